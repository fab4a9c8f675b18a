"""The product's own stack, built and deployed by SAM CLI into a local world's LocalStack."""

import json
import os
import re
import time
from functools import partial
from pathlib import Path

from world import command, paths
from world.build import architecture
from world.command import CommandFailed
from world.servers import Servers

NAME = "login-etl"
BUCKET = "login-etl-artifacts"
# Short, so that a bad message reaches the dead-letter queue while somebody watches.
PARAMETERS = {"FunctionTimeout": 1, "BatchWindow": 1, "MaxReceiveCount": 3}


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
        """The function's log lines so far: its own, the platform's, and the metrics. CloudWatch gets the same lines a little later."""
        return [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]

    def log_text(self) -> str:
        """The whole output of the function's environments."""
        files = sorted(self.localstack.function_logs.glob(f"{self.function_name}-*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def depth(self, queue_url: str) -> tuple[int, int]:
        """The number of a queue's visible messages, and of those in flight."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        attributes = self.localstack.client("sqs").get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)["Attributes"]
        return int(attributes[names[0]]), int(attributes[names[1]])

    def enable_mapping(self, enabled: bool) -> None:
        """Enables or disables the event source mapping, and returns when the change has taken effect."""
        functions = self.localstack.client("lambda")
        mapping = functions.list_event_source_mappings(FunctionName=self.name)["EventSourceMappings"][0]["UUID"]
        functions.update_event_source_mapping(UUID=mapping, Enabled=enabled)
        wanted = "Enabled" if enabled else "Disabled"
        deadline = time.monotonic() + 60
        while (state := functions.get_event_source_mapping(UUID=mapping)["State"]) != wanted:
            if time.monotonic() > deadline:
                raise CommandFailed(f"the event source mapping is still {state}, not {wanted}")
            time.sleep(0.1)


def deploy(servers: Servers, name: str = NAME, build: Path | None = None, quiet: bool = False, **parameters: object) -> Stack:
    """Deploys a build, by default production's. `parameters` are added to those of `parameters_for`, which connect the stack with the servers."""
    # SAM CLI accepts no empty value; parameters that may be empty are empty by default.
    parameters = {name: value for name, value in (parameters_for(servers) | parameters).items() if value != ""}
    # SAM CLI would create one with a separate stack, which takes 15 s.
    servers.localstack.client("s3").create_bucket(Bucket=BUCKET)
    log = paths.LOGS / f"deploy-{servers.name}-{name}.log"
    command.run(
        *("sam", "deploy", "--template-file", (build or paths.SAM_BUILD) / "template.yaml", "--stack-name", name),
        *("--s3-bucket", BUCKET, "--capabilities", "CAPABILITY_IAM", "--no-confirm-changeset", "--no-progressbar"),
        # SAM CLI needs quotes around a value with a space.
        *("--parameter-overrides", *(f'{key}="{value}"' if " " in str(value) else f"{key}={value}" for key, value in parameters.items())),
        what="Deploying the stack",
        log=log,
        # By default SAM CLI checks only every five seconds whether CloudFormation is done.
        environment=os.environ | servers.environment() | {"SAM_CLI_POLL_DELAY": "0.5"},
        progress=partial(resources, log),
        quiet=quiet,
    )
    return Stack(servers, name)


def resources(log: Path) -> str:
    """A deployment's progress, from SAM CLI's output: first the list of changes, then each resource's states."""
    output = log.read_text(errors="replace")
    changes = re.findall(r"^[+*-] (?:Add|Modify|Delete) ", output, re.MULTILINE)
    done = re.findall(r"^(?:CREATE|UPDATE|DELETE)_COMPLETE ", output, re.MULTILINE)
    return f"{min(len(done), len(changes))} of {len(changes)} resources" if changes else ""


def parameters_for(servers: Servers) -> dict[str, object]:
    """The template's parameters for these servers and this machine."""
    settings = servers.database_settings()
    return {
        "Architecture": architecture(),
        "DatabaseSecretArn": servers.database_secret_arn,
        "DatabaseHost": settings["DATABASE_HOST"],
        "DatabasePort": settings["DATABASE_PORT"],
        "DatabaseName": settings["DATABASE_NAME"],
        "DatabaseCa": settings["DATABASE_CA"],
        **PARAMETERS,
    }
