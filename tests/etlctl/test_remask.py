"""`etlctl keys remask`: every row under the active key, whatever happens meanwhile to the table, the ring and the process."""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from functools import cache, partial

import pytest
from world.soak.checker import key_id_of, mask

FIELDS = ("ip", "device_id")
COLUMNS = "user_id, masked_ip, masked_device_id, device_type, locale, app_version, create_date"
ADDRESSES = [*(f"198.18.{number // 250}.{number % 250}" for number in range(1000)), "2001:db8::1", "1.2.3.4", "010.1.1.1", "no address", ""]
DEVICES = [*(f"593-47-{number:04}" for number in range(1000)), "Gerät №\u00a07 \u202e\U0001f4f1", "x" * 150, "2001:DB8::1"]
SPELLINGS = {"2001:DB8:0:0::1": "2001:db8::1", "2001:0db8::0001": "2001:db8::1", "::FFFF:1.2.3.4": "1.2.3.4"}


def add_keys(world, *keys):
    """Adds keys, each as `id` (aes-siv) or `id aes-cbc`; returns `masked(key, field, value)`, which masks with any key of the ring."""
    for key in keys:
        id, _, cipher = key.partition(" ")
        world.json("keys", "add", id, "--cipher", cipher or "aes-siv")
    masked = cache(partial(mask, world.keyring()))
    return lambda key, field, value: None if value is None else masked(key, field, value)


def made_up(chance, count):
    """Made-up logins: each user's address and device."""
    return {f"user-{number}": (chance.choice(ADDRESSES), chance.choice(DEVICES)) for number in range(count)}


def under(masked, key, logins):
    """The masks of the logins under one key."""
    return {user: tuple(masked(key, *place) for place in zip(FIELDS, values)) for user, values in logins.items()}


def fill(world, masks):
    """Adds a row for each user's masks; the other columns differ from row to row."""
    with world.connect() as database, database.cursor().copy(f"copy user_logins ({COLUMNS}) from stdin") as copy:
        for number, (user, masks_of_user) in enumerate(masks.items()):
            locale = ("RU", "US", None)[number % 3]
            copy.write_row((user, *masks_of_user, f"device {number}", locale, number, date(2026, 1, 1) + timedelta(days=number % 365)))


def rows(world, columns=COLUMNS):
    """The rows by user, after checking that no user occurs twice."""
    with world.connect() as database:
        found = database.execute(f"select {columns} from user_logins").fetchall()
    by_user = {user: rest for user, *rest in found}
    assert len(by_user) == len(found)
    return by_user


def masks(world):
    return {user: tuple(found) for user, found in rows(world, "user_id, masked_ip, masked_device_id").items()}


def count(world, condition):
    with world.connect() as database:
        return database.execute(f"select count(*) from user_logins where {condition}").fetchone()[0]


def remask(world, *options, status=0, **settings):
    return world.json("keys", "remask", *options, status=status, **settings)


# The masks of each row.


