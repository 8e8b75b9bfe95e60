"""What ranks read of a query batch in storage is what laying out all of it would give, and the driver reads numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infscan.config import Compression, Dtype
from infscan.engine.executor import MadeHere
from infscan.errors import DamagedError
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    Array,
    Layout,
    LayoutPlan,
    SharedBasis,
    basis_to_arrays,
    lay_out,
    plan_layouts,
)
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_some, write_tensors
from infscan.steps.preconditioner import Preconditioner
from infscan.steps.queries import QueryTask, on_device, query_task, read_query_batch
from infscan.steps.stored_queries import StoredBatch, read_bases, read_layouts, read_spectra
from infscan.storage import Store
from tests.steps.test_queries import ROWS, read

RANK = 6


@pytest.fixture
def batch(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> StoredBatch:
    """Four queries in three groups, the layers in two; without a plan."""
    store, queries = Store(str(tmp_path / "batch")), read(tmp_path, ROWS)
    half = len(rank.layers) // 2
    layer_groups = (rank.layers[:half], rank.layers[half:])
    names = tuple(tuple(f"{q}-{g}" for g in range(2)) for q in range(3))
    for q, some in enumerate((queries[:2], queries[2:3], queries[3:])):
        for g, layers in enumerate(layer_groups):
            task = QueryTask(store, names[q][g], tuple(some), layers, inverse, RANK, Compression.weighted, "print")
            query_task(rank, task)
    plan = plan_layouts({}, (), 1, 0)
    return StoredBatch(store, names, layer_groups, plan, {}, len(queries), "float32")


def planned(batch: StoredBatch, plan: LayoutPlan, dtype: str = "float32", **bases: str) -> StoredBatch:
    return StoredBatch(batch.store, batch.names, batch.layer_groups, plan, bases, batch.queries, dtype)


def assert_alike(found: Layout[Array], wanted: Layout[Array]) -> None:
    assert type(found) is type(wanted)
    for kind, value in vars(wanted).items():
        np.testing.assert_array_equal(getattr(found, kind), value)


def test_the_driver_reads_what_the_columns_contribute(rank: ModelWorker, batch: StoredBatch) -> None:
    whole = read_query_batch(batch.store, batch.names)
    found = read_spectra(batch.store, batch.names, batch.layer_groups, RANK)
    assert found.keys() == whole.spectra.keys() == {layer.name for layer in rank.layers}
    for name, spectrum in whole.spectra.items():
        np.testing.assert_array_equal(found[name].values_qr, spectrum.values_qr)
        np.testing.assert_array_equal(found[name].totals_q, spectrum.totals_q)


def test_what_is_planned_by_lies_in_one_stretch_of_a_file(batch: StoredBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store far away it is one request, however many layers there are."""
    name, read_bytes = batch.names[0][0], []
    inner = Store.open

    def watched(store: Store, name: str) -> Any:
        stream = inner(store, name)
        taken = stream.read

        class Watched:
            def __getattr__(self, what: str) -> Any:
                return getattr(stream, what)

            def __enter__(self) -> Watched:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def read(self, size: int) -> bytes:
                read_bytes.append(size)
                return taken(size)

        return Watched()

    monkeypatch.setattr(Store, "open", watched)
    layers = batch.layer_groups[0]
    keys = [f"{layer.name}|{kind}" for layer in layers for kind in ("values", "totals")]
    read_some(batch.store, name, keys)
    _, header, stretch = read_bytes
    assert stretch == len(layers) * 2 * (RANK + 1) * 8
    size = Path(batch.store.uri, name).stat().st_size
    assert header + stretch < size / 3


@pytest.mark.parametrize("entries", [0, 1 << 30], ids=["columns", "matrices"])
@pytest.mark.parametrize("energy", [None, 0.5])
def test_ranks_read_what_laying_out_everything_gives(
    rank: ModelWorker, batch: StoredBatch, energy: float | None, entries: int
) -> None:
    whole = read_query_batch(batch.store, batch.names)
    # Of so long sequences matrices are cheaper where they fit.
    plan = plan_layouts(whole.spectra, rank.layers, 1 << 20, entries, energy)
    wanted = lay_out(whole.batch, plan)
    found = dict(read_layouts(planned(batch, plan)))
    assert list(found) == [layer.name for layer in rank.layers]
    for name, one in wanted.items():
        assert_alike(found[name], one)
        assert_alike(planned(batch, plan)[name], one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_read_in_the_products_dtype_scores_with_the_same_bits(
    rank: ModelWorker, batch: StoredBatch, dtype: str
) -> None:
    """It is rounded where it is read: half the bytes go to a node, and no bit is another one."""
    whole = read_query_batch(batch.store, batch.names)
    plan = plan_layouts(whole.spectra, rank.layers, 64, 0, 0.7)
    wanted = on_device(rank, lay_out(whole.batch, plan), Dtype(dtype))
    there = planned(batch, plan, dtype)
    found = on_device(rank, MadeHere(read_layouts, (there,)), Dtype(dtype))
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.equal(found[name].densify(), one.densify())
        assert found[name].dtype == getattr(torch, dtype)
    sizes = {
        name: nbytes(dict(read_layouts(planned(batch, plan, one)))) for name, one in (("f", "float32"), ("d", dtype))
    }
    assert sizes["d"] * 4 == sizes["f"] * getattr(torch, dtype).itemsize


def nbytes(batch: Mapping[str, Any]) -> int:
    return sum(one.U_xo.nbytes + one.V_xi.nbytes for one in batch.values())


def test_a_layer_with_a_shared_basis_is_read_from_its_own_file(rank: ModelWorker, batch: StoredBatch) -> None:
    whole = read_query_batch(batch.store, batch.names)
    plan = plan_layouts(whole.spectra, rank.layers, 64, 0)
    layer: Layer = rank.layers[1]
    made = torch.Generator().manual_seed(0)
    K, B = torch.randn(4, layer.outputs, 3, generator=made), torch.randn(3, layer.inputs, generator=made)
    write_tensors(batch.store, "joint", basis_to_arrays(SharedBasis(K, None, B)))
    write_tensors(batch.store, "none", {})
    bases = read_bases(batch.store, {layer.name: "joint", rank.layers[0].name: "none"})
    assert bases == {layer.name: (layer.outputs, 3)}
    there = StoredBatch(
        batch.store, batch.names, batch.layer_groups, plan.with_bases(bases), {layer.name: "joint"}, 4, "bfloat16"
    )
    found = on_device(rank, MadeHere(read_layouts, (there,)), Dtype("bfloat16"))
    wanted = K.to(torch.bfloat16) @ B.to(torch.bfloat16)
    torch.testing.assert_close(found[layer.name].densify(), wanted, atol=0.1, rtol=0.02)


def test_a_damaged_file_is_named(batch: StoredBatch, rank: ModelWorker) -> None:
    whole = read_query_batch(batch.store, batch.names)
    plan = plan_layouts(whole.spectra, rank.layers, 64, 0)
    path = Path(batch.store.uri, batch.names[1][1])
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match=batch.names[1][1]):
        list(read_layouts(planned(batch, plan)))
    with pytest.raises(DamagedError, match=batch.names[1][1]):
        _ = [planned(batch, plan)[layer.name] for layer in batch.layer_groups[1]]
