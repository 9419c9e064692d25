"""Waiting for storage: it ends, it is said, and what passes is tried again. Failures become errors without a secret."""

import logging
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from actstore.errors import (
    BucketError,
    CorruptStoreError,
    CredentialsError,
    InputError,
    StorageError,
    StorageFullError,
    StoragePermissionError,
    StoreError,
)
from actstore.kvstore import Limits, Operation, Root, storage_errors
from actstore.kvstore.addresses import Address
from actstore.kvstore.clouds import Profile, s3_settings, spec_of, use_emulator
from actstore.kvstore.failures import may_pass
from actstore.kvstore.waiting import Patience

BODY = (
    '[http_response_body=\'<?xml version=\\"1.0\\"?><Error><Code>{code}</Code><Message>at http://sesame.example/x?'
    "X-Amz-Credential=AKIASESAME</Message></Error>'] [http_response_code='{number}'] [x-amzn-requestid='1']"
)


def s3(status: str, number: int, code: str) -> str:
    """An error as TensorStore gives it, of a server that answers with its own address and a key."""
    return f"{status}{code}: at http://sesame.example/x AKIASESAME {BODY.format(code=code, number=number)}"


def gs(status: str, number: int, word: str) -> str:
    body = f'{{\\"error\\": {{\\"code\\": {number}, \\"message\\": \\"sesame@project.iam does not have\\", '
    body += f'\\\\"reason\\\\": \\\\"{word}\\\\"}}}}'
    return f"{status}sesame@project.iam does not have [http_response_code='{number}'] [http_response_body='{body}']"


