"""`etlctl keys`: keys listed, added, activated and retired, and never shown."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from world import paths

ADDRESS = "199.172.111.135"
KEY = "2b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfe"
IV = "000102030405060708090a0b0c0d0e0f"
NO_DATABASE = {"DATABASE_HOST": None, "DATABASE_SECRET_ID": None, "ETLCTL_DATABASE_SECRET_ID": None}


def replaced_ago(world, key, **ago):
    """Sets the time at which this key was replaced."""
    ring = world.keyring()
    ring["keys"][key]["replaced"] = (datetime.now(UTC) - timedelta(**ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    world.put_keyring(ring)


def seconds_since(text):
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()


def insert(world, *rows):
    with world.connect() as database, database.cursor() as cursor:
        cursor.executemany("insert into user_logins (masked_ip, masked_device_id, create_date) values (%s, %s, current_date)", rows)


def versions(world):
    """The secret's versions that have a staging label, and their labels."""
    return world.secrets.describe_secret(SecretId=world.masking_secret)["VersionIdsToStages"].values()


def rotated(world):
    """Rotates from the unnamed key to `new`, long enough ago that every function uses it."""
    world.json("keys", "add", "new")
    world.json("keys", "activate", "new")
    replaced_ago(world, "", days=1)


def refused(world, *arguments, status, **options):
    """Checks that a command is refused and changes nothing; returns its error text."""
    before = world.keyring()
    result = world.run("keys", *arguments, **options)
    assert result.returncode == status, result.stderr
    assert world.keyring() == before
    return result.stderr


# List.


def test_the_list_has_each_keys_cipher_age_and_rows(world):
    world.json("keys", "add", "siv")
    world.json("keys", "add", "cbc", "--cipher", "aes-cbc")
    ring = world.keyring()
    ring["keys"]["siv"]["created"] = (datetime.now(UTC) - timedelta(days=3, hours=4, minutes=5)).isoformat()
    del ring["keys"]["cbc"]["created"]
    world.put_keyring(ring)
    # A row counts once for each of its keys.
    insert(world, ("AAAA", "AAAA"), ("AAAA", "siv:AAAA"), (None, "siv:AAAA"), (None, None))
    listed = world.json("keys", "list")
    keys = {key["id"]: key for key in listed["keys"]}
    assert listed["active"] == ""
    assert listed["rows_of_unknown_keys"] == {}
    assert {id: (key["cipher"], key["active"], key["rows"]) for id, key in keys.items()} == {
        "": ("aes-cbc", True, 2),
        "siv": ("aes-siv", False, 2),
        "cbc": ("aes-cbc", False, 0),
    }
    assert keys["cbc"]["created"] is None
    assert abs(seconds_since(keys["siv"]["created"]) - timedelta(days=3, hours=4, minutes=5).total_seconds()) < 60
    shown = world.run("keys", "list").stdout
    assert re.search(r"^\(unnamed\) +aes-cbc +active .* 2$", shown, re.MULTILINE)
    assert re.search(r"^siv +aes-siv .* 3 d 4 h +2$", shown, re.MULTILINE)
    assert re.search(r"^cbc +aes-cbc +unknown +0$", shown, re.MULTILINE)


def test_rows_of_a_key_that_is_not_in_the_ring_are_reported_with_status_1(world):
    insert(world, ("gone:AAAA", None), ("gone:AAAA", "AAAA"), (None, "lost:AAAA"))
    assert world.json("keys", "list", status=1)["rows_of_unknown_keys"] == {"gone": 2, "lost": 1}
    result = world.run("keys", "list")
    assert result.returncode == 1
    assert "2 rows masked with gone, which is not in the keyring" in result.stdout
    assert "1 row masked with lost, which is not in the keyring" in result.stdout


def test_without_rows_the_list_needs_no_database(empty_world):
    listed = empty_world.json("keys", "list", "--no-rows", environment=NO_DATABASE)
    assert [(key["id"], key["rows"]) for key in listed["keys"]] == [("", None)]
    refused(empty_world, "list", status=3, environment=NO_DATABASE)


# Add.