@pytest.mark.parametrize("cipher", ["aes-siv", "aes-cbc"])
def test_recoverable_masks_are_rewritten_under_the_active_key_and_all_else_stays(world, cipher):
    chance = random.Random(1)
    masked = add_keys(world, "siv", "cbc aes-cbc", f"new {cipher}")
    before, after = {}, {}
    for number in range(3000):
        # Any key may have masked either column, and the original script did not normalize addresses.
        ip, device = chance.choice([*ADDRESSES, *SPELLINGS, *SPELLINGS, None, None]), chance.choice([*DEVICES, None, None])
        ip_key, device_key = chance.choices(["", "siv", "cbc", "new"], k=2)
        before[f"user-{number}"] = masked(ip_key, "ip", ip), masked(device_key, "device_id", device)
        after[f"user-{number}"] = masked("new", "ip", SPELLINGS.get(ip, ip)), masked("new", "device_id", device)
    of_another_column, whole = masked("siv", "device_id", "x"), masked("siv", "ip", "x")
    junk = ["gone:AAAA", "not base64!", "", "AAAA", "new:AAAA", of_another_column, whole[:-4] + "AAA=", whole.replace("siv:", "new:")]
    for number, nonsense in enumerate(junk):
        before[f"junk-{number}"] = nonsense, masked("", "device_id", "593-47-5928")
        after[f"junk-{number}"] = nonsense, masked("new", "device_id", "593-47-5928")
    # The id of the new key makes the mask longer than the column.
    too_long = masked("", "device_id", "x" * 191)
    before["too long"] = masked("cbc", "ip", "198.18.0.1"), too_long
    after["too long"] = masked("new", "ip", "198.18.0.1"), too_long
    chance.shuffle(users := list(before))
    fill(world, {user: before[user] for user in users})
    full = rows(world)

    world.json("keys", "activate", "new")
    said = remask(world, status=1)
    assert {user: (*after[user], *row[2:]) for user, row in full.items()} == {user: tuple(row) for user, row in rows(world).items()}
    assert (said["read"], said["unrecoverable"], said["too_long"]) == (len(before), len(junk), 1)
    assert said["changed"] == sum(before[user] != after[user] for user in before)
    assert not said["equal_values_are_equal"]

    places = rows(world, "user_id, ctid::text, xmin::text")
    again = world.run("keys", "remask")
    assert again.returncode == 1
    assert again.stdout.startswith("0 rows remasked with new")
    assert f"{len(junk)} rows with a mask that no key of the keyring recovers: left as they are" in again.stdout
    assert "1 row with a value that is too long under this key: left as they are" in again.stdout
    assert "Checked" not in again.stdout
    assert rows(world, "user_id, ctid::text, xmin::text") == places, "a second run writes nothing"


def test_every_row_is_read_once_also_where_a_batch_ends_amid_a_block(world):
    masked = add_keys(world, "new aes-cbc")
    logins = made_up(random.Random(9), 3000)
    fill(world, under(masked, "", logins))
    world.json("keys", "activate", "new")
    said = remask(world, "--batch", "700")
    # A pass that rewrites, and one that finds nothing to do.
    assert (said["changed"], said["read"], said["passes"]) == (len(logins), len(logins), 2)


@pytest.mark.parametrize("cipher", ["aes-siv", "aes-cbc"])
def test_remasking_there_and_back_restores_every_mask(world, cipher):
    masked = add_keys(world, f"new {cipher}")
    logins = made_up(random.Random(2), 2000)
    fill(world, under(masked, "", logins))
    before = rows(world)
    for key in ("new", ""):
        world.json("keys", "activate", key)
        said = remask(world)
        assert (said["active"], said["changed"], said["rows_under_other_keys"]) == (key, 2000, 0)
        assert said["equal_values_are_equal"]
        assert masks(world) == under(masked, key, logins)
    assert rows(world) == before


# Users and partitions.

PARTITIONS = """
    create table user_logins (
        user_id varchar(128), device_type varchar(32), masked_ip varchar(256), masked_device_id varchar(256),
        locale varchar(32), app_version integer, create_date date
    ) partition by range (create_date);
    create table user_logins_2025 partition of user_logins for values from (minvalue) to ('2026-01-01');
    create table "Logins of spring, 2026" partition of user_logins for values from ('2026-01-01') to ('2026-06-01');
    create table user_logins_later partition of user_logins for values from ('2026-06-01') to (maxvalue) partition by range (create_date);
    create table user_logins_summer partition of user_logins_later for values from ('2026-06-01') to ('2026-09-01');
    create table user_logins_others partition of user_logins_later default;
"""


