"""The proxy itself: each fault as a bare client sees it, which requests meet one, and what is counted."""

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fault_proxy import FAULTS, FaultProxy, Rule, what_is_asked

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

BODY = bytes(range(256)) * 8


class _Echo(BaseHTTPRequestHandler):
    """Answers every request with what it has stored under the path; PUT stores."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, bytes]

    def do_PUT(self) -> None:
        self.stored[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(b"")

    def do_GET(self) -> None:
        self._send(self.stored.get(self.path, BODY))

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2048")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Kept", "yes")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[tuple[str, dict[str, bytes]]]:
    stored: dict[str, bytes] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("_Stored", (_Echo,), {"stored": stored})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", stored
        server.shutdown()
        thread.join()


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/acts/x", body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body, by a client that retries nothing."""
    client = http.client.HTTPConnection("127.0.0.1", urlsplit(proxy.endpoint).port or 0, timeout=5)
    try:
        client.request(method, path, body)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def test_without_rules_everything_passes(upstream: tuple[str, dict[str, bytes]]) -> None:
    with FaultProxy(upstream[0]) as proxy:
        assert ask(proxy) == (200, BODY)
        assert ask(proxy, "PUT", "/acts/y", b"new") == (200, b"")
        assert ask(proxy, "GET", "/acts/y") == (200, b"new")
        assert ask(proxy, "HEAD") == (200, b"")
        large = BODY * 4096
        assert ask(proxy, "PUT", "/acts/large", large)[0] == 200
        assert ask(proxy, "GET", "/acts/large") == (200, large)
        client = http.client.HTTPConnection("127.0.0.1", urlsplit(proxy.endpoint).port or 0)
        for _ in range(3):  # on one connection
            client.request("GET", "/acts/x")
            answer = client.getresponse()
            assert (answer.read(), answer.getheader("X-Kept")) == (BODY, "yes")
        client.close()
    assert proxy.counts() == {"read": 6, "write": 2, "look": 1}
    assert proxy.faulted == 0
    assert sum(each.bytes_up for each in proxy.requests) == 3 + len(large)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name.isdigit()])
def test_a_status_comes_instead_of_an_answer(upstream: tuple[str, dict[str, bytes]], fault: str) -> None:
    with FaultProxy(upstream[0], [Rule(fault)]) as proxy:
        assert ask(proxy, "PUT", "/acts/y", b"new")[0] == int(fault)
        assert ask(proxy)[0] == int(fault)
        assert ask(proxy, "HEAD")[0] == int(fault)
    assert upstream[1] == {}
    assert [each.status for each in proxy.requests] == [0, 0, 0]  # the server was not asked


LOST: dict[str, tuple[type[Exception], bool]] = {  # what a client gets, and whether a write was applied
    "reset before": (ConnectionResetError, False),
    "reset after": (ConnectionResetError, True),
    "lost answer": (http.client.RemoteDisconnected, True),
}


@pytest.mark.parametrize("fault", LOST)
def test_a_connection_that_ends(upstream: tuple[str, dict[str, bytes]], fault: str) -> None:
    error, applied = LOST[fault]
    with FaultProxy(upstream[0], [Rule(fault)]) as proxy:
        with pytest.raises(error):
            ask(proxy, "PUT", "/acts/y", b"new")
        with pytest.raises((error, http.client.IncompleteRead)):
            ask(proxy)
    assert upstream[1] == ({"/acts/y": b"new"} if applied else {})
    assert [bool(each.status) for each in proxy.requests] == [applied, applied]


def test_half_a_body_that_looks_whole(upstream: tuple[str, dict[str, bytes]]) -> None:
    with FaultProxy(upstream[0], [Rule("short body")]) as proxy:
        assert ask(proxy) == (200, BODY[:1024])
        assert ask(proxy, "PUT", "/acts/y", b"12345678")[0] == 200
    assert upstream[1] == {"/acts/y": b"1234"}


def test_half_a_body_that_is_seen_to_be_cut(upstream: tuple[str, dict[str, bytes]]) -> None:
    with FaultProxy(upstream[0], [Rule("truncation")]) as proxy, pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy)
    assert caught.value.partial == BODY[:1024]


def test_one_bit_is_another(upstream: tuple[str, dict[str, bytes]]) -> None:
    with FaultProxy(upstream[0], [Rule("bit flip")]) as proxy:
        found = ask(proxy)[1]
        assert ask(proxy, "PUT", "/acts/y", b"abc")[0] == 200
    assert [(a ^ b) for a, b in zip(found, BODY, strict=True) if a != b] == [1]
    assert upstream[1] == {"/acts/y": b"acc"}


