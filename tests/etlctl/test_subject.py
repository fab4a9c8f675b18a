"""`etlctl subject`: a person's data found, exported and erased, on record."""

import json
import random
import stat
import threading
import time
import uuid
from datetime import date

import psycopg
import pytest
from driver import ONE_KEY
from queues import Queues
from world import delivery, messages

PERSON, ADDRESS, DEVICE = "zoe.quill@example.com", "198.51.100.77", "593-47-5928"
MASKED_SUBJECT = """
table = "visits"
retention_days = 30
[[column]]
name = "masked_mail"
from = "visitor.mail"
keep = "masked"
normalize = "lowercase"
subject = true
[[column]]
name = "page"
from = "page"
keep = "plain"
type = "text"
[[column]]
name = "visited_on"
value = "processing-date"
type = "date"
"""
SIV = {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}


class DeadLetters(Queues):
    """A dead-letter queue that messages can be put into; in a FIFO queue, all are in one group."""

    def bury(self, *bodies: str) -> None:
        fifo = self.dead_letter_queue_url.endswith(".fifo")
        for number, body in enumerate(bodies):
            group = {"MessageGroupId": "one", "MessageDeduplicationId": str(number)} if fifo else {}
            self.sqs.send_message(QueueUrl=self.dead_letter_queue_url, MessageBody=body, **group)

    def bodies(self) -> set[str]:
        received = delivery.receive_all(self, self.dead_letter_queue_url)
        for message in received:
            self.sqs.change_message_visibility(QueueUrl=self.dead_letter_queue_url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)
        return {message["Body"] for message in received}


@pytest.fixture
def dead(servers):
    dead = DeadLetters(servers)
    yield dead
    dead.delete()


@pytest.fixture
def ring(world):
    """The world with two keys, the newer one active."""
    world.put_keyring({"active": "new", "keys": {"": {"cipher": "aes-cbc", **ONE_KEY}, "new": SIV}})
    return world


def insert(world, user, ip=ADDRESS, key="new", count=1):
    with world.connect() as database:
        row = [user, world.masks("ip", ip)[key], world.masks("device_id", DEVICE)[key], date(2026, 11, 1)]
        database.execute(
            "insert into user_logins (user_id, device_type, masked_ip, masked_device_id, app_version, create_date)"
            " select %s, 'android', %s, %s, 230, %s from generate_series(1, %s)",
            [*row, count],
        )


def count(world, condition="true", table="user_logins"):
    with world.connect() as database:
        return database.execute(f"select count(*) from {table} where {condition}").fetchone()[0]


def audited(world, columns="action, reason, erased_rows, erased_messages"):
    with world.connect() as database:
        return database.execute(f"select {columns} from etl_audit order by id").fetchall()


def everything(world):
    """The content of all tables, as text."""
    with world.connect() as database:
        tables = database.execute("select oid::regclass::text from pg_class where relkind in ('r', 'p') and relnamespace = 'public'::regnamespace").fetchall()
        return "\n".join(str(row) for (table,) in tables for row in database.execute(f"select * from {table}").fetchall())


def partition_by_day(world, **partitions):
    """Makes the table of visits, with partitions given as the days since their begin and end."""
    with world.connect() as database:
        database.execute("create table visits (masked_mail varchar(256), page text, visited_on date) partition by range (visited_on)")
        for name, days in partitions.items():
            first, last = database.execute("select current_date - %s, current_date - %s", days).fetchone()
            database.execute(f"create table {name} partition of visits for values from ('{first}') to ('{last}')")


def body(**fields):
    return json.dumps(messages.login(random.Random(1), **fields))


# Found and exported.


def test_a_person_is_found_by_the_subject_and_by_masks_of_every_key(ring):
    insert(ring, PERSON, key="")
    insert(ring, PERSON)
    insert(ring, "other", ip="192.0.2.9")
    assert ring.json("subject", "find", PERSON)["row_count"] == 2
    assert ring.json("subject", "find", "-", input=f"{PERSON}\n")["row_count"] == 2
    assert ring.json("subject", "find", f"::ffff:{ADDRESS}", "--field", "ip")["row_count"] == 2
    assert ring.json("subject", "find", DEVICE, "--field", "device-id")["row_count"] == 3
    assert ring.json("subject", "find", "nobody")["row_count"] == 0


