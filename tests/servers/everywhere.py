"""The table of all servers that take writes, by name: how each is started."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Protocol

from servers.fake_gcs import NAME as FAKE_GCS
from servers.fake_gcs import fake_gcs
from servers.localbucket import NAME as LOCALBUCKET
from servers.localbucket import localbucket
from servers.moto import NAME as MOTO
from servers.moto import moto
from servers.server import Server
from servers.strict_gcs import NAME as STRICT_GCS
from servers.strict_gcs import strict_gcs


class Start(Protocol):
    """Starts a server for as long as the `with` block lasts."""

    def __call__(self) -> AbstractContextManager[Server]: ...


Reached = Callable[[str], AbstractContextManager[Server]]
"""Gives a server by its name: the fixture `reached`."""
SERVERS: Mapping[str, Start] = MappingProxyType(
    {MOTO: moto, LOCALBUCKET: localbucket, FAKE_GCS: fake_gcs, STRICT_GCS: strict_gcs}
)


class Started:
    """Each server that was asked for, started once and kept until the `with` block ends."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._found = stack, dict[str, Server]()

    def __getitem__(self, name: str) -> Server:
        """The running server.

        Raises:
            Missing: it cannot be installed here; the message says why.
        """
        if name not in self._found:
            self._found[name] = self._stack.enter_context(SERVERS[name]())
        return self._found[name]


@contextlib.contextmanager
def started() -> Iterator[Started]:
    """Starts servers as they are asked for; none of them outlives the block."""
    with contextlib.ExitStack() as stack:
        yield Started(stack)
