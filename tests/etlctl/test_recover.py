"""`etlctl recover`: from masks to values. Nothing is shown before it is on record, wherever the process dies."""

import base64
import csv
import fcntl
import io
import json
import os
import random
import time

import psycopg
import pytest
from Crypto.Cipher import AES

NEW_KEY = {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}


def masked(field, value):
    """A value's mask by RFC 5297, under the new key."""
    cipher = AES.new(bytes.fromhex(NEW_KEY["key"]), AES.MODE_SIV)
    cipher.update(field.encode())
    text, tag = cipher.encrypt_and_digest(value.encode())
    return "new:" + base64.b64encode(tag + text).decode()


ADDRESSES, DEVICE = ["199.172.111.135", "2001:db8::1"], "593-47-5928"
# The first mask is made with the first key, which has no name.
MASKS, DEVICE_MASK = ["FGV999l/wJpqUDVxPK7Ouw==", masked("ip", ADDRESSES[1])], masked("device_id", DEVICE)
HOSTILE = ["a\x1b[31mred\x1b[0m", "bell\x07 \x7f", "\u202ename", "two\nlines"]


@pytest.fixture
def ring(world):
    """A world in the middle of a rotation: logins under either key, and without an address or a device."""
    world.put_keyring({"active": "new", "keys": {"": world.keyring(), "new": NEW_KEY}})
    rows = [("first", MASKS[0], DEVICE_MASK), ("second", MASKS[1], None), ("third", None, DEVICE_MASK)]
    with world.connect() as database:
        database.cursor().executemany("insert into user_logins (user_id, masked_ip, masked_device_id) values (%s, %s, %s)", rows)
    return world


def recover(*arguments, reason="a ticket"):
    return ("recover", "--field", "ip", "--reason", reason, *arguments)


def audit(world, columns="requested, recovered"):
    with world.connect() as database:
        return database.execute(f"select {columns} from etl_audit order by id").fetchall()


def shows_no_value(*texts):
    return not any(value in text for value in (*ADDRESSES, DEVICE) for text in texts)


# Sources of masks.


def test_one_value_is_recovered_and_the_record_says_who_what_when_and_why(ring):
    result = ring.run(*recover(MASKS[1], reason="Order 12/345"), environment={"USER": "alice"})
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{ADDRESSES[1]}\n", "")
    (record,) = audit(ring, "action, reason, source, requested, recovered, key_ids, masks, db_user, host(db_client), operator")
    assert record[:-1] == ("recover", "Order 12/345", "arguments", 1, 1, ["new"], [MASKS[1]], "postgres", "127.0.0.1")
    assert record[-1].startswith("arn:aws:") and "(alice@" in record[-1]
    assert audit(ring, "clock_timestamp() - at between interval '0' and interval '1 minute'") == [(True,)]


def test_several_values_are_printed_one_per_line_in_their_order(ring, tmp_path):
    file = tmp_path / "masks.txt"
    file.write_text("\n\n".join(MASKS) + "\n")
    answer = [{"mask": mask, "value": value} for mask, value in zip(MASKS, ADDRESSES, strict=True)]
    for source in (MASKS, ["--file", str(file)], ["--file", "-"]):
        result = ring.run(*recover("--yes", *source), input=file.read_text())
        assert (result.returncode, result.stdout.splitlines()) == (0, ADDRESSES)
        assert ring.json(*recover("--yes", *source), input=file.read_text()) == answer
    assert audit(ring, "requested, recovered, key_ids, masks") == [(2, 2, ["", "new"], MASKS)] * 6


def test_rows_of_a_file_or_a_query_get_the_values_of_both_columns_beside_them(ring, tmp_path):
    file = tmp_path / "logins.csv"
    file.write_text(
        f'user_id,masked_ip,masked_device_id\n"a, ""b""",{MASKS[0]},{DEVICE_MASK}\nsecond,{MASKS[1]},\nthird,,{DEVICE_MASK}\n'
    )
    query = "select case user_id when 'first' then 'a, \"b\"' else user_id end as user_id, masked_ip, masked_device_id from user_logins order by 1"
    values = [(ADDRESSES[0], DEVICE), (ADDRESSES[1], ""), ("", DEVICE)]
    for source in (["--csv", str(file)], ["--query", query + ";"]):
        result = ring.run("recover", "--reason", "r", "--yes", *source)
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert [(row["ip"], row["device_id"]) for row in rows] == values
        assert [row["user_id"] for row in rows] == ['a, "b"', "second", "third"]
        assert [row["masked_ip"] for row in rows] == [*MASKS, ""]
        assert ring.json("recover", "--reason", "r", "--yes", *source) == rows
    assert audit(ring) == [(4, 4)] * 4
    assert audit(ring, "source")[2] == (f"query {query};",)