def test_the_first_added_key_makes_a_ring_and_the_old_key_stays_active(empty_world):
    one = empty_world.keyring()
    before = empty_world.masks("ip", ADDRESS)
    assert empty_world.json("keys", "add", "new") == {"added": "new", "cipher": "aes-siv"}
    ring = empty_world.keyring()
    assert ring["active"] == ""
    assert ring["keys"][""].items() >= one.items()
    assert {"cipher": "aes-siv"}.items() <= ring["keys"]["new"].items()
    assert all(0 <= seconds_since(key["created"]) < 60 for key in ring["keys"].values())
    after = empty_world.json("mask", "--field", "ip", ADDRESS)
    assert {mask["key"]: mask["active"] for mask in after} == {"": True, "new": False}
    assert before.items() <= {mask["key"]: mask["mask"] for mask in after}.items()


@pytest.mark.parametrize("cipher", ["aes-siv", "aes-cbc"])
def test_a_key_is_random_and_of_256_bits(empty_world, cipher):
    for id in ("a", "b"):
        empty_world.json("keys", "add", id, "--cipher", cipher)
    a, b = (empty_world.keyring()["keys"][id] for id in ("a", "b"))
    assert (a["cipher"], b["cipher"]) == (cipher, cipher)
    assert len(bytes.fromhex(a["key"])) == len(bytes.fromhex(b["key"])) == 32
    assert a["key"] != b["key"]
    assert {mask["cipher"] for mask in empty_world.json("mask", "--field", "ip", ADDRESS) if mask["key"]} == {cipher}


def test_the_default_id_of_a_key_is_the_month(empty_world):
    before = f"{datetime.now():%Y-%m}"
    added = empty_world.json("keys", "add")["added"]
    assert added in {before, f"{datetime.now():%Y-%m}"}
    assert set(empty_world.keyring()["keys"]) == {"", added}


def test_a_bad_id_is_refused(empty_world):
    for id in ("BAD", "a b", "a:b", "é", "x" * 33, ""):
        assert "id" in refused(empty_world, "add", id, status=2), id
    empty_world.json("keys", "add", "x" * 32)
    empty_world.json("keys", "add", "a-z.0_9")


def test_an_id_that_is_there_already_is_refused(empty_world):
    empty_world.json("keys", "add", "new")
    assert 'there is a key "new" already' in refused(empty_world, "add", "new", status=2)


def test_concurrent_adds_either_succeed_or_report_a_conflict_and_lose_no_key(empty_world):
    expected = {""}
    told_off = 0
    for attempt in range(20):
        adding = {f"{attempt}-{person}": empty_world.start("keys", "add", f"{attempt}-{person}") for person in range(4)}
        errors = {id: process.communicate(timeout=60)[1] for id, process in adding.items()}
        added = {id for id, process in adding.items() if process.returncode == 0}
        assert added, errors
        expected |= added
        for id in adding.keys() - added:
            assert adding[id].returncode == 3
            assert "the keyring was changed by somebody else just now" in errors[id]
            told_off += 1
        assert set(empty_world.keyring()["keys"]) == expected
        assert sorted(map(sorted, versions(empty_world))) == [["AWSCURRENT"], ["AWSPREVIOUS"]]
        # Repeat until there was a conflict.
        if attempt >= 4 and told_off:
            return
    pytest.fail("there was no conflict")


# Activate.


def test_the_active_key_masks_and_the_one_before_is_marked_as_replaced(empty_world):
    empty_world.json("keys", "add", "new")
    masks = empty_world.masks("ip", ADDRESS)
    assert empty_world.json("keys", "activate", "new") == {"active": "new", "before": "", "longest_value": 173, "in_use_within_seconds": 3600}
    assert {mask["key"]: mask["active"] for mask in empty_world.json("mask", "--field", "ip", ADDRESS)} == {"": False, "new": True}
    assert empty_world.masks("ip", ADDRESS) == masks
    keys = empty_world.keyring()["keys"]
    assert 0 <= seconds_since(keys[""]["replaced"]) < 60
    assert "replaced" not in keys["new"]


def test_a_key_that_is_active_again_is_not_marked_as_replaced(empty_world):
    empty_world.json("keys", "add", "new")
    empty_world.json("keys", "activate", "new")
    empty_world.json("keys", "activate", "")
    keys = empty_world.keyring()["keys"]
    assert "replaced" not in keys[""]
    assert "replaced" in keys["new"]


def test_activating_says_when_running_functions_follow(empty_world):
    empty_world.json("keys", "add", "new")
    assert "within 2 min" in empty_world.run("keys", "activate", "new", environment={"SECRETS_TTL": "120"}).stdout


def test_activating_the_active_key_changes_nothing(empty_world):
    empty_world.json("keys", "add", "new")
    before = empty_world.keyring()
    result = empty_world.run("keys", "activate", "")
    assert (result.returncode, result.stdout) == (0, "(unnamed) is active already.\n")
    assert empty_world.keyring() == before


