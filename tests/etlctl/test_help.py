"""Help, completions, exit statuses, settings and colours of `etlctl`."""

import json
import os
import re
import subprocess

import pytest
from world import paths
from world.localstack import CREDENTIALS

GOLDEN = paths.ROOT / "tests" / "etlctl" / "golden"
GROUPS = {
    (): "init migrate doctor mask find recover subject keys dlq mapping status completions".split(),
    ("subject",): "find export erase".split(),
    ("keys",): "list add activate remask retire".split(),
    ("dlq",): "list explain show redrive purge".split(),
    ("mapping",): "show check ddl try".split(),
}
COMMANDS = [(*group, name) for group, names in GROUPS.items() for name in names]
HELP = [("-h",), ("--help",), *((*command, "--help") for command in COMMANDS)]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The same key in every ring; here the key's id identifies the ring.
KEY = {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}


def shown(etlctl, *arguments, columns=100):
    result = etlctl.run(*arguments, environment={"COLUMNS": str(columns)})
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def golden(arguments):
    return GOLDEN / ("-".join(["etlctl", *arguments[:-1]]) + {"--help": ".txt", "-h": ".short.txt"}[arguments[-1]])


# Help.


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_matches_its_approved_copy(etlctl, arguments):
    text, file = shown(etlctl, *arguments), golden(arguments)
    if os.environ.get("ETLCTL_GOLDEN") == "renew":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == (file.read_text() if file.exists() else None), "if this is better, approve it: run the test with ETLCTL_GOLDEN=renew"


