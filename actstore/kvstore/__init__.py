"""The only place that talks to storage: where a path or URL becomes TensorStore's specs, and its errors become ours.

A `Root` is the place of one store: it reads, writes and lists small objects by key, and opens arrays below it. Writes
are durable when they return. What differs between a folder of this machine and a bucket is in `local` and `remote`;
nobody else asks which it is, but for the paths that read files where they lie (`Root.is_local`).
"""

from actstore.kvstore.addresses import SUFFIX
from actstore.kvstore.cache import DEFAULT_BYTES, Cache
from actstore.kvstore.failures import storage_errors
from actstore.kvstore.forks import forked, refuse_fork
from actstore.kvstore.limits import Limits
from actstore.kvstore.local import kind_of
from actstore.kvstore.root import Root
from actstore.kvstore.waiting import Operation

__all__ = [
    "DEFAULT_BYTES",
    "SUFFIX",
    "Cache",
    "Limits",
    "Operation",
    "Root",
    "forked",
    "kind_of",
    "refuse_fork",
    "storage_errors",
]
