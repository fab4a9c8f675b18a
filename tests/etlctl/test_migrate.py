"""`etlctl migrate`: the schema is applied once, in order, and never by halves, whatever exists already."""

import hashlib
import json
import re
from pathlib import Path

import psycopg
import pytest
from world import paths

*FILES, TABLE_FILE = sorted((paths.ROOT / "schema").glob("*.sql"))
NAMES = [*(file.stem for file in FILES), "table user_logins"]
# The exercise's table alone, in an otherwise empty database.
TABLE = re.search(r"create table [^;]*;", TABLE_FILE.read_text()).group()
BEFORE_THE_MAPPING = sorted((Path(__file__).parent / "before_the_mapping").glob("*.sql"))
VIEWS = "user_logins_masked_ip_duplicates, user_logins_masked_device_id_duplicates"
# The widest rows that the function writes; a locale may also be null.
WIDEST = """
insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
select repeat('u', 128), repeat('t', 32), repeat('i', 256), repeat('d', 256), locale, 2147483647, '9999-12-31'::date
from (values (repeat('l', 32)), (null)) as wide (locale)
"""


def relations(database):
    """The relations of the schema, without the table of the records."""
    query = "select relname, relkind from pg_class where relnamespace = 'public'::regnamespace and relname not like 'login_etl_migrations%'"
    return set(database.execute(query))


def recorded(database):
    """The recorded names, in the order in which they were applied."""
    if database.execute("select to_regclass('login_etl_migrations')").fetchone() == (None,):
        return []
    return [name for (name,) in database.execute("select name from login_etl_migrations order by applied_at")]


def missing(world, status=1):
    return [migration["name"] for migration in world.json("migrate", "--check", status=status) if migration["state"] == "missing"]


def test_every_file_is_applied_in_order_and_recorded_with_its_checksum(empty_world):
    assert empty_world.json("migrate") == {"applied": NAMES}
    with empty_world.connect() as database:
        assert recorded(database) == NAMES
        records = database.execute("select name, checksum, applied_by from login_etl_migrations").fetchall()
        database.execute(f"select from user_logins, etl_ledger, {VIEWS}, etl_audit")
    assert set(records) == {
        (name, hashlib.sha256(file.read_bytes()).hexdigest(), "postgres") for name, file in zip(NAMES, [*FILES, TABLE_FILE], strict=True)
    }


def test_check_says_what_is_missing_and_changes_nothing(empty_world):
    assert missing(empty_world) == NAMES
    with empty_world.connect() as database:
        assert (relations(database), recorded(database)) == (set(), [])
    empty_world.run("migrate")
    assert missing(empty_world, status=0) == []


def test_what_is_applied_is_not_applied_again(world):
    with world.connect() as database:
        # If the file were applied again, it would make the view again.
        database.execute("drop view user_logins_masked_ip_duplicates")
        before = relations(database)
        assert world.json("migrate") == {"applied": []}
        assert relations(database) == before