@pytest.mark.parametrize("who", ["owner", "operator"])
@pytest.mark.parametrize("table", ["as a whole", "in partitions"])
def test_all_of_the_table_is_remasked_by_its_owner_and_by_an_operator(empty_world, table, who):
    if table == "in partitions":
        with empty_world.connect() as database:
            database.execute(PARTITIONS)
    assert empty_world.run("migrate").returncode == 0
    masked = add_keys(empty_world, "new")
    logins = made_up(random.Random(3), 1000)
    fill(empty_world, under(masked, "", logins))
    empty_world.json("keys", "activate", "new")
    environment = empty_world.user("login_etl_operator") if who == "operator" else {}
    assert remask(empty_world, environment=environment)["changed"] == 1000
    assert masks(empty_world) == under(masked, "new", logins)


# Rate and batch size.


def test_no_more_rows_are_rewritten_than_the_rate_allows(world):
    masked = add_keys(world, "new aes-cbc")
    fill(world, under(masked, "", made_up(random.Random(4), 3000)))
    world.json("keys", "activate", "new")
    began = time.monotonic()
    with world.start("keys", "remask", "--rate", "1000", stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            changed = count(world, "masked_ip like 'new:%'")
            assert changed <= 1000 * (time.monotonic() - began + 1)
    assert process.returncode == 0
    assert time.monotonic() - began > 2
    assert count(world, "masked_ip like 'new:%'") == 3000


def test_a_batch_has_about_the_requested_number_of_rows(world):
    masked = add_keys(world, "new aes-cbc")
    fill(world, under(masked, "", made_up(random.Random(5), 3000)))
    world.json("keys", "activate", "new")
    remask(world, "--batch", "200")
    batches = Counter(batch for (batch,) in rows(world, "user_id, xmin::text").values())
    assert 3000 / 400 < len(batches)
    assert max(batches.values()) < 400


# Concurrent changes.


def test_rows_inserted_meanwhile_are_neither_lost_nor_duplicated_nor_delayed(world):
    masked = add_keys(world, "new aes-cbc")
    logins = made_up(random.Random(6), 30_000)
    fill(world, under(masked, "", logins))
    world.json("keys", "activate", "new")
    finished = threading.Event()

    def function(name, key):
        """Inserts batch after batch, and returns the inserted logins. Not endlessly: on a busy machine it would outrun the command."""
        chance, inserted = random.Random(name), {}
        with world.connect() as database, database.cursor() as cursor:
            database.execute("set lock_timeout = '1s'")
            while len(inserted) < 3000 and not finished.wait(0.01):
                new = {f"{name}-{len(inserted)}-{user}": values for user, values in made_up(chance, 20).items()}
                values = [(user, *found) for user, found in under(masked, key, new).items()]
                cursor.executemany("insert into user_logins (user_id, masked_ip, masked_device_id) values (%s, %s, %s)", values)
                inserted |= new
        return inserted

    # The last one has not read the new keyring yet.
    functions = {"one": "new", "two": "new", "three": "new", "late": ""}
    with ThreadPoolExecutor(len(functions)) as pool:
        running = [pool.submit(function, *each) for each in functions.items()]
        try:
            said = world.run("keys", "remask", "--batch", "500")
        finally:
            finished.set()
    # A late row may arrive after the last pass.
    assert said.returncode == 0 or "Rows still come in under another key" in said.stdout, said
    for inserted in running:
        assert len(inserted.result()) > 100
        logins |= inserted.result()
    now = masks(world)
    assert now.keys() == logins.keys()
    either = [under(masked, key, logins) for key in ("", "new")]
    assert not [user for user, found in now.items() if found not in (either[0][user], either[1][user])]
    remask(world)
    assert masks(world) == either[1]


def test_concurrent_changes_and_deletions_are_not_overwritten(world):
    masked = add_keys(world, "new")
    fill(world, under(masked, "", made_up(random.Random(9), 100)))
    world.json("keys", "activate", "new")
    moved = ("2001:db8::1", "593-47-5928")
    with world.connect() as database, database.transaction():
        database.execute("update user_logins set masked_ip = null, masked_device_id = null where user_id = 'user-1'")
        database.execute("update user_logins set masked_ip = %s, masked_device_id = %s where user_id = 'user-2'", under(masked, "", {0: moved})[0])
        database.execute("delete from user_logins where user_id = 'user-3'")
        process = world.start("keys", "remask")
        world.until(lambda: any(world.sessions()))
    assert process.communicate(timeout=60) and process.returncode == 0
    found = masks(world)
    assert len(found) == 99
    assert "user-3" not in found
    assert found["user-1"] == (None, None)
    assert found["user-2"] == under(masked, "new", {0: moved})[0]


def test_concurrent_runs_do_no_harm(world):
    masked = add_keys(world, "new aes-cbc")
    logins = made_up(random.Random(7), 10_000)
    fill(world, under(masked, "", logins))
    world.json("keys", "activate", "new")
    runs = [world.start("keys", "remask", "--batch", batch) for batch in ("150", "200", "5000")]
    for process in runs:
        assert process.communicate(timeout=60) and process.returncode == 0
    assert masks(world) == under(masked, "new", logins)


def test_a_run_overtaken_by_the_next_rotation_leaves_no_mask_of_a_retired_key(world):
    masked = add_keys(world, "b aes-cbc", "c aes-cbc")
    logins = made_up(random.Random(8), 5000)
    fill(world, under(masked, "", logins))
    world.json("keys", "activate", "b")
    with world.start("keys", "remask", "--batch", "100", "--rate", "2000", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asleep:
        try:
            world.until(lambda: count(world, "masked_ip like 'b:%'"))
            # Like a laptop whose lid is closed.
            asleep.send_signal(signal.SIGSTOP)
            assert count(world, "masked_ip not like 'b:%'")
            world.json("keys", "activate", "c")
            remask(world)
            ring = world.keyring()
            ring["keys"]["b"]["replaced"] = (datetime.now(UTC) - timedelta(days=1)).isoformat()
            world.put_keyring(ring)
            world.run("keys", "retire", "b", "--yes")
        finally:
            asleep.send_signal(signal.SIGCONT)
    kept = [under(masked, key, logins) for key in world.keyring()["keys"]]
    assert not [user for user, found in masks(world).items() if not any(found == of_key[user] for of_key in kept)]


def test_fifty_kills_neither_lose_nor_duplicate_nor_damage_a_row(world):
    seed = random.randrange(10_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    masked = add_keys(world, "new aes-cbc")
    logins = made_up(chance, 3_000)
    ips, devices = ({masked(key, field, value): value for key in ("", "new") for value in of} for field, of in zip(FIELDS, (ADDRESSES, DEVICES)))
    fill(world, under(masked, "", logins))
    others = rows(world, "user_id, device_type, locale, app_version, create_date")

    def activate(key):
        world.json("keys", "activate", key)
        # Otherwise the table grows with each rotation.
        with world.connect() as database:
            database.execute("vacuum user_logins")
        return key

    active = activate("new")
    began = time.monotonic()
    remask(world, "--batch", "50")
    whole = time.monotonic() - began
    kills = amid = 0
    all_is_left = False
    while kills < 50:
        with world.start("keys", "remask", "--batch", "50", stdout=subprocess.DEVNULL) as process:
            began = time.monotonic()
            try:
                process.wait(chance.uniform(0, whole))
                if all_is_left:
                    # A busy machine, on which the first run was slow, may be idle now. Then hardly a run would be killed.
                    whole = max(whole / 2, time.monotonic() - began)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        found = masks(world)
        assert {user: (ips.get(ip), devices.get(device)) for user, (ip, device) in found.items()} == logins
        keys = {key_id_of(masked) for row in found.values() for masked in row}
        amid += len(keys) == 2
        all_is_left = keys == {active}
        if all_is_left:
            active = activate("" if active else "new")
    assert amid >= 10, "most kills hit the rewriting"
    remask(world)
    assert masks(world) == under(masked, active, logins)
    assert rows(world, "user_id, device_type, locale, app_version, create_date") == others
