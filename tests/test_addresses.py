"""What a path or URL may say: each way to write one, and each that is refused, without a secret in the message."""

import pickle

import pytest

from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.kvstore.addresses import Address, parse

GOOD = {
    "gs": ("gs://bucket/a/run.acts.zarr", Address("gs", "bucket", "a/run.acts.zarr")),
    "slash": ("s3://my.bucket-1/run.acts.zarr/", Address("s3", "my.bucket-1", "run.acts.zarr")),
    "https": (
        "https://host.example:8443/a%20b/x.acts.zarr",
        Address("https", "host.example:8443", "a b/x.acts.zarr"),
    ),
    "escapes": (
        "http://host/50%25/%C3%A9%3F%23/it's(1)+2@3/x.acts.zarr",
        Address("http", "host", "50%/é?#/it's(1)+2@3/x.acts.zarr"),
    ),
    "escape of a bucket": ("gs://bucket/a%20b/x.acts.zarr", Address("gs", "bucket", "a%20b/x.acts.zarr")),
    "IPv6": ("http://[::1]:8000/x.acts.zarr", Address("http", "[::1]:8000", "x.acts.zarr")),
    "http": ("http://127.0.0.1:80/x.acts.zarr", Address("http", "127.0.0.1:80", "x.acts.zarr")),
    "memory": ("memory://m/x.acts.zarr", Address("memory", "m", "x.acts.zarr")),
    "file": ("file:///tmp/x.acts.zarr", "/tmp/x.acts.zarr"),
    "path": ("../runs/a|b.acts.zarr", "../runs/a|b.acts.zarr"),
    "colon": ("./s3:x.acts.zarr", "./s3:x.acts.zarr"),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_an_address_is_read(text, expected):
    assert parse(text) == expected
    if isinstance(expected, Address):
        assert expected.url == text.rstrip("/")
        assert parse(expected.url) == expected


BAD = {
    "scheme": ("ftp://b/x.acts.zarr", "found a ftp:// address; expected a path, file://, gs://, s3://, or http"),
    "gcs": ("gcs://b/x.acts.zarr", "did you mean gs://"),
    "upper case": ("S3://bucket/x.acts.zarr", "did you mean s3://"),
    "no bucket": ("s3:///x.acts.zarr", "has no bucket after s3://; expected s3://bucket/path/run.acts.zarr"),
    "odd bucket": ("gs://b_/x.acts.zarr", "has a wrong bucket after gs://"),
    "nothing in it": ("gs://bucket", "names no store; expected gs://bucket/path/run.acts.zarr"),
    "only a slash": ("gs://bucket/", "names no store"),
    "parent": ("gs://bucket/a/../x.acts.zarr", "holds a step such as .."),
    "dot": ("gs://bucket/./x.acts.zarr", "holds a step such as .."),
    "double slash": ("gs://bucket//x.acts.zarr", "holds an empty step, //"),
    "pipe": ("gs://bucket/x.zip|zip:x.acts.zarr", "holds '|'"),
    "chain": ("gs://bucket/x::y.acts.zarr", "holds '::'"),
    "chain before": ("simplecache::s3://bucket/x.acts.zarr", "is neither a path nor a URL"),
    "backslash": ("gs://bucket/a\\x.acts.zarr", r"holds '\\\\'"),
    "user": ("https://me:sesame@host/x.acts.zarr", "holds a user or password"),
    "user of a bucket": ("s3://AKIA:sesame@bucket/x.acts.zarr", "holds a user or password"),
    "query": ("https://host/x.acts.zarr?X-Amz-Signature=sesame", "holds a query or fragment"),
    "fragment": ("https://host/x.acts.zarr#sesame", "holds a query or fragment"),
    "space": ("gs://bucket/a b.acts.zarr", "holds a space or control character"),
    "space on a web server": ("http://host/a b.acts.zarr", "holds a space .*: write %20 for a space"),
    "escape that is no text": ("http://host/a%ff.acts.zarr", "holds escapes that are not UTF-8"),
    "chain behind IPv6": ("http://[::1]/x::y.acts.zarr", "holds '::'"),
    "newline": ("gs://bucket/a\nb.acts.zarr", "holds a space or control character"),
    "escaped parent": ("https://host/%2e%2E/x.acts.zarr", r"holds an escape that stands for \. or /"),
    "escaped slash": ("https://host/a%2Fx.acts.zarr", r"holds an escape that stands for \. or /"),
    "broken escape": ("https://host/a%zz.acts.zarr", "holds an escape"),
    "long": (f"gs://bucket/{'a' * 800}.acts.zarr", "holds a path of more than 700 bytes"),
    "JSON": ('{"driver": "s3", "bucket": "sesame"}', "the address is JSON, of 36 characters; expected a path or a URL"),
    "one slash": ("s3:/bucket/x.acts.zarr", "is neither a path nor a URL"),
    "user after one slash": ("s3:/AKIA:sesame@bucket/x.acts.zarr", r"^'s3:/\*\*\*@bucket/x.acts.zarr' is neither"),
    "user with a slash": ("s3:/AKIA:ses/sesame@bucket/x.acts.zarr", r"^'s3:/\*\*\*@bucket/x.acts.zarr' is neither"),
    "query after one slash": ("https:/host/x.acts.zarr?key=sesame", "is neither a path nor a URL"),
    "unknown user": ("~nouser/x.acts.zarr", "begins with the home folder of a user who is not known here"),
    "NUL": ("a\0b/x.acts.zarr", "holds a NUL character, which no path may have"),
    "host of a file": ("file://host/x.acts.zarr", "names a host; expected file:///path"),
    "port": ("http://host:123456/x.acts.zarr", "has a wrong host"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_an_address_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        Root.of(text)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_copy_of_a_root_holds_no_key_and_no_server(monkeypatch):
    """What is pickled may be written to a disk, or be sent to another host, which has its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "sesame-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://sesame.example:1")
    root = Root.of("s3://bucket/x.acts.zarr")
    assert "sesame" in str(root.place.spec(""))
    data = pickle.dumps(root)
    assert b"sesame" not in data
    assert "sesame" not in repr(root)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other.example:1")
    assert pickle.loads(data).place.spec("")["endpoint"] == "http://other.example:1"
