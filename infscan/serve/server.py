"""A small HTTP server over one index: a page, questions as JSON, answers as JSON or as the report's page.

GET  /                      the page
GET  /api/index             what is asked: model, corpus, sequences (HEAD, as GET without what it would send)
POST /api/questions         {"prompt", "completion", "contrast"?, "measure"?} -> 202 {"id", "state"}
GET  /api/questions/<id>    {"state": waiting | asking | found | done | failed, "rows": [...], "certificate", ...}
GET  /answers/<id>          the report of a finished question
POST /api/login             {"token"} -> a cookie, where the server has a token

Nothing of a corpus or of a question is interpreted: texts go out as JSON strings, and pages show them as text.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from infscan.config.jobs import ServeJob
from infscan.errors import InfscanError
from infscan.report.assemble import csp_hash
from infscan.serve.desk import BusyError, Desk
from infscan.storage import Store

log = logging.getLogger("infscan")

_PAGE = "infscan://serve/page"
_COOKIE = "infscan"
_BODY = 1 << 20
# Digits of a body's length: more, and Python converts none of them.
_DIGITS = 18
# Seconds that a client may take over a request, and connections that are served at once.
_TIMEOUT_S, _CONNECTIONS = 20, 512
_MINUTE_S = 60.0
_MOST_CLIENTS = 10_000
_LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")


class Allowance:
    """So many questions a minute for every client's address, refilled as time goes on."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str, now: float) -> bool:
        """Whether the client may ask one more."""
        with self._lock:
            left, then = self._left.pop(client, (float(self.per_minute), now))
            left = min(float(self.per_minute), left + (now - then) * self.per_minute / _MINUTE_S)
            allowed = left >= 1
            self._left[client] = (left - allowed, now)
            while len(self._left) > _MOST_CLIENTS:
                self._left.popitem(last=False)
            return allowed