def test_an_unknown_key_is_refused_with_a_list_of_the_keys(empty_world):
    empty_world.json("keys", "add", "new")
    for command in ("activate", "retire"):
        assert 'there is no key "nwe" in the keyring; it has "", "new"' in refused(empty_world, command, "nwe", status=2)


# Retire.


def test_a_key_is_retired_and_the_others_work_on(world):
    rotated(world)
    masks = world.masks("ip", ADDRESS)
    insert(world, (masks["new"], None))
    assert world.json("keys", "retire", "", "--yes") == {"retired": ""}
    assert set(world.keyring()["keys"]) == {"new"}
    assert world.masks("ip", ADDRESS) == {"new": masks["new"]}
    assert [(key["id"], key["rows"]) for key in world.json("keys", "list")["keys"]] == [("new", 1)]
    assert world.json("find", "--ip", ADDRESS)["row_count"] == 1


def test_the_id_of_a_retired_key_is_not_given_again(world):
    rotated(world)
    world.json("keys", "add", "short-lived")
    replaced_ago(world, "short-lived", hours=48)
    world.json("keys", "retire", "short-lived", "--yes")
    assert 'a key "short-lived" was retired' in refused(world, "add", "short-lived", status=2)


def test_a_keyring_that_would_lose_a_key_in_silence_is_refused(empty_world):
    key = '{"cipher": "aes-cbc", "key": "2b7e151628aed2a6abf7158809cf4f3c"}'
    for text in (f'{{"active": "a", "keys": {{"a": {key}, "a": {key}}}}}', '{"key": "2b7e151628aed2a6abf7158809cf4f3c", "iv": null}'):
        empty_world.secrets.put_secret_value(SecretId=empty_world.masking_secret, SecretString=text)
        assert "is not a keyring" in refused(empty_world, "list", "--no-rows", status=3)


def test_activating_warns_of_values_that_become_too_long(empty_world):
    empty_world.json("keys", "add", "a-rather-long-name-for-a-key")
    result = empty_world.run("keys", "activate", "a-rather-long-name-for-a-key")
    assert result.returncode == 0
    assert "bytes were masked until now, but are too long for this key" in result.stdout


def test_one_way_columns_have_a_key_of_their_own(world, tmp_path):
    mapping = tmp_path / "mapping.toml"
    mapping.write_text((paths.ROOT / "mapping.toml").read_text().replace('from = "device_id"\nkeep = "masked"', 'from = "device_id"\nkeep = "one-way"'))
    world.environment["MAPPING_FILE"] = str(mapping)
    assert 'has no "one_way" key' in world.run("doctor").stdout
    world.json("keys", "add", "devices", "--cipher", "hmac-sha256")
    assert world.json("keys", "activate", "devices", "--one-way")["one_way"] == "devices"
    assert [(key["id"], key["active"], key["one_way"]) for key in world.json("keys", "list")["keys"]] == [("", True, False), ("devices", False, True)]
    assert "devices is active" in refused(world, "retire", "devices", "--yes", status=3)
    [mask] = world.json("mask", "--field", "device_id", "x")
    assert (mask["key"], mask["active"], mask["mask"][:8]) == ("devices", True, "devices:")
    insert(world, (world.masks("ip", ADDRESS)[""], mask["mask"]))
    assert world.json("find", "--field", "device_id", "--value", "x")["row_count"] == 1
    recovered = world.run("recover", "--field", "device_id", "--reason", "why", mask["mask"])
    assert (recovered.returncode, "nobody can recover them" in recovered.stderr) == (3, True)
    assert world.json("keys", "remask")["rows_under_other_keys"] == 0


def test_the_active_key_is_not_retired(world):
    rotated(world)
    assert "new is active" in refused(world, "retire", "new", "--yes", status=3)


def test_a_key_with_a_row_is_not_retired(world):
    rotated(world)
    for row in [("AAAA", None), (None, "AAAA"), ("new:AAAA", "AAAA")]:
        with world.connect() as database:
            database.execute("truncate user_logins")
        insert(world, row)
        assert "1 row masked under (unnamed)" in refused(world, "retire", "", "--yes", status=3), row


