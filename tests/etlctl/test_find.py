"""`etlctl mask` and `find`: from values to masks and rows, without a trace of the value."""

import base64
import subprocess
import uuid

import psycopg
import pytest
from Crypto.Cipher import AES
from Crypto.Util.Padding import pad

ADDRESS = "199.172.111.135"
DEVICE = "593-47-5928"
NEW_KEY = {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}


@pytest.fixture
def ring(world):
    """A world in the middle of a rotation: the first key, unnamed, and the active one."""
    world.put_keyring({"active": "new", "keys": {"": world.keyring(), "new": NEW_KEY}})
    return world


@pytest.fixture
def logins(ring):
    """Logins on three days with one address and one device, masked under either key, and a login with others."""
    addresses, devices = ring.masks("ip", ADDRESS), ring.masks("device_id", DEVICE)
    rows = [
        ("first", addresses[""], devices["new"], "2026-11-01"),
        ("second", addresses["new"], devices[""], "2026-11-02"),
        ("first", addresses["new"], devices["new"], "2026-11-03"),
        ("other", "b3RoZXI=", "b3RoZXI=", "2026-11-03"),
    ]
    with ring.connect() as database:
        insert = "insert into user_logins (user_id, masked_ip, masked_device_id, create_date) values (%s, %s, %s, %s)"
        database.cursor().executemany(insert, rows)
    return ring


def days(answer):
    return [row["create_date"] for row in answer["rows"]]


def test_a_value_is_masked_as_the_original_script_masked_it(world):
    assert world.json("mask", "--field", "ip", ADDRESS) == [{"key": "", "cipher": "aes-cbc", "active": True, "mask": "FGV999l/wJpqUDVxPK7Ouw=="}]


def test_a_value_is_masked_under_every_key_of_the_ring_and_the_active_one_is_marked(ring):
    old, new = ring.json("mask", "--field", "ip", ADDRESS)
    assert old == {"key": "", "cipher": "aes-cbc", "active": False, "mask": "FGV999l/wJpqUDVxPK7Ouw=="}
    assert (new["key"], new["cipher"], new["active"], new["mask"][:4]) == ("new", "aes-siv", True, "new:")
    table = ring.run("mask", "--field", "ip", ADDRESS).stdout.splitlines()
    assert [line.split() for line in table[1:]] == [["(unnamed)", "aes-cbc", old["mask"]], ["new", "aes-siv", "active", new["mask"]]]


def test_all_spellings_of_an_address_have_one_mask_and_devices_are_literal(ring):
    assert ring.masks("ip", "2001:DB8:0:0::1") == ring.masks("ip", "2001:db8::1")
    assert ring.masks("device_id", "2001:DB8:0:0::1") != ring.masks("device_id", "2001:db8::1")


def test_rows_that_the_original_script_wrote_are_found_by_the_spelling_that_was_sent(world):
    # That script did not normalize addresses.
    keyring = world.keyring()
    cipher = AES.new(bytes.fromhex(keyring["key"]), AES.MODE_CBC, bytes.fromhex(keyring["iv"]))
    masked = base64.b64encode(cipher.encrypt(pad(b"2001:DB8:0:0::1", 16))).decode()
    with world.connect() as database:
        database.execute("insert into user_logins (masked_ip) values (%s), (%s)", [masked, world.masks("ip", "2001:db8::1")[""]])
    assert world.json("find", "--ip", "2001:DB8:0:0::1")["row_count"] == 2
    assert world.json("find", "--ip", "2001:db8::1")["row_count"] == 1


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_value_comes_from_standard_input_without_its_line_ending(logins, end):
    assert logins.json("mask", "--field", "ip", "-", input=ADDRESS + end) == logins.json("mask", "--field", "ip", ADDRESS)
    assert logins.json("find", "--device-id", "-", input=DEVICE + end)["row_count"] == 3


@pytest.mark.parametrize("arguments", [("--ip", ADDRESS), ("--device-id", DEVICE)])
def test_rows_are_found_under_every_key_the_latest_first(logins, arguments):
    answer = logins.json("find", *arguments)
    assert days(answer) == ["2026-11-03", "2026-11-02", "2026-11-01"]
    assert (answer["row_count"], answer["subject_count"], answer["first_day"], answer["last_day"]) == (3, 2, "2026-11-01", "2026-11-03")
    text = logins.run("find", *arguments).stdout
    shown = [(line.split()[-1], line.split()[0]) for line in text.splitlines()[1:4]]
    assert shown == [("2026-11-03", "first"), ("2026-11-02", "second"), ("2026-11-01", "first")]
    assert "3 rows, 2 different user_id, 2026-11-01 to 2026-11-03" in text


def test_since_leaves_earlier_days_out_and_limit_shows_fewer_but_counts_all(logins):
    assert days(logins.json("find", "--ip", ADDRESS, "--since", "2026-11-02")) == ["2026-11-03", "2026-11-02"]
    limited = logins.json("find", "--ip", ADDRESS, "--limit", "1")
    assert (days(limited), limited["row_count"]) == (["2026-11-03"], 3)
    assert "--limit shows more" in logins.run("find", "--ip", ADDRESS, "--limit", "1").stdout
    assert "--limit" not in logins.run("find", "--ip", ADDRESS, "--limit", "3").stdout


def test_a_limit_of_zero_does_not_claim_that_there_is_no_row(logins):
    assert "No row" not in logins.run("find", "--ip", ADDRESS, "--limit", "0").stdout


def test_a_value_without_rows_is_reported_as_such(logins):
    result = logins.run("find", "--ip", "192.0.2.1")
    assert (result.returncode, result.stdout) == (0, "No row has this value.\n")
    assert logins.json("find", "--ip", "192.0.2.1")["rows"] == []


