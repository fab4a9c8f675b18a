"""Measures the function's part of a cold start: from a process's start to its first request for an event."""

import hashlib
import random
import shutil
import socket
import ssl
import statistics
import struct
import time
from pathlib import Path

import certifi
from world import paths
from measure.bench import Bench
from measure.report import COLOURS, bars, spread, table
from measure.runtime import Runtime
from measure.secretsmanager import SecretsManager
from world.localstack import free_port
from world.roots import ROOTS
from world.servers import DATABASE_USER
from world.tokens import Tokens

NAME = "cold"
TITLE = "Cold start"
ROUNDS, QUICK_ROUNDS = 31, 4
# PostgreSQL's default for hashing a password in the client: https://www.postgresql.org/docs/current/sasl-authentication.html
SCRAM_ROUNDS = 4096
SHOWN = {
    "hello": "hello world, Rust",
    "login-etl": "login-etl",
    "login-etl-iam": "login-etl, signing in by a token",
    "login-etl-localstack": "login-etl, secrets from LocalStack",
    "python-hello": "hello world, Python",
    "python": "Python with the same duties",
    "python-localstack": "Python, secrets from LocalStack",
}
# Each start does the work of the one before, and one thing more.
STEPS = {
    "hello": "the process, Lambda's runtime client, and its request for an event: the hello world",
    "secrets": "the settings, the AWS SDK's client, and two secrets, which are read at once and without TLS",
    "secrets-tls": "TLS to Secrets Manager",
    "plain": "a session with the database, without TLS",
    "login-etl": "TLS to the database",
}
ALL_ROOTS = "login-etl-all-roots"
TOKEN_USER = "bench_token"


class AnyToken(Tokens):
    """Accepts every token, because the time that RDS takes to check one is not ours to measure."""

    def judge(self, user: str, token: str) -> bool:
        return True


def measure(bench: Bench) -> dict:
    if missing := [name for name in ("hello", "login-etl") if not bench.program(name).exists()]:
        return {"skipped": f"no {' and no '.join(missing)} in {bench.binaries.name}"}
    environment = bench.environment(bench.database("bench_cold"))
    reader = bench.servers.localstack.client("secretsmanager")
    names = (environment["MASKING_SECRET_ID"], environment["DATABASE_SECRET_ID"])
    secrets = {name: reader.get_secret_value(SecretId=name)["SecretString"] for name in names}
    # PostgreSQL's certificate and key, issued for `localhost`.
    authority = bench.servers.postgres.ca_file
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    with SecretsManager(secrets, tls) as https, SecretsManager(secrets, None) as http, AnyToken(bench.servers.postgres) as tokens:
        with bench.servers.postgres.connect(autocommit=True) as admin:
            admin.execute(f"drop role if exists {TOKEN_USER}")
            admin.execute(f"create role {TOKEN_USER} login in role {DATABASE_USER}")
        tokens.admit(TOKEN_USER)
        trusting = environment | trust(authority, bench.directory / "roots")
        # As in template.yaml.
        of_python, trusting = trusting, trusting | {"SSL_CERT_FILE": "/dev/null", "AWS_CA_BUNDLE": str(amazon_and(authority, bench.directory))}
        deployed = trusting | {"AWS_ENDPOINT_URL": https.endpoint}
        by_token = {"DATABASE_AUTH": "iam", "DATABASE_USER": TOKEN_USER, "DATABASE_SECRET_ID": ""}
        refused = {"DATABASE_TLS": "disable", "DATABASE_PORT": str(free_port())}
        hello, function = bench.command("hello"), bench.command("login-etl")
        python = [str(bench.peers_python), str(paths.ROOT / "benches" / "peers" / "cold.py")]
        contenders = {
            "hello": (hello, environment),
            "secrets": (function, trusting | refused | {"AWS_ENDPOINT_URL": http.endpoint}),
            "secrets-tls": (function, deployed | refused),
            "plain": (function, deployed | {"DATABASE_TLS": "disable"}),
            "login-etl": (function, deployed),
            ALL_ROOTS: (function, {name: value for name, value in deployed.items() if name != "SSL_CERT_FILE"}),
            "login-etl-iam": (function, deployed | by_token),
            "login-etl-localstack": (function, environment),
            "python-hello": ([*python, "--hello"], environment),
            "python": (python, of_python | {"AWS_ENDPOINT_URL": https.endpoint}),
            "python-localstack": (python, environment),
        }
        rounds = QUICK_ROUNDS if bench.quick else ROUNDS
        times = {name: {"ns": [], "cpu_ns": []} for name in contenders}
        session, scram = [], []
        order, chance = list(contenders), random.Random(bench.seed)
        # The first round, not counted, fills the page cache and compiles Python's modules.
        for number in range(rounds + 1):
            bench.say(f"cold starts, round {number} of {rounds}")
            chance.shuffle(order)
            for name in order:
                ns, cpu_ns = start(*contenders[name], bench.directory / f"cold-{name}.log")
                if number:
                    times[name]["ns"].append(ns)
                    times[name]["cpu_ns"].append(cpu_ns)
            if number:
                session.append(asked_for_password(bench.servers.postgres.port, environment["DATABASE_NAME"]))
                scram.append(salted_password())
        return {
            "rounds": rounds,
            "times": times,
            "secret_ns": https.service_ns[2:],
            "session_ns": session,
            "scram_ns": scram,
        }


