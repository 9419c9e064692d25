"""Every exception of actstore, in one tree.

::

    ActstoreError                   exit code 1
    ├── InputError                  2   an argument, a file or a configuration is wrong; nothing was done
    │   ├── UnknownNameError        2   a site, layer, column or option that does not exist here
    │   └── PlanMismatchError       2   the target holds another run; the differing fields are named
    ├── StoreError                  3   something about the store stops this operation
    │   ├── StoreNotFoundError      2   there is no store at this place
    │   ├── UnfinishedStoreError    2   the store is still being written and `partial=True` was not given
    │   ├── SealedStoreError        2   the store is complete and takes no more blocks
    │   ├── CorruptStoreError       4   stored bytes or metadata are damaged, missing or hostile
    │   └── StorageError            3   the storage failed: try again, or mend it first
    │       ├── StoragePermissionError  2   not allowed, or read-only
    │       │   └── CredentialsError    2   no credentials, expired ones, or ones that are not accepted
    │       ├── BucketError             2   no such bucket, in another region, or its server refuses such requests
    │       └── StorageFullError        2   no space left
    └── StoppedError                75  asked to stop; running the same command again continues
        └── WorkerLostError         75  a process that computes the same model ended; so did this one

Every message has three parts: what was found, what was expected, what to do next. The exit code is what the
command line returns when the exception reaches it.
"""

from typing import ClassVar


class ActstoreError(Exception):
    """The root of all errors that actstore raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(ActstoreError, ValueError):
    """An argument, a file or a configuration is wrong. Raised before any compute; nothing was written."""

    exit_code = 2


class UnknownNameError(InputError):
    """A site, layer, column or option was named that does not exist here."""


class PlanMismatchError(InputError):
    """The target already holds a run whose plan differs from this one."""


class StoreError(ActstoreError):
    """Something about the store stops this operation."""

    exit_code = 3


class StoreNotFoundError(StoreError):
    """There is no store at this place."""

    exit_code = 2


class UnfinishedStoreError(StoreError):
    """The store is still being written."""

    exit_code = 2


class SealedStoreError(StoreError):
    """The store is complete and takes no more blocks."""

    exit_code = 2


class CorruptStoreError(StoreError):
    """Stored bytes or metadata are damaged, missing or hostile."""

    exit_code = 4


class StorageError(StoreError):
    """The storage failed: a time-out, a network error, an input/output error."""


class StoragePermissionError(StorageError):
    """The storage refused: no permission, or read-only."""

    exit_code = 2


class CredentialsError(StoragePermissionError):
    """The storage does not know who asks: no credentials, expired ones, or ones that it does not accept."""


class BucketError(StorageError):
    """There is no such bucket, it is in another region than was asked, or its server refuses such requests."""

    exit_code = 2


class StorageFullError(StorageError):
    """No space, quota or inodes left."""

    exit_code = 2


class StoppedError(ActstoreError):
    """Asked to stop (SIGTERM, SIGINT, SIGHUP). Running the same command again continues."""

    exit_code = 75


class WorkerLostError(StoppedError):
    """Another process of the group that computes one model together ended or is not reachable."""
