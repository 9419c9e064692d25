"""Failures of storage as errors of ours: one line each, without a spec, a server's address or anything of a credential.

TensorStore raises a ValueError with a status word, the answer of the server and a dump of its spec. Of all that a
message keeps what went wrong, and at which object.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from actstore.durable import LOCK_SUFFIX
from actstore.errors import (
    ActstoreError,
    BucketError,
    CorruptStoreError,
    CredentialsError,
    StorageError,
    StorageFullError,
    StoragePermissionError,
    StoreError,
)
from actstore.kvstore.addresses import SUFFIX

TIMEOUT_SECONDS = 600.0  # of local storage: what takes longer than this is not coming back
_KIND_OF_ERRNO: dict[int, type[StorageError]] = {
    errno.ENOSPC: StorageFullError, errno.EDQUOT: StorageFullError,
    errno.EROFS: StoragePermissionError, errno.EACCES: StoragePermissionError, errno.EPERM: StoragePermissionError,
}  # fmt: skip
_Kinds = list[tuple[str, type[StoreError], str]]
_CREDENTIALS = "check your credentials: the environment and the cloud's own files (docs: how-to on buckets)"
_REQUESTER_PAYS = (
    "requests are at the cost of whoever asks, which is not supported: use another bucket, or copy the store"
)
_NO_RANGES = (
    "the server does not answer ranges (`python -m http.server` does not): copy the whole folder of the store to this "
    "machine, or use a server that does"
)
_LARGE = "it is larger than the storage takes in one request: make the store with fewer `--block-samples`"
_BUSY = "the storage is busy or not reachable: run the same command again later"
_REFUSED = (
    "the storage refused this and would again: find out what its answer means there (its documentation or whoever runs "
    "it says so), mend that, then run the same command again"
)
_PASSING = (
    r"RequestTimeout\b|IncompleteBody|Throttl|SlowDown|[rR]ateLimitExceeded"  # words that stand with 400, 403 too
)
_ANSWERS: _Kinds = [  # of servers: the word of their answer, or the number
    ("RequestTimeTooSkewed", CredentialsError, "set the clock of this machine, then run the same command again"),
    ("ExpiredToken", CredentialsError, "renew your credentials, then run the same command again"),
    ("TokenRefreshRequired", CredentialsError, "renew your credentials, then run the same command again"),
    ("InvalidAccessKeyId", CredentialsError, _CREDENTIALS),
    ("SignatureDoesNotMatch", CredentialsError, _CREDENTIALS),
    ("InvalidToken", CredentialsError, _CREDENTIALS),
    ("NoSuchBucket", BucketError, "check the name of the bucket, or make it"),
    ("InvalidBucketName", BucketError, "check the name of the bucket"),
    ("PermanentRedirect", BucketError, "set AWS_REGION to the region of the bucket"),
    ("AuthorizationHeaderMalformed", BucketError, "set AWS_REGION to the region of the bucket"),
    ("IllegalLocationConstraint", BucketError, "set AWS_REGION to the region of the bucket"),
    ("QuotaExceeded", StorageFullError, "raise the quota or delete something, then run the same command again"),
    ("507", StorageFullError, "free some space, then run the same command again"),
    ("EntityTooLarge", BucketError, _LARGE),
    ("413", BucketError, _LARGE),
    ("KMS", StoragePermissionError, "check the key (KMS) of the bucket, and that these credentials may use it"),
    ("UserProject", BucketError, _REQUESTER_PAYS),
    ("405", BucketError, "the storage takes no such request: check the address, and whether it can be written at all"),
    ("401", CredentialsError, _CREDENTIALS),
    ("403", StoragePermissionError, "check what these credentials may do here (docs: how-to on least privilege)"),
    ("404", BucketError, "check the name of the bucket, or make it"),
    ("416", CorruptStoreError, "run `actstore verify`"),  # an object shorter than what was asked of it
    ("301", BucketError, "check the region of the bucket, and that the address is not one that leads elsewhere"),
]  # fmt: skip
_STATUS: _Kinds = [
    ("No space left", StorageFullError, "free some space, then run the same command again"),
    ("Disk quota", StorageFullError, "free some space or raise the quota, then run the same command again"),
    ("Read-only file system", StoragePermissionError, "choose a target that can be written"),
    ("CREDENTIALS", CredentialsError, _CREDENTIALS),  # of the AWS libraries
    ("credentials from provider", CredentialsError, _CREDENTIALS),
    ("credentials provider", CredentialsError, _CREDENTIALS),
    ("credentials file", CredentialsError, _CREDENTIALS),  # of Google
    ("PERMISSION_DENIED", StoragePermissionError, "check the permissions of the target"),
    ("UNAUTHENTICATED", CredentialsError, "check your credentials"),
    ("RESOURCE_EXHAUSTED", StorageFullError, "free some space, then run the same command again"),
    ("DATA_LOSS", CorruptStoreError, "run `actstore verify`"),
    ("OUT_OF_RANGE", CorruptStoreError, "run `actstore verify`"),
    ("was ignored by server", BucketError, _NO_RANGES),
    ("Requested byte range", CorruptStoreError, "run `actstore verify`"),  # an object shorter than its index
    ("Not enough data", CorruptStoreError, "run `actstore verify`"),  # an empty object
    ("ZSTD_", CorruptStoreError, "run `actstore verify`"),  # FAILED_PRECONDITION, as are refused writes
    ("Truncated Zstd", CorruptStoreError, "run `actstore verify`"),
    ("End of data", CorruptStoreError, "run `actstore verify`"),  # a chunk of another size: of another array
    ("NOT_FOUND", CorruptStoreError, "run `actstore verify`"),
    ("DEADLINE_EXCEEDED", StorageError, "the storage is too slow or gone: run the same command again later"),
    ("UNAVAILABLE", StorageError, "the storage is not reachable: run the same command again later"),
]


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turns TensorStore's errors inside the block into ours, in one line without the spec.

    Raises:
        StoreError: of the class that fits the failure.
    """
    try:
        yield
    except ActstoreError:
        raise  # ours already; some of them are ValueErrors too
    except TimeoutError:
        raise StorageError(
            f"could not {doing}: no answer in {TIMEOUT_SECONDS:.0f} s; run the same command again later"
        ) from None
    except OSError as error:
        failure = _KIND_OF_ERRNO.get(error.errno or 0, StorageError)
        remedy = (
            "free some space, then run the same command again" if failure is StorageFullError else "check the target"
        )
        raise failure(f"could not {doing}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        kind, remedy = _kind(str(error))
        raise kind(f"could not {doing}: {reason(str(error))}; {remedy}") from None


def _kind(text: str) -> tuple[type[StoreError], str]:
    """The class of a failure, and what to do about it."""
    answer = _answer(text)
    if answer is not None:
        if re.search(_PASSING, answer):
            return StorageError, _BUSY
        if re.search("requester.pays", text, re.IGNORECASE):
            return BucketError, _REQUESTER_PAYS
        for needle, kind, remedy in _ANSWERS:
            if needle in answer:
                return kind, remedy
        return (BucketError, _REFUSED) if re.match(r"4(?!08|09|12|29)", answer) else (StorageError, _BUSY)
    for needle, kind, remedy in _STATUS:
        if needle in text:
            return kind, remedy
    return StorageError, _BUSY if "CURL" in text else "run the same command again"


def may_pass(text: str) -> bool:
    """Whether a failure may be another one, or none, if the same is tried again in a while."""
    answer = _answer(text)
    if _kind(text)[0] is not StorageError:
        return False
    if answer is not None:
        return bool(re.match(r"408|409|412|429|5\d\d", answer) or re.search(_PASSING, answer))
    return text.startswith(("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL")) or "CURL error" in text


def reason(text: str) -> str:
    """What went wrong and at which object, out of TensorStore's chain of causes: no status word, spec or location."""
    paths = re.findall(rf'{re.escape(SUFFIX)}/([^"\\]+)"', text)
    place = f" at {paths[-1].removesuffix(LOCK_SUFFIX)}" if paths else ""
    if (answer := _answer(text)) is not None:
        return f"the storage answered {answer}{place}"
    if curl := re.search(r"CURL error ([\w ,'/-]+)", text):
        return curl[1].strip().removesuffix(" to server").lower() + place  # what follows names the server
    if _kind(text)[0] is CredentialsError and "credentials file" not in text:
        return "no credentials were found where they were looked for"
    text = re.sub(r"\s*\[[a-z_ ]+='.*$", "", text.split("\n", maxsplit=1)[0])
    cause = re.split(r'": |(?<=[a-z]): (?=[A-Z])|^[A-Z_]+: ', text)[-1]
    cause = re.sub(r"^chunk .* is missing$", "missing object", cause)
    return re.sub(r"\w+://\S+", "its address", cause) + place


def _answer(text: str) -> str | None:
    """What a server answered, `403 AccessDenied`: its number, and its own word where it has one; None: no answer."""
    number = re.search(r"http_response_code='(\d{3})'|HTTP code (\d{3})", text)
    if number is None:
        return None
    code = number[1] or number[2]
    word = re.search(r"<Code>([\w.]+)</Code>", text) or re.search(r'\\*"reason\\*": *\\*"(\w+)', text)
    named = word[1] if word else ""
    if not named and (found := re.match(r"(?:[A-Z_]+: )?(?:All \d+ retry attempts failed: )?(\w+): ", text)):
        named = "" if found[1].isupper() else found[1]
    return f"{code} {named}".strip()