def start(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, int]:
    """Runs a process until it asks for an event; returns its elapsed time and its CPU time, in ns."""
    with Runtime(command, environment, log) as runtime:
        ns = runtime.ready()
        return ns, runtime.end()


def trust(authority: Path, directory: Path) -> dict[str, str]:
    """Settings that add our CA to the roots of the machine and of boto3's bundle, which stay in use as in Lambda."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    shutil.copy(authority, directory)
    bundle = directory.with_suffix(".pem")
    bundle.write_text(Path(certifi.where()).read_text() + authority.read_text())
    return {"SSL_CERT_DIR": str(directory), "AWS_CA_BUNDLE": str(bundle)}


def amazon_and(authority: Path, directory: Path) -> Path:
    """A file with the built-in roots for AWS's endpoints, and our CA."""
    file = directory / "amazon-and-ours.pem"
    file.write_text((ROOTS / "amazon.pem").read_text() + authority.read_text())
    return file


def asked_for_password(port: int, database: str) -> int:
    """The ns from opening a connection until PostgreSQL's new server process asks for the password."""
    parameters = f"user\0{DATABASE_USER}\0database\0{database}\0\0".encode()
    began = time.monotonic_ns()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        # https://www.postgresql.org/docs/current/protocol-message-formats.html: StartupMessage, then AuthenticationSASL.
        connection.sendall(struct.pack(">II", 8 + len(parameters), 3 << 16) + parameters)
        if connection.recv(1) != b"R":
            raise RuntimeError("PostgreSQL does not ask for a password")
        return time.monotonic_ns() - began


def salted_password() -> int:
    began = time.monotonic_ns()
    hashlib.pbkdf2_hmac("sha256", b"password", bytes(16), SCRAM_ROUNDS)
    return time.monotonic_ns() - began