def test_an_export_has_every_row_and_without_a_reason_only_masks(ring, tmp_path):
    insert(ring, PERSON, count=3)
    insert(ring, "other")
    file = tmp_path / "export.jsonl"
    assert ring.json("subject", "export", PERSON, "--output", str(file)) == {"rows": 3, "recovered": 0, "lost": 0, "output": str(file)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["user_id"] for row in rows] == [PERSON] * 3 and "ip" not in rows[0]
    assert audited(ring) == []
    again = ring.run("subject", "export", PERSON, "--output", str(file))
    assert again.returncode == 3 and "cannot create" in again.stderr


def test_an_export_with_a_reason_recovers_and_is_recorded(ring, tmp_path):
    insert(ring, PERSON, key="")
    insert(ring, PERSON)
    file = tmp_path / "export.jsonl"
    ring.json("subject", "export", PERSON, "--output", str(file), "--reason", "Request 7")
    assert {(row["ip"], row["device_id"]) for row in map(json.loads, file.read_text().splitlines())} == {(ADDRESS, DEVICE)}
    assert audited(ring, "action, reason, source, requested, recovered, key_ids") == [
        ("export", "Request 7", "export of user_logins by user_id", 4, 4, ["", "new"])
    ]


# Erased.


def test_an_erasure_counts_unless_it_is_confirmed(ring, dead):
    insert(ring, PERSON, count=3)
    dead.bury(body(user_id=PERSON), body(user_id="other"))
    told = ring.run("subject", "erase", PERSON, "--reason", "Request 7", environment=dead.environment)
    assert (told.returncode, told.stderr) == (1, "") and "3 rows and 1 dead message would be erased" in told.stdout
    assert count(ring) == 3 and len(dead.bodies()) == 2 and audited(ring) == []


def test_an_erasure_deletes_only_the_persons_rows_and_dead_messages_and_is_recorded(ring, dead):
    insert(ring, PERSON, count=7)
    insert(ring, "other", count=2)
    kept = {body(user_id="other"), body(user_id=f"x{PERSON}"), "not JSON at all", body(user_id="other", locale=PERSON)}
    broken = body(user_id=PERSON)[:-1], json.dumps({"userId": PERSON}), json.dumps([f"mail to {PERSON}, please"])
    dead.bury(*kept, body(user_id=PERSON), *broken)
    with ring.connect() as database:
        database.execute("insert into etl_ledger values (now(), gen_random_uuid())")
    told = ring.run("subject", "erase", "-", "--reason", "Request 7", "--yes", "--batch", "3", input=PERSON, environment=dead.environment)
    # Messages that mention the person but lack the field are listed, and stay.
    assert (told.returncode, told.stderr) == (1, ""), told.stderr
    assert "7 rows erased, 1 dead message deleted; recorded in etl_audit." in told.stdout and "run this again" in told.stdout
    assert "3 dead messages have the value but not the field" in told.stdout
    assert count(ring) == 2 and dead.bodies() == {*kept, *broken} and count(ring, table="etl_ledger") == 1
    again = ring.json("subject", "erase", PERSON, "--reason", "Request 7", "--yes", "--mentions", environment=dead.environment)
    assert (again["rows"], again["messages"], again["mentions"]) == (0, 3, []) and dead.bodies() == kept
    records = audited(ring)
    assert {record[:2] for record in records} == {("erase", "Request 7")}
    assert [sum(number or 0 for number in numbers) for numbers in zip(*(record[2:] for record in records))] == [7, 4]
    assert PERSON not in everything(ring) + told.stdout
    # A further run erases nothing, and that is on record, too.
    again = ring.json("subject", "erase", PERSON, "--reason", "Request 7", "--yes", environment=dead.environment)
    assert (again["rows"], again["messages"]) == (0, 0) and audited(ring)[-1] == ("erase", "Request 7", 0, 0)


def test_all_of_a_persons_messages_in_a_fifo_group_are_deleted(servers, ring):
    dead = DeadLetters(servers, ".fifo")
    dead.bury(*(body(user_id=PERSON, locale=str(number)) for number in range(25)), body(user_id="other"))
    erased = ring.json("subject", "erase", PERSON, "--reason", "r", "--yes", environment=dead.environment)
    assert erased["messages"] == 25 and dead.bodies() == {body(user_id="other")}
    assert sum(messages or 0 for *_, messages in audited(ring)) == 25
    dead.delete()


