"""The soak test: sends messages through the local world while everything in it breaks, and accounts for every message at the end.

- ``load``         the messages, and the expected result of each
- ``visits``       the second mapping, and its messages
- ``proxy``        the network between the function and PostgreSQL
- ``memory``       queues in memory, for a storm
- ``environment``  further execution environments, under Lambda's contract
- ``pollers``      hand the queues' messages to these environments
- ``faults``       the faults and their schedule
- ``run``          one run: deploys, sends, waits until the queues are empty
- ``checker``      compares the sent messages with the tables, the dead-letter queues and the logs
- ``rehearsal``    proves, in every run, that the checker finds each kind of damage
"""
