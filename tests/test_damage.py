"""What infscan wrote and a disk changed is never used: every flipped byte is refused by name, or changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infscan.config import Packing, from_yaml
from infscan.corpus.addressable import open_corpus
from infscan.corpus.filtered import describe_filtered
from infscan.errors import ConfigError, CorpusError, DamagedError, RunError, StorageError
from infscan.results.schema import read_parquet
from infscan.results.shard_file import read_candidates, read_hits
from infscan.results.tensor_files import read_facts, read_tensor, read_tensors, tensor_bytes, write_tensors
from infscan.steps.factor_files import check_files, complete
from infscan.storage import Store
from tests.corpus.builders import plain, prepare, settings, token_rows, write_rows
from tests.results.builders import QUERIES, put_shard

_REFUSALS = (CorpusError, DamagedError, RunError)


def attempt(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return read(), None
    except _REFUSALS as error:
        return None, error


def damage(path: Path, read: Callable[[], Any], step: int = 1) -> None:
    """Flip a bit of every `step`-th byte, and cut the file at some places: refused by name, or the same is read."""
    whole, expected = path.read_bytes(), read()
    refused = 0
    for at in range(0, len(whole), step):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        found, error = attempt(read)
        refused += error is not None
        assert path.name in str(error) if error else found == expected, f"byte {at} of {len(whole)}: {error}"
    assert refused > len(whole) / step / 2
    for length in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(_REFUSALS, match=path.name):
            read()
    path.write_bytes(whole)
    assert read() == expected


def test_a_prepared_part(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", token_rows(12))
    _, corpus = prepare(source, tmp_path / "out", settings(Packing.concat, 8))

    def read() -> list[dict[str, Any]]:
        opened = open_corpus(Store(str(tmp_path / "out")))
        found = [plain(one) for one in opened.read(np.arange(corpus.sequences))]
        opened.close()
        return found

    damage(tmp_path / "out" / "part-00000.parquet", read, step=17)


def test_a_manifest(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", token_rows(12))
    manifest, _ = prepare(source, tmp_path / "out", settings(Packing.concat, 8))
    path = tmp_path / "out" / "manifest.json"
    for old, new in (
        (f'"sequences": {manifest.sequences}', f'"sequences": {manifest.sequences + 1}'),
        (manifest.fingerprint, "0" * 64),
        ('"index": 0', '"index": 1'),
    ):
        whole = path.read_text()
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(CorpusError, match="changed or damaged"):
            open_corpus(Store(str(tmp_path / "out")))
        path.write_text(whole)


def test_what_a_filter_chose(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", token_rows(60))
    _, corpus = prepare(source, tmp_path / "out", settings(Packing.concat, 8))
    store = Store(str(tmp_path / "few"))
    describe_filtered(store, corpus, np.arange(1, corpus.sequences, 3))
    path = tmp_path / "few" / "chosen.parquet"

    def read() -> Any:
        return open_corpus(store).counts

    def numbers() -> Any:
        chosen = open_corpus(store).chosen
        return None if chosen is None else chosen.tolist()

    damage(path, numbers, step=7)
    for content in (b"", b"PAR1", write_rows(tmp_path / "x.parquet", [{"other": 1}]).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"chosen\.parquet was changed or damaged; filter the corpus again"):
            read()
    path.unlink()
    with pytest.raises(CorpusError, match=r"chosen\.parquet is missing; filter the corpus again"):
        read()


def test_a_shards_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = [("alpha", "proponent", 3, 0.5), ("beta#0", "opponent", 1, -2.0), ("alpha", "proponent", 1, 0.25)]
    put_shard(store, "shard-000000", [0, 1, 2, 3], rows)

    def read() -> Any:
        hits, counts = read_hits(store, "shard-000000", QUERIES)
        return list(hits.rows()), counts, read_candidates(store, "shard-000000", np.arange(4)).to_pylist()

    damage(tmp_path / "shards" / "shard-000000.parquet", read, step=23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    store = Store(str(tmp_path))
    tensors = {"A": torch.arange(12.0).reshape(3, 4).to(dtype), "tokens": torch.tensor(7)}
    write_tensors(store, "queries.safetensors", tensors, {"fingerprint": "f"})

    def read() -> Any:
        found = read_tensors(store, "queries.safetensors")
        one = read_tensor(store, "queries.safetensors", "A")
        facts = read_facts(store, "queries.safetensors")["fingerprint"]
        return {key: (str(t.dtype), t.tolist()) for key, t in found.items()}, one.tolist(), facts

    damage(tmp_path / "queries.safetensors", read)


def test_equal_content_is_equal_bytes_however_many_facts_stand_beside_it() -> None:
    facts = {str(number): "x" for number in range(20)}
    assert len({tensor_bytes({"a": torch.ones(2), "b": torch.ones(3)}, facts) for _ in range(20)}) == 1


def test_finished_factors_of_which_a_file_is_gone_or_cut_off_are_refused_by_one_listing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("A/x", "S/x", "Lambda/x"):
        write_tensors(store, f"{name}.safetensors", {"A": torch.ones(3, 3)})

    class Plan:
        fingerprint, fields = "f", {"model": "m"}

    store.write_json("factors.json", complete(store, Plan()))  # type: ignore[arg-type]
    check_files(store)
    path = tmp_path / "S" / "x.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(DamagedError, match=r"S/x\.safetensors is damaged .*fit again"):
        check_files(store)
    path.unlink()
    with pytest.raises(DamagedError, match=r"S/x\.safetensors is damaged \(it is missing\)"):
        check_files(store)
    path.write_bytes(whole)
    value = json.loads((tmp_path / "factors.json").read_text())
    store.write_json("factors.json", value | {"fingerprint": "another"})
    with pytest.raises(DamagedError, match=r"factors\.json"):
        check_files(store)


def test_a_table_that_infscan_did_not_write_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", [{"a": 1}])
    with pytest.raises(RunError, match="not written by infscan"):
        read_parquet(Store(str(tmp_path)), "x.parquet")


def test_a_tensors_name_cannot_leave_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="leaves its folder"):
        read_tensors(Store(str(tmp_path / "factors")), "A/../../secret.safetensors")


@pytest.mark.parametrize("text", ["", "a: [", "- 1\n", "\ufffd\ufffd: {"])
def test_a_configuration_that_is_none_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not a configuration"):
        from_yaml(text)
