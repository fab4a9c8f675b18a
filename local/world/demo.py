"""Runs ./local/demo."""

import base64
import json
import shutil
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

from Crypto.Cipher import AES
from Crypto.Util.Padding import unpad

from world import arguments, build, command, delivery, down, messages, paths, stack, tokens
from world.localstack import LocalStackError
from world.postgres import PostgresError
from world.servers import DATABASE_USER, Servers, alone
from world.tokens import Tokens

# If nothing changes for this long, nothing more will: each bad message is received three times, seconds apart.
QUIET_SECONDS = 120
SHOWN = 5
LOGINS = "user_logins"
NEXT = """What to try next
  ./local/demo --keep          leave it running, and look around with psql and etlctl
  ./local/demo --input FILE    send your own messages, one a line; with --mapping FILE, of any kind (docs/mapping.md)
  ./local/test                 run every check and test"""


def main() -> int:
    options = arguments.parse("demo")
    started = time.monotonic()
    bodies = read_lines(options.input) if options.input else messages.make(options.messages)
    with ExitStack() as cleanup:
        cleanup.enter_context(alone(paths.WORLD))
        down.stop(paths.WORLD)
        servers = Servers(paths.WORLD)
        cleanup.callback(servers.stop)
        with ThreadPoolExecutor() as threads:
            print("Starting PostgreSQL and LocalStack ...")
            starting = threads.submit(servers.start)
            function = build.function(quick=True)
            starting.result()
        print(f"PostgreSQL listens on {servers.postgres.host}:{servers.postgres.port}, LocalStack on {servers.localstack.endpoint}")
        table = map_to_table(servers, function, options.mapping)
        signing_in = {}
        if options.iam:
            signed = cleanup.enter_context(Tokens(servers.postgres, servers.localstack.identities))
            signed.admit(DATABASE_USER)
            signing_in = tokens.PARAMETERS
            print(f"PostgreSQL lets {DATABASE_USER} sign in with IAM tokens only, not with a password")
        deployed = stack.deploy(servers, build=function, **signing_in)
        adds_up = run(servers, deployed, bodies, table)
        if options.iam:
            heading("Signing in")
            print(f"  {sum(not verdict.reason for verdict in signed.verdicts):7} tokens accepted; the stack has no secret with a password")
        if options.keep:
            cleanup.pop_all()
            keep(servers, deployed)
    heading(f"Every message is accounted for, after {time.monotonic() - started:.0f} s." if adds_up else "Not every message is accounted for.")
    if adds_up:
        print("  Each valid message was masked and written to PostgreSQL once, though some were delivered twice.\n")
        print(NEXT)
    return 0 if adds_up else 1


