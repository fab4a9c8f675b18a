"""The attack: messages through the whole local world while everything in it breaks, and an account of every one of them at the end.

- ``load``         what is sent, and what is to become of each message
- ``visits``       the second mapping, and its messages
- ``proxy``        the network between the function and PostgreSQL
- ``memory``       queues in memory, for a storm
- ``environment``  execution environments beyond the emulator's, under Lambda's contract
- ``pollers``      what hands the queues' messages to them
- ``faults``       what breaks, and when
- ``run``          puts these together: deploys, sends, waits until all is settled
- ``checker``      compares what was sent with what stands in the tables, the dead-letter queues and the logs
- ``rehearsal``    shows, in every run, that the checker can find what it looks for
"""