RETRIED = "ABORTED: All 2 retry attempts failed: "
# name: what TensorStore says, the class it becomes, a part of its message, and whether it may pass
ANSWERS = {
    "denied": (s3("PERMISSION_DENIED: ", 403, "AccessDenied"), StoragePermissionError, "403 AccessDenied;", False),
    "bad key": (s3("PERMISSION_DENIED: ", 403, "InvalidAccessKeyId"), CredentialsError, "check your cred", False),
    "signature": (s3("PERMISSION_DENIED: ", 403, "SignatureDoesNotMatch"), CredentialsError, "check your", False),
    "expired": (s3("", 400, "ExpiredToken"), CredentialsError, "renew your credentials", False),
    "clock": (s3(RETRIED, 403, "RequestTimeTooSkewed"), CredentialsError, "set the clock", False),
    "region": (s3("", 400, "AuthorizationHeaderMalformed"), BucketError, "set AWS_REGION to the region of the", False),
    "elsewhere": (s3("UNKNOWN: ", 301, "PermanentRedirect"), BucketError, "set AWS_REGION", False),
    "no bucket": (s3("NOT_FOUND: ", 404, "NoSuchBucket"), BucketError, "check the name of the bucket", False),
    "slow down": (s3(RETRIED, 503, "SlowDown"), StorageError, "503 SlowDown; the storage is busy", True),
    "internal": (s3(RETRIED, 500, "InternalError"), StorageError, "500 InternalError", True),
    "too many": (s3(RETRIED, 429, "TooManyRequests"), StorageError, "429", True),
    "time-out": (s3(RETRIED, 408, "RequestTimeout"), StorageError, "408", True),
    "conflict": (s3("ABORTED: ", 409, "OperationAborted"), StorageError, "409", True),
    "time-out of a body": (s3("", 400, "RequestTimeout"), StorageError, "400 RequestTimeout; the storage is bu", True),
    "rate": (gs("PERMISSION_DENIED: ", 403, "rateLimitExceeded"), StorageError, "403 rateLimitExceeded; the st", True),
    "too large": (s3("", 400, "EntityTooLarge"), BucketError, "400 EntityTooLarge; it is larger than the", False),
    "too large for a proxy": (
        "UNKNOWN: x [http_response_code='413']", BucketError, "413; it is larger than the storage takes in one", False,
    ),
    "method": (s3("", 405, "MethodNotAllowed"), BucketError, "405 MethodNotAllowed; the storage takes no such", False),
    "key": (s3("", 400, "KMS.DisabledException"), StoragePermissionError, "400 KMS.DisabledException; check t", False),
    "payer": (
        gs("INVALID_ARGUMENT: ", 400, "required").replace("does not have", "is a requester pays bucket"),
        BucketError, "400 required; requests are at the cost of whoever asks", False,
    ),
    "refused": (s3("", 400, "InvalidRequest"), BucketError, "400 InvalidRequest; the storage refused this and", False),
    "unknown": ("UNKNOWN: x [http_response_code='418']", BucketError, "answered 418; the storage refused this", False),
    "a moment": ("UNKNOWN: x [http_response_code='599']", StorageError, "599; the storage is busy", True),
    "no ranges": (
        "FAILED_PRECONDITION: Requested byte range [0, 10) was ignored by server", BucketError,
        "the server does not answer ranges", False,
    ),
    "full": (s3("UNKNOWN: ", 507, "InsufficientStorage"), StorageFullError, "free some space", False),
    "a range": (s3("OUT_OF_RANGE: ", 416, "InvalidRange"), CorruptStoreError, "416 InvalidRange", False),
    "no word": (
        "PERMISSION_DENIED: Unknown [http_response_code='403']", StoragePermissionError, "answered 403; ", False,
    ),
    "gs denied": (gs("PERMISSION_DENIED: ", 403, "forbidden"), StoragePermissionError, "403 forbidden", False),
    "gs credentials": (gs("PERMISSION_DENIED: ", 401, "authError"), CredentialsError, "401 authError", False),
    "gs no bucket": (gs("NOT_FOUND: ", 404, "notFound"), BucketError, "404 notFound", False),
    "gs busy": (gs(RETRIED, 503, "backendError"), StorageError, "503 backendError", True),
    "web": (
        "PERMISSION_DENIED: Forbidden [HTTP code 403] [http_response_body='x']", StoragePermissionError, "403", False,
    ),
    "no server": (
        f"{RETRIED}CURL error Could not connect to server: Failed to connect to sesame.example port 1 [curl_code='7']",
        StorageError, "could not connect; the storage is busy or not reachable", True,
    ),
    "stalled": (
        f"{RETRIED}CURL error Timeout was reached: Operation too slow. Less than 1024 bytes/sec [curl_code='28']",
        StorageError, "timeout was reached", True,
    ),
    "no keys": (
        "INTERNAL: Failed to get credentials from provider: aws-c-auth: x", CredentialsError, "no credentials", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "part", "passes"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_of_a_server_becomes_an_error(text, kind, part, passes):
    with pytest.raises(StoreError) as caught, storage_errors("read zarr.json of s3://bucket/run.acts.zarr"):
        raise ValueError(text)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith("could not read zarr.json of s3://bucket/run.acts.zarr: ")
    assert part in message
    assert not re.search("sesame|http:|xml|[{}<>]|tensorstore", message, re.IGNORECASE), message
    assert may_pass(text) is passes


# Operations


class Future:
    """An answer after some seconds; an exception is raised."""

    def __init__(self, answer, seconds=0.0):
        self.answer, self.when = answer, time.monotonic() + seconds

    def result(self, timeout):
        left = self.when - time.monotonic()
        time.sleep(min(max(left, 0), timeout))
        if left > timeout:
            raise TimeoutError
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def operation(*futures, seconds=30.0, notice=0.1, again=True, sound=None):
    waiting = iter(futures)

    def start():
        return next(waiting)()

    return Operation("write x of s3://b/r", start, Patience(seconds, notice, again=again), sound=sound)


BUSY = ValueError(s3(RETRIED, 503, "SlowDown"))


def test_what_passes_is_tried_again_and_said(caplog):
    assert operation(lambda: Future(BUSY), lambda: Future("there")).result() == "there"
    (line,) = caplog.messages
    assert re.fullmatch(
        r"storage: could not write x of s3://b/r: the storage answered 503 SlowDown; trying again, for (29|30) s more",
        line,
    )


def test_waiting_is_said_now_and_then(caplog):
    assert operation(lambda: Future("there", 0.35)).result() == "there"
    assert 1 <= len(caplog.messages) <= 3  # fewer on a busy machine
    for line in caplog.messages:
        assert re.fullmatch(r"storage: waiting [01] s for an answer to write x of s3://b/r", line)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_waiting_ends():
    begun = time.monotonic()
    with pytest.raises(
        StorageError, match=r"could not write x of s3://b/r: no answer in [0-9] s; see whether the storage"
    ):
        operation(lambda: Future("late", 60), seconds=0.3).result()
    assert time.monotonic() - begun < 5
    with pytest.raises(StorageError, match="503 SlowDown; the storage is busy"):
        operation(*[lambda: Future(BUSY)] * 9, seconds=1.5).result()
    assert time.monotonic() - begun < 10


def test_an_answer_for_which_nobody_came_in_time_is_taken():
    late = operation(lambda: Future("there"), seconds=0.1)
    time.sleep(0.2)
    assert late.result() == "there"


def test_when_time_is_over_after_a_pause_the_reason_is_what_was_said_before_it(monkeypatch):
    real, slept = time.sleep, []
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), real(1.6 * len(slept))))
    with pytest.raises(StorageError, match="503 SlowDown; the storage is busy"):
        operation(lambda: Future(BUSY), lambda: Future(BUSY), seconds=1.5).result()
    assert slept


