"""What a path or URL says, checked: a local path, or a place in a bucket, on a web server or in memory. Pure.

A URL names the place and nothing else. Who may use it (keys, tokens, profiles) and through which server comes from the
standard places of each cloud, never from the URL, so that it can be stored, logged and shown.
"""

import dataclasses
import os
import re
from urllib.parse import quote, unquote

from actstore.errors import InputError

SUFFIX = ".acts.zarr"
SCHEMES = ("gs", "s3", "http", "https", "memory")
_LIKELY = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "google": "gs"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_WEB = ("http", "https")
_IN_PATHS = "/:@!$&'()*+,;=~"  # what quote need not write as an escape, beside letters, digits and -._
_NAME = re.compile(r"[A-Za-z0-9._-]{1,222}")
_MOST_BYTES = 700  # of a prefix: keys of a store add up to 200 to it, and clouds end at 1,024


@dataclasses.dataclass(frozen=True)
class Address:
    """A place for a store that is not on this machine's disks."""

    scheme: str
    bucket: str
    """Name of the bucket; host and port of a web server; the first name of a place in memory."""
    prefix: str
    """Path of the store below it, without slashes at its ends and, of a web server, without escapes."""

    @property
    def url(self) -> str:
        """The address as it is shown, and can be given again."""
        path = quote(self.prefix, _IN_PATHS) if self.scheme in _WEB else self.prefix
        return f"{self.scheme}://{self.bucket}/{path}"


def parse(text: str) -> Address | str:
    """The address that a URL names, or the local path that a `file://` URL or a path names.

    Raises:
        InputError: it is neither, or holds what could lead elsewhere or give a secret away.
    """
    if text.lstrip().startswith(("{", "[{")) and ":" in text:
        raise InputError(
            f"the address is JSON, of {len(text):,} characters; expected a path or a URL such as gs://bucket/run{SUFFIX}"
        )
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", text, re.DOTALL)
    if found is None:
        return _path(text)
    scheme, rest = found.groups()
    if scheme == "file":
        return _file(rest, text)
    if scheme not in SCHEMES:
        likely = _LIKELY.get(scheme.lower(), scheme.lower())
        meant = f"; did you mean {likely}://" if likely in SCHEMES else ""
        raise InputError(
            f"cannot open {shown(text)}: found a {scheme}:// address; expected a path, file://, gs://, s3://, or "
            f"http:// and https:// to read{meant}"
        )
    _refuse_dangerous(rest, text)
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    expected, what = {
        "gs": (_BUCKET, "bucket"), "s3": (_BUCKET, "bucket"), "memory": (_NAME, "name"),
    }.get(scheme, (_HOST, "host"))  # fmt: skip
    if not expected.fullmatch(bucket):
        raise InputError(
            f"{shown(text)} has {'no' if not bucket else 'a wrong'} {what} after {scheme}://; expected "
            f"{scheme}://{what}/path/run{SUFFIX}"
        )
    if not prefix:
        raise InputError(f"{shown(text)} names no store; expected {scheme}://{what}/path/run{SUFFIX}")
    return Address(scheme, bucket, _decoded(prefix, text) if scheme in _WEB else prefix)


def _decoded(path: str, text: str) -> str:
    """A path of a web server without escapes: TensorStore writes them."""
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise InputError(f"{shown(text)} holds escapes that are not UTF-8; expected those of text in UTF-8") from None


def _path(text: str) -> str:
    """A local path; what looks like a URL that lost something is refused."""
    if (
        re.match(r"(?:gs|s3|https?|memory|file):", text)
        or "://" in text
        or re.match(r"[A-Za-z][A-Za-z0-9+.-]*::", text)
    ):
        raise InputError(
            f"{shown(text)} is neither a path nor a URL; expected a path such as runs/qwen{SUFFIX}, or "
            f"gs://bucket/qwen{SUFFIX}; for a local path of this name write ./ before it"
        )
    return text


def _file(rest: str, text: str) -> str:
    """The path of a `file://` URL."""
    if not rest.startswith("/"):
        raise InputError(f"{shown(text)} names a host; expected file:///path/run{SUFFIX}, with three slashes")
    return rest


def _refuse_dangerous(rest: str, text: str) -> None:
    """Refuses what TensorStore, a server or a reader of logs could take for something else.

    Raises:
        InputError: says what.
    """

    def refuse(found: str, remedy: str) -> None:
        raise InputError(f"{shown(text)} holds {found}; expected a URL that names a place and nothing else: {remedy}")

    host = rest.partition("/")[0]
    if "@" in host:
        refuse("a user or password", "take it out; credentials come from the environment or the cloud's own files")
    if "?" in rest or "#" in rest:
        refuse("a query or fragment", "take out what follows ? or #; tokens come from the environment")
    behind = rest.removeprefix(host) if _HOST.fullmatch(host) else rest  # addresses of IPv6 have ::
    for piece, remedy in [("|", "one store, without |"), ("::", "one store, without ::"), ("\\", "use / only")]:
        if piece in behind:
            refuse(repr(piece), remedy)
    if re.search(r"[\x00-\x20\x7f-\x9f]", rest):
        refuse(
            "a space or control character",
            "write %20 for a space" if text.startswith(_WEB) else "rename the store",
        )
    if re.search(r"%(?![0-9a-fA-F]{2})|%(?:2[ef]|5c|00)", rest, re.IGNORECASE):
        refuse("an escape that stands for . or / or for nothing", "write the path as it is")
    parts = rest.rstrip("/").split("/")[1:]
    if ".." in parts or "." in parts:
        refuse("a step such as ..", "write the path without it")
    if "" in parts:
        refuse("an empty step, //", "write one slash")
    if len("/".join(parts).encode()) > _MOST_BYTES:
        refuse(f"a path of more than {_MOST_BYTES} bytes", "use a shorter one")


def shown(text: str) -> str:
    """An address as a message may show it: no user, no password, no query, no control characters, not too long."""
    safe = re.sub(r"^(\w+:/+)?.*@", r"\1***@", text, flags=re.DOTALL)
    safe = re.sub(r"[?#].*$", "?***", safe, flags=re.DOTALL) if ":" in text else safe
    return repr(safe if len(safe) <= 200 else f"{safe[:200]}...")


def store_name(url: str) -> str:
    """The last part of a path or URL: the name of the store."""
    return os.path.basename(url.rstrip("/"))  # noqa: PTH119  a URL is no path
