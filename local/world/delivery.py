"""Sends messages to a queue, receives them, and hands them to the function as Lambda's pollers would."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from world.localstack import ACCOUNT, REGION
from world.stack import Stack


def send(stack: Stack, bodies: list[str], progress: Callable[[int], None] = lambda sent: None) -> dict[str, str]:
    """Sends the bodies, ten per request, and returns them by message id."""
    sqs = stack.localstack.client("sqs")
    sent = {}

    def send_ten(start: int) -> dict[str, str]:
        entries = [{"Id": str(number), "MessageBody": body} for number, body in enumerate(bodies[start : start + 10])]
        answer = sqs.send_message_batch(QueueUrl=stack.queue_url, Entries=entries)
        if answer.get("Failed"):
            raise RuntimeError(f"SQS refused messages: {answer['Failed'][0]['Message']}")
        return {entry["MessageId"]: bodies[start + int(entry["Id"])] for entry in answer["Successful"]}

    with ThreadPoolExecutor(8) as pool:
        for ten in pool.map(send_ten, range(0, len(bodies), 10)):
            sent |= ten
            progress(len(sent))
    return sent


def receive_all(stack: Stack, queue_url: str) -> list[dict]:
    """Receives all visible messages of a queue without deleting them."""
    sqs = stack.localstack.client("sqs")
    messages: dict[str, dict] = {}
    while True:
        answer = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["All"], VisibilityTimeout=300)
        if not answer.get("Messages"):
            return list(messages.values())
        messages |= {message["MessageId"]: message for message in answer["Messages"]}


def deliver_without_deleting(stack: Stack, invoke: Callable[[dict], dict]) -> set[str]:
    """Hands up to ten waiting messages to the function and does not delete them, like a poller that dies too early.

    `invoke` calls the function with an event and returns its answer. Returns the ids of the messages that the function handled.
    """
    sqs = stack.localstack.client("sqs")
    # Waits, because a poller that is being stopped may still hold a few messages, which then return to the queue.
    answer = sqs.receive_message(QueueUrl=stack.queue_url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["All"], WaitTimeSeconds=10)
    if not (received := answer.get("Messages")):
        return set()
    answer = invoke({"Records": [record(message) for message in received]})
    for message in received:
        sqs.change_message_visibility(QueueUrl=stack.queue_url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)
    failed = {failure["itemIdentifier"] for failure in answer["batchItemFailures"]}
    return {message["MessageId"] for message in received} - failed


def record(message: dict) -> dict:
    """A received message as a record of Lambda's event."""
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message["Attributes"],
        "messageAttributes": {},
        "md5OfBody": message["MD5OfBody"],
        "eventSource": "aws:sqs",
        "eventSourceARN": f"arn:aws:sqs:{REGION}:{ACCOUNT}:logins",
        "awsRegion": REGION,
    }
