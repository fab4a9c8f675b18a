"""`etlctl doctor`: finds each fault, and reports none in a sound pipeline."""

import json
import re
import uuid
from contextlib import ExitStack
from pathlib import Path

import botocore
import pytest
from queues import Queues
from world import messages
from world.localstack import free_port
from world.servers import DATABASE_SECRET, OPERATOR_SECRET
from world.tokens import Tokens

# Roots that did not sign the server's certificate.
OTHER_ROOTS = str(Path(botocore.__file__).parent / "cacert.pem")


def findings(pipeline, **environment):
    """The doctor's findings that are not ok. Also checks the form of all its findings."""
    told = pipeline.run("doctor", "--json", environment=environment)
    checks = json.loads(told.stdout)
    for check in checks:
        assert set(check) == {"area", "state", "found", "advice"}
        assert bool(check["advice"]) == (check["state"] in ("warning", "failed")) or check["state"] == "unknown"
    no = {"failed", "unknown"} & {check["state"] for check in checks}
    assert (told.returncode, told.stderr) == (1 if no else 0, "")
    for secret in secret_values(pipeline):
        assert secret not in told.stdout
    return [check for check in checks if check["state"] != "ok"]


def secret_values(pipeline):
    passwords = [pipeline.secrets.get_secret_value(SecretId=secret)["SecretString"] for secret in (DATABASE_SECRET, OPERATOR_SECRET)]
    return [pipeline.keyring()["key"], *(json.loads(password)["password"] for password in passwords)]


@pytest.fixture
def undo():
    """Undoes, at the end, what a test did to the pipeline."""
    with ExitStack() as undo:
        yield undo


# Faults, as functions that cause them.


def queue(url="queue_url", **wrong):
    def spoil(pipeline, undo):
        queues = pipeline.queues
        policy = {"deadLetterTargetArn": queues.arn(queues.dead_letter_queue_url), "maxReceiveCount": 1}
        attributes = {name: json.dumps(policy) if value == "received once" else value for name, value in wrong.items()}
        right = queues.sqs.get_queue_attributes(QueueUrl=getattr(queues, url), AttributeNames=list(wrong))["Attributes"]
        undo.callback(queues.sqs.set_queue_attributes, QueueUrl=getattr(queues, url), Attributes=right)
        queues.sqs.set_queue_attributes(QueueUrl=getattr(queues, url), Attributes=attributes)

    return spoil


def dead_letter_queue(**wrong):
    return queue("dead_letter_queue_url", **wrong)


def mapping(**wrong):
    def spoil(pipeline, undo):
        # LocalStack takes a while to change a mapping, but creates a new one at once.
        queues = Queues(pipeline.servers, VisibilityTimeout="300")
        undo.callback(queues.delete)
        undo.callback(pipeline.functions.delete_event_source_mapping, UUID=pipeline.lead(queues, **wrong))
        return queues.environment

    return spoil


def reserved_concurrency(pipeline, undo):
    undo.callback(pipeline.functions.delete_function_concurrency, FunctionName=pipeline.name)
    pipeline.functions.put_function_concurrency(FunctionName=pipeline.name, ReservedConcurrentExecutions=1)


def quiet_log(pipeline, undo):
    def level(name):
        logging = {"LogFormat": "JSON", "ApplicationLogLevel": name}
        pipeline.functions.update_function_configuration(FunctionName=pipeline.name, LoggingConfig=logging)
        pipeline.functions.get_waiter("function_updated_v2").wait(FunctionName=pipeline.name, WaiterConfig={"Delay": 0.1})

    undo.callback(level, "INFO")
    level("WARN")


def dead_message(pipeline, undo):
    url = pipeline.queues.dead_letter_queue_url
    undo.callback(pipeline.queues.sqs.purge_queue, QueueUrl=url)
    pipeline.queues.sqs.send_message(QueueUrl=url, MessageBody=messages.WRONG_TYPE)


def bad_keyring(pipeline, undo):
    undo.callback(pipeline.put_keyring, pipeline.keyring())
    pipeline.put_keyring({"key": "none of ours"})