def test_messages_that_another_run_has_hidden_are_reported(ring, dead):
    dead.bury(body(user_id=PERSON))
    hidden = dead.sqs.receive_message(QueueUrl=dead.dead_letter_queue_url, VisibilityTimeout=60)["Messages"]
    for words in ((), ("--yes",)):
        told = ring.run("subject", "erase", PERSON, "--reason", "r", *words, environment=dead.environment)
        assert told.returncode == 1 and f"{len(hidden)} dead message hidden" in told.stdout


def test_by_a_masked_field_rows_under_every_key_are_erased(ring, dead):
    for key in ("", "new"):
        insert(ring, PERSON, key=key)
        insert(ring, PERSON, ip="192.0.2.9", key=key)
    dead.bury(body(ip=f"::ffff:{ADDRESS}"), body(ip="192.0.2.9"))
    erased = ring.json("subject", "erase", ADDRESS, "--field", "ip", "--reason", "r", "--yes", environment=dead.environment)
    assert (erased["rows"], erased["messages"]) == (2, 1) and count(ring) == 2 and len(dead.bodies()) == 1


def test_a_masked_subject_is_found_exported_and_erased(empty_world, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT)
    world, chosen = empty_world, ("--mapping", str(tmp_path / "mapping.toml"))
    assert world.run("migrate", *chosen).returncode == 0
    mask = world.json("mask", *chosen, "--field", "visitor.mail", PERSON)[0]["mask"]
    with world.connect() as database:
        database.execute("insert into visits values (%s, '/', now()), (%s, '/b', now()), ('other', '/', now())", [mask, mask])
    assert world.json("subject", "find", PERSON.upper(), *chosen)["row_count"] == 2
    file = tmp_path / "export.jsonl"
    world.json("subject", "export", PERSON, *chosen, "--output", str(file), "--reason", "r")
    assert {json.loads(line)["visitor.mail"] for line in file.read_text().splitlines()} == {PERSON}
    assert world.json("subject", "erase", PERSON, *chosen, "--reason", "r", "--yes", status=1)["rows"] == 2
    assert count(world, table="visits") == 1


def test_partitions_by_another_column_lose_only_expired_rows(empty_world, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT)
    with empty_world.connect() as database:
        database.execute("create table visits (masked_mail varchar(256), page text, visited_on date) partition by range (page)")
        database.execute("create table pages partition of visits for values from ('2001-01-01') to ('2002-01-01')")
        database.execute("insert into visits select 'm', '2001-05-05', current_date - n from generate_series(28, 32) n")
    assert empty_world.run("migrate", "--mapping", str(tmp_path / "mapping.toml")).returncode == 0
    with empty_world.connect() as database:
        assert database.execute("select * from visits_expire(10)").fetchone() == (2, 0)
    assert count(empty_world, table="visits") == 3


def test_a_reader_of_one_partition_does_not_stop_others_from_being_dropped(empty_world, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT)
    partition_by_day(empty_world, oldest=(90, 60), old=(60, 40), young=(40, -9))
    assert empty_world.run("migrate", "--mapping", str(tmp_path / "mapping.toml")).returncode == 0
    with empty_world.connect() as database:
        with empty_world.locked("oldest", "access share"):
            assert database.execute("select * from visits_expire(10)").fetchone() == (0, 1)
        assert database.execute("select * from visits_expire(10)").fetchone() == (0, 1)
        assert database.execute("select count(*) from pg_inherits where inhparent = 'visits'::regclass").fetchone() == (1,)


