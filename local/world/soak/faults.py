"""The faults, and their schedule from a seed, run by one thread for each part of the world."""

import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import psycopg

from world.servers import DATABASE_USER, Servers
from world.soak.pollers import Redeliveries
from world.soak.proxy import Proxy
from world.soak.visits import TABLE as VISITS
from world.stack import Stack

# How long a fault is retried that found nothing to break, because no connection was open or no statement was sent.
PATIENCE_SECONDS = 10
# How far the load may run ahead of the faults, in faults.
AHEAD = 3


@dataclass(frozen=True)
class Fault:
    kind: str
    # When to begin, as a share of the attack's duration.
    at: float
    seed: int


@dataclass
class Targets:
    """The parts of the world that faults break."""

    servers: Servers
    stack: Stack
    # The client of the queues.
    sqs: object
    # The networks to PostgreSQL and to Secrets Manager.
    proxy: Proxy
    aws_proxy: Proxy
    redeliveries: Redeliveries
    queue_urls: list[str]
    visibility_seconds: int
    # Every password and the keyring with every key of the run; none of them may be in a log.
    passwords: list[str] = field(default_factory=list)
    ring: dict = field(default_factory=dict)
    # Key id and time (seconds since the epoch) of each rotation.
    rotations: list[tuple[str, float]] = field(default_factory=list)

    def admin(self, **options) -> psycopg.Connection:
        return self.servers.postgres.connect(autocommit=True, **options)

    def functions(self) -> list[psutil.Process]:
        """The function's processes, in LocalStack's environments and in ours."""
        with suppress(psutil.NoSuchProcess):
            return [process for process in psutil.Process().children(recursive=True) if process.name() == "bootstrap"]
        return []


# Each fault returns whether it broke anything.


