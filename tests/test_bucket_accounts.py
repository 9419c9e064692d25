"""Credentials that are missing, wrong or expired, rights, buckets that are not there: one line, typed, with its code.

moto checks signatures and policies here; the strict server knows which token may do what.
"""

import dataclasses
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from bucket_processes import QUICK, Outcome, Processes
from fault_proxy import FaultProxy, Rule
from servers.everywhere import Started
from servers.moto import NAME as MOTO
from servers.moto import REGION, guarded_moto
from servers.server import Missing, Server
from servers.strict_gcs import strict_gcs

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

KEY = "run.acts.zarr"
LEAST = {"s3": ["s3:PutObject", "s3:GetObject", "s3:ListBucket"], "gs": frozenset({"put", "get", "list", "delete"})}
READER = {"s3": ["s3:GetObject", "s3:ListBucket"], "gs": frozenset({"get", "list"})}
CREATOR = {"s3": LEAST["s3"], "gs": frozenset({"put", "get", "list"})}  # Google's service has no writing over for it
STRANGER = {"s3": ["s3:GetBucketLocation"], "gs": frozenset({"nothing"})}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def users() -> Iterator[dict[str, Server]]:
    """The bucket of each scheme as several users see it, by `s3 writer` and so on; a store lies in each."""
    with ExitStack() as stack:
        rights: dict[str, Any] = {"writer": LEAST, "reader": READER, "creator": CREATOR, "stranger": STRANGER}
        google = stack.enter_context(strict_gcs(**{name: each["gs"] for name, each in rights.items()}))
        found = {f"gs {name}": with_environ(google, GOOGLE_AUTH_TOKEN_FOR_TESTING=name) for name in rights}
        found["gs expired"] = with_environ(google, GOOGLE_AUTH_TOKEN_FOR_TESTING="of-yesterday")
        found["gs no credentials"] = dataclasses.replace(google, environ={})
        found["gs no bucket"] = dataclasses.replace(google, bucket="not-there")
        try:
            amazon = stack.enter_context(guarded_moto({name: each["s3"] for name, each in rights.items()}))
        except Missing as error:
            pytest.skip(f"NOT RUN: {error}")
        found |= {f"s3 {name}": amazon[name] for name in rights}
        found["s3 wrong secret"] = with_environ(amazon["writer"], AWS_SECRET_ACCESS_KEY="of-somebody-else")
        found["s3 unknown key"] = with_environ(amazon["writer"], AWS_ACCESS_KEY_ID="AKIAOFSOMEBODYELSE00")
        found["s3 no credentials"] = dataclasses.replace(amazon["writer"], environ={"AWS_REGION": REGION})
        yield found


def with_environ(server: Server, **variables: str) -> Server:
    return dataclasses.replace(server, environ={**server.environ, **variables})


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_enough_to_write_and_to_read(scheme: str, users: dict[str, Server], processes: Processes) -> None:
    """Put, get and list to write, and on Google's service delete, without which nothing is written over there."""
    assert processes.value(users[f"{scheme} writer"], "write", KEY) == [0, 1, 2, 3]
    assert processes.value(users[f"{scheme} reader"], "read", KEY) == "right"
    assert processes.value(users[f"{scheme} reader"], "check", KEY) == "complete"


def test_the_strict_server_asks_for_delete_to_write_over(users: dict[str, Server]) -> None:
    answers = {}
    for user in ("creator", "writer"):
        server = users[f"gs {user}"]
        place = f"{server.endpoint}/upload/storage/v1/b/{server.bucket}/o?uploadType=media&name=over-{user}"
        request = urllib.request.Request(place, b"x", {"Authorization": f"Bearer {user}"}, method="POST")
        with urllib.request.urlopen(request, timeout=20) as first:
            assert first.status == 200
        try:
            with urllib.request.urlopen(request, timeout=20) as second:
                answers[user] = second.status
        except urllib.error.HTTPError as error:
            answers[user] = error.code
    assert answers == {"creator": 403, "writer": 200}


