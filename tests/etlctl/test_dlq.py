"""`etlctl dlq`: dead messages listed, explained, shown, redriven and purged, with the deployed function."""

import json
import random
import re
import uuid
from collections import Counter
from contextlib import contextmanager
from datetime import datetime

import pytest
from driver import Terminal
from queues import Queues, Wiretap
from world import delivery, messages

CANARY = "canary-8c1f"


def login(**fields):
    """A body with a canary in every field that can hold one."""
    made_up = {"user_id": f"{CANARY}-{uuid.uuid4()}", "ip": CANARY, "device_id": CANARY, "locale": CANARY}
    return json.dumps(messages.login(random.Random(1), **made_up | fields))


def user(body):
    return json.loads(body)["user_id"]


class DeadLetters(Queues):
    """Queues whose messages die at their second receive."""

    def __init__(self, pipeline, kind=""):
        super().__init__(pipeline.servers, kind, receives=1)
        self.pipeline = pipeline

    def bury(self, *bodies):
        """Sends messages, and receives until all waiting messages are dead; returns the sent bodies by message id."""
        sent = delivery.send(self, list(bodies))
        while self.sqs.receive_message(QueueUrl=self.queue_url, MaxNumberOfMessages=10, VisibilityTimeout=0).get("Messages"):
            pass
        return sent

    def in_sight(self, url=None):
        """The bodies of the visible messages, by message id."""
        received = delivery.receive_all(self, url or self.dead_letter_queue_url)
        self.show_again(received, url)
        return {message["MessageId"]: message["Body"] for message in received}

    def show_again(self, received, url=None):
        for message in received:
            handle = message["ReceiptHandle"]
            self.sqs.change_message_visibility(QueueUrl=url or self.dead_letter_queue_url, ReceiptHandle=handle, VisibilityTimeout=0)

    def run(self, *arguments, **options):
        return self.pipeline.run("dlq", *arguments, **self.with_environment(options))

    def json(self, *arguments, **options):
        return self.pipeline.json("dlq", *arguments, **self.with_environment(options))

    def with_environment(self, options):
        return options | {"environment": self.environment | options.get("environment", {})}

    def rows(self, bodies):
        """The number of rows of each body."""
        with self.pipeline.connect() as database:
            query = "select user_id from user_logins where user_id = any(%s)"
            rows = Counter(row[0] for row in database.execute(query, [[user(body) for body in bodies]]))
        return [rows[user(body)] for body in bodies]


@pytest.fixture
def dead(pipeline):
    dead = DeadLetters(pipeline)
    yield dead
    dead.delete()


@contextmanager
def refusing(pipeline, body):
    """Has the database refuse this login's row."""
    with pipeline.connect() as database:
        database.execute(f"alter table user_logins add constraint no_canary check (user_id <> '{user(body)}')")
        try:
            yield
        finally:
            database.execute("alter table user_logins drop constraint no_canary")


BAD = {
    **{f"not JSON: {CANARY} {number}": "body is not JSON" for number in range(20)},
    **{login(ip=[CANARY, number]): "ip is not a string" for number in range(12)},
    messages.WRONG_TYPE: "user_id is missing",
}
REFUSED = 'refused by the database: SQLSTATE 23514, constraint "no_canary", table public.user_logins'
UNKNOWN = "nothing in the log: its batches failed or timed out"