def test_a_sound_pipeline_has_only_ok_findings(pipeline):
    assert findings(pipeline) == []
    said = pipeline.run("doctor")
    assert (said.returncode, said.stdout.count("\n  ok  ")) == (0, len(pipeline.json("doctor")))
    assert said.stdout.endswith(" ok, 0 warn, 0 failed, 0 unknown\n")


DATABASE, QUEUE, DEAD, MAPPING, USER = "database", "queue", "dead-letter queue", "event source mapping", "function's database user"
RUSSIA = '{"body": {"locale": ["RU"]}}'


@pytest.mark.parametrize(
    "spoil, area, state, found, advice",
    [
        pytest.param(queue(VisibilityTimeout="60"), QUEUE, "failed", "60 s, for a function timeout of 10 s", "61 s", id="short visibility timeout"),
        pytest.param(queue(RedrivePolicy=""), QUEUE, "failed", "no dead-letter queue", "RedrivePolicy", id="no dead-letter queue"),
        pytest.param(queue(RedrivePolicy="received once"), QUEUE, "warning", "up to 1 time", "MaxReceiveCount", id="few receives"),
        pytest.param(dead_letter_queue(MessageRetentionPeriod="86400"), DEAD, "failed", "for 1 day, the queue for 4", "raise", id="short retention"),
        pytest.param(dead_message, DEAD, "warning", "1 message", "etlctl dlq explain", id="dead letters"),
        pytest.param(mapping(Enabled=False), MAPPING, "failed", "Disabled", "enable it", id="disabled mapping"),
        pytest.param(mapping(FunctionResponseTypes=[]), MAPPING, "failed", "lacks ReportBatch", "FunctionResponseTypes", id="no partial failures"),
        pytest.param(mapping(FilterCriteria={"Filters": [{"Pattern": RUSSIA}]}), MAPPING, "failed", RUSSIA, "remove the filter", id="filter"),
        pytest.param(mapping(ScalingConfig={"MaximumConcurrency": 1000}), DATABASE, "failed", "may want 1000", "lower", id="high concurrency"),
        pytest.param(mapping(ScalingConfig={}), MAPPING, "warning", "no MaximumConcurrency", "set MaximumConcurrency", id="no maximum concurrency"),
        pytest.param(reserved_concurrency, MAPPING, "failed", "reserved concurrency 1", "lower MaximumConcurrency", id="reserved concurrency"),
        pytest.param(quiet_log, "function", "failed", "it logs at WARN", "LogLevel", id="quiet log"),
        pytest.param(bad_keyring, "secrets", "failed", "hex digits", "AWSPREVIOUS", id="keyring that does not parse"),
    ],
)
def test_each_fault_of_the_pipeline_is_the_only_finding_and_has_advice(pipeline, undo, spoil, area, state, found, advice):
    environment = spoil(pipeline, undo)
    (finding,) = findings(pipeline, **environment or {})
    assert (finding["area"], finding["state"]) == (area, state)
    assert found in finding["found"]
    assert advice in finding["advice"]


@pytest.mark.parametrize(
    "environment, area, state, found",
    [
        pytest.param({"DATABASE_TLS": "disable"}, DATABASE, "warning", "TLS is off", id="no TLS"),
        pytest.param({"DATABASE_CA": OTHER_ROOTS}, DATABASE, "failed", "no trusted root signed the database's certificate; trusted are those in", id="other roots"),
        pytest.param({"DATABASE_HOST": "127.0.0.1"}, DATABASE, "failed", 'is not for "127.0.0.1", but for localhost', id="a host that the certificate does not name"),
        pytest.param({"DATABASE_PORT": str(free_port())}, DATABASE, "failed", "the connection is lost: connection refused", id="nobody there"),
        pytest.param({"MASKING_SECRET_ID": "none-of-ours"}, "secrets", "failed", '"none-of-ours" (ResourceNotFoundException)', id="no keyring"),
        pytest.param({"FUNCTION_NAME": "none-of-ours"}, "function", "unknown", '"none-of-ours" (ResourceNotFoundException', id="no function"),
        pytest.param({"DLQ_URL": "{url}-other"}, "queue", "unknown", "NonExistentQueue", id="no such dead-letter queue"),
        pytest.param({"ETLCTL_DATABASE_SECRET_ID": None}, DATABASE, "unknown", "set ETLCTL_DATABASE_SECRET_ID", id="nobody to the database"),
    ],
)
def test_a_wrong_setting_is_the_first_finding(pipeline, environment, area, state, found):
    environment = {name: value and value.format(url=pipeline.queues.queue_url) for name, value in environment.items()}
    finding = findings(pipeline, **environment)[0]
    assert (finding["area"], finding["state"]) == (area, state)
    assert found in finding["found"]


