"""`etlctl mapping`: mappings checked, tried and printed as SQL."""

import json

from world import paths

EXAMPLES = paths.ROOT / "examples"
SHIPPED = paths.ROOT / "mapping.toml"


def test_a_mapping_is_checked_and_a_broken_rule_is_shown_with_its_place(etlctl, tmp_path):
    assert etlctl.run("mapping", "check", SHIPPED).returncode == 0
    broken = tmp_path / "mapping.toml"
    broken.write_text(SHIPPED.read_text().replace('keep = "masked"', 'kept = "masked"', 1))
    result = etlctl.run("mapping", "check", broken)
    assert result.returncode == 1
    place = broken.read_text()[: broken.read_text().index("kept = ")].count("\n") + 1
    assert f"line {place}, column 1: unknown field `kept`" in result.stdout


def test_trying_a_sample_event_shows_its_rows_and_its_refusals(etlctl):
    result = etlctl.run("mapping", "try", paths.ROOT / "events" / "mixed.json", "--json")
    answers = json.loads(result.stdout)
    assert result.returncode == 1
    assert [list(answer)[0] for answer in answers] == ["row", "refused", "refused", "row", "refused", "refused"]
    assert answers[0]["row"]["masked_ip"].startswith("made-up:")


def test_trying_under_a_keyring_makes_the_masks_of_the_table(etlctl, tmp_path):
    keyring = tmp_path / "keyring.json"
    keyring.write_text(json.dumps({"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"}))
    body = {"user_id": "u", "app_version": "1", "device_type": "ios", "ip": "199.172.111.135", "device_id": "d"}
    result = etlctl.run("mapping", "try", "-", "--keyring", keyring, "--json", input=json.dumps(body))
    assert json.loads(result.stdout)[0]["row"]["masked_ip"] == "FGV999l/wJpqUDVxPK7Ouw=="


def test_a_missing_mapping_message_or_field_is_an_error(etlctl, tmp_path):
    assert "cannot be read" in etlctl.run("mapping", "show", "--mapping", tmp_path / "none.toml").stderr
    result = etlctl.run("mapping", "try", "-", input="\n")
    assert (result.returncode, "no message" in result.stderr) == (2, True)
    assert "no masked field" in etlctl.run("mask", "--field", "iq", "x").stderr


def test_the_sql_of_an_example_makes_its_table_once_and_again(etlctl, servers):
    ddl = etlctl.run("mapping", "ddl", "--mapping", EXAMPLES / "clicks" / "mapping.toml").stdout
    with servers.postgres.connect() as database:
        for _ in range(2):
            database.execute(ddl)
        grants = "select has_table_privilege('login_etl', 'web.clicks', 'insert'), has_table_privilege('login_etl', 'web.clicks', 'select')"
        assert database.execute(grants).fetchone() == (True, False)
        database.execute("drop schema web cascade")
