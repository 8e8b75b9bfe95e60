"""Settings of one place among several: what is sent where, as a server sees it."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from infscan.errors import StorageError
from infscan.storage import Store, expand, open_input
from infscan.storage.locations import VARIABLE, Location, location_of
from tests.conftest import Bucket
from tests.servers import ObjectServer, moto

ROW = b'{"id": "a", "text": "hello"}\n'


class Watched:
    """A door to an S3 server that notes what requests carry, and that may let only payers in."""

    def __init__(self, server: ObjectServer, *, pays: bool) -> None:
        self.seen: list[tuple[bool, bool]] = []
        seen = self.seen

        class Door(BaseHTTPRequestHandler):
            def answer(self) -> None:
                signed, payer = bool(self.headers.get("Authorization")), bool(self.headers.get("x-amz-request-payer"))
                seen.append((signed, payer))
                if pays and not payer:
                    self.give(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
                    return
                headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
                request = urllib.request.Request(server.endpoint + self.path, headers=headers, method=self.command)
                try:
                    found: Any = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
                except urllib.error.HTTPError as error:
                    found = error
                self.give(found.status, dict(found.headers.items()), found.read())

            def give(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
                dropped = ("transfer-encoding", "connection", "content-length", "server", "date")
                for key, value in headers.items():
                    if key.lower() not in dropped:
                        self.send_header(key, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            do_GET = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def theirs() -> Iterator[ObjectServer]:
    """Somebody else's server, with a bucket that anyone may read."""
    with moto() as server:
        server.make_bucket("theirs")
        server.client().put_object(Bucket="theirs", Key="d/a.jsonl", ACL="public-read", Body=ROW)
        yield server


@pytest.fixture
def watched(theirs: ObjectServer, request: pytest.FixtureRequest) -> Iterator[Watched]:
    door = Watched(theirs, pays=request.param)
    yield door
    door.http.shutdown()


def read_theirs() -> bytes:
    (file,) = expand("s3://theirs/d")
    return open_input(file.uri).read() + Store("s3://theirs/d").read("a.jsonl")


@pytest.mark.parametrize("watched", [False], indirect=True)
def test_a_public_bucket_is_read_without_credentials_and_the_output_has_its_own(
    watched: Watched, moto_s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"s3://theirs": {"anonymous": True, "endpoint_url": watched.endpoint}}
    monkeypatch.setenv(VARIABLE, json.dumps(place))
    assert read_theirs() == ROW * 2
    assert {signed for signed, _ in watched.seen} == {False}
    mine = Store(moto_s3.uri())
    mine.write("a", b"x")
    assert mine.read("a") == b"x"
    # Without the place its bucket is looked for where the environment says, and not at their door.
    before = len(watched.seen)
    monkeypatch.delenv(VARIABLE)
    assert expand("s3://theirs/d")
    assert len(watched.seen) == before


@pytest.mark.parametrize("watched", [True], indirect=True)
def test_a_requester_pays_for_every_request(watched: Watched, moto_s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    place: dict[str, Any] = {"endpoint_url": watched.endpoint, "requester_pays": True}
    monkeypatch.setenv(VARIABLE, json.dumps({"s3://theirs/d": place}))
    assert read_theirs() == ROW * 2
    assert set(watched.seen) == {(True, True)}
    monkeypatch.setenv(VARIABLE, json.dumps({"s3://theirs/d": {"endpoint_url": watched.endpoint}}))
    with pytest.raises(StorageError, match=r"refused access .*requester pays.*INFSCAN_STORAGE_LOCATIONS"):
        read_theirs()


def test_the_longest_beginning_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"s3://a": {"region": "x"}, "s3://a/b/": {"profile": "p"}}')
    assert location_of("s3://a/c") == Location(region="x")
    assert location_of("s3://a/b/c") == location_of("s3://a/b") == Location(profile="p")
    assert location_of("s3://a/bc") == Location(region="x")
    assert location_of("s3://ab") == Location()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object of places"),
        ('{"bucket": {}}', "'bucket' is no place of S3"),
        ('{"s3://a": 1}', "no JSON object"),
        ('{"s3://a": {"anon": true}}', "there are anonymous, requester_pays, endpoint_url, region, profile"),
        ('{"s3://a": {"anonymous": "yes"}}', "anonymous of s3://a has to be true or false"),
        ('{"s3://a": {"secret": "hidden-value"}}', "credentials belong in a profile"),
        ('{"s3://a": {"anonymous": true, "profile": "p"}}', "leave one out"),
    ],
)
def test_a_variable_that_is_something_else_is_refused(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(StorageError, match=said) as caught:
        Store("s3://a/b").exists("c")
    assert VARIABLE in str(caught.value)
    assert "hidden-value" not in str(caught.value)
