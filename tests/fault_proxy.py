"""A proxy in front of a bucket that answers as a bad network or a busy service does, by rules.

It is the endpoint that a client is given. Each request is passed on to the real server, unless a rule names a fault for
it. Whether a rule with a probability applies is drawn from the seed, the request and how often it was made before, so
the order in which threads ask changes nothing. Every request is written down.

A fault of a request that carries a body (a write) may hurt that body; of others, the answer.
"""

import asyncio
import collections
import dataclasses
import random
import re
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["read", "write", "list", "delete", "look", "other"]
DRIP_BYTES, DRIP_SECONDS = 24, 0.1  # of a slow answer: 240 bytes a second
_MOST_HEAD_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which requests meet which fault. An empty `kinds` or `methods` is all of them."""

    fault: str
    kinds: frozenset[Kind] = frozenset()
    methods: frozenset[str] = frozenset()
    key: str = ""  # a pattern, searched in the key of the object, or in the prefix of a list
    probability: float = 1.0
    most: int | None = None  # how many requests meet it; None: all

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"no fault {self.fault!r}; there are {', '.join(FAULTS)}")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request that came, and what became of it: `status` is 0 where the server was not asked or did not answer."""

    method: str
    kind: Kind
    key: str
    fault: str = ""
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclasses.dataclass(frozen=True)
class Message:
    """A request or an answer: its first line, its headers in small letters, its body."""

    line: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def status(self) -> int:
        return int(self.line.split()[1])

    def head(self, length: int | None) -> bytes:
        """The head; the length of the body, where there is one, is what is said here whatever the body is."""
        headers = self.headers if length is None else self.headers | {"content-length": str(length)}
        lines = [self.line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin1")

    @property
    def length(self) -> int | None:
        """What a head must say: nothing where the first line or the sender leaves no body."""
        bodiless = self.line.startswith("HTTP/1.1 204") or not (self.body or self.line.startswith("HTTP/"))
        return None if bodiless and "content-length" not in self.headers else len(self.body)

    def halves(self) -> tuple[bytes, bytes]:
        """All bytes, cut in the middle of the body, or of the head where there is no body."""
        head = self.head(self.length)
        middle = len(head) + len(self.body) // 2 if self.body else len(head) // 2
        return (head + self.body)[:middle], (head + self.body)[middle:]


@dataclasses.dataclass
class Exchange:
    """One request and the two connections that it concerns: what a fault has to work with."""

    request: Message
    client: asyncio.StreamWriter
    upstream: tuple[str, int]
    silent: asyncio.Event
    gone: Callable[[], bool]
    status: int = 0
    bytes_down: int = 0

    async def forward(self, request: Message | None = None) -> Message:
        """The server's answer to the request, or to another one in its place."""
        asked = request or self.request
        reader, writer = await asyncio.open_connection(*self.upstream, limit=_MOST_HEAD_BYTES)
        try:
            kept = {name: value for name, value in asked.headers.items() if name not in _OF_ONE_CONNECTION}
            alone = dataclasses.replace(asked, headers=kept | {"connection": "close"})
            writer.write(alone.head(alone.length) + asked.body)
            await writer.drain()
            answer = await _read_message(reader, answers=asked.line.split()[0])
        finally:
            writer.close()
        self.status = answer.status
        headers = {name: value for name, value in answer.headers.items() if name not in _OF_ONE_CONNECTION}
        return dataclasses.replace(answer, headers=headers)

    async def send(self, data: bytes) -> None:
        self.client.write(data)
        self.bytes_down += len(data)
        await self.client.drain()

    async def answer(self, message: Message) -> None:
        """Sends a whole answer. To HEAD the head alone, with the length that the body would have."""
        to_head = self.request.line.startswith("HEAD ")
        length = int(message.headers.get("content-length", "0")) if to_head else message.length
        await self.send(message.head(length) + message.body)

    def close(self) -> None:
        self.client.close()

    def reset(self) -> None:
        """Ends the connection as one that was cut: the client gets RST, not an end of file."""
        raw = self.client.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()


_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "expect"}

# Faults


