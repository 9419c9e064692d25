"""Switches the shape checks on, and makes the small stores that tests share."""

import math
import os
import time

import jaxtyping
import typecheck

typecheck.install()  # before anything imports them

from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from parts import mark_the_rest_long  # noqa: E402
from servers.everywhere import Reached, Started, started  # noqa: E402
from servers.server import Missing, Server  # noqa: E402
from stores import Contents, make_contents  # noqa: E402

settings.register_profile("shared", deadline=None, max_examples=40)  # a busy machine is not a failure
settings.load_profile("shared")


BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=math.inf, help="tests that would begin later are skipped, loudly")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"NOT RUN: {minutes:g} minutes were over on this machine; run it on a faster one")


@pytest.hookimpl(tryfirst=True)  # before those that are marked long are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest_long(items)


@pytest.fixture(scope="session")
def contents() -> Contents:
    """Four sites with widths and layers of their own, all dtypes, a short last block, documents."""
    return make_contents()


@pytest.fixture(scope="session")
def finished(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of `contents`. Shared by all tests: read it, never change it."""
    return contents.write(tmp_path_factory.mktemp("finished") / "run.acts.zarr")


@pytest.fixture(scope="session")
def unfinished(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `contents` with blocks 1 and 3 only. Shared by all tests: read it, never change it."""
    return contents.write(tmp_path_factory.mktemp("unfinished") / "run.acts.zarr", blocks=[3, 1], seal=False)


@pytest.fixture(scope="session")
def started_servers() -> Iterator[Started]:
    """Servers with buckets by name, each started when a test first asks for it. Use prefixes of your own."""
    with started() as servers:
        yield servers


@pytest.fixture(scope="session")
def reached(started_servers: Started) -> Reached:
    """Gives a server by its name, which clients inside find by the environment; skips where it cannot be had."""

    @contextmanager
    def reach(name: str) -> Iterator[Server]:
        try:
            server = started_servers[name]
        except Missing as error:
            pytest.skip(f"NOT RUN: {error}")
        with mock.patch.dict(os.environ, server.client_environ()):
            yield server

    return reach


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the tests: what a user's wrong array or value meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
