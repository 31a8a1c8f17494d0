"""Stands before an API server and does what networks and API servers do on bad days: to one request, or to the events of watches.

TLS with the cluster's own authority; what comes in is sent on with the client certificate of the kubeconfig that is given.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import yaml
from aiohttp import web
from multidict import CIMultiDict

T = TypeVar("T")
Event = dict[str, Any]
DELAY_SECONDS = 3.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host", "upgrade"}
_ENDLESS = aiohttp.ClientTimeout(total=None)


class Fault(StrEnum):
    """What happens to one request."""

    FAIL_500 = "fail 500"
    FAIL_503 = "fail 503"
    FAIL_429 = "fail 429"
    """With Retry-After: 1."""
    FAIL_409 = "fail 409"
    DROP = "drop"
    """The connection is reset and nothing was forwarded."""
    LOST_ANSWER = "lost answer"
    """Forwarded; then the connection is reset: a write has happened."""
    DELAY = "delay"
    """Forwarded after some seconds."""
    SLOW_ANSWER = "slow answer"
    """Forwarded at once and answered after some seconds, when watches have told the outcome long since."""
    KILL_BEFORE = "kill before"
    """The client is killed, and nothing was forwarded."""
    KILL_AFTER = "kill after"
    """Forwarded; then the client is killed."""


_STATUSES = {
    Fault.FAIL_500: (500, "InternalError"),
    Fault.FAIL_503: (503, "ServiceUnavailable"),
    Fault.FAIL_429: (429, "TooManyRequests"),
    Fault.FAIL_409: (409, "Conflict"),
}


class Gone(Exception):
    """Raised by a watch policy: the stream ends with the event that says 410."""


class Cut(Exception):
    """Raised by a watch policy: the stream is reset."""


WatchPolicy = Callable[[str, Event], list[Event]]
"""(path, event) → the events to send on. May raise :class:`Gone` and :class:`Cut`."""


class EventFault(StrEnum):
    """What happens to one event of a watch."""

    LOSE = "lose event"
    DOUBLE = "double event"
    STALE = "stale event"
    """The object's previous event comes once more, after it."""
    SWAP = "swap events"
    """It comes after the next event of its watch."""
    CUT = "cut watch"
    """It is lost with its stream, which is reset."""
    GONE = "410 Gone"
    """It is lost with its stream, which has to begin with a list."""


class EventStrike:
    """A policy: one fault at one event, counted over all watches."""

    def __init__(self, fault: EventFault, at: int) -> None:
        self._fault, self._at = fault, at
        self._held: dict[str, list[Event]] = {}
        self._last: dict[str, Event] = {}
        self.count = 0
        self.hit = ""

    def __call__(self, path: str, event: Event) -> list[Event]:
        self.count += 1
        uid = event["object"]["metadata"].get("uid", "")
        before, self._last[uid] = self._last.get(uid, event), event
        held = self._held.pop(path, [])
        if self.count != self._at:
            return [event, *held]
        self.hit = f"{event['type']} {path} {event['object']['metadata'].get('name')}"
        match self._fault:
            case EventFault.LOSE:
                return []
            case EventFault.DOUBLE:
                return [event, event]
            case EventFault.STALE:
                return [event, before]
            case EventFault.SWAP:
                self._held[path] = [event]
                return []
            case EventFault.CUT:
                raise Cut
            case EventFault.GONE:
                raise Gone


@dataclass
class Plan:
    """What is to happen, and what did."""

    fault: Fault | None = None
    at: int = 0
    """Number of the request, from 1."""
    kill: Callable[[], None] | None = None
    watch: WatchPolicy | None = None
    refuse_watches: Callable[[str], bool] | None = None
    """Watches of these paths are refused before they begin."""
    refusal: tuple[int, str] = 410, "Expired"
    """How: status code and reason."""
    counts: Callable[[str], bool] = lambda _path: True
    """Whether requests of this path are counted, and may be struck."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request that counts, in order."""
    hit: str = ""
    """The request that the fault struck."""


