"""The product's own stack, built and deployed by SAM CLI into a local world's LocalStack."""

import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

from world import paths
from world.servers import Servers

NAME = "login-etl"
# Short, so that a bad message reaches the dead-letter queue while somebody watches.
PARAMETERS = {"FunctionTimeout": 1, "BatchWindow": 1, "MaxReceiveCount": 3}
TICK_SECONDS = 10


class CommandFailed(Exception):
    """A tool failed; the text has its command and the end of its output."""


class Stack:
    """The deployed stack: its queues, its function, the keyring's secret."""

    def __init__(self, servers: Servers, name: str = NAME):
        self.name = name
        self.localstack = servers.localstack
        described = self.localstack.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]
        outputs = {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}
        self.queue_url = outputs["QueueUrl"]
        self.dead_letter_queue_url = outputs["DeadLetterQueueUrl"]
        self.function_name = outputs["FunctionName"]
        self.masking_secret_arn = outputs["MaskingSecretArn"]

    def environment(self) -> dict[str, str]:
        return {
            "QUEUE_URL": self.queue_url,
            "DLQ_URL": self.dead_letter_queue_url,
            "FUNCTION_NAME": self.function_name,
            "MASKING_SECRET_ID": self.masking_secret_arn,
        }

    def key(self) -> bytes:
        """The AES key of the generated keyring."""
        secret = self.localstack.client("secretsmanager").get_secret_value(SecretId=self.masking_secret_arn)
        return bytes.fromhex(json.loads(secret["SecretString"])["key"])

    def log(self) -> list[dict]:
        """The function's log lines so far: its own, the platform's, and the metrics. CloudWatch has the same, a little later."""
        return [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]

    def log_text(self) -> str:
        """All that the function's environments wrote."""
        files = sorted(self.localstack.function_logs.glob(f"{self.function_name}-*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def depth(self, queue_url: str) -> tuple[int, int]:
        """How many of a queue's messages wait, and how many are being handled."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        attributes = self.localstack.client("sqs").get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return int(attributes[names[0]]), int(attributes[names[1]])

    def enable_mapping(self, enabled: bool) -> None:
        """Switches the event source mapping on or off, and returns when it is."""
        functions = self.localstack.client("lambda")
        mapping = functions.list_event_source_mappings(FunctionName=self.name)["EventSourceMappings"][0]["UUID"]
        functions.update_event_source_mapping(UUID=mapping, Enabled=enabled)
        wanted = "Enabled" if enabled else "Disabled"
        deadline = time.monotonic() + 60
        while (state := functions.get_event_source_mapping(UUID=mapping)["State"]) != wanted:
            if time.monotonic() > deadline:
                raise CommandFailed(f"the event source mapping is {state}, and does not become {wanted}")
            time.sleep(0.1)


def build() -> None:
    """Builds the function for this machine, as `sam build` builds it for production."""
    run(
        *("sam", "build", "--template-file", paths.ROOT / "template.yaml", "--build-dir", paths.SAM_BUILD),
        *("--parameter-overrides", f"Architecture={architecture()}"),
        what="Building the function (some minutes the first time)",
    )


def deploy(servers: Servers, name: str = NAME, **parameters: object) -> Stack:
    """Deploys what was built; `parameters` are the template's, beyond those that say where the servers are."""
    parameters = parameters_for(servers) | parameters
    run(
        *("sam", "deploy", "--template-file", paths.SAM_BUILD / "template.yaml", "--stack-name", name),
        *("--resolve-s3", "--capabilities", "CAPABILITY_IAM", "--no-confirm-changeset", "--no-progressbar"),
        *("--parameter-overrides", *(f"{key}={value}" for key, value in parameters.items())),
        what="Deploying the stack",
        # SAM CLI looks every five seconds whether CloudFormation is done.
        environment=os.environ | servers.environment() | {"SAM_CLI_POLL_DELAY": "0.5"},
    )
    return Stack(servers, name)


def parameters_for(servers: Servers) -> dict[str, object]:
    """The template's parameters for these servers and this machine."""
    settings = servers.database_settings()
    return {
        "Architecture": architecture(),
        "DatabaseSecretArn": servers.database_secret_arn,
        "DatabaseHost": settings["DATABASE_HOST"],
        "DatabasePort": settings["DATABASE_PORT"],
        "DatabaseName": settings["DATABASE_NAME"],
        "DatabaseCaFile": settings["DATABASE_CA_FILE"],
        **PARAMETERS,
    }


def architecture() -> str:
    return "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"


def run(*command: str | Path, what: str, environment: dict[str, str] | None = None) -> None:
    """Runs a command, saying what it does and, while it lasts, that it goes on. Raises `CommandFailed`."""
    print(f"{what} ...")
    log = paths.LOCAL / f"{command[0]}-{command[1]}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=paths.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while True:
                try:
                    status = process.wait(TICK_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    print(f"  ... {time.monotonic() - started:.0f} s  {last_line(log)}")
        except BaseException:
            # With all it started: a build goes on without its `sam`.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if status != 0:
        tail = "\n  ".join(log.read_text(errors="replace").splitlines()[-30:])
        raise CommandFailed(f"{' '.join(map(str, command[:2]))} failed (status {status}); the end of {log}:\n  {tail}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:80] if lines else ""
