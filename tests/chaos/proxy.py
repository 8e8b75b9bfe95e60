"""A faulty way to an S3 server: an HTTP proxy that plays faults by a plan, before moto's server or seaweedfs.

    with fault_proxy(server, Plan(seed=1)) as proxy:
        os.environ.update(proxy.server.env)   # or proxy.url alone: what was the server's endpoint is now the proxy's
        ...
        proxy.plan = None                     # from now on everything passes; any plan(method, path) does
        proxy.counts                          # Counter({"passed": 201, "503": 12, "cut": 9, ...})

The Host header goes through unchanged, so that signatures made for the proxy's address hold at a server that checks
them. It runs in threads of this process and serves any number of other processes.

Faults, by name:
    500, 503, 429   an answer with that status (any HTTP status is one); the request does not reach the server
    slow            the answer comes in two halves with a pause before each
    cut             the server does its work; half of the answer's body comes, then the connection is closed
    lost            the server does its work; the connection is reset instead of an answer
    reset           the connection is reset; the request does not reach the server
    hang            nothing comes until the proxy ends or the client goes away
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.servers import ObjectServer, free_ports

FAULTS = ("500", "503", "429", "slow", "cut", "lost", "reset")
# What S3 says beside these statuses.
_CODES = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests", "403": "AccessDenied"}
# plan(method, path with query) -> the fault's name, or None to pass the request on.
Decide = Callable[[str, str], "str | None"]


class Plan:
    """A fault for a share of all requests, drawn by (seed, method, path, how often that was asked before).

    The draw does not depend on the order in which processes come. After `in_a_row` faults on one method and path the
    next such request passes, so that who asks often enough is always served.
    """

    def __init__(self, seed: int, rate: float = 0.2, faults: Sequence[str] = FAULTS, in_a_row: int = 2) -> None:
        self.seed, self.rate, self.faults, self.in_a_row = seed, rate, tuple(faults), in_a_row
        self._asked: Counter[tuple[str, str]] = Counter()
        self._row: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        key = (method, path)
        with self._lock:
            self._asked[key] += 1
            draw = random.Random(f"{self.seed} {method} {path} {self._asked[key]}")
            if self._row[key] < self.in_a_row and draw.random() < self.rate:
                self._row[key] += 1
                return draw.choice(self.faults)
            self._row[key] = 0
            return None


def first(count: int, fault: str, method: str = "") -> Decide:
    """A plan: `fault` for the first `count` requests (of that method), then none."""
    left = iter(range(count))
    return lambda asked, _: fault if (not method or asked == method) and next(left, None) is not None else None


def always(fault: str, method: str = "", within: str = "") -> Decide:
    """A plan: `fault` for every request (of that method, with `within` in its path and query)."""
    return lambda asked, path: fault if (not method or asked == method) and within in path else None


@dataclass
class Proxy:
    """A running proxy. server: as the one behind it, at the proxy's address. requests: (method, path with query).

    counts: how often each fault was played, and `passed`. plan, slow_s: may be replaced at any time.
    """

    server: ObjectServer
    plan: Decide | None
    slow_s: float
    counts: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return self.server.endpoint

    def meet(self, method: str, path: str) -> str | None:
        """Record a request and say which fault it meets."""
        plan = self.plan
        fault = plan(method, path) if plan else None
        with self._lock:
            self.requests.append((method, path))
            self.counts[fault or "passed"] += 1
        return fault

    @property
    def played(self) -> int:
        """Faults played so far."""
        with self._lock:
            return self.counts.total() - self.counts["passed"]


@contextmanager
def fault_proxy(upstream: ObjectServer, plan: Decide | None = None, slow_s: float = 0.2) -> Iterator[Proxy]:
    """A proxy before `upstream`, gone at the end of the block. slow_s: each of the two pauses of `slow`."""
    (port,) = free_ports(1)
    proxy = Proxy(replace(upstream, endpoint=f"http://127.0.0.1:{port}"), plan, slow_s)
    listener = _Listener(("127.0.0.1", port), _handler(proxy, urlsplit(upstream.endpoint).netloc))
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy._ended.set()
        listener.shutdown()
        listener.server_close()
        thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news here."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: HTTPMessage
    body: bytes


def _handler(proxy: Proxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *arguments: object) -> None:
            return

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.meet(self.command, self.path)
            if fault is None:
                self.answer(self.forward(body))
            elif fault.isdigit():
                self.refuse(fault)
            elif fault == "slow":
                self.answer(self.forward(body), pause_s=proxy.slow_s)
            elif fault == "cut":
                self.cut(self.forward(body))
            elif fault == "lost":
                self.forward(body)
                self.reset()
            elif fault == "reset":
                self.reset()
            elif fault == "hang":
                self.hang()
            else:
                raise ValueError(f"no such fault: {fault}")

        def forward(self, body: bytes) -> _Answer:
            connection = HTTPConnection(upstream, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                return _Answer(answer.status, answer.headers, answer.read())
            except (OSError, HTTPException):
                self.reset()  # what a client sees of a server that is gone
                raise
            finally:
                connection.close()

        def head(self, answer: _Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            # A HEAD answers with the length of what it does not send.
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(answer.body)))
            self.end_headers()

        def answer(self, answer: _Answer, pause_s: float = 0.0) -> None:
            half = len(answer.body) // 2
            time.sleep(pause_s)
            self.head(answer)
            self.wfile.write(answer.body[:half])
            time.sleep(pause_s)
            self.wfile.write(answer.body[half:])

        def cut(self, answer: _Answer) -> None:
            if not answer.body:
                self.reset()  # of nothing there is no half
                return
            self.head(answer)
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True

        def refuse(self, status: str) -> None:
            code = _CODES.get(status, "")
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a planned fault</Message></Error>".encode()
            self.send_response(int(status))
            if code and self.command != "HEAD":
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            else:
                self.send_header("Content-Length", "0")
                self.end_headers()

        def reset(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                # Closed with unsent time to linger of zero, a socket says RST instead of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def hang(self) -> None:
            self.close_connection = True
            self.connection.settimeout(0.1)
            while not proxy._ended.is_set():
                try:
                    if not self.connection.recv(1):
                        return
                except TimeoutError:
                    continue
                except OSError:
                    return

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

    return Handler