def test_another_column_is_recovered_by_its_name_and_field(ring):
    source, text = ("recover", "--reason", "r", "--yes", "--csv", "-"), f"id,who\n1,{DEVICE_MASK}\n"
    assert ring.run(*source, "--column", "who", "--field", "device_id", input=text).stdout == f"id,who,device_id\n1,{DEVICE_MASK},{DEVICE}\n"
    for wrong in ((), ("--column", "whom", "--field", "device_id")):
        result = ring.run(*source, *wrong, input=text)
        assert (result.returncode, result.stdout) == (3, "")
        assert "there is no column" in result.stderr
    assert len(audit(ring)) == 1


def test_a_query_that_would_change_anything_is_refused(ring):
    for query in (
        "delete from user_logins returning masked_ip",
        "with gone as (delete from user_logins returning *) select * from gone",
        "insert into user_logins (user_id) values ('new') returning masked_ip",
        "select masked_ip from user_logins; delete from user_logins",
        "select masked_ip from user_logins) to stdout; delete from user_logins; copy (select masked_ip from user_logins",
        "select set_config('transaction_read_only', 'off', true) as masked_ip",
        "select masked_ip from user_logins for update",
        "select masked_ip from user_logins) to program 'true'; copy (select masked_ip from user_logins",
    ):
        result = ring.run("recover", "--reason", "r", "--yes", "--query", query)
        assert (result.returncode, result.stdout) == (3, ""), query
        assert "the query failed" in result.stderr and "SQLSTATE" in result.stderr
    with ring.connect() as database:
        assert database.execute("select count(*) from user_logins").fetchone() == (3,)
    assert audit(ring) == []


def test_large_objects_that_a_query_makes_are_rolled_back(ring):
    """Before PostgreSQL 16, a read-only transaction can make large objects."""
    ring.run("recover", "--reason", "r", "--yes", "--query", "select lo_create(0)::text as masked_ip")
    with ring.connect() as database:
        assert database.execute("select count(*) from pg_largeobject_metadata").fetchone() == (0,)


def test_json_has_each_value_unchanged(ring):
    masks = [masked("ip", value) for value in HOSTILE]
    assert ring.json(*recover("--yes", *masks)) == [{"mask": mask, "value": value} for mask, value in zip(masks, HOSTILE, strict=True)]


def test_a_pipe_gets_what_a_file_gets(ring, tmp_path):
    masks = [masked("ip", value) for value in HOSTILE]
    piped = ring.run(*recover("--yes", *masks)).stdout
    ring.run(*recover("--yes", *masks, "--output", str(tmp_path / "values")))
    assert piped == (tmp_path / "values").read_text()
    assert piped.startswith(HOSTILE[0] + "\n")


def test_there_is_one_line_for_each_mask_whatever_a_value_holds(ring):
    lines = ring.run(*recover("--yes", MASKS[0], masked("ip", "two\nlines"), MASKS[1])).stdout.split("\n")
    assert (lines[0], lines[2:]) == (ADDRESSES[0], [ADDRESSES[1], ""])


def test_a_value_cannot_steer_the_terminal_that_shows_it(ring):
    for arguments in ((), ("--json",)):
        seen, status = ring.on_terminal(*recover("--yes", *(masked("ip", value) for value in HOSTILE), *arguments))
        assert status == 0
        assert seen.replace("\n", "").isprintable(), arguments


# Reason and confirmation.


def test_nothing_is_recovered_without_a_reason(ring):
    for arguments in ((), ("--reason", ""), ("--reason", " \t\n")):
        result = ring.run("recover", "--field", "ip", *arguments, MASKS[0])
        assert (result.returncode, result.stdout) == (2, "")
        assert "--reason" in result.stderr
    assert audit(ring) == []


