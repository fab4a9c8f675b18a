"""Rotates the key, from the original's cipher to AES-SIV, while messages flow through the deployed stack."""

import json
import os
import random
import subprocess
import threading
import time
from base64 import b64decode
from collections import Counter

from Crypto.Cipher import AES
from world import delivery, messages, paths
from world.servers import OPERATOR_SECRET

FIELDS = {"masked_ip": "ip", "masked_device_id": "device_id"}


def etlctl(servers, stack, *arguments):
    environment = {"PATH": os.environ["PATH"], **servers.environment(), "ETLCTL_DATABASE_SECRET_ID": OPERATOR_SECRET}
    command = [paths.ROOT / "target" / "debug" / "etlctl", "--json", "--stack", stack.name, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return result.returncode, json.loads(result.stdout or "null"), result.stderr


def recover(keyring, field, masked):
    """Recovers a value with another implementation than ours."""
    id, encoded = masked.split(":")
    cipher = AES.new(bytes.fromhex(keyring["keys"][id]["key"]), AES.MODE_SIV)
    cipher.update(field.encode())
    ciphertext = b64decode(encoded)
    return cipher.decrypt_and_verify(ciphertext[16:], ciphertext[:16]).decode()


def shared(logins, field):
    """For values that occur more than once: how many values occur how often."""
    counts = Counter(login[field] for login in logins)
    return Counter(count for count in counts.values() if count > 1)


def test_a_rotation_loses_no_message_and_leaves_every_row_under_the_new_key(servers, stack):
    secrets = servers.localstack.client("secretsmanager")
    original = secrets.get_secret_value(SecretId=stack.masking_secret_arn)["SecretString"]
    with servers.postgres.connect(autocommit=True) as database:
        database.execute("truncate user_logins, etl_ledger")
    chance = random.Random(11)
    # Many logins share an address or a device, during the whole rotation.
    addresses = [messages.login(chance)["ip"] for _ in range(50)]
    devices = [messages.login(chance)["device_id"] for _ in range(50)]
    logins = []
    stop = threading.Event()

    def flow():
        while not stop.is_set():
            some = [messages.login(chance, ip=chance.choice(addresses), device_id=chance.choice(devices)) for _ in range(20)]
            logins.extend(some)
            delivery.send(stack, [json.dumps(login) for login in some])

    sender = threading.Thread(target=flow)
    sender.start()
    try:
        rows_are(servers, at_least=200)
        assert etlctl(servers, stack, "keys", "add", "new")[0] == 0
        assert etlctl(servers, stack, "keys", "activate", "new")[0] == 0
        remask(servers, stack)
        stop.set()
        sender.join()
        rows_are(servers, at_least=len(logins))
        # Until all environments had the new keyring, they inserted rows under the old key.
        remask(servers, stack)

        _, keys, _ = etlctl(servers, stack, "keys", "list")
        assert {key["id"]: (key["active"], key["rows"]) for key in keys["keys"]} == {"": (False, 0), "new": (True, len(logins))}
        keyring = json.loads(secrets.get_secret_value(SecretId=stack.masking_secret_arn)["SecretString"])
        sent = {login["user_id"]: login for login in logins}
        with servers.postgres.connect() as database:
            rows = database.execute("select user_id, masked_ip, masked_device_id from user_logins").fetchall()
            views = {
                field: Counter(row[0] for row in database.execute(f"select row_count from user_logins_masked_{field}_duplicates").fetchall())
                for field in FIELDS.values()
            }
        assert sorted(row[0] for row in rows) == sorted(sent)
        for user_id, *masks in rows:
            for field, masked in zip(FIELDS.values(), masks, strict=True):
                assert recover(keyring, field, masked) == sent[user_id][field]
        assert views == {field: shared(logins, field) for field in FIELDS.values()}
    finally:
        stop.set()
        sender.join()
        secrets.put_secret_value(SecretId=stack.masking_secret_arn, SecretString=original)
        with servers.postgres.connect(autocommit=True) as database:
            database.execute("truncate user_logins, etl_ledger")


def remask(servers, stack):
    """Repeats the remask while etlctl reports that rows are still inserted under the old key."""
    deadline = time.monotonic() + 120
    while (remasked := etlctl(servers, stack, "keys", "remask"))[0] != 0:
        assert remasked[0] == 1, remasked
        assert time.monotonic() < deadline, remasked
    assert remasked[1]["equal_values_are_equal"]
    assert remasked[1]["settled_in_seconds"] > 0


def rows_are(servers, at_least):
    deadline = time.monotonic() + 120
    with servers.postgres.connect(autocommit=True) as database:
        while (rows := database.execute("select count(*) from user_logins").fetchone()[0]) < at_least:
            assert time.monotonic() < deadline, f"{rows} of {at_least} rows"
            time.sleep(0.1)