def test_what_does_not_pass_is_not_tried_again():
    with pytest.raises(StoragePermissionError):
        operation(lambda: Future(ValueError(s3("PERMISSION_DENIED: ", 403, "AccessDenied")))).result()
    with pytest.raises(StorageError, match="503"):
        operation(lambda: Future(BUSY), again=False).result()


def test_an_answer_that_is_none_is_asked_for_again(caplog):
    found = operation(lambda: Future(0), lambda: Future(1), sound=lambda answer: None if answer else "it is no answer")
    assert found.result() == 1
    assert "it is no answer" in caplog.messages[0]


def test_a_server_that_never_answers(monkeypatch, caplog):
    """The whole way, with a port that accepts and says nothing."""
    monkeypatch.setenv("ACTSTORE_DEADLINE_SECONDS", "1.5")
    monkeypatch.setenv("ACTSTORE_NOTICE_SECONDS", "0.5")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/run.acts.zarr"
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"could not look at zarr.json of .*: no answer in [12] s"):
            Root.of(url).read("zarr.json")
        assert 1 < time.monotonic() - begun < 10
    assert [line for line in caplog.messages if "waiting" in line]


def test_a_server_that_comes_back(monkeypatch, caplog):
    """Connections are refused at first: the same request is answered once the server is there."""
    from servers.server import free_port

    port, answered = free_port(), b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    def come_back():
        time.sleep(2.5)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
            server.settimeout(30)
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answered)

    thread = threading.Thread(target=come_back, daemon=True)
    thread.start()
    root = Root.of(f"http://127.0.0.1:{port}/run.acts.zarr")
    found = root.begin_range("read x", "x", slice(None)).result()
    thread.join()
    assert found.value == b"{}"
    assert "could not connect; trying again" in caplog.messages[0]


# Settings


def test_limits_come_from_the_environment():
    assert Limits.of({}) == Limits()
    limits = Limits.of({"ACTSTORE_DEADLINE_SECONDS": "7.5", "ACTSTORE_REQUESTS_AT_ONCE": "4"})
    assert (limits.deadline_seconds, limits.requests_at_once, limits.stall_seconds) == (7.5, 4, 20)
    assert limits.deadline(128 << 20) == pytest.approx(7.5 + 134.2, abs=0.1)
    environ = {}
    limits.tell_curl(environ)
    assert environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "20"
    assert set(limits.described()) == {
        "ACTSTORE_DEADLINE_SECONDS", "ACTSTORE_STALL_SECONDS", "ACTSTORE_NOTICE_SECONDS", "ACTSTORE_REQUESTS_AT_ONCE",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "no", "-1", "0", "nan", "inf", "1e9"])
def test_a_limit_that_cannot_be_is_refused(text):
    with pytest.raises(InputError, match=r"ACTSTORE_STALL_SECONDS is .*; expected a positive number, such as 20"):
        Limits.of({"ACTSTORE_STALL_SECONDS": text})


@pytest.fixture
def files(tmp_path):
    """Files of the AWS command line, and the environment that names them."""
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile lab]\nservices = lab\nregion = us-east-2\n"
        "[services lab]\ns3 =\n  endpoint_url = http://lab.example:9000/\n[profile role]\nrole_arn = arn:aws:x\n"
    )
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = id\naws_secret_access_key = key\n")
    return {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}


