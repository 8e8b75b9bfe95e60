"""A server over an index: answers are runs' rows, each client's own; what may not be asked is refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest

from infscan.api import read_run, run_ask
from infscan.config.jobs import AskJob
from infscan.errors import ConfigError, StorageError
from infscan.serve.desk import Desk
from infscan.serve.run import TOKEN, serving
from infscan.serve.server import Allowance, Server
from infscan.steps import similarity
from infscan.steps.ask import ask_config, read_indexes
from tests.serve.served import HERE, answered, call, serve_job, text_index

QUESTION = {"prompt": "the river runs", "completion": " of the stone"}
SECRET = "a long enough secret"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_index(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(index: Path) -> Iterator[Server]:
    with serving(serve_job(index)) as made:
        yield made


def test_an_answer_is_the_row_of_a_run(index: Path, server: Server) -> None:
    status, asked = call(server.uri, "/api/questions", QUESTION)
    assert (status, asked["state"]) == (202, "waiting")
    seen = answered(server.uri, asked["id"])
    assert seen["state"] == "done"
    assert 0 < seen["first_s"] < seen["exact_s"]
    uri = str(index.parent / "alone")
    run_ask(AskJob(index=str(index), **QUESTION, top_k=5, output=uri, cluster=HERE))
    wanted = read_run(uri).top().to_pylist()
    names = ("side", "rank", "sequence_id", "score")
    assert [[row[name] for name in names] for row in seen["rows"]] == [[row[name] for name in names] for row in wanted]
    texts = dict(zip(*(read_run(uri).sequences()[name].to_pylist() for name in ("sequence_id", "text")), strict=True))
    assert all(row["text"] == texts[row["sequence_id"]] for row in seen["rows"])
    summary, (answer,) = read_run(uri).summary, read_run(uri).answers().to_pylist()
    assert (seen["certificate"], seen["verdict"]) == (summary["certificate"]["sentence"], answer["verdict"] or "")
    # The run folder is as checkable as a scan's.
    assert read_run(str(Path(server.desk.store.uri) / seen["run"])).summary["counts"]["published"]["rows"] == 10


@pytest.mark.parametrize("clients", [9, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_at_once_lose_nothing_and_get_their_own_answers(server: Server, clients: int) -> None:
    questions = [{"prompt": f"the {word}", "completion": f" {word} falls"} for word in ("river", "stone", "cloud")]

    def ask(number: int) -> tuple[int, list[Any], bytes]:
        status, asked = call(server.uri, "/api/questions", questions[number % 3])
        assert status == 202
        seen = answered(server.uri, asked["id"])
        assert seen["id"] == asked["id"]
        # Of its own rows, whatever it was asked with.
        assert ("over all queries" in seen["certificate"]) <= (seen["together"] == 1)
        rows = [(row["side"], row["sequence_id"], row["score"]) for row in seen["rows"]]
        return number % 3, rows, call(server.uri, f"/answers/{asked['id']}")[1]

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(clients)))
    firsts = {which: rows for which, rows, _ in found}
    for which, rows, _ in found:
        # Whatever questions it was asked with: the same rows, and scores within rounding.
        assert {row[:2] for row in rows} == {row[:2] for row in firsts[which]}
        np.testing.assert_allclose([row[2] for row in rows], [row[2] for row in firsts[which]], rtol=1e-4)
    assert len({str(rows) for rows in firsts.values()}) == 3
    for which, _, page in found:
        for number, word in enumerate(("river falls", "stone falls", "cloud falls")):
            assert (f"{word}".encode() in page) == (number == which)


def test_the_page_is_whole_and_under_a_strict_policy(server: Server) -> None:
    status, page = call(server.uri, "/")
    assert (status, b"{{" in page) == (200, False)
    assert "script-src 'sha256-" in server.policy
    assert "unsafe" not in server.policy
    assert call(server.uri, "/api/index")[1]["sequences"] == 33


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x"}, "completion: give the text"),
        ({**QUESTION, "completion": 7}, "completion must be a string"),
        ({**QUESTION, "model": "other"}, "'model' is no part of a question"),
        ({**QUESTION, "measure": "tokens"}, "measure 'tokens' is unknown"),
        ({**QUESTION, "prompt": "a" * 20_001}, "at most 20,000"),
        ({**QUESTION, "prompt": "river " * 500}, "longer than the model's context of 128"),
        ({**QUESTION, "contrast": QUESTION["completion"]}, "contrast has the tokens of its completion"),
        (b"[1]", "no JSON object"),
        (b"{", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(server: Server, body: Any, said: str) -> None:
    status, found = call(server.uri, "/api/questions", body)
    assert status == 400
    assert said in found["error"]


def test_other_sites_and_other_names_are_refused(server: Server) -> None:
    assert call(server.uri, "/", Host="rebound.example")[0] == 403
    assert call(server.uri, "/api/questions", QUESTION, Origin="https://elsewhere.example")[0] == 403
    assert call(server.uri, "/api/questions", QUESTION, Content_Type="text/plain")[0] == 415
    for path in ("/api/questions/q-0123", "/api/questions/..%2f..", "/answers/q-" + "0" * 24, "/etc/passwd", "/api/"):
        assert call(server.uri, path)[0] == 404


def raw(server: Server, data: bytes) -> tuple[int, bytes, bytes]:
    """What comes back until the server ends the connection: status, headers and body."""
    with socket.create_connection(server.server_address[:2], timeout=60) as connection:
        connection.sendall(data)
        found = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    headers, _, body = found.partition(b"\r\n\r\n")
    return int(headers.split()[1]), headers, body


HOST, JSON = b"Host: localhost\r\n", b"Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (b"BREW / HTTP/1.1\r\n" + HOST, 501, "'BREW' is no method of this server; there are GET, HEAD and POST"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST, 414, "Too Long"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300 + HOST, 431, "Too many headers"),
        (b"GET / HTTP/1.1 and more\r\n" + HOST, 400, "Bad request version"),
        (b"GET / HTTP/1.1\r\n", 403, "its own machine only"),
        (b"POST /api/questions HTTP/1.1\r\n" + JSON + b"Content-Length: " + b"9" * 5000 + b"\r\n", 413, "at most"),
        (b"POST /api/questions HTTP/1.1\r\n" + JSON + b"Content-Length: -1\r\n", 411, "say the body's length"),
    ],
)
def test_what_is_no_request_is_refused_as_any_other(server: Server, request_: bytes, status: int, said: str) -> None:
    found, headers, body = raw(server, request_ + b"\r\n")
    assert (found, b"Content-Security-Policy: default-src 'none'" in headers) == (status, True)
    assert said in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /api/login HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", 411),
        (b"POST /api/login HTTP/1.1\r\n" + JSON + b"Content-Length: 2\r\nContent-Length: 60\r\n\r\n{}", 411),
        (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 60\r\n\r\n", 400),
    ],
)
def test_no_request_hides_in_another_s_body(server: Server, request_: bytes, status: int) -> None:
    found, _, rest = raw(server, request_ + b"GET /api/index HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (found, b"sequences" in rest) == (status, False)


def test_head_is_get_without_a_body(server: Server) -> None:
    status, headers, body = raw(server, b"HEAD / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
    assert (status, body) == (200, b"")
    assert f"Content-Length: {len(server.page)}".encode() in headers


def test_a_client_that_sends_byte_by_byte_holds_no_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infscan.serve.server._TIMEOUT_S", 0.5)
    with socket.create_connection(server.server_address[:2], timeout=60) as connection:
        connection.sendall(b"POST /api/login HTTP/1.1\r\n" + JSON + b"Content-Length: 1000000\r\n\r\n")
        # Each byte comes well within the time that the whole request has.
        sent = 0
        with suppress(ConnectionError):
            while sent < 1000:
                connection.sendall(b" ")
                sent += 1
                time.sleep(0.05)
    assert sent < 1000


def test_a_request_that_fails_is_answered(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.desk, "facts", lambda: 1 / 0)
    status, said = call(server.uri, "/api/index")
    assert (status, said["error"]) == (500, "the request failed for a reason that the server's log has.")


def test_a_question_s_words_are_in_no_log_and_its_slips_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is the model read from its folder again, nor what is the same for every question computed again."""
    monkeypatch.setattr("infscan.steps.inputs.describe", None)
    answered(server.uri, call(server.uri, "/api/questions", QUESTION)[1]["id"])
    states, rows = similarity._states, list[int]()
    monkeypatch.setattr(similarity, "_states", lambda worker, batch: rows.extend(batch.rows) or states(worker, batch))
    asked = call(server.uri, "/api/questions", {"prompt": "the xyzzy", "completion": "plugh"})[1]
    seen = answered(server.uri, asked["id"])
    # The question's own, and the published sequences'; those of the sample are known from before.
    assert 1 < len(rows) <= 1 + 10
    assert seen["state"] == "done"
    assert seen["warnings"] == ["no space between 'the xyzzy' and 'plugh': the completion is a part of a word"]
    said = "".join(capfd.readouterr()) + caplog.text
    assert "xyzzy" not in said
    assert "plugh" not in said