def test_every_command_and_nothing_else_has_approved_help(etlctl):
    for group, names in GROUPS.items():
        listed = shown(etlctl, *group, "--help").split("\nCommands:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in listed.splitlines()] == names
    assert set(GOLDEN.glob("etlctl*")) == {golden(arguments) for arguments in HELP}


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_every_command_option_and_argument_is_described(etlctl, arguments):
    text = shown(etlctl, *arguments)
    lines = text.split("\n\nExamples:")[0].splitlines()
    assert lines[0] and not lines[0].startswith("Usage:")
    # The description is on the same line or on the next.
    entries = [(line.strip(), after) for line, after in zip(lines, [*lines[1:], ""], strict=True) if re.match(r" {2,6}[-<\[a-z]", line)]
    assert "-h, --help" in " ".join(line for line, _ in entries)
    assert [line for line, after in entries if not re.search(r"\S {2,}\S", line) and not re.match(r" {10}\S", after)] == []


@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(etlctl, columns):
    assert columns - 15 < max(map(len, shown(etlctl, "migrate", "--help", columns=columns).splitlines())) <= columns


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_examples_and_lists_are_not_broken_on_a_terminal_of_80_columns(etlctl, arguments):
    narrow = shown(etlctl, *arguments, columns=80).splitlines()
    laid_out = [line for line in shown(etlctl, *arguments, columns=120).splitlines() if re.match(r"  (etlctl |--|\d )", line)]
    assert [line for line in laid_out if line not in narrow] == []


# Completions.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_every_command(etlctl, shell):
    script = shown(etlctl, "completions", shell)
    assert all(re.search(rf"\b{name}\b", script) for command in COMMANDS for name in command)


def test_bash_completes_commands(etlctl, tmp_path):
    script = shown(etlctl, "completions", "bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    ask = "\nCOMP_WORDS=(etlctl keys re) COMP_CWORD=2\n_etlctl etlctl re keys\necho ${COMPREPLY[@]}\n"
    assert subprocess.run(["bash"], input=script + ask, text=True, check=True, capture_output=True).stdout == "remask retire\n"


@pytest.mark.parametrize("arguments", [("--help",), ("completions", "bash")])
def test_a_closed_pipe_is_no_error(etlctl, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = etlctl.start(*arguments, stdout=writer)
    os.close(writer)
    assert (process.communicate()[1], process.returncode) == ("", 0)


# Exit statuses, and missing settings.


@pytest.mark.parametrize(
    "command", ["", "migrat", "help", "keys", "keys lst", "status --what", "find", "find --ip x --since yesterday", "mask --field user_id x"]
)
def test_wrong_usage_is_status_2_and_points_to_help(etlctl, command):
    result = etlctl.run(*command.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert "--help" in result.stderr


def test_the_version_is_printed(etlctl):
    assert re.fullmatch(r"etlctl \d+\.\d+\.\d+\n", shown(etlctl, "--version"))


@pytest.mark.parametrize(
    "command, given, names",
    [
        ("mask --field ip x", {}, ["MASKING_SECRET_ID", "--masking-secret", "--stack"]),
        ("keys list", {}, ["MASKING_SECRET_ID", "--masking-secret", "--stack"]),
        ("dlq list", {}, ["DLQ_URL", "--dlq-url", "--stack"]),
        ("migrate", {}, ["ETLCTL_DATABASE_SECRET_ID", "--database-secret", "DATABASE_USER", "DATABASE_PASSWORD"]),
        ("migrate", {"DATABASE_USER": "alice"}, ["DATABASE_PASSWORD"]),
        ("migrate", {"DATABASE_USER": "alice", "DATABASE_PASSWORD": "hunter2"}, ["DATABASE_HOST", "--database-host"]),
        ("migrate", {"DATABASE_PORT": "five"}, ["DATABASE_PORT", "1 to 65535"]),
        ("migrate", {"DATABASE_TLS": "prefer"}, ["DATABASE_TLS", "verify-full or disable"]),
        ("migrate", {"DATABASE_CA": "/none.pem"}, ["DATABASE_CA", "--database-ca", "/none.pem"]),
        ("mask --field ip x", {"AWS_CA_BUNDLE": "/none.pem"}, ["AWS_CA_BUNDLE", "/none.pem"]),
        ("mask --field ip x", {"AWS_REGION": None, "AWS_DEFAULT_REGION": None, "MASKING_SECRET_ID": "x"}, ["AWS_REGION", "AWS_PROFILE"]),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named_with_its_flag(etlctl, command, given, names):
    result = etlctl.run(*command.split(), environment=CREDENTIALS | {"AWS_EC2_METADATA_DISABLED": "true"} | given)
    assert (result.returncode, result.stdout) == (3, "")
    assert [name for name in names if name not in result.stderr] == []
    assert "hunter2" not in result.stderr


# Which certificates of AWS are trusted.


def test_the_bundle_has_the_roots_for_aws(empty_world):
    over_tls = {"AWS_ENDPOINT_URL": empty_world.environment["AWS_ENDPOINT_URL"].replace("http:", "https:")}
    assert empty_world.json("mask", "--field", "ip", "x", environment=over_tls)
    result = empty_world.run("mask", "--field", "ip", "x", environment=over_tls | {"AWS_CA_BUNDLE": None})
    assert (result.returncode, result.stdout) == (3, "")
    assert "AWS_CA_BUNDLE" in result.stderr


def test_a_system_without_roots_is_enough(empty_world):
    assert empty_world.json("mask", "--field", "ip", "x", environment={"SSL_CERT_FILE": "/none.pem", "AWS_CA_BUNDLE": None})


# Where settings come from.


@pytest.fixture
def key_of(empty_world, tmp_path):
    """Returns the id of the key that masks with these arguments. Three secrets each have a key named after the secret."""
    for name in ("flag", "variable", "file"):
        ring = {"active": name, "keys": {name: KEY}}
        empty_world.secrets.create_secret(Name=f"{empty_world.name}/{name}", SecretString=json.dumps(ring))

    def ask(*arguments, variable=None):
        environment = {"MASKING_SECRET_ID": variable and f"{empty_world.name}/{variable}"}
        (mask,) = empty_world.json("mask", "--field", "ip", "x", *arguments, environment=environment, cwd=tmp_path)
        return mask["key"]

    return ask


def test_precedence_is_flag_stack_environment_file(empty_world, key_of, stack, tmp_path):
    of_stack = key_of("--masking-secret", stack.masking_secret_arn)
    assert of_stack not in ("flag", "variable", "file")
    (tmp_path / ".env").write_text(f"# comment\nMASKING_SECRET_ID='{empty_world.name}/file'\n")
    assert key_of() == "file"
    assert key_of(variable="variable") == "variable"
    assert key_of("--stack", stack.name, variable="variable") == of_stack
    assert key_of("--stack", stack.name, "--masking-secret", f"{empty_world.name}/flag", variable="variable") == "flag"


def test_a_named_file_is_read_instead_of_dotenv(empty_world, key_of, tmp_path):
    (tmp_path / ".env").write_text("not read")
    (tmp_path / "other").write_text(f"MASKING_SECRET_ID={empty_world.name}/file\n")
    assert key_of("--env-file", "other") == "file"


@pytest.mark.parametrize("name, arguments", [(".env", ()), ("other", ("--env-file", "other"))])
def test_a_broken_file_is_named_and_not_quoted(etlctl, tmp_path, name, arguments):
    (tmp_path / name).write_text("DATABASE_USER=alice\nDATABASE_PASSWORD='hunter2\n")
    result = etlctl.run("mask", "--field", "ip", "x", *arguments)
    assert (result.returncode, result.stdout) == (3, "")
    assert name in result.stderr and "hunter2" not in result.stderr


def test_a_named_file_that_does_not_exist_is_an_error(etlctl):
    result = etlctl.run("mask", "--field", "ip", "x", "--env-file", "none.env")
    assert (result.returncode, result.stdout) == (3, "")
    assert "none.env" in result.stderr


# Colours.


@pytest.mark.parametrize("arguments", [("--help",), ("migrate", "--check"), ("mask", "--field", "ip", "x", "--masking-secret", "none")])
def test_colours_are_only_on_a_terminal_and_can_be_turned_off(empty_world, arguments):
    result = empty_world.run(*arguments)
    plain = result.stdout + result.stderr
    coloured, status = empty_world.on_terminal(*arguments)
    assert status == result.returncode
    assert COLOUR.search(coloured) and not COLOUR.search(plain)
    assert not COLOUR.search(empty_world.on_terminal(*arguments, environment={"NO_COLOR": "1"})[0])
    assert not COLOUR.search(empty_world.on_terminal(*arguments, environment={"TERM": "dumb"})[0])