class Server(ThreadingHTTPServer):
    """Listens on one address, and hands questions to a desk."""

    daemon_threads = True
    # Two hundred may come at once.
    request_queue_size = 256

    def __init__(self, desk: Desk, job: ServeJob, token: str | None) -> None:
        self.desk, self.token = desk, token
        self.allowance = Allowance(job.per_minute)
        self.local = job.is_local
        self.connections = threading.BoundedSemaphore(_CONNECTIONS)
        templates = Store(_PAGE)
        style, script = templates.read("ask.css").decode(), templates.read("ask.js").decode()
        page = templates.read("ask.html").decode()
        self.page = page.replace("{{style}}", style).replace("{{script}}", script).encode()
        self.policy = (
            f"default-src 'none'; script-src {csp_hash(script)}; style-src {csp_hash(style)}; connect-src 'self'; "
            "frame-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        )
        self.address_family = socket.AF_INET6 if ":" in job.host else socket.AF_INET
        super().__init__((job.host, job.port), Handler)

    @property
    def uri(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, said: str) -> None:
        self.status, self.said = status, said


class _Arriving(io.RawIOBase):
    """What a client sends, all of a request within so many seconds: one that sends byte by byte holds no connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(left)
        try:
            return self.connection.recv_into(buffer)
        finally:
            # An answer has as long again.
            self.connection.settimeout(_TIMEOUT_S)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "infscan", ""
    timeout = _TIMEOUT_S

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.arriving = _Arriving(self.connection)
        self.rfile = io.BufferedReader(self.arriving)

    def handle_one_request(self) -> None:
        self.arriving.deadline = time.monotonic() + _TIMEOUT_S
        super().handle_one_request()

    def log_message(self, format: str, *args: Any) -> None:
        """What people ask is not written to a log."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is wrong before a request is looked at (its first line, a method that there is not), as any refusal."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            message = f"{self.command[:20]!r} is no method of this server; there are GET, HEAD and POST"
        # Also where the first line says nothing that is known, there is a status to read.
        self.request_version, self.close_connection = self.protocol_version, True
        self._json({"error": f"{(message or status.phrase)[:200]}."}, status)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self._refusing():
            self._check_framing()
            self._check_host()
            if self.path == "/":
                self._send(self.server.page, "text/html; charset=utf-8", policy=self.server.policy)
                return
            self._check_token()
            kind, _, name = self.path.strip("/").rpartition("/")
            if self.path == "/api/index":
                self._json(self.server.desk.facts())
            elif kind == "api/questions":
                self._json(self._found(self.server.desk.look(name)))
            elif kind == "answers":
                # The report's page carries its own policy; here it may only stand in this server's frame.
                page = self._found(self.server.desk.page(name))
                self._send(page, "text/html; charset=utf-8", policy="frame-ancestors 'self'")
            else:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address.")

    def do_POST(self) -> None:
        with self._refusing():
            self._check_framing()
            self._check_host()
            body = self._body()
            if self.path == "/api/login":
                self._login(body)
                return
            self._check_token()
            if self.path != "/api/questions":
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address.")
            if not self.server.allowance.take(self.client_address[0], time.monotonic()):
                raise _RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many questions in a minute; wait a little.")
            try:
                question = self.server.desk.submit(body)
            except BusyError as error:
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
            except InfscanError as error:
                raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from None
            self._json({"id": question.id, "state": question.state}, HTTPStatus.ACCEPTED)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except _RefusedError as refused:
            # What is left of a body would be taken for the next request.
            self.close_connection = True
            self._json({"error": refused.said}, refused.status)
        except InfscanError as error:
            self.close_connection = True
            self._json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
        except (ConnectionError, TimeoutError):
            # The client is gone.
            raise
        except Exception:
            log.exception("a request failed")
            self.close_connection = True
            said = "the request failed for a reason that the server's log has."
            self._json({"error": said}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _check_framing(self) -> None:
        """Where a request ends is to be beyond doubt: a proxy in front may otherwise see another one in its body."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) > 1:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "say the body's length, once; no other encoding is read.")
        if self.command != "POST" and lengths not in ([], ["0"]):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{self.command} has no body here.")

    def _check_host(self) -> None:
        """A page elsewhere must not reach a server of this machine under another name, nor post to any."""
        host = self.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.server.local and name not in _LOCAL:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "this server answers to its own machine only.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "another site's page may not ask here.")

    def _check_token(self) -> None:
        if self.server.token is None:
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        by_cookie = cookie is not None and _same(cookie.value, _cookie_of(self.server.token))
        if not (by_cookie or _same(given, self.server.token)):
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "give the server's token.")

    def _login(self, body: Mapping[str, Any]) -> None:
        token, given = self.server.token, body.get("token")
        if not self.server.allowance.take(self.client_address[0], time.monotonic()):
            raise _RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many attempts in a minute; wait a little.")
        if token is not None and not (isinstance(given, str) and _same(given, token)):
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "this is not the server's token.")
        cookie = f"{_COOKIE}={_cookie_of(token)}; HttpOnly; SameSite=Strict; Path=/" if token else None
        self._json({}, cookie=cookie)

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "say the body's length.")
        if len(length) > _DIGITS or int(length) > _BODY:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {_BODY:,} bytes.")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the body is no JSON object.")
        return value

    def _found(self, value: Any) -> Any:
        if value is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such question, or it is not answered.")
        return value

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, *, cookie: str | None = None) -> None:
        self._send(json.dumps(value).encode(), "application/json", status, cookie=cookie)

    def _send(
        self,
        data: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        *,
        policy: str = "default-src 'none'; frame-ancestors 'none'",
        cookie: str | None = None,
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": policy}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, value)
        if cookie:
            self.send_header("Set-Cookie", cookie)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _cookie_of(token: str) -> str:
    """What a browser keeps in place of the token, which may have characters that a cookie has not."""
    return hmac.new(token.encode(), b"cookie", "sha256").hexdigest()


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