def test_many_values_are_refused_without_a_terminal(ring, tmp_path):
    file = tmp_path / "masks.txt"
    file.write_text(MASKS[0])
    output = tmp_path / "values.txt"
    for source in ([*MASKS], ["--file", str(file)], ["--query", "select masked_ip from user_logins"]):
        result = ring.run(*recover(*source, "--output", str(output)))
        assert (result.returncode, result.stdout) == (2, "")
        assert "--yes" in result.stderr
    assert (audit(ring), output.exists()) == ([], False)


def test_at_a_terminal_it_asks_and_a_no_shows_and_records_nothing(ring):
    for answer in ("n", " ", "yesterday"):
        seen, status = ring.on_terminal(*recover(*MASKS), answer=answer)
        assert status == 2
        assert "Recover 2 values (arguments)?" in seen
        assert shows_no_value(seen)
    assert audit(ring) == []


def test_at_a_terminal_a_yes_shows_and_records(ring):
    seen, status = ring.on_terminal(*recover(*MASKS), answer="y")
    assert (status, seen.splitlines()[-2:]) == (0, ADDRESSES)
    assert audit(ring) == [(2, 2)]


# Where the values go.


def test_only_the_owner_can_read_an_output_file_and_nothing_else_has_the_values(ring, tmp_path):
    output = tmp_path / "values.txt"
    result = ring.run(*recover("--yes", *MASKS, "--output", str(output)), umask=0)
    assert (result.returncode, output.read_text().splitlines()) == (0, ADDRESSES)
    assert output.stat().st_mode & 0o777 == 0o600
    assert shows_no_value(result.stdout, result.stderr)
    assert str(output) in result.stdout
    output = tmp_path / "values.json"
    assert ring.json(*recover("--yes", *MASKS, "--output", str(output))) == {"recovered": 2, "lost": 0, "output": str(output)}
    assert [recovered["value"] for recovered in json.loads(output.read_text())] == ADDRESSES


def test_a_file_that_is_there_already_is_left_alone(ring, tmp_path):
    file, link, target = tmp_path / "file", tmp_path / "link", tmp_path / "target"
    file.write_text("mine")
    link.symlink_to(target)
    for output in (file, link):
        result = ring.run(*recover(MASKS[0], "--output", str(output)))
        assert (result.returncode, result.stdout) == (3, "")
        assert str(output) in result.stderr
    assert (file.read_text(), target.exists()) == ("mine", False)
    assert audit(ring) == []


# Unrecoverable input.

UNDECIPHERABLE = {
    "nothing": "",
    "a blank": " ",
    "not Base64": "not base64!",
    "a plain value": "198.51.100.7",
    "not a whole block": "c2hvcnQ=",
    "wrong padding": "AAAAAAAAAAAAAAAAAAAAAA==",
    "a truncated mask": MASKS[1][:-4],
    "an altered mask": MASKS[1].replace("new:", "new:AAAA"),
    "an unknown key": MASKS[1].replace("new:", "gone:"),
    "a key's id alone": "new:",
    "the other column's mask": DEVICE_MASK,
}


def test_all_unrecoverable_input_looks_alike_and_is_recorded_without_the_input(ring):
    seen = {}
    for kind, given in UNDECIPHERABLE.items():
        result = ring.run(*recover(given, reason=kind))
        seen.setdefault((result.returncode, result.stdout, result.stderr), []).append(kind)
    assert list(seen) == [(1, "\n", "1 value cannot be recovered with this keyring\n")], seen
    assert audit(ring, "reason, requested, recovered, key_ids, masks") == [(kind, 1, 0, [], []) for kind in UNDECIPHERABLE]


def test_recoverable_masks_are_recovered_and_the_others_counted(ring):
    plain = "198.51.100.7"
    result = ring.run(*recover("--yes", plain, *MASKS, "gone:AAAA"))
    assert (result.returncode, result.stdout.split("\n")) == (1, ["", *ADDRESSES, "", ""])
    assert result.stderr == "2 values cannot be recovered with this keyring\n"
    assert audit(ring) == [(4, 2)]
    (record,) = audit(ring, "etl_audit::text")
    assert MASKS[0] in record[0] and plain not in record[0] and "gone" not in record[0]


# The record.


def test_not_even_the_owner_changes_a_record(ring):
    ring.run(*recover(MASKS[0]))
    for change in ("update etl_audit set reason = 'another'", "delete from etl_audit", "truncate etl_audit"):
        with ring.connect() as database, pytest.raises(psycopg.errors.InsufficientPrivilege, match="only grows"):
            database.execute(change)
    assert audit(ring, "reason") == [("a ticket",)]


