"""Proves, in every run, that the checker finds each kind of damage: damages the run's own result, runs the checker, and undoes the damage."""

from collections.abc import Callable
from dataclasses import replace

import psycopg

from world.soak import checker
from world.soak.checker import Evidence
from world.soak.visits import TABLE as VISITS

ONE = "ctid = (select min(ctid) from user_logins where user_id like 'canary-0%')"
ONE_VISIT = f"ctid = (select min(ctid) from {VISITS})"
# The expected finding, and the damage to the tables, which a rollback undoes.
TO_TABLES = (
    ("rows lost", f"delete from user_logins where {ONE}"),
    ("rows doubled", f"insert into user_logins select * from user_logins where {ONE}"),
    ("rows that nobody may have written", "insert into user_logins (user_id, masked_ip) values ('canary-bad', '')"),
    ("masks wrong", f"update user_logins set masked_ip = masked_device_id where {ONE}"),
    ("other columns wrong", f"update user_logins set app_version = app_version + 1 where {ONE}"),
    ("personal values in a table", f"update user_logins set locale = 'canary' where {ONE}"),
    # A row that is updated now is committed later than its successors.
    ("order broken in a FIFO group", "update user_logins set locale = locale where user_id like 'canary-blocked000-000000%'"),
    ("ledger entries lost", "delete from etl_ledger where ctid = (select min(ctid) from etl_ledger)"),
    ("ledger entries doubled or of messages that are no rows", "insert into etl_ledger values (now(), '00000000-0000-4000-8000-000000000000')"),
    ("rows lost", f"delete from {VISITS} where {ONE_VISIT}"),
    ("rows doubled", f"insert into {VISITS} select * from {VISITS} where {ONE_VISIT}"),
    ("masks wrong", f"update {VISITS} set masked_phone = masked_ip where {ONE_VISIT}"),
    ("other columns wrong", f"update {VISITS} set ratio = ratio + 1 where {ONE_VISIT}"),
)
# The expected finding, and the damage to the other evidence.
TO_EVIDENCE: dict[str, Callable[[Evidence], Evidence]] = {
    "good messages dead-lettered": lambda seen: replace(seen, dead=[*seen.dead, next(key for key, sent in seen.sent.items() if sent.good)]),
    "bad messages lost": lambda seen: replace(seen, dead=seen.dead[1:]),
    "dead letters doubled or unknown": lambda seen: replace(seen, dead=seen.dead + seen.dead[:1]),
    "messages left in a queue": lambda seen: replace(seen, left=1),
    "malformed answers": lambda seen: replace(seen, malformed=1),
    "masks under a key long retired": lambda seen: replace(seen, rotations=[("next", 0.0)]),
    "personal values in a log": lambda seen: replace(seen, logs={"log": b'{"message":"failed","body":"198.18.0.7"}'}),
    "keys or passwords in a log": lambda seen: replace(seen, logs={"log": seen.secrets[0].encode()}),
    "panics": lambda seen: replace(seen, logs={"log": b'{"message":"panicked"}'}),
}


def blind_spots(evidence: Evidence, database: psycopg.Connection) -> list[str]:
    """The kinds of damage to a clean result that the checker does not find; there is at least one damage for each kind of finding."""
    missed = [*({finding.name for finding in checker.check(evidence, database)} ^ ({name for name, _ in TO_TABLES} | TO_EVIDENCE.keys()))]
    for name, damage in TO_TABLES:
        with database.transaction(force_rollback=True):
            database.execute(damage)
            missed += unnoticed(name, evidence, database)
    for name, damaged in TO_EVIDENCE.items():
        missed += unnoticed(name, damaged(evidence), database)
    return missed


def unnoticed(name: str, evidence: Evidence, database: psycopg.Connection) -> list[str]:
    return [] if any(finding.count for finding in checker.check(evidence, database) if finding.name == name) else [name]