def test_a_key_is_not_retired_while_a_running_function_may_use_it(world):
    rotated(world)
    # An invocation that began with the previous keyring may last 15 minutes.
    for ttl, minutes, retired in [("1", 0, False), ("1", 15.5, False), ("3600", 17, False), ("3600", 75, False), ("1", 17, True), ("3600", 77, True)]:
        replaced_ago(world, "", minutes=minutes)
        ring, retire = world.keyring(), ("retire", "", "--yes")
        if retired:
            world.json("keys", *retire, environment={"SECRETS_TTL": ttl})
            assert set(world.keyring()["keys"]) == {"new"}
            world.put_keyring(ring)
        else:
            said = refused(world, *retire, status=3, environment={"SECRETS_TTL": ttl})
            assert "running functions may still mask under (unnamed)" in said, (ttl, minutes)


def test_a_key_that_was_replaced_by_hand_just_now_is_not_retired(world):
    world.json("keys", "add", "new")
    world.put_keyring(world.keyring() | {"active": "new"})
    assert "running functions may still mask under (unnamed)" in refused(world, "retire", "", "--yes", status=3)


def test_retiring_needs_confirmation(world):
    rotated(world)
    assert "--yes" in refused(world, "retire", "", status=2)
    seen, status = world.on_terminal("keys", "retire", "", answer="n")
    assert (status, set(world.keyring()["keys"])) == (2, {"", "new"}), seen
    seen, status = world.on_terminal("keys", "retire", "", answer="y")
    assert (status, set(world.keyring()["keys"])) == (0, {"new"}), seen


# Secrecy.

COMMANDS = (["list"], ["list", "--no-rows"], ["add", "a"], ["activate", "b"], ["remask"], ["retire", "a", "--yes"], ["retire", "gone"])
TALKATIVE = {"RUST_LOG": "trace", "RUST_BACKTRACE": "full"}


def shown_by(world, commands):
    """The output of these commands, as text and as JSON."""
    for command in commands:
        for format in ([], ["--json"]):
            result = world.run("keys", *command, *format, environment=TALKATIVE)
            yield result.stdout + result.stderr


def parts(key):
    """The beginning and the end of a key, either of which an error might quote."""
    return {key[:12], key[-12:]}


def test_no_key_is_ever_shown(world):
    hidden = {world.keyring()["iv"]}
    # Collects the keys of every state of the ring.
    for command in ([], ["add", "a"], ["add", "b"], ["add", "c"], ["activate", "a"], *COMMANDS, ["activate", "c"], *COMMANDS):
        shown = "".join(shown_by(world, [command] if command else []))
        ring = world.keyring()
        hidden |= {part for key in ring.get("keys", {"": ring}).values() for part in parts(key["key"])}
        assert not [part for part in hidden if part in shown.lower()], command
    assert len(hidden) == 1 + 4 * 2


NO_KEYRINGS = [
    KEY,
    json.dumps(KEY),
    json.dumps([KEY]),
    json.dumps({"key": KEY})[:-1],
    json.dumps({"key": KEY[:-1]}),
    json.dumps({"key": KEY + "x"}),
    json.dumps({"key": KEY, "iv": KEY}),
    json.dumps({"key": KEY, KEY: KEY}),
    json.dumps({"active": KEY, "keys": {"": {"key": KEY}}}),
    json.dumps({"active": KEY, "keys": {KEY: {"key": KEY}}}),
    json.dumps({"active": "", "keys": {"": {"key": KEY, "cipher": KEY}}}),
    json.dumps({"active": "", "keys": {"": {"key": KEY, "cipher": "aes-siv", "iv": IV}}}),
    json.dumps({"active": "", "keys": {"": {"key": KEY}, "b": {"key": [KEY]}}}),
]


def test_an_invalid_keyring_secret_shows_no_key(empty_world):
    for secret in NO_KEYRINGS:
        empty_world.secrets.put_secret_value(SecretId=empty_world.masking_secret, SecretString=secret)
        for shown in shown_by(empty_world, COMMANDS):
            assert f'the secret "{empty_world.masking_secret}"' in shown
            assert not [part for part in parts(KEY) if part in shown.lower()], shown
        assert empty_world.secrets.get_secret_value(SecretId=empty_world.masking_secret)["SecretString"] == secret


def test_a_key_with_an_invalid_date_can_be_used(empty_world):
    empty_world.put_keyring({"active": "", "keys": {"": {"key": KEY, "created": "2026-11-01", "replaced": KEY}}})
    shown = "".join(shown_by(empty_world, [["list", "--no-rows"], ["add", "new"]]))
    assert not [part for part in parts(KEY) if part in shown]
    assert set(empty_world.keyring()["keys"]) == {"", "new"}
