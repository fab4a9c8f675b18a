"""Five incidents, played on the real local world, with the dashboard that somebody would see.

- ``plays``      the incidents: what breaks, what is looked at, what is done about it
- ``scene``      one incident's stage: a stack of its own, its traffic, what was done when, and the account of every message
- ``samples``    what CloudWatch would have been sent, from the function's log and the queues
- ``ticker``     what goes on beside it, the traffic and the watching
- ``alarms``     the template's alarms over these samples, by CloudWatch's rules
- ``insights``   the dashboard's log queries over the function's log
- ``dashboard``  the template's dashboard as one picture
- ``page``       what the runbook shows of an incident

A minute of CloudWatch's is played in two seconds. All times shown are played ones, from noon.
"""
