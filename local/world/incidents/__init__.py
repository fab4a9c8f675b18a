"""Plays five incidents on the local world, and draws the dashboard that an engineer would see.

- ``plays``      the incidents: the fault, the diagnosis and the remedy
- ``scene``      runs one incident: its stack, its traffic, its timeline, and the account of every message
- ``samples``    the metrics that CloudWatch would get, from the function's log and the queues
- ``ticker``     repeats an action in a thread, for the traffic and the polling
- ``alarms``     the template's alarms over these samples, by CloudWatch's rules
- ``insights``   the dashboard's log queries over the function's log
- ``dashboard``  the template's dashboard as one picture
- ``page``       an incident's part of the runbook

A CloudWatch minute is played in two seconds. All times shown are played times, from noon.
"""