def test_a_server_that_is_ended_leaves_no_question_without_a_word(index: Path) -> None:
    job = serve_job(index, at_once=1)
    desks = [Desk(found, ask_config(found, job.asking()), job) for found in [read_indexes([str(index)])] * 2]
    first, second = (desks[0].submit(QUESTION) for _ in range(2))
    desks[0].abandon()
    desks[0]._ask(desks[0]._next())
    assert (first.state, second.state) == ("failed", "waiting")
    assert "was ended" in first.error
    desks[0].stop()
    desks[0].work()
    for question in (first, second):
        seen = desks[1].look(question.id)
        assert seen is not None
        assert (seen["state"], seen["error"]) == ("failed", "the server ended before it was answered; ask again.")


def test_a_place_for_answers_that_takes_none_is_refused_before_a_question_is(index: Path) -> None:
    with (
        pytest.raises(StorageError, match="a file is where a folder is needed"),
        serving(serve_job(index, output=str(index / "config.yaml"))),
    ):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_it_listens_on_ipv6(index: Path) -> None:
    with serving(serve_job(index, host="::1")) as server:
        assert server.uri.startswith("http://[::1]:")
        assert call(server.uri, "/")[0] == 200


def test_an_answer_is_read_again_by_a_later_server(index: Path, server: Server) -> None:
    asked = call(server.uri, "/api/questions", QUESTION)[1]
    seen = answered(server.uri, asked["id"])
    with serving(serve_job(index)) as later:
        again = answered(later.uri, asked["id"])
        assert (again["state"], again["rows"], again["run"]) == ("done", seen["rows"], seen["run"])
        assert call(later.uri, f"/answers/{asked['id']}") == call(server.uri, f"/answers/{asked['id']}")