def test_what_cannot_be_checked_is_not_reported_as_failed(pipeline):
    told = pipeline.run("doctor", "--json", environment={"AWS_REGION": None, "AWS_DEFAULT_REGION": None})
    assert told.returncode in (1, 3)
    assert "AWS_REGION" in told.stdout + told.stderr
    assert "failed" not in told.stdout


@pytest.fixture
def other_queues(servers):
    queues = Queues(servers, VisibilityTimeout="300")
    yield queues
    queues.delete()


def test_a_queue_without_an_event_source_mapping_is_failed(pipeline, other_queues):
    (finding,) = findings(pipeline, **other_queues.environment)
    assert (finding["area"], finding["state"]) == ("event source mapping", "failed")
    assert "there is none from the queue" in finding["found"]


def test_a_dead_letter_queue_of_another_queue_is_failed(pipeline, other_queues):
    (finding,) = findings(pipeline, DLQ_URL=other_queues.environment["DLQ_URL"])
    assert (finding["area"], finding["state"]) == ("queue", "failed")
    assert other_queues.arn(other_queues.dead_letter_queue_url) in finding["advice"]


def secret(pipeline, undo, **credentials):
    name = f"{pipeline.name}/{uuid.uuid4().hex[:8]}"
    undo.callback(pipeline.secrets.delete_secret, SecretId=name, ForceDeleteWithoutRecovery=True)
    pipeline.secrets.create_secret(Name=name, SecretString=json.dumps(credentials))
    return name


def test_an_operator_with_a_wrong_password_is_told_so(pipeline, undo):
    mine = secret(pipeline, undo, username="postgres", password="not-the-password")
    (finding,) = findings(pipeline, ETLCTL_DATABASE_SECRET_ID=mine)
    assert finding["area"] == "database"
    assert "28P01" in finding["found"]
    assert "not-the-password" not in json.dumps(finding)


def test_a_function_with_a_wrong_password_is_found(pipeline, undo):
    its = secret(pipeline, undo, username="login_etl", password="not-the-password")
    (finding,) = findings(pipeline, DATABASE_SECRET_ID=its)
    assert finding["state"] == "failed"
    assert "28P01" in finding["found"]
    assert "not-the-password" not in json.dumps(finding)


def test_credentials_that_do_not_parse_are_found(pipeline, undo):
    its = secret(pipeline, undo, user="login_etl", password="not-the-password")
    finding = findings(pipeline, DATABASE_SECRET_ID=its)[0]
    assert (finding["area"], finding["state"]) == ("secrets", "failed")
    assert "username" in finding["found"]
    assert "not-the-password" not in json.dumps(finding)


