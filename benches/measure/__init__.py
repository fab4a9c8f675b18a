"""The benchmark: compares the function with other ways of doing its work, and measures the resources it needs.

Tools of the sections:

- ``bench``           the servers, databases and contenders
- ``events``          SQS events as Lambda delivers them
- ``network``         a proxy that adds network latency between a contender and PostgreSQL
- ``runtime``         Lambda's Runtime API, for a program started as Lambda starts it
- ``secretsmanager``  a Secrets Manager over TLS that answers at once
- ``share``           the share of a core that Lambda gives a function with little memory

The sections:

- ``batches``         the contenders, at batches of 1 to 7,400 messages
- ``columns``         what a column costs, in mappings of up to 40
- ``ledger``          what a long ledger costs, and what pruning costs
- ``profile``         where the function's CPU time goes
- ``cold``            cold starts: from a process's start to its first request for an event
- ``footprint``       memory, the package's size, a small share of a core, and what metrics and logs cost
- ``environments``    many environments against one PostgreSQL

``report`` writes docs/performance.md and its plots from the results.

The measured programs are in benches/src/bin and benches/peers; the function itself is src/main.rs.
"""

import site
import sysconfig

from world import paths

# matplotlib is installed in the contenders' environment. It comes after our own on the path; the same Python made both.
site.addsitedir(sysconfig.get_path("purelib", vars={"base": str(paths.BENCH_VENV)}))