def test_too_many_questions_are_refused(index: Path) -> None:
    with serving(serve_job(index, per_minute=2)) as server:
        found = [call(server.uri, "/api/questions", QUESTION) for _ in range(3)]
        assert [status for status, _ in found] == [202, 202, 429]
        assert "too many questions" in found[2][1]["error"]
    with serving(replace(serve_job(index), most_waiting=1)) as server:
        # One is asked, or is about to be; one waits; the others are told.
        found = [call(server.uri, "/api/questions", QUESTION) for _ in range(4)]
        assert {status for status, _ in found} == {202, 503}
        assert "wait already" in found[-1][1]["error"]


def test_an_allowance_comes_back_with_time() -> None:
    allowance = Allowance(2)
    assert [allowance.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert allowance.take("b", 0.0)
    assert not allowance.take("a", 20.0)
    assert allowance.take("a", 60.0)


def test_beyond_this_machine_a_token_is_needed(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = serve_job(index, host="0.0.0.0")
    with pytest.raises(ConfigError, match=rf"set {TOKEN} in the environment"), serving(everywhere):
        pass
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="at least 16"), serving(serve_job(index)):
        pass
    monkeypatch.setenv(TOKEN, SECRET)
    with serving(everywhere) as server:
        uri = server.uri.replace("0.0.0.0", "127.0.0.1")
        assert call(uri, "/")[0] == 200
        assert call(uri, "/api/index")[0] == call(uri, "/api/questions", QUESTION)[0] == 401
        assert call(uri, "/api/index", Authorization="Bearer wrong")[0] == 401
        assert call(uri, "/api/index", Authorization=f"Bearer {SECRET}")[0] == 200
        assert call(uri, "/api/index", Cookie="infscan=wrong")[0] == 401
        assert call(uri, "/api/login", {"token": "wrong"})[0] == 401
        entered = Request(
            f"{uri}api/login", json.dumps({"token": SECRET}).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(entered) as response:
            cookie = response.headers["Set-Cookie"]
        assert "HttpOnly; SameSite=Strict" in cookie
        assert SECRET not in cookie
        assert call(uri, "/api/index", Cookie=cookie.partition(";")[0])[0] == 200


def test_a_place_that_is_taken_is_refused(index: Path, server: Server) -> None:
    port = int(server.server_address[1])
    with pytest.raises(ConfigError, match=rf"port={port}: cannot listen"), serving(serve_job(index, port=port)):
        pass