def text(result: dict, all_results: dict) -> str:
    if "skipped" in result:
        return f"Not measured: {result['skipped']}."
    times = {name: {figure: [ns / 1e6 for ns in samples] for figure, samples in one.items()} for name, one in result["times"].items()}
    whole, hello, python = (times[name]["ns"] for name in ("login-etl", "hello", "python"))
    to_hello, to_python = ratios(whole, hello), ratios(whole, python)
    by_token = ratios(times["login-etl-iam"]["ns"], hello)
    starts = [
        (SHOWN[name], spread(times[name]["ns"]), spread(ratios(times[name]["ns"], hello)), spread(times[name]["cpu_ns"])) for name in SHOWN
    ]
    names = list(STEPS)
    steps = [(STEPS["hello"], spread(hello), spread(times["hello"]["cpu_ns"]))]
    for before, name in zip(names, names[1:], strict=False):
        gained = {figure: differences(times[name][figure], times[before][figure]) for figure in ("ns", "cpu_ns")}
        steps.append((STEPS[name], spread(gained["ns"], "{:.1f}"), spread(gained["cpu_ns"], "{:.1f}")))
    steps.append(("all of it, as measured", spread(whole), spread(times["login-etl"]["cpu_ns"])))
    roots = {figure: differences(times[ALL_ROOTS][figure], times["login-etl"][figure]) for figure in ("ns", "cpu_ns")}
    ms = {name: statistics.median(result[name]) / 1e6 for name in ("secret_ns", "session_ns", "scram_ns")}
    return f"""\
How long a new environment takes until it can handle its first event: from the process's start to its
first request for an event. Lambda's part, fetching the package and starting a sandbox, comes before that and is not included. The function
reads both secrets, parses the keyring and connects to PostgreSQL, with TLS that verifies the server, and SCRAM. The programs are in the page
cache. {result["rounds"]} rounds.

{table(("", "ms", "× hello world", "CPU, ms"), starts)}

{bars([
    ("cold start, × hello world in Rust", "≤ 8", spread(to_hello, "{:.1f}"), statistics.median(to_hello) <= 8),
    ("cold start by a token, × hello world in Rust", "≤ 7", spread(by_token, "{:.1f}"), statistics.median(by_token) <= 7),
    ("cold start ÷ Python with the same duties", "≤ 1/15", spread([1 / ratio for ratio in to_python], "1/{:.1f}"),
     statistics.median(to_python) <= 1 / 15),
])}

![Cold starts](images/performance-cold.svg)

Secrets come from a stand-in for Secrets Manager with TLS, which answers a request in {ms["secret_ns"]:.2f} ms. LocalStack is a
development tool, and its own time would count as the function's: the bars are measured without it.

Where the time goes, measured by starts that each do one thing more than the one before:

{table(("what", "ms", "CPU, ms"), steps)}

For the session with the database, the server starts a process, which takes {ms["session_ns"]:.1f} ms until it asks for the
password; SCRAM has the client salt the password in {SCRAM_ROUNDS:,} rounds, which takes {ms["scram_ns"]:.1f} ms in OpenSSL; then the
server sets up the session. The machine's roots are not read: the function has AWS's roots built in, and the template keeps OpenSSL from reading
all others (`SSL_CERT_FILE=/dev/null`). If OpenSSL reads them, the start is {spread(roots["ns"], "{:.1f}")} ms longer,
{spread(roots["cpu_ns"], "{:.1f}")} ms of them CPU."""


def ratios(samples: list[float], others: list[float]) -> list[float]:
    """One ratio per round."""
    return [sample / other for sample, other in zip(samples, others, strict=True)]


def differences(samples: list[float], others: list[float]) -> list[float]:
    """One difference per round."""
    return [sample - other for sample, other in zip(samples, others, strict=True)]


def plots(result: dict, all_results: dict, directory: Path) -> None:
    if "skipped" in result:
        return
    import matplotlib.pyplot as plt

    colours = {"hello": COLOURS["hello"], "login-etl": COLOURS["ours"], "python-hello": "#999999", "python": COLOURS["original"]}
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    for name in reversed(colours):
        ms = statistics.median(result["times"][name]["ns"]) / 1e6
        bar = axes.barh(SHOWN[name], ms, color=colours[name], height=0.6)
        axes.bar_label(bar, [f"{ms:.1f}"], padding=4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms from the process's start to its first request for an event")
    figure.savefig(directory / "performance-cold.svg", metadata={"Date": None})