def _says(status: int, reason: str, code: str = "") -> Callable[[Exchange], Awaitable[None]]:
    """An answer that is none of the server; with a code, worded as S3 does."""

    async def says(exchange: Exchange) -> None:
        xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>"
        body = "" if exchange.request.line.startswith("HEAD ") else xml if code else reason
        headers = {"content-type": "application/xml" if code else "text/plain", "x-fault": "injected"}
        await exchange.answer(Message(f"HTTP/1.1 {status} {reason}", headers, body.encode()))

    return says


async def _reset_before(exchange: Exchange) -> None:
    exchange.reset()


async def _reset_after(exchange: Exchange) -> None:
    """The request was applied; the connection is cut in the middle of the answer."""
    await exchange.send((await exchange.forward()).halves()[0])
    exchange.reset()


async def _lost_answer(exchange: Exchange) -> None:
    """The request was applied; nothing comes back."""
    await exchange.forward()
    exchange.close()


async def _short_body(exchange: Exchange) -> None:
    """Half of a body, with a length that agrees: nothing about the message says that something is missing."""
    request = exchange.request
    if request.body:
        await exchange.answer(
            await exchange.forward(dataclasses.replace(request, body=request.body[: len(request.body) // 2]))
        )
        return
    answer = await exchange.forward()
    await exchange.answer(dataclasses.replace(answer, body=answer.body[: len(answer.body) // 2]))


async def _truncation(exchange: Exchange) -> None:
    """The length is that of the whole answer; the connection is closed in its middle."""
    await exchange.send((await exchange.forward()).halves()[0])
    exchange.close()


async def _hang(exchange: Exchange) -> None:
    """No answer, for as long as the client waits and the rules stay."""
    while not (exchange.silent.is_set() or exchange.gone()):
        await asyncio.sleep(0.02)
    exchange.reset()


async def _slow_drip(exchange: Exchange) -> None:
    data = b"".join((await exchange.forward()).halves())
    for start in range(0, len(data), DRIP_BYTES):
        await exchange.send(data[start : start + DRIP_BYTES])
        if exchange.gone():
            return
        if exchange.silent.is_set():
            await exchange.send(data[start + DRIP_BYTES :])
            return
        await asyncio.sleep(DRIP_SECONDS)


async def _bit_flip(exchange: Exchange) -> None:
    """One bit in the middle of the body is another."""
    request = exchange.request
    if request.body:
        await exchange.answer(await exchange.forward(dataclasses.replace(request, body=_flipped(request.body))))
        return
    answer = await exchange.forward()
    await exchange.answer(dataclasses.replace(answer, body=_flipped(answer.body)))


def _flipped(body: bytes) -> bytes:
    changed = bytearray(body)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)


OF_AN_ACCOUNT = {
    "401": _says(401, "Unauthorized"), "403": _says(403, "Forbidden"),
    "expired token": _says(400, "The provided token has expired.", "ExpiredToken"),
    "wrong region": _says(301, "Moved Permanently", "PermanentRedirect"),
}  # fmt: skip
"""Faults that no network makes, but whoever owns the bucket; the last two as S3 words them."""

FAULTS: Mapping[str, Callable[[Exchange], Awaitable[None]]] = MappingProxyType({
    "408": _says(408, "Request Timeout"), "429": _says(429, "Too Many Requests"),
    "500": _says(500, "Internal Server Error"), "502": _says(502, "Bad Gateway"), "503": _says(503, "Slow Down"),
    "409": _says(409, "Conflict"), "412": _says(412, "Precondition Failed"),
    "reset before": _reset_before, "reset after": _reset_after, "lost answer": _lost_answer,
    "short body": _short_body, "truncation": _truncation, "hang": _hang, "slow drip": _slow_drip,
    "bit flip": _bit_flip,
    **OF_AN_ACCOUNT,
})  # fmt: skip
"""All faults by name."""


class FaultProxy:
    """The proxy. Use it in a `with` statement; `endpoint` is for the client, `rules` may be replaced at any time."""

    def __init__(self, upstream: str, rules: list[Rule] | None = None, *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._seed = seed
        self._rules: list[Rule] = list(rules or [])
        self._met: collections.Counter[int] = collections.Counter()
        self._asked: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._loop = asyncio.new_event_loop()
        self._silent = asyncio.Event()
        self.requests: list[Seen] = []
        """Those that ended, in the order in which they did."""
        self.faulted = 0
        """How many requests met a fault; some may still hang."""
        self.under_way = 0
        """How many requests are not among `requests` yet."""

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="fault-proxy")
        listening = threading.Event()
        self._listening = listening.set
        self._thread.start()
        listening.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def rules(self) -> list[Rule]:
        """The rules, of which the first that applies to a request decides."""
        return self._rules

    @rules.setter
    def rules(self, rules: list[Rule]) -> None:
        """Other rules; requests that hang under the old ones are cut, and slow answers sent."""

        def replace() -> None:
            self._rules, self._met = list(rules), collections.Counter()
            self._silent.set()
            self._silent = asyncio.Event()
            done.set()

        done = threading.Event()
        self._loop.call_soon_threadsafe(replace)
        done.wait()

    def counts(self) -> collections.Counter[str]:
        """How many requests there were of each kind."""
        return collections.Counter(each.kind for each in self.requests)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._client(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0, limit=_MOST_HEAD_BYTES, backlog=256)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                await self._exchange(await _read_message(reader, client=writer), writer, reader.at_eof)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # either side has gone: that is what this is for
        finally:
            writer.close()

    async def _exchange(self, request: Message, writer: asyncio.StreamWriter, gone: Callable[[], bool]) -> None:
        method, target, _ = request.line.split(" ", 2)
        kind, key = what_is_asked(method, target)
        fault = self._fault(method, kind, key)
        exchange = Exchange(request, writer, self._upstream, self._silent, gone)
        self.under_way += 1
        try:
            if fault:
                await FAULTS[fault](exchange)
            else:
                await exchange.answer(await exchange.forward())
        finally:
            self.under_way -= 1
            self.requests.append(
                Seen(method, kind, key, fault, exchange.status, len(request.body), exchange.bytes_down)
            )

    def _fault(self, method: str, kind: Kind, key: str) -> str:
        for number, rule in enumerate(self._rules):
            if (rule.kinds and kind not in rule.kinds) or (rule.methods and method not in rule.methods):
                continue
            if not re.search(rule.key, key) or (rule.most is not None and self._met[number] >= rule.most):
                continue
            self._asked[method, key, number] += 1
            drawn = random.Random(f"{self._seed} {method} {key} {number} {self._asked[method, key, number]}").random()
            if drawn < rule.probability:
                self._met[number] += 1
                self.faulted += 1
                return rule.fault
        return ""


def what_is_asked(method: str, target: str) -> tuple[Kind, str]:
    """What a request to S3 or to Google's JSON interface does, and to which key; the prefix of a list."""
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    of_google = re.fullmatch(r"(?:/upload)?/storage/v1/b/[^/]+/o(?:/(.*))?", parts.path)
    name = of_google[1] if of_google else parts.path.removeprefix("/").partition("/")[2]
    key = query.get("name") or unquote(name or "")
    if not key and method == "GET":
        return "list", query.get("prefix") or query.get("startOffset", "")
    kinds: dict[str, Kind] = {"GET": "read", "PUT": "write", "POST": "write", "DELETE": "delete", "HEAD": "look"}
    return kinds.get(method, "other"), key


async def _read_message(
    reader: asyncio.StreamReader, *, answers: str = "", client: asyncio.StreamWriter | None = None
) -> Message:
    """The next request of `client`, or the answer to a request by the method `answers`."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if client is not None and headers.get("expect", "").lower() == "100-continue":
        client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await client.drain()
    if answers and head[0].split()[1] == "100":
        return await _read_message(reader, answers=answers)
    bodiless = answers == "HEAD" or (answers and head[0].split()[1] in ("204", "304"))
    if bodiless:
        body = b""
    elif "chunked" in headers.get("transfer-encoding", ""):
        body = await _read_chunks(reader)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read() if answers else b""
    return Message(head[0], headers, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body