def read_lines(file: Path) -> list[str]:
    try:
        bodies = [line for line in file.read_text().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read {file}: {error}")
    if not bodies:
        sys.exit(f"{file} has no message")
    return bodies


def map_to_table(servers: Servers, function: Path, mapping: Path | None) -> str:
    """Puts a mapping beside the function's program, and makes its table; returns the table's name. Without a mapping, the built-in one is used."""
    beside = function / "LoginFunction" / "mapping.toml"
    beside.unlink(missing_ok=True)
    if not mapping:
        return LOGINS
    etlctl, log = build.etlctl(), paths.LOGS / "mapping.log"
    ddl = command.run(etlctl, "mapping", "ddl", "--mapping", mapping.absolute(), what="Making the table", log=log, quiet=True)
    with servers.postgres.connect() as database:
        database.execute(ddl)
    shutil.copy(mapping, beside)
    table = json.loads(command.run(etlctl, "mapping", "show", "--mapping", mapping.absolute(), "--json", what="", log=log, quiet=True))["table"]
    print(f"Made the table {table}")
    return ".".join(f'"{name}"' for name in table.split("."))


def run(servers: Servers, deployed: stack.Stack, bodies: list[str], table: str) -> bool:
    """Sends the messages through the stack and shows the result; returns whether every message is accounted for."""
    # Off until some messages have been delivered once.
    deployed.enable_mapping(False)
    with command.shown(f"Sending {len(bodies)} messages", quiet=False) as say:
        sent = delivery.send(deployed, bodies, lambda done: say(lambda: (f"{done} of {len(bodies)}",)))
    twice = delivery.deliver_without_deleting(deployed, lambda event: invoke(deployed, event))
    print(f"Delivered {len(twice)} of them once without deleting them, so that SQS delivers them again")
    deployed.enable_mapping(True)
    wait_until_empty(deployed)

    dead = delivery.receive_all(deployed, deployed.dead_letter_queue_url)
    log = deployed.log()
    with servers.postgres.connect() as database:
        show_rows(database, table)
        if table == LOGINS:
            show_duplicates(database)
        show_dead_letters(dead, log)
        recovered = table != LOGINS or show_recovery(database, deployed, sent)
        inserted = database.execute(f"select count(*) from {table}").fetchone()[0]
    deduplicated = sum(line["deduplicated"] for line in log if line.get("message") == "batch loaded")

    show_function(log)
    heading("The count")
    # SQS itself may deliver a message twice, too.
    again = max(len(twice), deduplicated)
    print(f"  {len(sent):7} sent, and {again} of them delivered twice: {len(sent) + again} deliveries to account for")
    print(f"  {inserted:7} inserted")
    print(f"  {deduplicated:7} deduplicated")
    print(f"  {len(dead):7} dead-lettered")
    return recovered and deduplicated == again and inserted + len(dead) == len(sent)


def invoke(deployed: stack.Stack, event: dict) -> dict:
    answer = deployed.localstack.client("lambda").invoke(FunctionName=deployed.function_name, Payload=json.dumps(event))
    result = json.load(answer["Payload"])
    if "FunctionError" in answer:
        raise stack.CommandFailed(f"the function failed: {result['errorType']}: {result['errorMessage']}")
    return result


def wait_until_empty(deployed: stack.Stack) -> None:
    with command.shown("Waiting until the queue is empty; bad messages are tried three times", quiet=False) as say:
        quiet_since, before = time.monotonic(), None
        while True:
            waiting, in_flight = deployed.depth(deployed.queue_url)
            dead = deployed.depth(deployed.dead_letter_queue_url)[0]
            now = time.monotonic()
            if waiting + in_flight == 0:
                return
            if (waiting, in_flight, dead) != before:
                quiet_since, before = now, (waiting, in_flight, dead)
            if now - quiet_since > QUIET_SECONDS:
                raise stack.CommandFailed(f"the queue does not empty; the function's log is under {deployed.localstack.function_logs}")
            say(lambda: (f"{before[0]} waiting, {before[1]} in flight, {before[2]} dead-lettered",))
            time.sleep(0.25)


def show_rows(database, table: str) -> None:
    heading(f"{table}, up to {SHOWN} rows")
    show(database.execute(f"select * from {table} limit {SHOWN}"))


def show_duplicates(database) -> None:
    heading("Addresses and devices shared by several logins, found by their masks")
    columns = "row_count, subject_count as users, first_day, last_day"
    show(
        database.execute(
            f"""(select 'ip' as what, masked_ip as masked_value, {columns} from {LOGINS}_masked_ip_duplicates order by row_count desc limit {SHOWN})
                union all
                (select 'device', masked_device_id, {columns} from {LOGINS}_masked_device_id_duplicates order by row_count desc limit {SHOWN})"""
        )
    )


def show_dead_letters(dead: list[dict], log: list[dict]) -> None:
    heading("The dead-letter queue, with the reasons from the function's log")
    reasons = {line["message_id"]: line["reason"] for line in log if line.get("message") == "message failed"}
    counts = Counter(reasons.get(message["MessageId"], "no reason in the log") for message in dead)
    for reason, count in counts.most_common():
        print(f"  {count:7} {reason}")


def show_recovery(database, deployed: stack.Stack, sent: dict[str, str]) -> bool:
    """Recovers an address with the key, and compares it with the sent one."""
    row = database.execute("select user_id, masked_ip from user_logins limit 1").fetchone()
    if not row:
        return True
    heading("One value recovered with the key")
    user_id, masked_ip = row
    key = deployed.key()
    # The generated keyring has no IV; docs/settings.md describes how it is derived.
    iv = AES.new(key, AES.MODE_ECB).encrypt(b"login-etl/cbc-iv")
    ip = unpad(AES.new(key, AES.MODE_CBC, iv).decrypt(base64.b64decode(masked_ip)), 16).decode()
    print(f"  {masked_ip} is {ip}")
    return any(tells(body, user_id, ip) for body in sent.values())


def tells(body: str, user_id: str, ip: str) -> bool:
    """Whether a message has this user and this address, in any spelling."""
    try:
        login = json.loads(body)
        return login["user_id"] == user_id and (login["ip"] == ip or ip_address(login["ip"]) == ip_address(ip))
    except (ValueError, TypeError, KeyError):
        return False


def show_function(log: list[dict]) -> None:
    """Shows the platform's measurements of the function."""
    reports = [line["record"]["metrics"] for line in log if line.get("type") == "platform.report"]
    starts = [report["initDurationMs"] for report in reports if "initDurationMs" in report]
    heading("The function")
    print(f"  {len(reports)} invocations, {statistics.median(report['durationMs'] for report in reports):.0f} ms each (median)")
    print(f"  {max(starts):.0f} ms for a cold start: secrets read, connected to PostgreSQL over TLS")
    print(f"  {max(report['maxMemoryUsedMB'] for report in reports)} MB of memory at its peak")


def heading(text: str) -> None:
    print(f"\n{text}")


def show(cursor) -> None:
    """A query's rows as a table."""
    rows = [[column.name for column in cursor.description]]
    rows += [["" if value is None else str(value) for value in row] for row in cursor.fetchall()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())


def keep(servers: Servers, deployed: stack.Stack) -> None:
    """Writes how to reach the world to a file, and prints it."""
    url = servers.postgres.url("postgres", "postgres", servers.postgres.admin_password)
    database_url = f"{url}?sslmode=verify-full&sslrootcert={servers.postgres.ca_file}"
    # LOGIN_ETL_WORLD tells tests which servers to use.
    ours = {"DATABASE_URL": database_url, "PYTHON": sys.executable, "LOGIN_ETL_WORLD": str(paths.WORLD)}
    settings = servers.environment() | deployed.environment() | ours
    paths.ENV.touch(mode=0o600)
    paths.ENV.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
    heading("Everything is still running; ./local/down stops it")
    print(f"  psql '{database_url}'")
    print(f"  queue              {deployed.queue_url}")
    print(f"  AWS endpoint       {servers.localstack.endpoint}")
    print(f"  all settings       {paths.ENV.relative_to(paths.ROOT)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, LocalStackError, stack.CommandFailed) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
