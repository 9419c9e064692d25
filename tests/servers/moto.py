"""moto: Amazon S3 in memory, written in Python, with conditional writes and, if asked for, users and rights.

Start-up: `moto_server -H 127.0.0.1 -p PORT` (PyPI `moto[server]`), then the bucket is made with one PUT. Any key
is accepted then. With `INITIAL_NO_AUTH_ACTION_COUNT` in its environment it checks the signature and the policy of each
request after the first so many, which make the users.

Good for: S3's XML, paging, `If-Match` and `If-None-Match`, signatures and policies. It does not compare a body with the
digest that the client signed, and answers about 500 requests a second.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from servers.server import Missing, Server, free_port, request, running

NAME = "moto"
BUCKET = f"acts-{NAME}"
REGION = "us-east-1"
ANY_KEY = {"AWS_ACCESS_KEY_ID": "AKIAACTSTORETESTS000", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": REGION}
_COUNTED = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"}


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    """The server with an empty bucket; any key may do anything."""
    with _running({}) as endpoint:
        request("PUT", f"{endpoint}/{BUCKET}")
        yield Server(NAME, "s3", endpoint, ANY_KEY, BUCKET)


@contextlib.contextmanager
def guarded_moto(rights: Mapping[str, list[str]]) -> Iterator[dict[str, Server]]:
    """The server with users: for each name the bucket as a user sees it who has these actions, such as `s3:GetObject`.

    The user `owner` may do everything.
    """
    with _running(_COUNTED) as endpoint:
        users = _make_users(endpoint, {"owner": ["s3:*"], **rights})
        yield {user: Server(f"{NAME} as {user}", "s3", endpoint, keys, BUCKET) for user, keys in users.items()}


@contextlib.contextmanager
def _running(environ: Mapping[str, str]) -> Iterator[str]:
    try:
        import moto.server  # noqa: F401
    except ImportError as error:
        raise Missing(f"moto[server] is not installed: {error}") from None
    port = free_port()
    with running(
        [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, environ=environ
    ):  # fmt: skip
        yield f"http://127.0.0.1:{port}"


def _make_users(endpoint: str, rights: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    """Makes the bucket and the users while nothing is checked, then has everything checked; the keys of each."""
    import boto3

    def client(service: str) -> Any:
        return boto3.client(
            service, endpoint_url=endpoint, region_name=REGION,
            aws_access_key_id=ANY_KEY["AWS_ACCESS_KEY_ID"], aws_secret_access_key="any",
        )  # fmt: skip

    def check_after(actions: int) -> None:
        plain = {"Content-Type": "text/plain"}  # else it is taken for a form
        request("POST", f"{endpoint}/moto-api/reset-auth", str(actions).encode(), plain)

    check_after(1000)
    client("s3").create_bucket(Bucket=BUCKET)
    users, iam = {}, client("iam")
    for name, actions in rights.items():
        allowed = {
            "Effect": "Allow",
            "Action": actions,
            "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
        }
        iam.create_user(UserName=name)
        iam.put_user_policy(
            UserName=name, PolicyName="tests",
            PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}),
        )  # fmt: skip
        key = iam.create_access_key(UserName=name)["AccessKey"]
        users[name] = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_REGION": REGION,
        }  # fmt: skip
    check_after(0)
    return users