def test_a_row_of_an_unknown_day_is_found_as_well(logins):
    with logins.connect() as database:
        database.execute("update user_logins set create_date = null where create_date = '2026-11-01'")
    answer = logins.json("find", "--ip", ADDRESS)
    assert (days(answer), answer["row_count"]) == (["2026-11-03", "2026-11-02", None], 3)


def test_control_characters_are_shown_as_escapes(logins):
    with logins.connect() as database:
        database.execute("update user_logins set user_id = %s", ["\x1b[2J\x9b1m\r\n\u202ename"])
    for seen in (logins.run("find", "--ip", ADDRESS).stdout, logins.on_terminal("find", "--ip", ADDRESS, environment={"NO_COLOR": "1"})[0]):
        row = next(line for line in seen.split("\n") if "name" in line)
        assert r"\u{1b}[2J\u{9b}1m\u{d}\u{a}\u{202e}name" in row
        assert not set(row) & set("\x1b\x9b\r\u202e")


def test_the_plain_value_is_in_no_output_query_or_log(world):
    log, value = world.servers.postgres.log_file, uuid.uuid4().hex
    masked = world.masks("device_id", value)[""]
    with world.connect() as database:
        database.execute(f"alter database {world.name} set log_statement = 'all'")
    before = log.stat().st_size
    with world.locked("user_logins", "access exclusive"):
        process = world.start("find", "--device-id", "-", stdin=subprocess.PIPE)
        process.stdin.write(value)
        process.stdin.close()
        world.until(lambda: "relation" in world.sessions())
        with world.servers.postgres.connect() as database:
            activity = database.execute("select query from pg_stat_activity where datname = %s", [world.name]).fetchall()
    found, recovered = process.stdout.read() + process.stderr.read(), world.run("recover", "--field", "device_id", "--reason", "why", masked)
    assert (process.wait(), recovered.stdout) == (0, f"{value}\n")
    logged = log.read_bytes()[before:].decode()
    # The log has the statements with their parameters.
    assert masked in logged
    for text in (found, recovered.stderr, logged, str(activity)):
        assert value not in text


def test_objects_of_other_users_in_searched_schemas_are_not_used(logins):
    operator = logins.user("login_etl_operator")
    user = operator["DATABASE_USER"]
    with logins.connect() as database:
        # By default, PostgreSQL searches the schema with the user's name first, and prefers functions whose types fit better.
        for statement in (
            f"create schema {user} authorization {user}; create table {user}.etl_audit (like etl_audit including all)",
            f"create table {user}.user_logins (like user_logins); grant all on all tables in schema {user} to {user}",
            "create function public.split_part(varchar, text, integer) returns text language plpgsql as $$ begin raise exception 'taken'; end $$",
            "create function public.to_char(date, text) returns text language plpgsql as $$ begin raise exception 'taken'; end $$",
            "create function public.min(date) returns date language plpgsql as $$ begin raise exception 'taken'; end $$",
        ):
            database.execute(statement)
        assert logins.json("find", "--ip", ADDRESS, environment=operator)["row_count"] == 3
        listed = {key["id"]: key["rows"] for key in logins.json("keys", "list", environment=operator)["keys"]}
        assert listed == {"": 3, "new": 3}
        masked = logins.masks("ip", ADDRESS)["new"]
        assert logins.run("recover", "--field", "ip", "--reason", "why", masked, environment=operator).stdout == f"{ADDRESS}\n"
        assert database.execute("select count(*) from public.etl_audit").fetchone() == (1,)


def test_tables_in_another_schema_are_found_by_its_name(empty_world):
    with empty_world.connect() as database:
        database.execute("create schema app")
    assert "table user_logins" in empty_world.json("migrate", "--database-schema", "app")["applied"]
    assert empty_world.json("find", "--ip", ADDRESS, "--database-schema", "app")["row_count"] == 0
    assert empty_world.run("find", "--ip", ADDRESS).returncode == 3
    with empty_world.connect() as database:
        assert database.execute("select to_regclass('app.etl_ledger') is not null, to_regclass('public.etl_ledger')").fetchone() == (True, None)


def test_an_operator_finds_and_recovers_and_may_change_nothing_but_masks(logins):
    operator = logins.user("login_etl_operator")
    assert logins.json("find", "--ip", ADDRESS, environment=operator)["row_count"] == 3
    masked = logins.masks("ip", ADDRESS)["new"]
    result = logins.run("recover", "--field", "ip", "--reason", "why", masked, environment=operator)
    assert (result.returncode, result.stdout) == (0, f"{ADDRESS}\n")
    with logins.connect() as database:
        assert database.execute("select db_user, reason from etl_audit").fetchall() == [(operator["DATABASE_USER"], "why")]
        database.execute(f"set role {operator['DATABASE_USER']}")
        record = (
            "insert into etl_audit (operator, action, reason, source, requested, recovered, key_ids{}) "
            "values ('', 'recover', 'r', '', 0, 0, array[]::text[]{})"
        )
        for forbidden in (
            "update etl_audit set reason = 'another'",
            "delete from etl_audit",
            "truncate etl_audit",
            record.format(", at", ", '2000-01-01'"),
            record.format(", db_user", ", 'another'"),
            "update user_logins set user_id = 'another'",
            "insert into user_logins (user_id) values ('another')",
            "delete from user_logins",
            "truncate user_logins",
            "drop table user_logins",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                database.execute(forbidden)
        database.execute(record.format("", ""))
        database.execute("update user_logins set masked_ip = ''")