def test_the_expiry_call_deletes_only_rows_past_retention(empty_world, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT)
    assert empty_world.run("migrate", "--mapping", str(tmp_path / "mapping.toml")).returncode == 0
    with empty_world.connect() as database:
        database.execute("insert into visits select 'm', '/', current_date - n from generate_series(25, 34) n")
        database.execute("set role login_etl")
        for statement in ("delete from visits", "select * from visits", "select visits_erase('masked_mail', '{}', 1, '', '', 0)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                database.execute(statement)
        assert database.execute("select * from visits_expire(3)").fetchone() == (3, 0)
        assert database.execute("select * from visits_expire(3)").fetchone() == (1, 0)
        assert database.execute("select * from visits_expire(3)").fetchone() == (0, 0)
    assert count(empty_world, "visited_on >= current_date - 30", table="visits") == 6 == count(empty_world, table="visits")


def test_partitions_past_retention_are_dropped_whole(empty_world, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT)
    partition_by_day(empty_world, gone=(60, 40), straddles=(40, 20), young=(20, -9))
    with empty_world.connect() as database:
        database.execute("create table rest partition of visits default")
        database.execute("insert into visits select 'm', '/', current_date - n from generate_series(0, 69) n")
    assert empty_world.run("migrate", "--mapping", str(tmp_path / "mapping.toml")).returncode == 0
    with empty_world.connect() as database:
        database.execute("set role login_etl")
        # Drops one partition, and deletes the rows of the same age from the default partition.
        assert database.execute("select * from visits_expire(1000)").fetchone() == (9, 1)
        assert database.execute("select * from visits_expire(1000)").fetchone() == (0, 0)
    assert count(empty_world, table="visits") == 41


# Roles and refusals.


def test_who_erases_can_neither_read_nor_recover_and_who_recovers_cannot_erase(ring, dead):
    insert(ring, PERSON, count=2)
    privacy = ring.user("login_etl_privacy")
    masked = ring.masks("ip", ADDRESS)["new"]
    for arguments, role in (
        (("subject", "find", PERSON), "login_etl_operator"),
        (("recover", "--field", "ip", "--reason", "r", masked), "login_etl_operator"),
    ):
        refused = ring.run(*arguments, environment=privacy)
        assert refused.returncode == 3 and "42501" in refused.stderr and role in refused.stderr
    with ring.connect() as database:
        database.execute("set role login_etl_operator")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            database.execute("select user_logins_erase('user_id', array['a'], 1, 'w', 'r', 0)")
        database.execute("reset role; set role login_etl_privacy")
        for statement in ("delete from user_logins", "select from etl_audit", "insert into etl_audit default values", "select from user_logins"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                database.execute(statement)
    # A plain subject needs no keyring.
    without = privacy | dead.environment | {"MASKING_SECRET_ID": None}
    assert ring.json("subject", "erase", PERSON, "--reason", "r", "--yes", environment=without)["rows"] == 2


def test_an_operator_who_erases_is_told_which_role_it_takes(ring):
    insert(ring, PERSON)
    refused = ring.run("subject", "erase", PERSON, "--reason", "r", "--yes", environment=ring.user("login_etl_operator"))
    assert refused.returncode == 3 and "needs the role login_etl_privacy" in refused.stderr
    assert count(ring) == 1


def test_a_temporary_table_of_the_same_name_is_not_taken_for_the_table(ring):
    insert(ring, PERSON)
    with ring.connect() as database:
        database.execute("grant temporary on database " + ring.name + " to public; set role login_etl_privacy")
        database.execute("create temporary table user_logins (user_id text)")
        assert database.execute("select user_logins_erase('user_id', %s, 10, 'w', 'r', null)", [[PERSON]]).fetchone() == (1,)
    assert count(ring) == 0


def test_an_operator_that_somebody_made_in_the_schema_is_not_used(ring):
    insert(ring, PERSON)
    with ring.connect() as database:
        database.execute("create function public.never(varchar, varchar) returns boolean language sql as 'select false'")
        database.execute("create operator public.= (leftarg = varchar, rightarg = varchar, function = public.never)")
    assert ring.json("subject", "erase", PERSON, "--reason", "r", "--yes", status=1)["rows"] == 1


@pytest.mark.parametrize(
    ("value", "words", "says"),
    [
        (PERSON, ("--reason", " "), "--reason is blank"),
        (PERSON, ("--reason", f"Request of {PERSON.upper()}"), "--reason contains the value"),
        ("", ("--reason", "r"), "the value is empty"),
    ],
)
def test_a_bad_reason_or_value_is_refused_before_anything_is_done(ring, value, words, says):
    insert(ring, PERSON)
    told = ring.run("subject", "erase", value, *words, "--yes")
    assert told.returncode == 2 and says in told.stderr and count(ring) == 1 and audited(ring) == []


def test_without_a_dead_letter_queue_it_says_so(ring):
    insert(ring, PERSON)
    erased = ring.json("subject", "erase", PERSON, "--reason", "r", "--yes", status=1)
    assert (erased["rows"], erased["messages"]) == (1, None) and audited(ring) == [("erase", "r", 1, None)]
    told = ring.run("subject", "erase", PERSON, "--reason", "r", "--yes")
    assert told.returncode == 1 and "Dead messages were not searched" in told.stdout and "recorded" not in told.stdout


def test_rows_that_a_trigger_keeps_end_the_run_with_an_error(ring, dead):
    insert(ring, PERSON)
    with ring.connect() as database:
        database.execute("create function keep() returns trigger language plpgsql as 'begin return null; end'")
        database.execute("create trigger keep before delete on user_logins for each row execute function keep()")
    told = ring.run("subject", "erase", PERSON, "--reason", "r", "--yes", environment=dead.environment)
    assert told.returncode == 3 and "1 row cannot be erased" in told.stderr


def test_a_value_that_the_column_cannot_hold_reaches_no_log(empty_world, servers, tmp_path):
    (tmp_path / "mapping.toml").write_text(MASKED_SUBJECT.replace('keep = "masked"', 'keep = "plain"').replace('normalize = "lowercase"', 'type = "bigint"'))
    chosen = ("--mapping", str(tmp_path / "mapping.toml"))
    assert empty_world.run("migrate", *chosen).returncode == 0
    value = f"{uuid.uuid4().hex}@example.com"
    for command in (("find",), ("erase", "--reason", "r")):
        told = empty_world.run("subject", command[0], value, *command[1:], *chosen)
        assert told.returncode == 3 and "is not of type bigint" in told.stderr
    assert value not in servers.postgres.log_file.read_text(errors="replace")


# Kills and redeliveries.


def test_a_killed_erasure_has_recorded_exactly_what_it_erased_and_finishes_when_run_again(ring, dead):
    insert(ring, PERSON, count=10_000)
    insert(ring, "other", count=500)
    erase = ("subject", "erase", PERSON, "--reason", "r", "--yes")
    chance = random.Random(7)
    left = [10_000]
    for number in range(50):
        with ring.start(*erase, "--batch", "2", environment=dead.environment) as process:
            # Kill some runs before they erase anything, and most while they erase, however slow the machine is.
            if number % 3:
                ring.until(lambda: count(ring, f"user_id = '{PERSON}'") < left[-1] or process.poll() is not None)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        # The server may still be executing the last batch.
        ring.until(lambda: not ring.sessions())
        left.append(count(ring, f"user_id = '{PERSON}'"))
        assert sum(rows for _, _, rows, _ in audited(ring)) == 10_000 - left[-1]
    assert len(set(left)) > 10, "kills came too early or too late to show anything"
    assert ring.run(*erase, environment=dead.environment).returncode == 0
    assert sum(rows for _, _, rows, _ in audited(ring)) == 10_000
    assert count(ring) == 500 == count(ring, "user_id = 'other'")


def test_no_redelivery_brings_back_what_was_erased_while_messages_flow(pipeline):
    person = f"{uuid.uuid4().hex}@example.com"
    logins = [body(user_id=person if number % 2 else f"other-{number}") for number in range(60)]
    delivery.send(pipeline, logins)
    received = delivery.receive_all(pipeline, pipeline.queue_url)
    stop = threading.Event()

    def redeliver():
        while not stop.is_set():
            assert pipeline.invoke(received) == set()

    erase = ("subject", "erase", person, "--reason", "r", "--yes", "--batch", "7")
    deliverer = threading.Thread(target=redeliver)
    deliverer.start()
    try:
        pipeline.until(lambda: count(pipeline, f"user_id = '{person}'"))
        while count(pipeline, f"user_id = '{person}'"):
            pipeline.json(*erase)
    finally:
        stop.set()
        deliverer.join()
    assert pipeline.invoke(received) == set()
    assert count(pipeline, f"user_id = '{person}'") == 0 and count(pipeline, "user_id like 'other-%'") == 30
    assert sum(rows or 0 for _, _, rows, _ in audited(pipeline)) == 30
    assert person not in everything(pipeline)
    logs = pipeline.localstack.client("logs").filter_log_events(logGroupName=f"/aws/lambda/{pipeline.name}")["events"]
    assert logs and person not in str(logs)
    assert person not in pipeline.servers.postgres.log_file.read_text(errors="replace")