@pytest.mark.parametrize(
    "obstacle",
    [
        "alter table etl_audit rename to elsewhere",
        "alter table etl_audit add check (reason <> 'a ticket')",
        "alter database {} set default_transaction_read_only = on",
        # This one fails only at the commit.
        "create constraint trigger late after insert on etl_audit initially deferred"
        " for each row execute procedure etl_audit_only_grows()",
    ],
)
def test_a_value_is_not_shown_if_it_cannot_be_recorded(ring, tmp_path, obstacle):
    output = tmp_path / "values.txt"
    with ring.connect() as database:
        database.execute(obstacle.format(ring.name))
    for arguments in ([], ["--output", str(output)], ["--json"]):
        result = ring.run(*recover(MASKS[0], *arguments))
        assert (result.returncode, result.stdout) == (3, "")
        assert "record this in etl_audit, so nothing is shown" in result.stderr and "SQLSTATE" in result.stderr
    assert not output.exists()


def test_a_record_that_the_database_drops_is_an_error(ring):
    with ring.connect() as database:
        database.execute("create rule swallow as on insert to etl_audit do instead nothing")
    result = ring.run(*recover(MASKS[0]))
    assert (result.returncode, result.stdout) == (3, "")


def test_an_attempt_without_a_keyring_is_recorded(ring, tmp_path):
    output = tmp_path / "values.txt"
    for secret in (None, "none"):
        result = ring.run(*recover("--yes", *MASKS, "--output", str(output)), environment={"MASKING_SECRET_ID": secret})
        assert (result.returncode, result.stdout, output.exists()) == (3, "", False)
        assert (secret or "MASKING_SECRET_ID") in result.stderr
    assert audit(ring, "requested, recovered, key_ids, masks") == [(2, 0, [], [])] * 2


# Wherever the process dies.


def test_a_process_that_dies_before_its_record_is_written_has_shown_nothing(ring, tmp_path):
    output = tmp_path / "values.txt"
    for arguments in ([], ["--output", str(output)]):
        with ring.locked("etl_audit", "share"):
            process = ring.start(*recover(MASKS[0], *arguments))
            ring.until(lambda: "relation" in ring.sessions())
            process.kill()
            assert process.communicate() == ("", "")
        ring.until(lambda: not ring.sessions())
    assert output.read_text() == ""
    assert audit(ring) == []


def test_a_process_that_dies_before_its_reader_has_read_is_on_record(ring):
    reader, writer = os.pipe()
    # The pipe is full, so any output has to wait.
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)))
    process = ring.start(*recover(MASKS[0]), stdout=writer)
    os.close(writer)
    ring.until(lambda: audit(ring))
    process.kill()
    process.communicate()
    assert shows_no_value(os.read(reader, 65536).decode())
    os.close(reader)
    assert audit(ring) == [(1, 1)]


def test_a_recovery_whose_output_fails_is_on_record(ring):
    reader, writer = os.pipe()
    os.close(reader)
    ring.start(*recover(MASKS[0], reason="closed"), stdout=writer).communicate()
    os.close(writer)
    with open("/dev/full", "w") as full:
        process = ring.start(*recover(MASKS[0], reason="full"), stdout=full)
    assert "No space left" in process.communicate()[1]
    assert process.returncode == 3
    assert audit(ring, "reason, recovered") == [("closed", 1), ("full", 1)]


def test_however_often_it_is_killed_nothing_was_shown_that_is_not_on_record(ring):
    chance = random.Random(11)
    started = time.monotonic()
    ring.run(*recover(MASKS[0], reason="to its end"))
    length = time.monotonic() - started
    shown = {}
    for number in range(40):
        if number % 2:
            process = ring.start(*recover(MASKS[0], reason=str(number)))
            time.sleep(chance.uniform(0, length * 1.2))
        else:
            with ring.locked("etl_audit", "share"):
                process = ring.start(*recover(MASKS[0], reason=str(number)))
                ring.until(lambda: "relation" in ring.sessions())
            # The record is being written.
            time.sleep(chance.uniform(0, length / 10))
        process.kill()
        shown[str(number)] = not shows_no_value(process.communicate()[0])
    ring.until(lambda: not ring.sessions())
    recorded = {reason for (reason,) in audit(ring, "reason")}
    assert {reason for reason, was in shown.items() if was} <= recorded
    assert set(shown.values()) == {False, True}