REFUSED = {  # who, what: the error and a part of its message
    ("s3 reader", "write"): ("StoragePermissionError", "the storage answered 403 AccessDenied"),
    ("s3 stranger", "read"): ("StoragePermissionError", "the storage answered 403 AccessDenied"),
    ("s3 wrong secret", "read"): ("CredentialsError", "403 SignatureDoesNotMatch"),
    ("s3 wrong secret", "write"): ("CredentialsError", "403 SignatureDoesNotMatch"),
    ("s3 unknown key", "write"): ("CredentialsError", "403 InvalidAccessKeyId"),
    ("s3 no credentials", "read"): ("StoragePermissionError", "the storage answered 403"),
    ("gs reader", "write"): ("StoragePermissionError", "the storage answered 403"),
    ("gs creator", "write"): ("StoragePermissionError", "Google Cloud asks for storage.objects.delete to write over"),
    ("gs stranger", "read"): ("StoragePermissionError", "the storage answered 403"),
    ("gs stranger", "write"): ("StoragePermissionError", "the storage answered 403"),
    ("gs expired", "read"): ("CredentialsError", "the storage answered 401"),
    ("gs expired", "write"): ("CredentialsError", "the storage answered 401"),
    ("gs no credentials", "read"): ("CredentialsError", "the JSON credentials file"),
    ("gs no bucket", "write"): ("BucketError", "404"),
    ("gs no bucket", "read"): ("StoreNotFoundError", "no activation store at gs://not-there/run.acts.zarr"),
}


@pytest.mark.parametrize(("who", "what"), REFUSED)
def test_what_is_refused(who: str, what: str, users: dict[str, Server], processes: Processes) -> None:
    outcome = processes.run(users[who], what, KEY)
    check_refusal(outcome, *REFUSED[who, what], users[who])


def check_refusal(outcome: Outcome, error: str, said: str, server: Server) -> None:
    """One line that names the place and no secret, at once, exit code 2."""
    assert (outcome.error, outcome.exit_code) == (error, 2), outcome
    assert said in outcome.message
    assert server.url(KEY) in outcome.message
    assert "\n" not in outcome.message
    assert not any(secret in outcome.message for secret in server.environ.values() if secret != REGION)
    assert outcome.seconds < 20  # no retries; on a busy machine


@pytest.fixture(scope="module")
def open_s3(started_servers: Started) -> Server:
    try:
        return started_servers[MOTO]
    except Missing as error:
        pytest.skip(f"NOT RUN: {error}")


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_bucket_that_is_not_there(what: str, open_s3: Server, processes: Processes) -> None:
    nowhere = dataclasses.replace(open_s3, bucket="not-there")
    check_refusal(processes.run(nowhere, what, KEY), "BucketError", "NoSuchBucket", nowhere)


REDIRECTED = {"expired token": "CredentialsError", "wrong region": "BucketError"}


@pytest.mark.parametrize("fault", REDIRECTED)
def test_what_s3_answers_to_old_tokens_and_other_regions(fault: str, open_s3: Server, processes: Processes) -> None:
    with FaultProxy(open_s3.endpoint, [Rule(fault)]) as proxy:
        for what in ("read", "write"):
            outcome = processes.run(open_s3.through(proxy.endpoint), what, KEY)
            check_refusal(outcome, REDIRECTED[fault], "the storage answered", open_s3)


def test_credentials_that_expire_in_the_middle_lose_nothing(open_s3: Server, processes: Processes) -> None:
    key = "expired/run.acts.zarr"
    with FaultProxy(open_s3.endpoint, [Rule("expired token", key="commits/0000000[23]")]) as proxy:
        outcome = processes.run(open_s3.through(proxy.endpoint), "write", key)
    assert (outcome.error, outcome.exit_code) == ("CredentialsError", 2), outcome
    kept = processes.value(open_s3, "committed", key)
    assert set(kept) <= {0, 1}
    assert processes.value(open_s3, "write", key) == [block for block in range(4) if block not in kept]
    assert processes.value(open_s3, "check", key) == "complete"


def test_the_command_line_says_it_in_one_line_with_the_code(users: dict[str, Server], open_s3: Server) -> None:
    nowhere = dataclasses.replace(open_s3, bucket="not-there")
    unreachable = open_s3.through("http://127.0.0.1:9")  # nobody listens there
    asked = {
        "s3 stranger": (users["s3 stranger"], 2, "AccessDenied"),
        "gs expired": (users["gs expired"], 2, "401"),
        "no bucket": (nowhere, 2, "NoSuchBucket"),
        "unreachable": (unreachable, 3, "no answer|connect"),
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "actstore", "info", server.url(KEY)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **server.client_environ(), **QUICK, "ACTSTORE_DEADLINE_SECONDS": "2"},
        )
        for name, (server, _, _) in asked.items()
    }  # fmt: skip
    for name, (_, code, said) in asked.items():
        out, errors = running[name].communicate(timeout=120)
        assert running[name].returncode == code, (name, errors)
        assert out == ""
        assert "Traceback" not in errors
        assert any(word in errors for word in said.split("|")), (name, errors)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
