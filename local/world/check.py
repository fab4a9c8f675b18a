"""Runs ./local/test: builds, and runs the checks, several at once if they mostly wait for different things."""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from world import arguments, build, command, fresh, fuzz, instructions, paths, pgbouncer, stack, template
from world.command import CommandFailed, Interrupted
from world.postgres import PostgresError
from world.servers import Servers, alone

WORLD = paths.TEST_WORLD
TICK_SECONDS = 60
# Tests wait for servers more than they compute, and some fail if they get too little CPU, so compilers run at a lower priority. Most tests need
# the function first, then etlctl; no test needs the other builds.
NICE = 15
NICE_PROGRAMS = 5
# The steps of a row run one after the other; rows run in parallel, some at a time, so the longest come first. Cargo runs one build at a time in a
# target directory.
ROWS = (
    ("build function", "instructions", "fuzz"),
    ("build etlctl", "build tests", "format", "lints", "dependencies"),
    ("prose", "workflows", "template", "executor", "fresh", "soak"),
    ("function",),
    ("keys",),
    ("etlctl",),
    ("deployments",),
    ("remask",),
    ("deployed",),
    ("incidents",),
)
# Two of them compile, at a lower priority. With fewer, a long row would begin when the others end; with more, tests disturb one another.
ROWS_AT_ONCE = 7
# The parts of etlctl's tests that have checks of their own.
KEYS = tuple(f"tests/etlctl/test_{name}.py" for name in ("find", "keys", "recover", "subject"))
REMASK = "tests/etlctl/test_remask.py"
NO_PROSE = {".lock", ".pem", ".svg", ".txt"}
NEEDS = {
    "build function": {"fresh", "deployed", "deployments", "etlctl", "keys", "remask", "soak", "incidents"},
    "build etlctl": {"function", "deployed", "etlctl", "keys", "remask", "incidents"},
    "build tests": {"function"},
}
BUILDS = {
    "build function": partial(build.function, quiet=True),
    "build etlctl": partial(build.etlctl, quiet=True, nice=NICE_PROGRAMS),
    "build tests": partial(build.tests, quiet=True, nice=NICE_PROGRAMS),
}


class Run:
    """One run of some checks: the builds they wait for, the running checks, and the results."""

    def __init__(self, wanted: list[str]):
        self.wanted = wanted
        self.started = time.monotonic()
        self.running: dict[str, float] = {}
        self.passed: dict[str, bool] = {}
        self.left_out: list[str] = []
        self.built = {name: Future() for name in BUILDS}
        self.lock = threading.Lock()

    def all(self) -> bool:
        """Whether all checks passed."""
        with ThreadPoolExecutor(ROWS_AT_ONCE) as threads:
            rows = [threads.submit(self.row, row) for row in ROWS]
            try:
                self.watch(rows)
            finally:
                # Otherwise a waiting row would begin when another ends.
                for row in rows:
                    row.cancel()
                if not all(row.done() for row in rows):
                    command.stop_all()
        for row in rows:
            row.result()
        return all(self.passed.values())

    def row(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name in BUILDS:
                if NEEDS[name] & set(self.wanted):
                    self.build(name)
            elif name in self.wanted:
                self.check(name)

    def build(self, name: str) -> None:
        try:
            self.built[name].set_result(self.one(name, BUILDS[name]) is not False)
        except BaseException as error:
            self.built[name].set_exception(error)
            raise

    def check(self, name: str) -> None:
        if not all(self.built[needed].result() for needed in BUILDS if name in NEEDS[needed]):
            self.passed[name] = False
            self.say(f"FAILED   {name}: a build that it needs failed")
            return
        left_out = self.one(name, CHECKS[name])
        if isinstance(left_out, str):
            self.left_out.append(f"{name}: {left_out}")

    def one(self, name: str, step: Callable[[], str | None]) -> str | bool:
        """Runs a step; returns whether it passed, or what it left out."""
        self.running[name] = started = time.monotonic()
        answer: str | bool | None = None
        failure = ""
        try:
            answer = step()
        except Interrupted:
            raise
        except (CommandFailed, PostgresError, RuntimeError, OSError, instructions.TooMany) as error:
            failure = str(error)
        except Exception:
            failure = traceback.format_exc()
        finally:
            del self.running[name]
        seconds = f"{time.monotonic() - started:4.0f} s"
        self.passed[name] = not failure
        self.say(f"FAILED   {name:14} {seconds}\n{failure}\n" if failure else f"passed   {name:14} {seconds}")
        return answer if isinstance(answer, str) else not failure

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)

    def now(self) -> str:
        """The elapsed time, and the running steps."""
        running = ", ".join(f"{name} {progress(name)}".strip() for name in list(self.running))
        return f"{time.monotonic() - self.started:.0f} s: {running}"

    def watch(self, rows: list[Future]) -> None:
        """Returns when all rows are done; meanwhile shows the running steps."""
        status = Console().status("") if sys.stdout.isatty() else None
        if status:
            status.start()
        last = time.monotonic()
        try:
            while not all(row.done() for row in rows):
                time.sleep(0.5)
                if status:
                    status.update(self.now())
                elif time.monotonic() - last >= TICK_SECONDS:
                    last = time.monotonic()
                    self.say(f"  ... {self.now()}")
        finally:
            if status:
                status.stop()