class Graveyard(DeadLetters):
    """Thirty-five dead messages. Two are valid: the database refused one, and the log has nothing about the other."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        refused, unknown = login(), login()
        (refused_id,) = delivery.send(self, [refused])
        received = delivery.receive_all(self, self.queue_url)
        with refusing(pipeline, refused):
            assert pipeline.invoke(received) == {refused_id}
        pipeline.logged(refused_id)
        bad = self.bury(*BAD)
        (unknown_id,) = self.bury(unknown)
        # The refused message was sent first, and dies last.
        self.show_again(received, self.queue_url)
        self.bury()
        self.bodies = {refused_id: refused, unknown_id: unknown} | bad
        self.why = {refused_id: REFUSED, unknown_id: UNKNOWN} | {message_id: BAD[body] for message_id, body in bad.items()}
        self.valid = {refused_id, unknown_id}


@pytest.fixture(scope="module")
def graveyard(pipeline):
    graveyard = Graveyard(pipeline)
    yield graveyard
    graveyard.delete()


LOOKS = ("list", "list --json", "explain", "explain --json")


@pytest.fixture(scope="module")
def looks(graveyard):
    """The output of each command for the thirty-five messages."""
    return {look: graveyard.run(*look.split()).stdout for look in LOOKS}


def test_all_dead_messages_are_listed_oldest_first_each_with_its_reason(graveyard, looks):
    listed = json.loads(looks["list --json"])
    assert len(listed) == len(graveyard.bodies) == 35
    valid = dict.fromkeys(graveyard.valid)
    assert {message["message_id"]: message["reason"] for message in listed} == graveyard.why | valid
    assert {message["message_id"] for message in listed if message["valid"]} == graveyard.valid
    assert all(message["bytes"] == len(graveyard.bodies[message["message_id"]]) for message in listed)
    times = [datetime.fromisoformat(message["sent_at"]) for message in listed]
    assert times == sorted(times)


def test_how_often_a_message_was_received_is_a_number(looks):
    assert {type(message["receives"]) for message in json.loads(looks["list --json"])} == {int}


def test_the_list_is_a_table_that_ends_with_the_total(graveyard, looks):
    heading, *rows, empty, total = looks["list"].splitlines()
    assert (re.split("  +", heading), empty, total) == (["message", "sent (UTC)", "bytes", "reason"], "", "35 messages")
    why = graveyard.why | dict.fromkeys(graveyard.valid, "valid now")
    expected = {message_id: [str(len(body)), why[message_id]] for message_id, body in graveyard.bodies.items()}
    assert {row[0]: row[2:] for row in (re.split("  +", row) for row in rows)} == expected


def test_explain_groups_by_the_functions_reason_and_by_its_log_for_valid_messages(graveyard, looks):
    groups = json.loads(looks["explain --json"])
    assert {group["why"]: group["messages"] for group in groups} == Counter(graveyard.why.values())
    assert [group["messages"] for group in groups] == sorted((group["messages"] for group in groups), reverse=True)
    sent_at = {message["message_id"]: message["sent_at"] for message in json.loads(looks["list --json"])}
    for group in groups:
        assert {graveyard.why[message_id] for message_id in group["message_ids"]} == {group["why"]}
        assert group["valid"] == (group["why"] in (REFUSED, UNKNOWN))
        times = sorted((sent_at[message_id] for message_id in group["message_ids"]), key=datetime.fromisoformat)
        assert (group["first_sent_at"], group["last_sent_at"]) == (times[0], times[-1])


def test_explain_is_a_table_that_says_how_to_load_valid_messages(graveyard, looks):
    heading, *rows, empty, total, valid = looks["explain"].splitlines()
    assert re.split("  +", heading) == ["messages", "now", "why", "first sent", "last sent", "for example"]
    expected = {why: [str(number), "valid" if why in (REFUSED, UNKNOWN) else "invalid"] for why, number in Counter(graveyard.why.values()).items()}
    assert {row[2]: row[:2] for row in (re.split("  +", row) for row in rows)} == expected
    assert (empty, total) == ("", "35 messages")
    assert valid == "2 messages valid now: `etlctl dlq redrive --fixed` loads them."


def test_explain_claims_nothing_about_a_log_that_it_cannot_read(graveyard):
    explained = graveyard.run("explain", environment={"FUNCTION_NAME": "none-of-ours"})
    assert "nothing in the log" not in explained.stdout
    assert "none-of-ours" in explained.stdout + explained.stderr


@pytest.mark.parametrize("look", LOOKS)
def test_list_and_explain_show_no_value(looks, look):
    assert looks[look]
    assert CANARY not in looks[look]


@pytest.mark.parametrize("command", ["list", "explain", "show"])
def test_messages_that_were_looked_at_stay_visible(graveyard, command):
    looked = graveyard.run(command, *(list(graveyard.bodies)[:1] if command == "show" else []))
    assert looked.returncode == 0
    assert graveyard.in_sight() == graveyard.bodies


def test_a_limit_bounds_the_list_which_says_that_there_is_more(graveyard):
    *rows, empty, total = graveyard.run("list", "--limit", "3").stdout.splitlines()[1:]
    assert (len(rows), empty, total) == (3, "", "3 of about 35 messages read; --limit reads more")


def test_show_gives_the_kind_of_each_value_but_not_the_value(dead):
    body = login(user_id=None, app_version=7, ip=[CANARY, CANARY], device_id={CANARY: CANARY}, **{CANARY: CANARY, "another": 1})
    (message_id,) = dead.bury(body)
    shown = dead.json("show", message_id)
    assert shown.pop("sent_at")
    assert shown == {
        "message_id": message_id,
        "bytes": len(body),
        "valid": False,
        "reason": "user_id is missing",
        "body_shape": [
            {"field": "user_id", "is": "null"},
            {"field": "device_type", "is": f"text of {len(json.loads(body)['device_type'])} characters"},
            {"field": "ip", "is": "a list of 2"},
            {"field": "device_id", "is": "an object of 1"},
            {"field": "locale", "is": f"text of {len(CANARY)} characters"},
            {"field": "app_version", "is": "a number"},
            {"field": "others", "is": "2 fields"},
        ],
    }
    text = dead.run("show", message_id).stdout
    assert CANARY not in json.dumps(shown) + text
    assert re.search(r"^reason +user_id is missing$", text, re.MULTILINE)
    assert re.search(r"^ +ip +a list of 2$", text, re.MULTILINE)


def test_a_body_is_revealed_for_a_reason_that_is_recorded_and_cannot_steer_the_terminal(dead):
    # A terminal command that starts with a one-character CSI, and a character that reverses text.
    body = f"first {CANARY} \x9b31m\nsecond \u202e{CANARY}"
    (message_id,) = dead.bury(body)
    shown = dead.run("show", message_id, "--reveal", "--reason", "Ticket 12")
    assert shown.stdout.endswith(f"\n\nfirst {CANARY} \\u{{9b}}31m\nsecond \\u{{202e}}{CANARY}\n")
    assert dead.json("show", message_id, "--reveal", "--reason", "Ticket 13")["body"] == body
    with dead.pipeline.connect() as database:
        query = "select action, reason, requested, recovered, masks from etl_audit where source like %s order by id"
        audit = database.execute(query, [f"%{message_id}%"]).fetchall()
    assert audit == [("reveal", f"Ticket {number}", 1, 1, []) for number in (12, 13)]


@pytest.mark.parametrize("reason", [[], ["--reason", " "]], ids=["none", "blank"])
def test_nothing_is_revealed_without_a_reason(graveyard, reason):
    shown = graveyard.run("show", next(iter(graveyard.bodies)), "--reveal", *reason)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "--reason" in shown.stderr


def test_nothing_is_revealed_that_cannot_be_recorded(graveyard):
    with graveyard.pipeline.without("etl_audit"):
        shown = graveyard.run("show", next(iter(graveyard.bodies)), "--reveal", "--reason", "Ticket 12")
    assert (shown.returncode, shown.stdout) == (3, "")
    assert "cannot record this in etl_audit, so nothing is shown" in shown.stderr
    assert CANARY not in shown.stderr


def test_a_message_that_is_not_there_cannot_be_shown(graveyard):
    shown = graveyard.run("show", str(uuid.UUID(int=0)))
    assert (shown.returncode, shown.stdout) == (3, "")
    assert str(uuid.UUID(int=0)) in shown.stderr


def test_an_empty_queue_is_good_news(dead):
    for command in ("list", "explain"):
        assert dead.run(command).stdout == "No dead messages.\n"
        assert dead.json(command) == []
    assert dead.json("redrive", "--yes") == {"moved": 0}
    assert dead.json("redrive", "--fixed", "--yes") == {"loaded": 0, "refused": 0, "invalid": 0}


def test_a_redrive_returns_all_messages_to_their_queue(dead):
    sent = dead.bury(login(), login(), f"not JSON: {CANARY}")
    assert dead.json("redrive", "--yes") == {"moved": 3}
    assert sorted(dead.in_sight(dead.queue_url).values()) == sorted(sent.values())
    assert dead.in_sight() == {}


@pytest.mark.parametrize("command", [["redrive"], ["redrive", "--fixed"], ["purge"]], ids=" ".join)
def test_nothing_is_done_unless_somebody_says_yes(dead, command):
    sent = dead.bury(login(), login())
    asked = dead.run(*command)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "--yes" in asked.stderr
    seen, status = dead.pipeline.on_terminal("dlq", *command, answer="n", environment=dead.environment)
    assert (status, "2 dead messages" in seen) == (2, True)
    assert dead.in_sight() == sent
    seen, status = dead.pipeline.on_terminal("dlq", *command, answer="y", environment=dead.environment)
    assert status == 0
    assert dead.in_sight() == {}


def test_purge_deletes_all(dead):
    dead.bury(login(), messages.WRONG_TYPE)
    assert dead.json("purge", "--yes") == {"deleted": 2}
    assert dead.in_sight() == {}


def test_fixed_loads_the_valid_messages_and_leaves_the_others_visible(dead):
    valid = [login() for _ in range(12)]
    dead.bury(*valid)
    bad = dead.bury(*list(BAD)[:15])
    redriven = dead.run("redrive", "--fixed", "--yes")
    assert (redriven.returncode, redriven.stdout) == (0, "12 messages loaded and deleted from the dead-letter queue\n15 invalid messages left in it\n")
    assert dead.rows(valid) == [1] * 12
    assert dead.in_sight() == bad


def test_a_message_that_was_written_before_it_died_is_not_written_again(dead):
    bodies = [login(), login()]
    delivery.send(dead, bodies)
    received = delivery.receive_all(dead, dead.queue_url)
    assert dead.pipeline.invoke(received) == set()
    dead.show_again(received, dead.queue_url)
    dead.bury()
    assert dead.json("redrive", "--fixed", "--yes") == {"loaded": 2, "refused": 0, "invalid": 0}
    assert dead.rows(bodies) == [1, 1]
    assert dead.in_sight() == {}


def test_fixed_leaves_messages_that_the_database_still_refuses(dead):
    good, refused = login(), login()
    sent = dead.bury(good, refused)
    with refusing(dead.pipeline, refused):
        [explained] = [group for group in dead.json("explain") if not group["valid"]]
        assert (explained["why"], len(explained["message_ids"])) == (REFUSED, 1)
        assert dead.json("redrive", "--fixed", "--yes", status=1) == {"loaded": 1, "refused": 1, "invalid": 0}
    assert dead.rows([good, refused]) == [1, 0]
    assert dead.in_sight() == {message_id: body for message_id, body in sent.items() if body == refused}


def test_explain_says_that_it_cannot_try_the_database(graveyard):
    result = graveyard.run("explain", environment={"DATABASE_SECRET_ID": "gone"})
    assert result.returncode == 0
    assert 'Not tried against the database: cannot read the secret "gone"' in result.stdout


def test_a_function_that_cannot_be_invoked_loses_no_message(dead):
    sent = dead.bury(login(), messages.WRONG_TYPE)
    failed = dead.run("redrive", "--fixed", "--yes", environment={"FUNCTION_NAME": "none-of-ours"})
    assert (failed.returncode, failed.stdout) == (3, "")
    assert "none-of-ours" in failed.stderr
    assert dead.in_sight() == sent


def test_a_function_that_fails_loses_no_message_and_its_error_is_shown(dead):
    sent = dead.bury(login(), login())
    with dead.pipeline.without("etl_ledger"):
        failed = dead.run("redrive", "--fixed", "--yes")
    assert (failed.returncode, failed.stdout) == (3, "")
    assert re.search(r"the function failed: Table: .*SQLSTATE 42P01", failed.stderr)
    assert dead.in_sight() == sent


def test_a_redrive_killed_between_loading_and_deleting_can_be_run_again_without_duplicates(dead):
    bodies = [login() for _ in range(4)]
    sent = dead.bury(*bodies)
    command = ["dlq", "redrive", "--fixed", "--yes", "--rate", "1"]
    with Wiretap(dead.localstack, hold="DeleteMessageBatch") as wire:
        with dead.pipeline.start(*command, environment=dead.environment | wire.environment) as process:
            assert wire.held.wait(30)
            process.kill()
        assert sum(dead.rows(bodies)) == 1
        # They are hidden, but still in the queue, so it must not be reported as empty.
        assert dead.in_sight() == {}
        assert "No dead messages" not in dead.run("list").stdout
        dead.show_again(wire.received)
    assert dead.in_sight() == sent
    assert dead.json("redrive", "--fixed", "--yes") == {"loaded": 4, "refused": 0, "invalid": 0}
    assert dead.rows(bodies) == [1] * 4
    assert dead.in_sight() == {}


def test_a_redrive_interrupted_at_its_question_releases_its_messages(dead):
    sent = dead.bury(login(), login())
    with Terminal(dead.pipeline, "dlq", "redrive", "--fixed", environment=dead.environment) as terminal:
        terminal.until("[y/N]")
        terminal.type("\x03")
        assert terminal.end() != 0
    assert dead.in_sight() == sent


def test_a_redrive_interrupted_while_loading_releases_what_it_has_not_loaded(dead):
    bodies = [login() for _ in range(4)]
    dead.bury(*bodies)
    with Terminal(dead.pipeline, "dlq", "redrive", "--fixed", "--yes", "--rate", "1", environment=dead.environment) as terminal:
        dead.pipeline.until(lambda: sum(dead.rows(bodies)))
        terminal.type("\x03")
        assert terminal.end() != 0
    left = dead.in_sight().values()
    assert len(left) >= 2
    assert all(body in left or rows == 1 for body, rows in zip(bodies, dead.rows(bodies), strict=True))


@pytest.fixture
def fifo(pipeline):
    fifo = DeadLetters(pipeline, ".fifo")
    yield fifo
    fifo.delete()


def send_in_order(fifo, bodies, group):
    for body in bodies:
        fifo.sqs.send_message(QueueUrl=fifo.queue_url, MessageBody=body, MessageGroupId=group, MessageDeduplicationId=str(uuid.uuid4()))
    fifo.bury()


def test_all_groups_of_a_fifo_queue_are_listed_and_their_valid_messages_loaded(fifo):
    valid = [login() for _ in range(3)]
    send_in_order(fifo, [valid[0], messages.WRONG_TYPE, valid[1]], "one")
    send_in_order(fifo, [valid[2]], "another")
    listed = fifo.json("list")
    assert Counter(message["reason"] for message in listed) == {None: 3, "user_id is missing": 1}
    assert fifo.json("redrive", "--fixed", "--yes") == {"loaded": 3, "refused": 0, "invalid": 1}
    assert fifo.rows(valid) == [1] * 3
    assert list(fifo.in_sight().values()) == [messages.WRONG_TYPE]


def test_a_long_group_of_a_fifo_queue_is_loaded_completely(fifo):
    valid = [login() for _ in range(12)]
    send_in_order(fifo, valid, "one")
    # SQS returns ten messages of a group at a time, and the next ones after these are deleted.
    assert "--limit" not in fifo.run("list").stdout
    assert fifo.json("redrive", "--fixed", "--yes") == {"loaded": 12, "refused": 0, "invalid": 0}
    assert fifo.rows(valid) == [1] * 12
    assert fifo.in_sight() == {}
