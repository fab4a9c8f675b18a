"""A Python function with the original's dependencies, from its process's start to its first request for an event. Then it ends.

With `--hello` it only requests the event, without any initialisation.
"""

import http.client
import os
import sys


def initialise() -> object:
    """Reads both secrets, parses the key, and connects to the database. The imports are part of the cost."""
    import peer
    import psycopg2
    from Crypto.Cipher import AES

    key, iv = peer.key_and_iv(peer.secret("MASKING_SECRET_ID"))
    AES.new(key, AES.MODE_CBC, iv)
    return psycopg2.connect(**peer.database(peer.secret("DATABASE_SECRET_ID")))


connection = None if sys.argv[1:] == ["--hello"] else initialise()
runtime = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
runtime.request("GET", "/2018-06-01/runtime/invocation/next")
try:
    # The benchmark waits only for the request, so it may close the connection now.
    runtime.getresponse()
except (ConnectionError, http.client.HTTPException):
    pass