@pytest.mark.parametrize(
    "options, change, state, found",
    [
        ("superuser", "", "failed", "superuser"),
        ("createrole", "", "failed", "superuser, or close to one"),
        ("", "alter role {} nologin", "failed", "may not log in"),
        ("", "alter role {} reset statement_timeout", "warning", "no time limit"),
        ("", "alter role {} set synchronous_commit = off", "failed", "may be lost when the server crashes"),
        ("", "alter database {database} set synchronous_commit = on; alter role {} set synchronous_commit = off", "failed", "may be lost"),
        ("", "grant select (masked_ip) on user_logins to {}", "warning", "may read or change existing rows"),
        ("", "revoke insert on user_logins from {}", "failed", "may not insert rows"),
        ("", "revoke delete on etl_ledger from {}", "warning", "may not delete expired ledger keys"),
    ],
)
def test_missing_and_excessive_rights_of_the_functions_user_are_found(pipeline, undo, options, change, state, found):
    name = f"etlctl_{uuid.uuid4().hex[:12]}"
    its = secret(pipeline, undo, username=name, password=name)
    database = undo.enter_context(pipeline.connect())
    database.execute(f"create role {name} login password '{name}' {options}")
    undo.callback(database.execute, f"drop owned by {name}; drop role {name}")
    database.execute(f"grant insert on user_logins to {name}; grant select, insert, update, delete on etl_ledger to {name}")
    undo.callback(database.execute, f"alter database {database.info.dbname} reset synchronous_commit")
    database.execute(f"alter role {name} set statement_timeout = '30s'; {change.format(name, database=database.info.dbname)}")
    finding, *others = findings(pipeline, DATABASE_SECRET_ID=its)
    assert (finding["area"], finding["state"]) == (USER, state)
    assert found in finding["found"]
    # A superuser may also read.
    assert ["may read" in other["found"] for other in others] == [True] * (options == "superuser")


IN_DATABASE = [
    pytest.param("drop index user_logins_masked_ip_idx", DATABASE, "warning", "index", id="no index"),
    pytest.param("alter table etl_ledger drop constraint etl_ledger_pkey", DATABASE, "failed", "has no unique index", id="no ledger key"),
    pytest.param("alter table user_logins alter locale type varchar(2)", DATABASE, "failed", "does not fit", id="narrow column"),
    pytest.param("drop table user_logins cascade", DATABASE, "failed", "no table user_logins", id="no table"),
    pytest.param("drop table etl_ledger", DATABASE, "failed", "no table etl_ledger", id="no ledger"),
    pytest.param("revoke insert on user_logins from login_etl", USER, "failed", "may not insert", id="no insert"),
    pytest.param("revoke insert on etl_ledger from login_etl", USER, "failed", "may not insert", id="no key"),
    pytest.param("grant select on user_logins to login_etl", USER, "warning", "may read", id="reads rows"),
    pytest.param("grant create on schema public to public", DATABASE, "failed", "everybody may create in the schema public", id="open schema"),
    pytest.param("alter table user_logins set unlogged", USER, "failed", "user_logins is emptied", id="unlogged"),
    pytest.param("delete from login_etl_migrations where name like '003%'", DATABASE, "warning", "not recorded as applied: 003", id="record"),
]


def test_a_schedule_that_does_not_run_is_found(pipeline, world):
    def look():
        return [check["found"] for check in findings(pipeline, DATABASE_NAME=world.name, MAINTENANCE_SCHEDULE="arn:of-a-schedule")]

    assert look() == ["the schedule has never deleted expired keys and rows"]
    with world.connect() as database:
        database.execute("insert into etl_maintenance (done_at) values (now())")
        assert look() == []
        database.execute("update etl_maintenance set done_at = now() - interval '25 hours'")
    assert look() == ["the schedule last deleted expired keys and rows 1 d 1 h ago"]


REFUSED = "a test row that it writes (and rolls back) is refused: SQLSTATE"
RAISING = "create function f() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$"
PARTITIONED = """alter table user_logins rename to old; create table user_logins (like old) partition by range (create_date);
                 create index on user_logins (masked_ip); create index on user_logins (masked_device_id);
                 grant insert on user_logins to login_etl"""
TRIED = [
    pytest.param("alter table user_logins enable row level security", f"{REFUSED} 42501: a row security policy", id="row security"),
    pytest.param("alter role login_etl in database {0} set default_transaction_read_only = on", f"{REFUSED} 25006", id="read-only"),
    pytest.param("alter role login_etl in database {0} set search_path = nowhere", f"{REFUSED} 42P01", id="search path"),
    pytest.param(f"{RAISING}; create trigger t before insert on user_logins for each row execute function f()", f"{REFUSED} P0001", id="trigger"),
    pytest.param(PARTITIONED, f"{REFUSED} 23514, table public.user_logins: no partition takes the row", id="no partition"),
]


