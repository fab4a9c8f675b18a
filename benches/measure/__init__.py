"""The measuring instrument: the function beside other ways of doing its work, and what it needs.

What the sections measure with:

- ``bench``           the servers, databases and contenders
- ``events``          SQS events as Lambda delivers them
- ``network``         a network of so many microseconds between a contender and PostgreSQL
- ``runtime``         Lambda's Runtime API, for a program as Lambda starts it
- ``secretsmanager``  a Secrets Manager over TLS that answers at once
- ``share``           the share of a core that a function of little memory has

The sections:

- ``batches``         the contenders, at batches of 1 to 7,400 messages
- ``columns``         what a column costs, under mappings of up to 40
- ``ledger``          what the ledger costs when it is long, and when it prunes itself
- ``profile``         where the function's CPU time goes
- ``cold``            from a process's start to its first request for an event
- ``footprint``       memory, the package's size, a small share of a core, and what metrics and logs cost
- ``environments``    many environments against one PostgreSQL

And ``report`` makes docs/performance.md and its plots of the results.

The programs that are measured are in benches/src/bin and benches/peers, and src/main.rs is the function itself.
"""

import site
import sysconfig

from world import paths

# What draws the plots is installed with the contenders. It comes after our own environment, which the same Python made.
site.addsitedir(sysconfig.get_path("purelib", vars={"base": str(paths.BENCH_VENV)}))