def test_a_hanging_request_waits_for_other_rules(upstream: tuple[str, dict[str, bytes]]) -> None:
    with FaultProxy(upstream[0], [Rule("hang")]) as proxy:
        caught: list[type[BaseException]] = []

        def wait() -> None:
            with pytest.raises(OSError) as error:  # noqa: PT011  which one is compared below
                ask(proxy)
            caught.append(error.type)

        asked = threading.Thread(target=wait)
        asked.start()
        asked.join(0.3)
        assert asked.is_alive()
        proxy.rules = []
        asked.join(5)
        assert caught == [ConnectionResetError]
        assert ask(proxy) == (200, BODY)


def test_a_proxy_that_ends_lets_nothing_hang(upstream: tuple[str, dict[str, bytes]]) -> None:
    started = time.monotonic()
    with FaultProxy(upstream[0], [Rule("hang")]) as proxy:
        client = socket.create_connection(("127.0.0.1", urlsplit(proxy.endpoint).port or 0), timeout=5)
        client.sendall(b"GET /acts/x HTTP/1.1\r\n\r\n")
        time.sleep(0.1)
    assert client.recv(10) == b""
    client.close()
    assert time.monotonic() - started < 5


def test_a_slow_answer_is_whole(upstream: tuple[str, dict[str, bytes]]) -> None:
    upstream[1]["/acts/small"] = b"small"
    with FaultProxy(upstream[0], [Rule("slow drip")]) as proxy:
        started = time.monotonic()
        assert ask(proxy, "GET", "/acts/small") == (200, b"small")
        assert time.monotonic() - started > 0.3


def test_rules_choose_by_method_kind_key_and_count(upstream: tuple[str, dict[str, bytes]]) -> None:
    rules = [
        Rule("503", methods=frozenset({"PUT"}), key=r"commits/.*\.json$"),
        Rule("429", kinds=frozenset({"list"})),
        Rule("500", kinds=frozenset({"read"}), most=2),
    ]
    with FaultProxy(upstream[0], rules) as proxy:
        assert ask(proxy, "PUT", "/acts/run/commits/1.json", b"1")[0] == 503
        assert ask(proxy, "PUT", "/acts/run/other.json", b"1")[0] == 200
        assert ask(proxy, "GET", "/acts/?list-type=2&prefix=run/")[0] == 429
        assert [ask(proxy, "GET", "/acts/x")[0] for _ in range(3)] == [500, 500, 200]
    assert [each.fault for each in proxy.requests] == ["503", "", "429", "500", "500", ""]


def test_draws_come_from_the_seed_and_not_from_the_order(upstream: tuple[str, dict[str, bytes]]) -> None:
    def faults(seed: int, keys: list[int]) -> dict[int, list[int]]:
        with FaultProxy(upstream[0], [Rule("503", probability=0.3)], seed=seed) as proxy:
            found: dict[int, list[int]] = {}
            for key in keys:
                found.setdefault(key, []).append(ask(proxy, "GET", f"/acts/{key}")[0])
            return found

    keys = [number for number in range(60) for _ in range(2)]
    first = faults(1, keys)
    assert first == faults(1, keys[::-1])
    assert first != faults(2, keys)
    assert 0.15 < sum(status == 503 for each in first.values() for status in each) / 120 < 0.45


def test_a_fault_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no fault '504'"):
        Rule("504")


REQUESTS = {
    ("GET", "/acts/?list-type=2&prefix=run/.act/"): ("list", "run/.act/"),
    ("GET", "/acts?list-type=2"): ("list", ""),
    ("GET", "/acts/run/zarr.json"): ("read", "run/zarr.json"),
    ("HEAD", "/acts/run/zarr.json"): ("look", "run/zarr.json"),
    ("PUT", "/acts/a%20b"): ("write", "a b"),
    ("DELETE", "/acts/x"): ("delete", "x"),
    ("GET", "/storage/v1/b/acts/o/run%2Fzarr.json?alt=media"): ("read", "run/zarr.json"),
    ("GET", "/storage/v1/b/acts/o?startOffset=run%2F.act%2F&endOffset=run%2F.act0"): ("list", "run/.act/"),
    ("POST", "/upload/storage/v1/b/acts/o?uploadType=media&name=run%2Fx&ifGenerationMatch=0"): ("write", "run/x"),
    ("DELETE", "/storage/v1/b/acts/o/run%2Fx"): ("delete", "run/x"),
}


@pytest.mark.parametrize(("asked", "expected"), REQUESTS.items())
def test_what_a_request_is(asked: tuple[str, str], expected: tuple[str, str]) -> None:
    assert what_is_asked(*asked) == expected
