"""A reverse proxy on loopback that makes an S3 server fail in chosen ways.

    with FaultProxy(endpoint, share=0.05, seed=1) as proxy:
        ...                      # AWS_ENDPOINT_URL = proxy.endpoint
        proxy.counts()           # {Fault.LOST_RESPONSE: 3, ...}

Requests are passed on byte for byte but for ``Connection`` and ``Expect``, which signatures do not cover: path, query and Host
are as the client signed them. Every request has a connection of its own, whole bodies are kept in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit


class Fault(enum.StrEnum):
    ERROR_500 = "error 500"
    SLOW_DOWN = "503 SlowDown"
    # Before the request was passed on: nothing happened on the server.
    RESET = "reset"
    # After it was passed on: what it asked for has happened, and the client does not know.
    LOST_RESPONSE = "lost response"
    # The response's body comes in drops, for ``_DRIP_SECONDS`` in all.
    SLOW_BODY = "slow body"
    # The whole Content-Length and half of the body, then a reset.
    TRUNCATED_BODY = "truncated body"
    # No answer until the client closes the connection.
    HANG = "hang"
    # A server that has never heard of If-None-Match on PUT, and writes.
    IGNORED_CONDITION = "ignored condition"
    # A server that looks for the object and then writes, in two steps.
    LATE_CONDITION = "late condition"
    # A server that refuses If-None-Match on PUT.
    ERROR_501 = "error 501"


# Hangs are left out: each takes a client's whole time limit.
RANDOM_FAULTS = (
    Fault.ERROR_500,
    Fault.SLOW_DOWN,
    Fault.RESET,
    Fault.LOST_RESPONSE,
    Fault.SLOW_BODY,
    Fault.TRUNCATED_BODY,
)
_IN_THE_BODY = (Fault.SLOW_BODY, Fault.TRUNCATED_BODY)
_ON_CONDITIONS = (Fault.IGNORED_CONDITION, Fault.LATE_CONDITION, Fault.ERROR_501)
_ANSWERS = {
    Fault.ERROR_500: ("500 Internal Server Error", "InternalError"),
    Fault.SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    Fault.ERROR_501: ("501 Not Implemented", "NotImplemented"),
}
_DRIP_SECONDS = 0.5
_NUM_DROPS = 10
# Between the two steps of a late condition: writers that come at once all look before one writes.
_LATE_SECONDS = 0.3
_MAX_HEAD_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Rule:
    """Requests of one kind meet one fault. ``applied`` counts how often that happened."""

    fault: Fault
    method: str = "*"
    path: re.Pattern[str]
    times: int | None = None
    applied: int = 0


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str  # Path and query as sent.
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def to_bytes(self) -> bytes:
        """As received, except for what concerns this connection alone."""
        kept = [(key, value) for key, value in self.headers if key.lower() not in ("connection", "expect")]
        lines = [
            f"{self.method} {self.target} HTTP/1.1",
            *(f"{key}: {value}" for key, value in kept),
            "Connection: close",
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


@dataclass
class FaultProxy:
    """Runs while the ``with`` block does, in a thread; all methods may be called from any thread.

    Args:
        upstream: the server's endpoint, ``http://host:port``.
        share: of the requests that meet a fault from ``faults``, 0 to 1; rules come first.
        seed: of the choice. Faults are dealt like cards, so that after a few each has occurred.
        credentials: access key and secret key, needed where a request is signed anew: IGNORED_CONDITION, LATE_CONDITION.
    """

    upstream: str
    share: float = 0.0
    seed: int = 0
    faults: Sequence[Fault] = RANDOM_FAULTS
    credentials: tuple[str, str] | None = None
    endpoint: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._rng = random.Random(self.seed)
        self._decks: dict[bool, list[Fault]] = {True: [], False: []}
        self._rules: list[Rule] = []
        self._counts: Counter[Fault] = Counter()
        self._num_requests = 0

    # What it does

    def rule(self, fault: Fault, *, method: str = "*", path: str = "", times: int | None = None) -> Rule:
        """From now on the next ``times`` requests (None: all) of ``method`` whose path or query contains the regular
        expression ``path`` meet ``fault``; faults of conditions only those with ``If-None-Match``. Earlier rules come first.
        """
        rule = Rule(fault=fault, method=method, path=re.compile(path), times=times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear_rules(self) -> None:
        with self._lock:
            self._rules.clear()

    def counts(self) -> dict[Fault, int]:
        """How often each fault really happened."""
        with self._lock:
            return dict(self._counts)

    @property
    def num_requests(self) -> int:
        with self._lock:
            return self._num_requests

    def _choose(self, request: _Request) -> Fault | None:
        with self._lock:
            self._num_requests += 1
            for rule in self._rules:
                if rule.times is not None and rule.applied >= rule.times:
                    continue
                if rule.method not in ("*", request.method) or not rule.path.search(request.target):
                    continue
                if rule.fault in _ON_CONDITIONS and request.get("if-none-match") is None:
                    continue
                # Claimed under the lock, so that requests at once do not share one.
                rule.applied += 1
                return rule.fault
            if self._rng.random() >= self.share:
                return None
            has_body = request.method == "GET"
            deck = self._decks[has_body]
            if not deck:
                deck += [fault for fault in self.faults if has_body or fault not in _IN_THE_BODY]
                self._rng.shuffle(deck)
            return deck.pop()

    def _count(self, fault: Fault) -> None:
        with self._lock:
            self._counts[fault] += 1

    # The thread

    def __enter__(self) -> Self:
        listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(listening),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self, listening: socket.socket) -> None:
        connections: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(connected, sock=listening, limit=_MAX_HEAD_BYTES)
        await self._stop.wait()
        server.close()
        open_connections = list(connections)
        for task in open_connections:
            task.cancel()
        await asyncio.gather(*open_connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. A client that goes away, as after its time limit, and a server that is down end it with a reset."""
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        finally:
            _reset(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = _parse(await reader.readuntil(b"\r\n\r\n"))
        fault = self._choose(request)
        if fault is Fault.HANG:
            self._count(fault)
            while await reader.read(1 << 16):
                pass
            return
        if fault is Fault.RESET:
            self._count(fault)
            _reset(writer)
            return
        if request.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(request.get("content-length") or 0))
        request = _Request(request.method, request.target, request.headers, body)
        if fault in _ANSWERS:
            self._count(fault)
            writer.write(_error_answer(request, *_ANSWERS[fault]))
            return
        if fault in (Fault.IGNORED_CONDITION, Fault.LATE_CONDITION):
            self._count(fault)
            writer.write(await self._without_condition(request, look=fault is Fault.LATE_CONDITION))
            return
        response = await self._forward(request)
        if fault is Fault.LOST_RESPONSE:
            self._count(fault)
            _reset(writer)
            return
        head, _, content = response.partition(b"\r\n\r\n")
        if fault not in _IN_THE_BODY or not content:
            writer.write(response)
            return
        self._count(fault)
        writer.write(head + b"\r\n\r\n")
        if fault is Fault.TRUNCATED_BODY:
            writer.write(content[: len(content) // 2])
            await writer.drain()
            # What is still on its way is lost with a reset, and a half of the body should arrive: end without one.
            writer.close()
            return
        step = -(-len(content) // _NUM_DROPS)
        for start in range(0, len(content), step):
            writer.write(content[start : start + step])
            await writer.drain()
            await asyncio.sleep(_DRIP_SECONDS / _NUM_DROPS)

    async def _forward(self, request: _Request) -> bytes:
        """The server's whole response, as sent."""
        parts = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            writer.write(request.to_bytes())
            await writer.drain()
            return await reader.read(-1)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _without_condition(self, request: _Request, *, look: bool) -> bytes:
        """The PUT unconditionally, or, with ``look``, after a HEAD that found nothing."""
        if look:
            found = await self._forward(self._signed(_Request("HEAD", request.target, request.headers)))
            await asyncio.sleep(_LATE_SECONDS)
            if found.startswith(b"HTTP/1.1 200"):
                return _error_answer(request, "412 Precondition Failed", "PreconditionFailed")
        return await self._forward(self._signed(request))

    def _signed(self, request: _Request) -> _Request:
        """Without ``If-None-Match``, and signed anew, since the signature covers that header."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        assert self.credentials is not None, "FaultProxy(credentials=...) is needed to sign requests anew"
        signed_anew = ("authorization", "x-amz-date", "x-amz-content-sha256")
        not_signed = ("if-none-match", "content-length", "expect", "connection", "user-agent")
        keep = {key: value for key, value in request.headers if key.lower() not in signed_anew + not_signed}
        if not request.body:
            keep = {key: value for key, value in keep.items() if key.lower() in ("host", "accept")}
        url = f"http://{request.get('host')}{request.target}"
        signed = AWSRequest(method=request.method, url=url, headers=keep, data=request.body)
        S3SigV4Auth(Credentials(*self.credentials), "s3", _region(request)).add_auth(signed)
        headers = [(key, str(value)) for key, value in signed.headers.items()]
        headers.append(("Content-Length", str(len(request.body))))
        return _Request(request.method, request.target, tuple(headers), request.body)


def _parse(head: bytes) -> _Request:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = tuple((key, value.strip()) for key, _, value in (line.partition(":") for line in lines))
    request = _Request(method, target, headers)
    assert request.get("transfer-encoding") is None, "chunked requests are not supported: send a Content-Length"
    return request


def _region(request: _Request) -> str:
    """Of the credential scope: ``Credential=<key>/<date>/<region>/s3/aws4_request``."""
    return (request.get("authorization") or "").partition("Credential=")[2].split("/")[2]


def _error_answer(request: _Request, status: str, code: str) -> bytes:
    content = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>made by a test</Message></Error>'
    )
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return (head + ("" if request.method == "HEAD" else content)).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST, as a dying server or a full connection table does, rather than an orderly end."""
    with contextlib.suppress(OSError):
        peer: socket.socket = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