def progress(name: str) -> str:
    """A step's progress, if its log shows counts."""
    with suppress(OSError):
        return command.counted(paths.LOGS / f"{name.replace(' ', '-')}.log")
    return ""


def main() -> int:
    options = arguments.parse("test")
    wanted = options.check or list(CHECKS)
    print(f"Running {len(wanted)} checks; their output goes to {command.shorten(paths.LOGS)}/", flush=True)
    with alone(WORLD):
        run = Run(wanted)
        passed = run.all()
    results = {name: run.passed.get(name, False) for name in CHECKS if name in wanted}
    failed = [name for name, well in results.items() if not well]
    print(f"\nchecks: {len(results) - len(failed)} passed, {len(failed)} failed")
    print(f"in {time.monotonic() - run.started:.0f} s")
    if failed:
        print(f"Failed: {', '.join(failed)}. Their whole output is in {command.shorten(paths.LOGS)}/")
        print(f"To repeat only these: ./local/test {' '.join(failed)}")
    for left_out in run.left_out:
        print(f"Left out: {left_out}")
    return 0 if passed else 1


def quietly(name: str, *words: str | Path, nice: int = 0, directory: Path = paths.ROOT, **environment: str) -> str:
    """Runs a command of a check; its output goes to the check's log."""
    settings = build.environment() | environment
    return command.run(*words, what=name, log=paths.LOGS / f"{name}.log", environment=settings, quiet=True, nice=nice, directory=directory)


def check_format() -> None:
    quietly("format", "cargo", "fmt", "--all", "--check")


def check_lints() -> str | None:
    """Checks the workspace's sources with clippy and rustdoc, using the dependencies that the build of the tests has compiled."""
    try:
        # rustup puts the command on PATH even if the component is missing.
        quietly("lints-version", "clippy-driver", "--version")
    except (CommandFailed, FileNotFoundError):
        return "clippy is not installed (rustup component add clippy)"
    target = paths.ROOT / "target"
    # With directories of its own, cargo leaves the tests' programs as they are.
    directories = {"CARGO_BUILD_BUILD_DIR": str(target), "CARGO_TARGET_DIR": str(target / "lints")}
    wrapper = str(Path(__file__).with_name("lint"))
    words = ("cargo", "build", "--workspace", "--bins", "--tests", "--benches", "--locked")
    quietly("lints", *words, nice=NICE, RUSTC_WORKSPACE_WRAPPER=wrapper, **directories)
    return None


def check_dependencies() -> str | None:
    """Checks licences, bans and sources, and known vulnerabilities if their database is reachable."""
    if not shutil.which("cargo-deny"):
        return "cargo-deny is not installed (cargo install cargo-deny); the CI workflow installs it"
    quietly("dependencies", "cargo", "deny", "--locked", "check", "licenses", "bans", "sources")
    try:
        quietly("dependencies-advisories", "cargo", "deny", "--locked", "check", "advisories")
    except CommandFailed as failure:
        if "failed to fetch advisory database" not in str(failure):
            raise
        return "the database of known vulnerabilities cannot be reached"
    return None


def check_template() -> None:
    """Runs SAM's linter on the template, and two further linters on the CloudFormation that SAM makes of it: each finds what others miss."""
    quietly("template-sam", "sam", "validate", "--lint", "--region", "us-east-1")
    key = "arn:aws:kms:us-east-1:123456789012:key/1"
    expanded = []
    for name, parameters in {
        "standard": {},
        "fifo": {"QueueType": "fifo", "KmsKeyArn": key, "LogKmsKeyArn": key, "SecretsKmsKeyArn": key},
        "gradual": {"GradualDeployment": "true", "MaximumPollers": "2"},
    }.items():
        file = paths.LOCAL / f"template.{name}.json"
        file.write_text(json.dumps(template.expand(parameters), indent=2))
        expanded.append(file)
    # SAM resolves a parameter that no condition uses, which then looks unused.
    quietly("template-cfn-lint", "cfn-lint", "--ignore-checks", "W2001", "--", *expanded)
    files = [word for file in expanded for word in ("--file", file)]
    # By its interpreter: a script's #! line cannot name an interpreter whose path has a space.
    checkov = paths.CHECKOV / "bin" / "python", paths.CHECKOV / "bin" / "checkov"
    quietly("template-checkov", *checkov, "--skip-download", "--framework", "cloudformation", "--compact", "--quiet", *files)
    pytest("template", "tests/template")


def check_prose() -> None:
    """Checks links between pages, and English spelling."""
    quietly("prose-links", "md-dead-link-check", "--no-color", "--config", paths.ROOT / "local" / "links.toml")
    tracked = quietly("prose-files", "git", "ls-files", "-z").split("\0")
    # Only our own text, without generated files and fuzzing inputs.
    ours = [file for file in tracked if file and not file.startswith("fuzz/corpus/") and Path(file).suffix not in NO_PROSE]
    quietly("prose-spelling", "codespell", "--ignore-words-list", "inout,nwe", *ours)


