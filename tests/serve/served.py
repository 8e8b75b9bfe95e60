"""An index of a few texts and a server over it, for tests; everything runs in this process."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from infscan import pipeline
from infscan.config import Backend, ClusterConfig, QueriesConfig
from infscan.config.jobs import IndexConfig, IndexJob, ServeJob
from tests.report.finished import write_hostile
from tests.steps.runs import in_process, small_run, tiny_model

HERE = ClusterConfig(backend=Backend.in_process)


def text_index(folder: Path) -> Path:
    """An index of some hostile and some harmless documents, with a tokenizer."""
    tiny_model(folder / "model", tokenizer=True, context=128)
    write_hostile(folder)
    config = small_run(folder, "corpus.tokens_field=null", "corpus.sequence_length=128")
    made = vars(in_process(config)) | {"output": str(folder / "index"), "queries": QueriesConfig(path="")}
    job = IndexJob(**made, index=IndexConfig(bits=8))
    pipeline.make_index(job)
    return folder / "index"


def serve_job(index: Path, **settings: Any) -> ServeJob:
    known = {"index": str(index), "output": str(index.parent / "answers"), "port": 0, "per_minute": 10_000, "top_k": 5}
    return ServeJob(**known | settings)


def call(uri: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON (else bytes) of a request; a body is posted as JSON."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    known = {"Content-Type": "application/json"} if data is not None else {}
    request = Request(f"{uri}{path.lstrip('/')}", data, known | {k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urlopen(request, timeout=120) as response:
            status, content, kind = response.status, response.read(), response.headers["Content-Type"]
    except HTTPError as error:
        status, content, kind = error.code, error.read(), error.headers["Content-Type"]
    return status, json.loads(content) if kind == "application/json" else content


def answered(uri: str, question_id: str, **headers: str) -> dict[str, Any]:
    """What is said of a question once it is done or failed."""
    while True:
        status, seen = call(uri, f"/api/questions/{question_id}", **headers)
        assert status == 200, seen
        if seen["state"] in ("done", "failed"):
            return seen
        time.sleep(0.1)
