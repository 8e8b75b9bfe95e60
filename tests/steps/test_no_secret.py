"""No artefact and no log of a run holds a secret: the bucket, the folder it ran in, Ray's session, what it printed."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import ray

from infscan import cli
from tests.conftest import Bucket
from tests.steps.runs import tiny_model, token_corpus, token_queries

PLANTED = {
    name: f"hush/{name.lower()}+of=ours"
    for name in (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "FSSPEC_S3_KEY"),
        *("FSSPEC_S3_SECRET", "FSSPEC_ABFS_ACCOUNT_KEY", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN"),
    )
}


def spellings(secret: str) -> list[bytes]:
    return [secret.encode(), quote(secret, safe="").encode(), base64.b64encode(secret.encode())]


def found_in(name: str, content: bytes) -> list[str]:
    """Which planted variables' values a file holds; Parquet is looked at as it is and read."""
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(content))
        content += f"{table.schema.metadata} {table.to_pylist()}".encode()
    return [
        f"{name}: {variable}"
        for variable, secret in PLANTED.items()
        if any(spelling in content for spelling in spellings(secret))
    ]


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """Short: Ray's sockets lie in it, and their names end at 107 bytes.

    It stays until the last test: Ray Data opens its log there again in later sessions of this process.
    """
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_a_search_of_every_artefact_and_log_finds_none(
    tmp_path: Path,
    moto_s3: Bucket,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    inputs, here, output = tmp_path / "inputs", tmp_path / "here", moto_s3.uri()
    here.mkdir()
    # A sweep of one cell: Hydra writes its arguments down, too.
    arguments = [
        "-m",
        f"model.path={tiny_model(inputs / 'model')}",
        f"corpus.path={token_corpus(inputs / 'corpus.jsonl', 16)}",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        f"queries.path={token_queries(inputs / 'queries.jsonl', 1)}",
        "factors.solver=identity",
        "scan.compression=plain",
        "scan.rank=4",
        "scan.top_k=5",
        f"output={output}",
    ]
    for name, value in (PLANTED | {"RAY_TMPDIR": str(ray_folder)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(here)
    # Ray's processes have the environment of when it starts.
    ray.shutdown()
    capfd.readouterr()
    cli.main("scan", arguments)
    ray.shutdown()
    printed = "".join(capfd.readouterr()).encode()
    assert b"error" not in printed

    client, prefix = moto_s3.server.client(), output.split("/", 3)[3]
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=moto_s3.name, Prefix=prefix)["Contents"]]
    artefacts = {key: client.get_object(Bucket=moto_s3.name, Key=key)["Body"].read() for key in keys}
    artefacts |= dict(files_below(here)) | dict(files_below(ray_folder)) | {"printed": printed}
    # It looks where it should: results, Hydra's record of the sweep, logs of Ray's daemons and of a rank's process.
    for part in (
        "summary.json",
        "config.yaml",
        "top/",
        "shards/",
        "multirun.yaml",
        "printed",
        "/logs/raylet",
        "/logs/worker-",
    ):
        assert any(part in name for name in artefacts), part
    assert any(str(inputs).encode() in content for content in artefacts.values())
    assert [finding for name, content in artefacts.items() for finding in found_in(name, content)] == []
