"""The incidents: the fault, the diagnosis and the remedy."""

import json
import math

from world import stack
from world.incidents.samples import MINUTE_SECONDS
from world.incidents.scene import RATE, Play, Scene
from world.servers import DATABASE_USER

HEALTHY_MINUTES = 4


def begin(scene: Scene, rate: int = RATE) -> None:
    scene.traffic.rate = rate
    scene.tell(f"All is well, with about {rate * MINUTE_SECONDS:.0f} messages a minute.")
    scene.play(HEALTHY_MINUTES)


def database_down(scene: Scene) -> None:
    begin(scene)
    scene.tell("PostgreSQL crashes.")
    scene.servers.postgres.stop("immediate")
    scene.play(9)
    scene.look("status", "doctor")
    words = "# Start the database, or let it fail over. The messages then load by themselves."
    scene.remedy("PostgreSQL is started.", scene.servers.postgres.start, words)
    scene.recover()


def poison_flood(scene: Scene) -> None:
    begin(scene)
    scene.tell("A sender's new release writes `userId` for `user_id`, in half of the messages.")
    scene.traffic.bad_share = 0.5
    scene.play(19)
    scene.look("status", "dlq explain")

    def correct() -> None:
        scene.traffic.bad_share = 0.0
        scene.traffic.send([True] * sum(not message.good for message in scene.traffic.sent().values()))

    scene.remedy("the sender rolls back, and sends the bad messages again.", correct, "# Have the sender roll back, and send the bad messages again.")
    scene.wait_for_dead()

    def clear() -> None:
        scene.ask("dlq explain")
        scene.ask("dlq purge --yes")

    once_more = f"etlctl --stack {stack.NAME} dlq explain    # once more: no dead letter is worth keeping"
    scene.remedy("the dead letters are checked once more, and deleted.", clear, once_more, f"etlctl --stack {stack.NAME} dlq purge")
    scene.recover()


def keyring_broken(scene: Scene) -> None:
    begin(scene)
    scene.tell("Somebody overwrites the keyring with half of it.")
    broken = '{"key": "603deb1015ca71be2b73aef0857d7781'
    bad = scene.put_secret(scene.stack.masking_secret_arn, broken)
    scene.play(2)
    scene.tell("One of the two environments ends. Its replacement has no keyring, and fails each batch.")
    scene.bootstraps()[0].kill()
    scene.play(9)
    scene.look("status", "doctor")
    restore(scene, scene.stack.masking_secret_arn, bad)
    scene.recover()


def bad_credentials(scene: Scene) -> None:
    begin(scene)
    scene.tell("A rotation changes the password in the secret, but not in the database. Running environments have the old one.")
    arn = scene.servers.database_secret_arn
    bad = scene.put_secret(arn, json.dumps({"username": DATABASE_USER, "password": "not the database's"}))
    scene.play(2)
    scene.tell("Lambda replaces the environments, as it does every few hours.")
    for process in scene.bootstraps():
        process.kill()
    scene.play(13)
    scene.look("status", "doctor")
    restore(scene, arn, bad)
    scene.recover()


def restore(scene: Scene, arn: str, bad: str) -> None:
    scene.remedy(
        "the secret's previous version is made the current one.",
        lambda: scene.restore_secret(arn, bad),
        "aws secretsmanager list-secret-version-ids --secret-id ARN    # which is AWSPREVIOUS?",
        "aws secretsmanager update-secret-version-stage --secret-id ARN --version-stage AWSCURRENT \\\n"
        "    --move-to-version-id PREVIOUS --remove-from-version-id CURRENT",
    )


def backlog(scene: Scene) -> None:
    usual = 2
    with scene.admin() as admin:
        # Each batch takes half a second, whatever its size, as with a busy and distant server.
        waits = "begin perform pg_sleep(0.5); return null; end"
        admin.execute(f"create or replace function busy() returns trigger language plpgsql as '{waits}'")
        admin.execute("create trigger busy before insert on user_logins for each statement execute procedure busy()")
    try:
        begin(scene, usual)
        scene.tell("A campaign sends fifty times as many messages.")
        scene.traffic.rate = 50 * usual
        scene.play(13)
        scene.look("status", "doctor")
        scene.remedy(
            "the batch size is raised. The campaign goes on.",
            lambda: scene.set_batch_size(1000),
            "aws lambda update-event-source-mapping --uuid UUID --batch-size 1000    # and BatchSize=1000 with the next deployment",
        )
        scene.catch_up()
        scene.play(2)
        scene.tell("The campaign ends.")
        scene.traffic.rate = usual
        scene.calm_down()
    finally:
        with scene.admin() as admin:
            admin.execute("drop trigger busy on user_logins")


def healthy(scene: Scene) -> None:
    """A quiet afternoon: only the password is rotated."""
    for minute in range(26):
        scene.traffic.rate = RATE * (1.4 + math.sin(minute / 4))
        if minute == 8:
            scene.rotate_password()
        scene.play(0)
    scene.look()
    scene.recover()


HEALTHY = Play("dashboard", healthy, settings={"FunctionTimeout": 1, "MaxReceiveCount": 3})
INCIDENTS = [
    Play("database-down", database_down, frozenset({"Page", "FunctionErrors", "Late"}), "batch failed"),
    Play(
        "poison-flood",
        poison_flood,
        frozenset({"Page", "MessagesFailing", "MessagesComeBack", "DeadLetters"}),
        "message failed",
        # The shortest timeouts, because each message is redelivered so often.
        {"FunctionTimeout": 1, "MaxReceiveCount": 5},
    ),
    Play("keyring-broken", keyring_broken, frozenset({"Page", "KeyringNotRead", "FunctionErrors"}), "initialisation failed"),
    Play("bad-credentials", bad_credentials, frozenset({"Page", "CredentialsRefreshed", "FunctionErrors", "Late"}), "batch failed"),
    Play(
        "backlog",
        backlog,
        frozenset({"Page", "NearMaximumConcurrency", "Late"}),
        "batch loaded",
        {"BatchSize": 10, "MaximumConcurrency": 4},
        pollers=4,
    ),
]