@pytest.mark.parametrize("change, found", TRIED)
def test_a_row_is_tried_as_the_function_writes_it(pipeline, world, change, found):
    with world.connect() as database:
        database.execute(change.format(world.name))
    finding, *_ = [finding for finding in findings(pipeline, DATABASE_NAME=world.name) if finding["state"] != "unknown"]
    assert (finding["area"], finding["state"]) == (USER, "failed")
    assert finding["found"].startswith(found)
    with world.connect() as database:
        assert database.execute("select count(*) from etl_ledger").fetchone() == (0,)


@pytest.mark.parametrize("change, area, state, found", IN_DATABASE)
def test_each_fault_of_the_database_is_found_and_advised_migrations_repair_it(pipeline, world, change, area, state, found):
    def look():
        return findings(pipeline, DATABASE_NAME=world.name)

    assert look() == []
    with world.connect() as database:
        database.execute(change)
    first, *others = look()
    assert (first["area"], first["state"]) == (area, state)
    assert found in first["found"]
    assert not [other for other in others if other["state"] != "unknown"]
    if "`etlctl migrate`" in first["advice"]:
        assert world.run("migrate").returncode == 0
        assert look() == []


def test_failures_of_the_last_hour_are_found(pipeline, undo):
    undo.callback(pipeline.forget_log)
    record = {"MessageId": str(uuid.uuid4()), "ReceiptHandle": "", "Body": messages.WRONG_TYPE, "Attributes": {}, "MD5OfBody": ""}
    assert pipeline.invoke([record]) == {record["MessageId"]}
    with pipeline.without("etl_ledger"), pytest.raises(KeyError):
        pipeline.invoke([record | {"Body": messages.make(1)[0]}])
    for line in ("message failed", "batch failed"):
        pipeline.logged(line)
    whole, single = findings(pipeline)
    assert (whole["state"], single["state"]) == ("failed", "warning")
    assert "1 batch failed as a whole: Table" in whole["found"]
    assert "1 of 1 delivery failed: 1 × user_id is missing" in single["found"]


def snapshot(pipeline):
    """Everything that a check might change."""
    attributes = {url: pipeline.queues.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"] for url in pipeline.queues.urls}
    mapping = pipeline.functions.get_event_source_mapping(UUID=pipeline.mapping)
    function = pipeline.functions.get_function_configuration(FunctionName=pipeline.name)
    versions = pipeline.secrets.list_secret_version_ids(SecretId=pipeline.masking_secret)
    for answer in (mapping, function, versions):
        del answer["ResponseMetadata"]
    with pipeline.connect() as database:
        tables = [row[0] for row in database.execute("select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'")]
        counts = {table: database.execute(f"select count(*) from {table}").fetchone() for table in tables}
        objects = database.execute("select oid, relname, relacl::text from pg_class order by oid").fetchall()
        roles = database.execute("select rolname, rolconfig from pg_roles where rolname like 'login_etl%' order by 1").fetchall()
    return attributes, mapping, function, versions, counts, objects, roles


def test_doctor_changes_nothing(pipeline, undo):
    dead_message(pipeline, undo)
    before = snapshot(pipeline)
    findings(pipeline)
    assert snapshot(pipeline) == before
    url = pipeline.queues.dead_letter_queue_url
    (message,) = pipeline.queues.sqs.receive_message(QueueUrl=url, MessageSystemAttributeNames=["All"])["Messages"]
    assert message["Attributes"]["ApproximateReceiveCount"] == "1"


def test_a_stacks_name_and_a_database_user_are_enough(stack, pipeline):
    names = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "PATH", "ETLCTL_DATABASE_SECRET_ID"}
    environment = {name: None for name in pipeline.environment if name not in names}
    told = pipeline.run("doctor", "--stack", stack.name, "--json", environment=environment)
    checks = json.loads(told.stdout)
    assert {check["area"] for check in checks} == {check["area"] for check in pipeline.json("doctor")}
    assert [check for check in checks if check["state"] == "unknown"] == []
    assert [check["found"] for check in checks if check["area"] == "function"][0].startswith(f"{stack.function_name} has 256 MB and ")
    missing = pipeline.run("doctor", "--stack", "none-of-ours")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert "none-of-ours" in missing.stderr