class ProxyLoop:
    """One event loop in a thread, for any number of proxies."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it."""
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(60)

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ApiProxy:
    """One proxy with its own port, request counter and faults. ``kubeconfig`` is the one for its clients."""

    def __init__(
        self, loop: ProxyLoop, upstream: Path, certificate: tuple[Path, Path], folder: Path, plan: Plan | None = None
    ) -> None:
        self.plan = plan or Plan()
        self._loop = loop
        self._config = yaml.safe_load(upstream.read_text())
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(*certificate)
        self._streams: list[web.Request] = []
        port = loop.run(self._start())
        self._config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.kubeconfig = folder / f"proxy-{port}.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._config))

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._loop.run(self._stop())

    def __enter__(self) -> ApiProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut_watches(self) -> None:
        """Reset every stream that is open."""

        async def cut() -> None:
            for request in list(self._streams):
                _reset(request)

        self._loop.run(cut())

    async def _start(self) -> int:
        cluster, user = self._config["clusters"][0]["cluster"], self._config["users"][0]["user"]
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as file:  # the ssl module reads files only
            file.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            file.flush()
            context.load_cert_chain(file.name)
        self._upstream = aiohttp.ClientSession(
            cluster["server"],
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            timeout=aiohttp.ClientTimeout(total=60),
            read_bufsize=1 << 22,  # a line of a watch is a whole object
            auto_decompress=True,
        )
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._server)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        for request in list(self._streams):
            _reset(request)
        await self._runner.cleanup()
        await self._upstream.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        watch = request.query.get("watch") in ("true", "1")
        path = urlsplit(request.path).path
        name = f"{'WATCH' if watch else request.method} {path}"
        plan = self.plan
        counted = plan.counts(path)
        if counted:
            plan.requests.append(name)
        fault = plan.fault if counted and len(plan.requests) == plan.at else None
        if fault is not None:
            plan.hit = name
        if fault in _STATUSES:
            assert fault is not None
            return _status(*_STATUSES[fault])
        if fault is Fault.DROP:
            return _reset(request)
        if fault is Fault.KILL_BEFORE:
            return self._kill(request)
        if fault is Fault.DELAY:
            await asyncio.sleep(DELAY_SECONDS)
        if watch and plan.refuse_watches is not None and plan.refuse_watches(request.path):
            return _status(*plan.refusal)
        return await self._forward(request, body, watch, fault)

    async def _forward(self, request: web.Request, body: bytes, watch: bool, fault: Fault | None) -> web.StreamResponse:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in (*_HOP_BY_HOP, "authorization")}
        timeout = _ENDLESS if watch else aiohttp.ClientTimeout(total=60)
        try:
            async with self._upstream.request(
                request.method, request.rel_url, data=body or None, headers=headers, timeout=timeout
            ) as answer:
                if fault is Fault.KILL_AFTER:
                    return self._kill(request)
                if fault is Fault.LOST_ANSWER:
                    return _reset(request)
                if fault is Fault.SLOW_ANSWER:
                    await asyncio.sleep(DELAY_SECONDS)
                told = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP)
                if watch and answer.status == 200:
                    return await self._stream(request, answer, told)
                return web.Response(status=answer.status, headers=told, body=await answer.read())
        except (aiohttp.ClientError, TimeoutError):
            return _reset(request)  # the API server is away: so are we

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, headers: CIMultiDict[str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=200, headers=headers)
        await response.prepare(request)
        self._streams.append(request)
        try:
            async for line in answer.content:
                for text in self._through_policy(request.path, line):
                    await response.write(text)
            await response.write_eof()
        except Gone:
            error = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": error}).encode() + b"\n")
            await response.write_eof()
        except (Cut, aiohttp.ClientError, TimeoutError):
            _reset(request)
        except ConnectionResetError:
            pass  # our client went
        finally:
            self._streams.remove(request)
        return response

    def _through_policy(self, path: str, line: bytes) -> list[bytes]:
        if self.plan.watch is None:
            return [line]
        event = json.loads(line)
        if event["type"] == "BOOKMARK":
            return [line]
        return [json.dumps(e).encode() + b"\n" for e in self.plan.watch(path, event)]

    def _kill(self, request: web.Request) -> web.StreamResponse:
        if self.plan.kill is not None:
            self.plan.kill()
        return _reset(request)


def _reset(request: web.Request) -> web.Response:
    """End the client's connection without an answer: RST and not FIN."""
    transport = request.transport
    if transport is not None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response(status=502)  # nobody hears it


def _status(code: int, reason: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": "injected",
        "code": code,
    }
    headers = {"Retry-After": "1"} if code == 429 else {}
    return web.json_response(body, status=code, headers=headers)
