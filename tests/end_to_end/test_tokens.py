"""Tests signing in with IAM tokens, which botocore's code checks for PostgreSQL, as RDS checks them itself."""

import json
import random
import subprocess
import time

import pytest
from psycopg import sql
from runtime_api import environment, event
from world.localstack import CREDENTIALS
from world.servers import DATABASE_USER
from world.tokens import LIFE_SECONDS, Tokens

USER = "signs in by-token"
# Shifts a program's clock by the seconds in a file.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *time) {
    int (*original)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = original(clock, time);
    FILE *file = clock == CLOCK_REALTIME ? fopen(getenv("CLOCK_FILE"), "r") : NULL;
    if (file) {
        long seconds = 0;
        if (fscanf(file, "%ld", &seconds) == 1) time->tv_sec += seconds;
        fclose(file);
    }
    return status;
}
"""


@pytest.fixture
def tokens(servers, tmp_path):
    with servers.postgres.connect(autocommit=True) as admin, Tokens(servers.postgres, tmp_path) as tokens:
        admin.execute(sql.SQL("create role {} login in role {}").format(sql.Identifier(USER), sql.Identifier(DATABASE_USER)))
        tokens.admit(USER)
        yield tokens
        admin.execute(sql.SQL("drop role {}").format(sql.Identifier(USER)))


@pytest.fixture
def settings(servers, stack):
    signs_in = {"DATABASE_AUTH": "iam", "DATABASE_USER": USER, "DATABASE_SECRET_ID": "", "AWS_LAMBDA_LOG_LEVEL": "TRACE"}
    return servers.environment() | stack.environment() | signs_in


def load(api, count=10):
    return api.answer(api.invoke(event(random.Random(), count), seconds=20))


@pytest.mark.parametrize("session_token", [None, "IQoJb3JpZ2luX2VjE+/=" * 40])
def test_a_batch_is_loaded_without_a_password_and_the_token_is_in_no_log(settings, tokens, tmp_path, session_token):
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    if session_token:
        (tmp_path / "ASIATEST").write_text(json.dumps([secret, session_token]))
        settings |= {"AWS_ACCESS_KEY_ID": "ASIATEST", "AWS_SESSION_TOKEN": session_token}
    log = tmp_path / "log"
    with environment(settings, log) as api:
        assert load(api) == ("response", {"batchItemFailures": []})
    [verdict] = tokens.verdicts
    assert (verdict.user, verdict.reason) == (USER, "")
    signature = verdict.token.rpartition("Signature=")[2].partition("&")[0]
    assert signature not in log.read_text()


def test_after_twenty_minutes_a_new_connection_uses_a_new_token(settings, servers, tokens, tmp_path):
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"], check=True)
    clock = tmp_path / "clock"
    clock.write_text("-1200")
    tokens.clock = lambda: time.time() + int(clock.read_text())
    # LD_PRELOAD cannot contain a path with a space.
    settings |= {"LD_PRELOAD": "clock.so", "LD_LIBRARY_PATH": str(tmp_path), "CLOCK_FILE": str(clock)}
    with environment(settings, tmp_path / "log") as api:
        assert load(api) == ("response", {"batchItemFailures": []})
        clock.write_text("0")
        with servers.postgres.connect(autocommit=True) as admin:
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [USER])
        assert load(api) == ("response", {"batchItemFailures": []})
    first, second = tokens.verdicts
    assert (first.reason, second.reason) == ("", "")
    assert first.token != second.token


def test_a_refused_token_is_signed_again_once_and_the_error_says_what_to_do(settings, tokens, tmp_path):
    tokens.clock = lambda: time.time() + LIFE_SECONDS + 300
    with environment(settings, tmp_path / "log") as api:
        kind, answer = load(api)
        assert (kind, answer["errorType"]) == ("error", "DatabaseCredentials")
        assert "SQLSTATE 28000: the server refused the token: allow the AWS identity rds-db:connect" in answer["errorMessage"]
        # Two at the start, and two with the batch.
        assert len(tokens.verdicts) == 4
        tokens.clock = time.time
        assert load(api) == ("response", {"batchItemFailures": []})


def test_an_identity_without_access_gets_an_error_that_says_so(settings, tokens, tmp_path):
    with environment(settings | {"AWS_SECRET_ACCESS_KEY": "another"}, tmp_path / "log") as api:
        kind, answer = load(api)
    assert (kind, answer["errorType"]) == ("error", "DatabaseCredentials")
    assert f'rds-db:connect as "{USER}" on this database' in answer["errorMessage"]
    assert {verdict.reason for verdict in tokens.verdicts} == {"its signature is wrong"}


def test_a_user_without_rds_iam_is_named(settings, tokens, tmp_path):
    tokens.admit(USER, admitted=False)
    with environment(settings, tmp_path / "log") as api:
        kind, answer = load(api)
    assert (kind, answer["errorType"]) == ("error", "DatabaseCredentials")
    assert f'SQLSTATE 28P01: the server treated the token as a password: grant rds_iam to "{USER}"' in answer["errorMessage"]
    assert tokens.verdicts == []