def test_a_live_version_that_is_not_the_latest_is_found(pipeline, undo):
    version = pipeline.functions.publish_version(FunctionName=pipeline.name)["Version"]
    live = f"{pipeline.name}:{version}"

    def of_version():
        return [finding for finding in findings(pipeline, FUNCTION_NAME=live) if "live version" in finding["found"]]

    def set_memory(size):
        pipeline.functions.update_function_configuration(FunctionName=pipeline.name, MemorySize=size)
        pipeline.functions.get_waiter("function_updated_v2").wait(FunctionName=pipeline.name, WaiterConfig={"Delay": 0.1})

    assert of_version() == []
    undo.callback(set_memory, 128)
    set_memory(512)
    [finding] = of_version()
    assert (finding["area"], finding["state"], finding["found"]) == ("function", "warning", "the live version is not the latest")
    assert "another Release" in finding["advice"]


def test_people_get_a_list_by_area_with_advice_where_something_is_wrong(pipeline, undo):
    queue(VisibilityTimeout="60")(pipeline, undo)
    dead_message(pipeline, undo)
    said = pipeline.run("doctor", environment={"DATABASE_SECRET_ID": "none-of-ours"})
    text = said.stdout.replace(pipeline.queues.dead_letter_queue_url.rpartition("/")[2], "DEAD_LETTERS").replace(pipeline.name, "FUNCTION")
    for volatile, shown in ((r"good for .+", "good for TIME"), (r"[\d.]+ s apart", "SECONDS s apart"), (r"has \d+ connections", "has N connections")):
        text = re.sub(volatile, shown, text)
    assert said.returncode == 1
    assert text == (Path(__file__).parent / "golden" / "doctor.txt").read_text()


def test_the_sign_in_method_is_checked_against_the_users_role(pipeline, undo, servers):
    """RDS accepts only tokens from members of rds_iam."""
    tokens = undo.enter_context(Tokens(servers.postgres))
    name = f"etlctl_{uuid.uuid4().hex[:12]}"
    its = secret(pipeline, undo, username=name, password=name)
    database = undo.enter_context(pipeline.connect())
    database.execute(f"create role {name} login password '{name}' in role login_etl; alter role {name} set statement_timeout = '30s'")
    undo.callback(database.execute, f"drop role {name}")
    by_token = {"FUNCTION_DATABASE_AUTH": "iam", "FUNCTION_DATABASE_USER": name, "DATABASE_SECRET_ID": None}
    assert "is not in the role rds_iam" in findings(pipeline, **by_token)[0]["found"]
    tokens.admit(name)
    assert findings(pipeline, **by_token) == []
    assert [verdict.reason for verdict in tokens.verdicts] == [""]
    assert "accepts its tokens, and no password" in findings(pipeline, DATABASE_SECRET_ID=its)[0]["found"]
    # The operator may have no right to sign in as the function. That is no fault of the function.
    (finding,) = findings(pipeline, **by_token, AWS_SECRET_ACCESS_KEY="another")
    assert finding["state"] == "unknown"
    assert "rds-db:connect" in finding["found"]


def test_an_operator_signs_in_with_a_token_of_their_own(world, servers):
    user = world.user("login_etl_operator")["DATABASE_USER"]
    with Tokens(servers.postgres) as tokens:
        tokens.admit(user)
        its = ("--database-auth", "iam", "--database-user", user)
        assert world.run("migrate", "--check", *its).returncode == 0
        assert [(verdict.user, verdict.reason) for verdict in tokens.verdicts] == [(user, "")]
        tokens.admit(user, admitted=False)
        refused = world.run("migrate", "--check", *its)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert f'grant rds_iam to "{user}"' in refused.stderr
        in_clear = world.run("migrate", "--check", *its, "--database-tls", "disable")
        assert (in_clear.returncode, in_clear.stdout) == (3, "")
        assert "a token needs TLS" in in_clear.stderr
        assert len(tokens.verdicts) == 1
    assert world.run("migrate", "--check", "--database-auth", "token").returncode == 2
    assert "--database-user" in world.run("migrate", "--check", "--database-auth", "iam").stderr
