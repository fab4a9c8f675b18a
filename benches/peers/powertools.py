"""Powertools for AWS Lambda (Python), as its documentation shows it: a `BatchProcessor` and a handler of one record, which inserts one row.

Each record commits by itself: the processor reports a record as done when its handler returns, and goes on after a failed record, which
would abort a shared transaction. The idempotency utility, which records each message in DynamoDB, is left out. So a redelivered message
becomes another row.
"""

import base64
import json
import os
from datetime import UTC, datetime

import peer
import psycopg
from aws_lambda_powertools.utilities import parameters
from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response
from aws_lambda_powertools.utilities.batch.types import PartialItemFailureResponse
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

INSERT = """
    insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
    values (%s, %s, %s, %s, %s, %s, %s)
"""


def secret(name: str) -> dict:
    return parameters.get_secret(os.environ[name], transform="json")


# By default an event raises if all of its records fail. A batch of one bad message does, which is no error of the function here.
processor = BatchProcessor(event_type=EventType.SQS, raise_on_entire_batch_failure=False)
key, iv = peer.key_and_iv(secret("MASKING_SECRET_ID"))
cipher = Cipher(algorithms.AES(key), modes.CBC(iv))
connection = psycopg.connect(**peer.database(secret("DATABASE_SECRET_ID")), autocommit=True)


def mask(value: str) -> str:
    padder, encryptor = PKCS7(algorithms.AES.block_size).padder(), cipher.encryptor()
    padded = padder.update(value.encode()) + padder.finalize()
    masked = base64.b64encode(encryptor.update(padded) + encryptor.finalize()).decode()
    if len(masked) > peer.MASKED_MAX:
        raise ValueError("the mask does not fit its column")
    return masked


def record_handler(record: SQSRecord) -> None:
    login = peer.login(record.body)
    row = (
        login["user_id"],
        login["device_type"],
        mask(login["ip"]),
        mask(login["device_id"]),
        login["locale"],
        login["app_version"],
        datetime.now(UTC).date(),
    )
    connection.execute(INSERT, row)


def lambda_handler(event: dict, context: object) -> PartialItemFailureResponse:
    return process_partial_response(event=event, record_handler=record_handler, processor=processor, context=context)


def handle(event: bytes) -> bytes:
    return json.dumps(lambda_handler(json.loads(event), None)).encode()


if __name__ == "__main__":
    peer.serve(handle)