NO_METADATA = {"AWS_EC2_METADATA_DISABLED": "true"}
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
LAB = {"endpoint": "http://lab.example:9000", "aws_region": "us-east-2"}
# name: the environment beside the files, the kind of credentials, what else is in the spec
PLACES = {
    "keys": (KEYS, "environment", {}),
    "keys before profile": ({**KEYS, "AWS_PROFILE": "lab"}, "environment", LAB),
    "an empty profile": ({**KEYS, "AWS_PROFILE": ""}, "environment", {}),
    "empty keys": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_PROFILE": "lab"}, "profile", LAB),
    "profile": ({"AWS_PROFILE": "lab"}, "profile", LAB),
    "role": ({"AWS_PROFILE": "role"}, "profile", {}),
    "endpoint": (
        {**KEYS, "AWS_ENDPOINT_URL": "http://a:1/"}, "environment",
        {"endpoint": "http://a:1", "aws_region": "eu-west-1"},
    ),
    "endpoint of s3": (
        {**KEYS, "AWS_ENDPOINT_URL": "http://a:1", "AWS_ENDPOINT_URL_S3": "http://b:2", "AWS_REGION": "x"},
        "environment", {"endpoint": "http://b:2", "aws_region": "x"},
    ),
    "endpoint ignored": (
        {**KEYS, "AWS_ENDPOINT_URL": "http://a:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "environment", {},
    ),
    "half of the keys": ({"AWS_ACCESS_KEY_ID": "id", **NO_METADATA}, "anonymous", {}),
    "nothing": (NO_METADATA, "anonymous", {}),
    "a host of EC2": ({}, "imds", {}),
    "a container": ({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/x"}, "ecs", {}),
    "a pod": ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/x"}, "default", {}),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "kind", "more"), PLACES.values(), ids=PLACES.keys())
def test_settings_of_s3_come_from_the_standard_places(files, environ, kind, more):
    found = s3_settings({**files, **environ})
    credentials = found.pop("aws_credentials")
    assert credentials["type"] == kind
    assert found == more
    if kind == "profile":
        assert Path(credentials["config_file"]).is_absolute()
        assert credentials["profile"] == environ["AWS_PROFILE"]


def test_files_of_aws_that_cannot_be(files):
    with pytest.raises(InputError, match="AWS_PROFILE names the profile 'nobody', which is in none of the files"):
        Profile.of({**files, "AWS_PROFILE": "nobody"})
    Path(files["AWS_CONFIG_FILE"]).write_text("no section\n")
    with pytest.raises(InputError, match=r"cannot be read .*; expected a file of the AWS command line"):
        Profile.of(files)
    missing = {"AWS_CONFIG_FILE": "nowhere", "AWS_SHARED_CREDENTIALS_FILE": "nowhere"}
    assert not Profile.of(missing).has_keys


NO_SERVER = {
    "no scheme": "minio:9000",
    "garbage": "garbage",
    "a space": "http://a b:1",
    "an end": "http://a:1 ",
    "another scheme": "ftp://a:1",
    "a port": "http://a:99999",
    "no host": "http://",
    "a user": "http://me:sesame@a:1",
    "a user alone": "me:ses/ame@a:1",
    "a query": "http://a:1/?key=sesame",
}


@pytest.mark.parametrize("text", NO_SERVER.values(), ids=NO_SERVER.keys())
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_address_of_a_server_that_is_none_is_refused(files, name, text):
    with pytest.raises(
        InputError, match=rf"^{name} is '.*'; expected the address of a server, such as https"
    ) as caught:
        s3_settings({**files, **KEYS, name: text})
    assert not re.search("ses|me:", str(caught.value))
    ignored = {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}
    assert "endpoint" not in s3_settings({**files, **KEYS, name: text, **ignored})


def test_other_addresses_of_servers_that_are_none_are_refused_too(files):
    path = Path(files["AWS_CONFIG_FILE"])
    path.write_text(path.read_text().replace("http://lab.example:9000/", "lab.example"))
    with pytest.raises(InputError, match=r"^endpoint_url of the profile 'lab' is 'lab.example'; expected the address"):
        s3_settings({**files, "AWS_PROFILE": "lab"})
    with pytest.raises(InputError, match=r"^STORAGE_EMULATOR_HOST is 'http://local host'; expected the address"):
        use_emulator({"STORAGE_EMULATOR_HOST": "local host"})


@pytest.mark.parametrize("text", ["http://[::1]:9000", "http://minio_1:9000/", "https://a.example/storage/v1"])
def test_addresses_of_servers(files, text):
    assert s3_settings({**files, **KEYS, "AWS_ENDPOINT_URL": text})["endpoint"] == text.rstrip("/")


def test_a_key_of_google_that_is_no_file_is_refused(tmp_path):
    """Its library would end the process at a folder."""
    (tmp_path / "key.json").write_text("{}")
    address = Address("gs", "bucket", "run.acts.zarr")
    for path, found in [(tmp_path, "a folder"), (tmp_path / "nothing.json", "no file that can be read")]:
        with pytest.raises(
            CredentialsError, match=rf"^GOOGLE_APPLICATION_CREDENTIALS is '.*', which is {found}; expec"
        ):
            spec_of(address, {"GOOGLE_APPLICATION_CREDENTIALS": str(path)})
    for sound in (str(tmp_path / "key.json"), os.devnull, ""):
        assert spec_of(address, {"GOOGLE_APPLICATION_CREDENTIALS": sound})["bucket"] == "bucket"