def test_concurrent_migrations_all_succeed_and_apply_each_file_once(empty_world):
    processes = [empty_world.start("--json", "migrate") for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert sorted(name for stdout, _ in answers for name in json.loads(stdout)["applied"]) == NAMES
    with empty_world.connect() as database:
        assert recorded(database) == NAMES


def test_a_schema_that_was_applied_by_hand_is_adopted_with_its_rows(empty_world):
    empty_world.servers.apply_schema(empty_world.name)
    with empty_world.connect() as database:
        database.execute(WIDEST)
        before = relations(database), database.execute("select * from user_logins").fetchall()
        assert missing(empty_world) == NAMES
        assert empty_world.json("migrate") == {"applied": NAMES}
        assert (relations(database), database.execute("select * from user_logins").fetchall()) == before
    assert missing(empty_world, status=0) == []


@pytest.mark.parametrize(
    "change",
    [
        "alter masked_ip type varchar(300), alter masked_device_id type text, alter user_id type varchar, alter app_version type bigint",
        "alter user_id set not null, alter locale set default 'EN'",
        "add note text, add loaded_at timestamptz not null default now(), add version text not null generated always as (app_version::text) stored",
        "add id bigint generated always as identity primary key",
    ],
)
def test_a_table_that_fits_is_adopted_with_its_rows(empty_world, change):
    with empty_world.connect() as database:
        database.execute(TABLE)
        database.execute("insert into user_logins values ('u', 'ios', 'ip', 'device', 'RU', 230, '2026-11-01')")
        database.execute(f"alter table user_logins {change}")
        database.execute(WIDEST)
        rows = database.execute("select * from user_logins").fetchall()
        assert empty_world.json("migrate") == {"applied": NAMES}
        assert database.execute("select * from user_logins").fetchall() == rows
        assert database.execute("select count(*) from user_logins_masked_ip_duplicates").fetchone() == (1,)


@pytest.mark.parametrize(
    "change, column",
    [
        ("alter masked_ip type varchar(255)", "masked_ip"),
        ("alter user_id type char(64)", "user_id"),
        ("alter app_version type smallint", "app_version"),
        ("alter masked_device_id type bytea using null", "masked_device_id"),
        ("alter create_date type integer using 0", "create_date"),
        ("drop device_type", "device_type"),
        ("alter locale set not null", "locale"),
        # The function writes the null itself.
        ("alter locale set default 'EN', alter locale set not null", "locale"),
        ("add region text not null", "region"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_its_column_and_nothing_is_recorded(empty_world, change, column):
    with empty_world.connect() as database:
        database.execute(TABLE)
        database.execute(f"alter table user_logins {change}")
        before = relations(database)
        with pytest.raises(psycopg.Error):
            database.execute(WIDEST)
        result = empty_world.run("migrate")
        assert (result.returncode, result.stdout) == (3, "")
        assert f"column {column} " in result.stderr
        assert (relations(database), recorded(database)) == (before, [])


def test_a_file_that_has_changed_since_it_was_applied_is_refused_and_no_migration_is_advised(world):
    with world.connect() as database:
        database.execute("update login_etl_migrations set checksum = 'another' where name = '001_ledger'")
    result = world.run("migrate")
    assert (result.returncode, result.stdout) == (3, "")
    assert "001_ledger was applied with another content" in result.stderr
    check = world.run("migrate", "--check")
    assert check.returncode == 1
    assert [line.split()[0] for line in check.stdout.splitlines() if "changed" in line] == ["001_ledger"]
    assert "run `etlctl migrate`" not in check.stdout


def test_missing_rights_are_reported_with_the_sqlstate_and_the_user_that_has_them(empty_world):
    with empty_world.connect() as database:
        # The default since PostgreSQL 15.
        database.execute("revoke create on schema public from public")
        result = empty_world.run("migrate", environment=empty_world.user())
        assert (result.returncode, result.stdout) == (3, "")
        assert "SQLSTATE 42501" in result.stderr
        assert "the tables' owner" in result.stderr
        assert relations(database) == set()


def test_a_user_who_may_not_make_roles_is_told_who_may(empty_world):
    with empty_world.connect() as database:
        environment = empty_world.user()
        database.execute(f"alter database {empty_world.name} owner to {environment['DATABASE_USER']}")
        database.execute(f"alter schema public owner to {environment['DATABASE_USER']}")
    result = empty_world.run("migrate", environment=environment)
    assert (result.returncode, result.stdout) == (3, "")
    assert "may not make the roles" in result.stderr and "createrole" in result.stderr


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_of_another_encoding_is_migrated(empty_world, encoding):
    with empty_world.servers.postgres.connect(autocommit=True) as server:
        server.execute(f"drop database {empty_world.name}")
        server.execute(f"create database {empty_world.name} encoding '{encoding}' locale 'C' template template0")
    assert empty_world.json("migrate") == {"applied": NAMES}


ALL_TABLES = ("user_logins", "etl_ledger", "etl_audit", "etl_maintenance", "login_etl_migrations")


@pytest.mark.parametrize("moved, advice", [(ALL_TABLES, "name their schema with --database-schema"), (("user_logins",), "move back"), (("etl_ledger",), "move back")])
@pytest.mark.parametrize("command", [("migrate",), ("migrate", "--check")])
def test_tables_that_were_moved_to_another_schema_are_not_made_again(world, moved, advice, command):
    with world.connect() as database:
        database.execute("create schema moved")
        for table in moved:
            database.execute(f"alter table {table} set schema moved")
        result = world.run(*command)
        assert (result.returncode, result.stdout) == (3, "")
        assert f"moved.{moved[-1]}" in result.stderr
        assert advice in result.stderr
        assert relations(database) & {(table, b"r") for table in moved} == set()


def test_tables_of_others_do_no_harm(empty_world):
    with empty_world.connect() as database:
        database.execute("create schema other; create table other.user_logins (); create temp table etl_ledger ()")
        assert empty_world.json("migrate") == {"applied": NAMES}


def test_a_second_installation_does_no_harm(world):
    with world.connect() as database:
        database.execute("create schema other")
        assert world.json("migrate", "--database-schema", "other") == {"applied": NAMES}
        # Another installation may be newer.
        database.execute("drop table etl_maintenance cascade; delete from login_etl_migrations where name = '004_privacy'")
    assert world.json("migrate") == {"applied": ["004_privacy"]}


def test_login_etl_signs_in_with_tokens_only_on_request(world):
    result = world.run("migrate", "--iam")
    assert (result.returncode, result.stdout) == (3, "")
    assert "there is no role rds_iam" in result.stderr
    member = "select pg_has_role('login_etl', 'rds_iam', 'member')"
    with world.connect() as database:
        database.execute("create role rds_iam")
        try:
            assert world.run("migrate").returncode == 0
            assert database.execute(member).fetchone() == (False,)
            assert "DatabaseAuth=iam" in world.run("migrate", "--iam").stdout
            assert database.execute(member).fetchone() == (True,)
        finally:
            database.execute("drop role rds_iam")


def test_an_operator_may_check(world):
    assert world.run("migrate", "--check", environment=world.user("login_etl_operator")).returncode == 0


@pytest.mark.parametrize("table, mode", [("user_logins", "row exclusive"), ("login_etl_migrations", "share")])
def test_a_migration_that_is_killed_leaves_nothing_half_applied_and_the_next_finishes(world, table, mode):
    with world.connect() as database:
        complete = relations(database)
        database.execute(f"drop view {VIEWS}; drop index user_logins_masked_ip_idx, user_logins_masked_device_id_idx")
        database.execute("delete from login_etl_migrations where name = 'table user_logins'")
        before = relations(database)
        # The lock blocks the file's first statement, or the record after the whole file.
        with world.locked(table, mode):
            process = world.start("migrate")
            world.until(lambda: "relation" in world.sessions())
            process.kill()
            process.communicate()
        world.until(lambda: not world.sessions())
        assert relations(database) == before
        assert missing(world) == ["table user_logins"]
        assert world.json("migrate") == {"applied": ["table user_logins"]}
        assert relations(database) == complete


def test_a_database_from_before_the_mapping_keeps_its_rows_and_the_old_function_still_works(empty_world):
    with empty_world.connect() as database:
        database.execute("create table login_etl_migrations (name text primary key, checksum text not null, applied_at timestamptz not null default now(), applied_by text not null default session_user)")
        for file in BEFORE_THE_MAPPING:
            database.execute(file.read_text())
            database.execute("insert into login_etl_migrations (name, checksum) values (%s, 'of that time')", [file.stem])
        database.execute(WIDEST)
        database.execute("insert into user_logins_ledger values ('2026-11-01', '00000000-0000-0000-0000-000000000001')")
        database.execute(
            "insert into user_logins_audit (operator, action, reason, source, requested, recovered, key_ids) values ('me', 'recover', 'why', 'there', 1, 1, '{}')"
        )
        rows = database.execute("select * from user_logins").fetchall()
        assert missing(empty_world) == NAMES
        assert empty_world.json("migrate") == {"applied": NAMES}
        assert database.execute("select * from user_logins").fetchall() == rows
        assert database.execute("select operator from etl_audit").fetchall() == [("me",)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="etl_audit only grows"):
            database.execute("delete from etl_audit")
        for statement in (
            "set role login_etl",
            "insert into user_logins_ledger values ('2026-11-02', '00000000-0000-0000-0000-000000000002')",
            "insert into user_logins_ledger values ('2026-11-01', '00000000-0000-0000-0000-000000000001') on conflict do nothing",
            "delete from user_logins_ledger where message_id in (select message_id from user_logins_ledger for update skip locked limit 0)",
            "reset role",
        ):
            database.execute(statement)
        assert database.execute("select count(*) from etl_ledger").fetchone() == (2,)
        # A second run has nothing to do.
        assert empty_world.json("migrate") == {"applied": []}


def test_the_table_of_another_mapping_is_made_and_follows_its_changes(empty_world, tmp_path):
    mapping, shipped = tmp_path / "mapping.toml", (paths.ROOT / "mapping.toml").read_text()
    mapping.write_text(shipped.replace('table = "user_logins"', 'table = "app.visits"'))
    names = [*NAMES[:-1], "table app.visits"]
    assert empty_world.json("migrate", "--mapping", mapping) == {"applied": names}
    with empty_world.connect() as database:
        tables = "select oid::regclass::text from pg_class where relkind = 'r' and relnamespace in ('public'::regnamespace, 'app'::regnamespace)"
        assert {name for (name,) in database.execute(tables)} == {"app.visits", "etl_ledger", "etl_audit", "etl_maintenance", "login_etl_migrations"}
    mapping.write_text(mapping.read_text().replace("max_length = 32\n", "max_length = 64\n", 1))
    refused = empty_world.run("migrate", "--mapping", mapping)
    assert (refused.returncode, "the table app.visits does not fit: its column device_type" in refused.stderr) == (3, True)
    with empty_world.connect() as database:
        database.execute("alter table app.visits alter device_type type varchar(64)")
    assert empty_world.json("migrate", "--mapping", mapping) == {"applied": ["table app.visits"]}
    # The built-in mapping's table is missing.
    assert missing(empty_world) == ["table user_logins"]
