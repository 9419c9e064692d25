"""Some of the kills that `python -m tests.bucket_storm` does at length."""

from collections.abc import Iterator

import pytest
from bucket_processes import Processes
from bucket_storm import SERVERS, Storm
from kill_points import unchecked
from servers.everywhere import Reached

pytestmark = pytest.mark.slow  # of the protocol and not of the Python


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module", params=SERVERS)
def storm(
    request: pytest.FixtureRequest, reached: Reached, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storm]:
    with reached(request.param) as server, unchecked():
        yield Storm(server, processes, tmp_path_factory.mktemp(request.param))


@pytest.mark.sampled(2)
def test_a_storm_of_kills(storm: Storm) -> None:
    print(storm.at_random(6, seed=0))


@pytest.mark.sampled(2)
def test_a_run_killed_at_a_point_is_continued_to_the_same_bytes(storm: Storm) -> None:
    points = storm.points()
    assert len(points) > 150
    for key in storm.whole:
        assert any(point.endswith(f" {key}") for point in points), f"no point writes {key}"
    print(storm.kill_at(points[7::26]))


def test_the_server_has_no_threads_when_it_forks(processes: Processes) -> None:
    assert processes.threads() == 1


def test_a_lost_shard_would_be_seen(storm: Storm) -> None:
    key = next(name for name in storm.whole if name.startswith("resid_post/c/"))
    kept = storm.whole[key]
    storm.whole[key] = kept[::-1]
    try:
        with pytest.raises(AssertionError, match=f"(promised, but missing or wrong|other bytes).*{key}"):
            storm.kill_at(["after write .act/SEALED.json"])
    finally:
        storm.whole[key] = kept