def cut_with_reset(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.cut(reset=True) > 0


def cut_in_order(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.cut(reset=False) > 0


def refuse_connections(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.refuse(chance.uniform(0.2, 2)) > 0


def delay(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.delay(chance.uniform(1, 3), each=chance.choice((0.05, 0.2, 0.8))) > 0


def stall(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.stall(chance.uniform(0.1, 3)) > 0


def cut_after_commit(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.spring("unheard", PATIENCE_SECONDS / 2)


def stall_after_commit(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.spring("silenced", PATIENCE_SECONDS / 2)


def tear_statement(targets: Targets, chance: random.Random) -> bool:
    return targets.proxy.spring("torn", PATIENCE_SECONDS / 2)


def crash_postgres(targets: Targets, chance: random.Random) -> bool:
    targets.servers.postgres.restart("immediate")
    return True


def restart_postgres(targets: Targets, chance: random.Random) -> bool:
    targets.servers.postgres.restart("fast")
    return True


def terminate_backends(targets: Targets, chance: random.Random) -> bool:
    with targets.admin() as admin:
        return admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [DATABASE_USER]).rowcount > 0


def lock_table(targets: Targets, chance: random.Random) -> bool:
    """Sometimes for longer than an invocation's timeout."""
    table = chance.choice(("user_logins", "etl_ledger"))
    with targets.admin() as admin, admin.transaction():
        admin.execute(f"lock table {table} in access exclusive mode")
        return wait_for_waiting(targets, chance.uniform(0.5, 4.5)) > 0


def cancel_statements(targets: Targets, chance: random.Random) -> bool:
    """Cancels statements that wait for a lock, because others are too short to catch."""
    with targets.admin() as admin, admin.transaction():
        admin.execute("lock table user_logins in access exclusive mode")
        wait_for_waiting(targets, 1)
        with targets.admin() as other:
            query = "select pg_cancel_backend(pid) from pg_stat_activity where usename = %s and wait_event_type = 'Lock'"
            return other.execute(query, [DATABASE_USER]).rowcount > 0


def wait_for_waiting(targets: Targets, seconds: float) -> int:
    """The number of statements that wait for a lock after `seconds`."""
    time.sleep(seconds)
    with targets.admin() as admin:
        query = "select count(*) from pg_stat_activity where usename = %s and wait_event_type = 'Lock'"
        return admin.execute(query, [DATABASE_USER]).fetchone()[0]


def make_read_only(targets: Targets, chance: random.Random) -> bool:
    """Makes the database read-only, like a standby after a failover."""
    return alter_role_for_a_while(targets, chance, "set default_transaction_read_only = on", "reset default_transaction_read_only")


def exhaust_connections(targets: Targets, chance: random.Random) -> bool:
    return alter_role_for_a_while(targets, chance, "connection limit 0", "connection limit -1")


def alter_role_for_a_while(targets: Targets, chance: random.Random, change: str, back: str) -> bool:
    with targets.admin() as admin:
        admin.execute(f"alter role {DATABASE_USER} {change}")
        try:
            terminate_backends(targets, chance)
            time.sleep(chance.uniform(0.2, 2))
        finally:
            admin.execute(f"alter role {DATABASE_USER} {back}")
        terminate_backends(targets, chance)
    return True


def demand_a_column(targets: Targets, chance: random.Random) -> bool:
    """Adds a column that is not null and that nobody fills, so that no row can be written for a while."""
    demand = "alter table user_logins add column demanded text not null default ''; alter table user_logins alter demanded drop default"
    return alter_table_for_a_while(targets, chance, demand, "alter table user_logins drop column if exists demanded")


def refuse_by_trigger(targets: Targets, chance: random.Random) -> bool:
    """For a while, a trigger raises an exception for some of the users."""
    refuse = """create or replace function refuse() returns trigger language plpgsql as $$
        begin if new.user_id ~ '[0-3]$' then raise exception 'not now'; end if; return new; end $$;
        create trigger refuse before insert on user_logins for each row execute function refuse()"""
    return alter_table_for_a_while(targets, chance, refuse, "drop trigger if exists refuse on user_logins")


def detach_partition(targets: Targets, chance: random.Random) -> bool:
    """For a while, the second mapping's rows have no partition."""
    detach = f"alter table {VISITS} detach partition {VISITS}_all"
    return alter_table_for_a_while(targets, chance, detach, f"alter table {VISITS} attach partition {VISITS}_all default")


def alter_table_for_a_while(targets: Targets, chance: random.Random, change: str, back: str) -> bool:
    with targets.admin() as admin:
        admin.execute(change)
    try:
        time.sleep(chance.uniform(0.5, 3))
    finally:
        with targets.admin() as admin:
            admin.execute(back)
    return True


def rotate_password(targets: Targets, chance: random.Random) -> bool:
    """Rotates like a single-user rotation: for a moment the secret and the server disagree. Ends all connections, so that clients must log in again."""
    password = secrets.token_urlsafe(24)
    targets.passwords.append(password)
    secret = json.dumps({"username": DATABASE_USER, "password": password})

    def store() -> None:
        targets.stack.localstack.client("secretsmanager").put_secret_value(SecretId=targets.servers.database_secret_arn, SecretString=secret)

    with targets.admin() as admin:

        def alter() -> None:
            admin.execute(psycopg.sql.SQL("alter role {} password {}").format(psycopg.sql.Identifier(DATABASE_USER), password))

        steps = [store, alter]
        chance.shuffle(steps)
        steps[0]()
        terminate_backends(targets, chance)
        time.sleep(chance.uniform(0, 1))
        steps[1]()
    return True


def rotate_keyring(targets: Targets, chance: random.Random) -> bool:
    """Adds a new active key, of any cipher and length; the old keys stay for their masks."""
    key_id = f"soak-{len(targets.ring['keys'])}"
    cipher, digits, iv = chance.choice((("aes-cbc", 32, 1), ("aes-cbc", 48, 0), ("aes-cbc", 64, 1), ("aes-siv", 64, 0), ("aes-siv", 128, 0)))
    key = {"cipher": cipher, "key": secrets.token_hex(digits // 2)} | ({"iv": secrets.token_hex(16)} if iv else {})
    targets.ring |= {"active": key_id, "keys": targets.ring["keys"] | {key_id: key}}
    secret = json.dumps(targets.ring)
    targets.stack.localstack.client("secretsmanager").put_secret_value(SecretId=targets.stack.masking_secret_arn, SecretString=secret)
    targets.rotations.append((key_id, time.time()))
    return True


def kill_function(targets: Targets, chance: random.Random) -> bool:
    with suppress(IndexError, psutil.NoSuchProcess):
        chance.choice(targets.functions()).kill()
        return True
    return False


def freeze_function(targets: Targets, chance: random.Random) -> bool:
    with suppress(IndexError, psutil.NoSuchProcess):
        process = chance.choice(targets.functions())
        process.suspend()
        time.sleep(chance.uniform(0.2, 4))
        with suppress(psutil.NoSuchProcess):
            process.resume()
        return True
    return False


def refuse_secrets(targets: Targets, chance: random.Random) -> bool:
    """Refuses connections to Secrets Manager while an environment starts and the others read the keyring again."""
    kill_function(targets, chance)
    targets.aws_proxy.refuse(chance.uniform(0.5, 4))
    return True


def silence_secrets(targets: Targets, chance: random.Random) -> bool:
    kill_function(targets, chance)
    targets.aws_proxy.stall(chance.uniform(0.5, 3))
    return True


def shorten_visibility(targets: Targets, chance: random.Random) -> bool:
    """For a while, messages become visible again while they are still being handled."""
    for queue_url in targets.queue_urls:
        targets.sqs.set_queue_attributes(QueueUrl=queue_url, Attributes={"VisibilityTimeout": "1"})
    time.sleep(chance.uniform(1, 3))
    for queue_url in targets.queue_urls:
        targets.sqs.set_queue_attributes(QueueUrl=queue_url, Attributes={"VisibilityTimeout": str(targets.visibility_seconds)})
    return True


def redelivery(kind: str) -> Callable[[Targets, random.Random], bool]:
    return lambda targets, chance: targets.redeliveries.cause(kind, PATIENCE_SECONDS / 2)


# One thread per lane: faults that must not overlap are in the same lane, and lanes run in parallel. The number is a kind's weight.
LANES: list[dict[str, tuple[int, Callable[[Targets, random.Random], bool]]]] = [
    {
        "connections cut (RST)": (2, cut_with_reset),
        "connections cut (FIN)": (2, cut_in_order),
        "connections refused": (1, refuse_connections),
        "network slow": (1, delay),
        "network silent (half-open)": (2, stall),
        "cut after the commit": (4, cut_after_commit),
        "silent after the commit": (2, stall_after_commit),
        "statement cut in two": (2, tear_statement),
    },
    {
        "PostgreSQL crashed": (2, crash_postgres),
        "PostgreSQL restarted": (1, restart_postgres),
        "backends terminated": (2, terminate_backends),
        "table locked": (2, lock_table),
        "statements cancelled": (1, cancel_statements),
        "database read-only": (1, make_read_only),
        "no connections left": (1, exhaust_connections),
        "password rotated": (2, rotate_password),
        "keyring rotated": (1, rotate_keyring),
        "a required column added": (1, demand_a_column),
        "some users refused": (1, refuse_by_trigger),
        "partition missing": (1, detach_partition),
    },
    {
        "function killed": (5, kill_function),
        "function frozen": (2, freeze_function),
        "Secrets Manager unreachable": (1, refuse_secrets),
        "Secrets Manager silent": (1, silence_secrets),
        "visibility timeout too short": (1, shorten_visibility),
        **{kind: (3, redelivery(kind)) for kind in Redeliveries.KINDS},
    },
]


def plan(count: int, seed: int) -> list[list[Fault]]:
    """Each lane's faults in order of their beginning, with kinds in proportion to their weights. The same seed gives the same plan."""
    chance = random.Random(seed)
    lanes = []
    for number, lane in enumerate(LANES):
        share = count // len(LANES) + (number < count % len(LANES))
        once = [kind for kind, (weight, _) in lane.items() for _ in range(weight)]
        # Every kind occurs once before any is repeated.
        kinds = list(lane)[:share]
        while len(kinds) < share:
            kinds += chance.sample(once, min(len(once), share - len(kinds)))
        chance.shuffle(kinds)
        lanes.append([Fault(kind, (index + chance.random()) / share, chance.getrandbits(32)) for index, kind in enumerate(kinds)])
    return lanes


class Attack:
    """Owns the lanes' threads, as a context manager, and knows their progress."""

    def __init__(self, targets: Targets, schedule: list[list[Fault]], seconds: float):
        self._targets, self._schedule, self._seconds = targets, schedule, seconds
        self._count = sum(map(len, schedule))
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._error: BaseException | None = None

    def __enter__(self) -> "Attack":
        self.started = self._last = time.monotonic()
        lanes = zip(self._schedule, LANES, strict=True)
        self._threads = [threading.Thread(target=self._run, args=lane, daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        # Lets a running fault finish: it may be starting a server.
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    @property
    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def progress(self) -> float:
        """From 0 to 1. While a fault waits for traffic, the progress runs ahead by at most `AHEAD` faults, so that messages keep coming."""
        if self.over:
            return 1.0
        with self._lock:
            since = (time.monotonic() - self._last) / self._seconds * self._count
            return min(1.0, (self.done.total() + self.missed.total() + min(AHEAD, since)) / self._count)

    def check(self) -> None:
        """Raises the error that ended a lane, if any."""
        if self._error:
            raise self._error

    def _run(self, faults: list[Fault], actions: dict) -> None:
        try:
            for fault in faults:
                self._stopping.wait(max(0.0, self.started + fault.at * self._seconds - time.monotonic()))
                if self._stopping.is_set():
                    return
                hit = self._inject(actions[fault.kind][1], random.Random(fault.seed))
                with self._lock:
                    (self.done if hit else self.missed)[fault.kind] += 1
                    self._last = time.monotonic()
        except BaseException as error:
            self._error = error

    def _inject(self, action: Callable[[Targets, random.Random], bool], chance: random.Random) -> bool:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (hit := action(self._targets, chance)) and time.monotonic() < deadline and not self._stopping.is_set():
            time.sleep(0.05)
        return hit