def check_workflows() -> None:
    """Checks the workflows with actionlint (correctness) and zizmor (security), compose.yaml against its schema, and all scripts with shellcheck."""
    workflows = sorted((paths.ROOT / ".github" / "workflows").glob("*.yml"))
    quietly("workflows-actionlint", "actionlint", "-shellcheck", "shellcheck", "-pyflakes", "", *workflows)
    quietly("workflows-zizmor", "zizmor", "--offline", "--quiet", "--strict-collection", ".github")
    quietly("workflows-compose", "check-jsonschema", "--builtin-schema", "vendor.compose-spec", paths.ROOT / "local" / "compose.yaml")
    if shutil.which("shellcheck"):
        scripts = [file for file in (paths.ROOT / "local").iterdir() if file.is_file() and file.read_bytes().startswith((b"#!/usr/bin/env bash", b"# shellcheck"))]
        quietly("workflows-shellcheck", "shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", *scripts)


def check_fresh() -> str | None:
    return fresh.check()


def check_function() -> None:
    """Runs the library's tests on their own PostgreSQL and LocalStack: with default settings, and with `COPY` and without prepared statements."""
    with Servers(paths.FUNCTION_WORLD) as servers:
        environment = {"PYTHON": sys.executable, **servers.environment(), **servers.trust()}
        # The cached result of the finished build. Running cargo here would wait for other checks' builds.
        tests = BUILDS["build tests"]()
        for test in tests:
            quietly(f"function-{test.name}", test.program, directory=test.directory, **environment)
        [it] = [test for test in tests if test.name == "it-test"]
        # The first run's large batches, the soak, and the test behind a pooler cover the other two combinations.
        quietly("function-copy", it.program, directory=it.directory, **environment, COPY_THRESHOLD="1", PREPARED_STATEMENTS="false")


def check_deployed() -> str | None:
    """Tests the deployed stack: loading messages, its logs and its metrics."""
    on_stack("deployed", WORLD, "tests/end_to_end", "tests/packaging", "--ignore", "tests/end_to_end/test_deployment.py")
    return None if pgbouncer.program() else f"the function behind a pooler: {pgbouncer.MISSING}"


def check_deployments() -> None:
    """Tests stacks of every kind, and stack updates, on their own servers: these tests mostly wait for CloudFormation."""
    with Servers(paths.DEPLOYMENTS_WORLD):
        pytest("deployments", "tests/end_to_end/test_deployment.py", LOGIN_ETL_WORLD=str(paths.DEPLOYMENTS_WORLD))


def check_etlctl() -> None:
    """What else etlctl does, and partitioned tables, on servers of its own, so that it runs in parallel with the other checks of a stack."""
    on_stack("etlctl", paths.ETLCTL_WORLD, "tests/etlctl", "tests/incidents", "tests/partitioning", *(word for file in (*KEYS, REMASK) for word in ("--ignore", file)))


def check_keys() -> None:
    """What etlctl does with masked values and their keys."""
    on_stack("keys", paths.KEYS_WORLD, *KEYS)


def check_remask() -> None:
    """Rewriting all masks under another key, which is the longest of etlctl's tests."""
    on_stack("remask", paths.REMASK_WORLD, REMASK)


def on_stack(name: str, world: Path, *tests: str) -> None:
    """Runs tests on servers with the stack deployed."""
    with Servers(world) as servers:
        # A longer timeout than the demo's, so that a pause of the machine causes no further receive, because tests count receives.
        stack.deploy(servers, quiet=True, LogLevel="TRACE", FunctionTimeout=3, SecretsTtl=2)
        pytest(name, *tests, LOGIN_ETL_WORLD=str(world))


def check_instructions() -> str | None:
    """Compares the function's instruction counts, which are more stable than times, with recorded ceilings."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed (apt-get install valgrind)"
    return instructions.check()


def check_fuzz() -> None:
    fuzz.check(4)


def check_soak() -> None:
    """Runs the soak with a fixed schedule; `./local/soak` makes a new one."""
    quietly("soak", sys.executable, "-m", "world.soak", "--quick", "--seed", "1", "--build", paths.SAM_BUILD)


def check_incidents() -> None:
    """Plays two of the five incidents, one of the database and one of the secrets; `./local/incidents` plays all."""
    only = ("--only", "database-down", "--only", "keyring-broken")
    etlctl = paths.ROOT / "target" / "debug" / "etlctl"
    quietly("incidents", sys.executable, "-m", "world.incidents", *only, "--build", paths.SAM_BUILD, "--etlctl", etlctl)


def check_executor() -> None:
    pytest("executor", "local/executor/tests")


def pytest(name: str, *words: str, **environment: str) -> None:
    quietly(name, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=25", *words, **environment)


CHECKS = {name: globals()[f"check_{name}"] for name in arguments.CHECKS}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, Interrupted):
        sys.exit("\nInterrupted; everything is stopped.")
