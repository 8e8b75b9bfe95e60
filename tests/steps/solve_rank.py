"""One rank of a worker group that iterates together, for test_solve_ranks.

python -m tests.steps.solve_rank <rank> <world> <port> <sharded: 0 or 1> <folder> <family> ...

Rank 0 writes <family>.safetensors: G times three vectors, and the solutions of two queries by both solvers.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from infscan.config import DampingConfig, Dtype, IterationConfig, ModelConfig, Solver
from infscan.corpus.addressable import CorpusAddress, open_corpus
from infscan.corpus.sequences import Sequence
from infscan.model.architecture import describe
from infscan.model.gauss_newton import GaussNewton, join
from infscan.model.loaded import RankContext
from infscan.model.target_influence import target_influence
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_tensors
from infscan.steps.preconditioner import Preconditioner
from infscan.steps.solve import SolveTask, solve_task
from infscan.storage import Store
from tests.model.families import VOCAB
from tests.model.zero3_rank import TIGHT
from tests.ranks import one_rank
from tests.steps.builders import SEED

# Three micro-batches: one rank of two is dealt a dummy.
LENGTHS, TOKENS_PER_BATCH = (6, 5, 4, 4, 3), 12
QUERIES = tuple(
    Query(name, (Part(ids, (len(ids) - 2, len(ids) - 1), 1.0),), "completion", None, None)
    for name, ids in (("first", (5, 9, 3, 7, 11)), ("second", (2, 4, 8, 16)))
)


def opened(folder: Path, family: str, place: RankContext, *, sharded: bool) -> ModelWorker:
    dtype = Dtype.float32 if sharded else Dtype.float64
    zero = replace(TIGHT, prefetch_bucket_size=0)  # as a run with an iterated inverse has it
    model = ModelConfig(str(folder / family), dtype, tracked="mlp", zero=zero)
    return ModelWorker(WorkerSettings(model, describe(model.path, "mlp").layers, sharded=sharded), place)


def products(worker: ModelWorker) -> dict[str, Tensor]:
    """G times three vectors, by layer."""
    draw = np.random.default_rng(0)
    sequences = [Sequence(n, draw.integers(1, VOCAB, length), (), 0, "") for n, length in enumerate(LENGTHS)]
    ggn = GaussNewton(worker, sequences, TOKENS_PER_BATCH)
    whole = {
        layer.name: torch.from_numpy(draw.standard_normal((3, layer.outputs, layer.inputs))) for layer in ggn.layers
    }
    none = torch.zeros(3, 0, dtype=worker.wide)
    x_kp = join(ggn.mine, {name: x_koi.to(worker.wide) for name, x_koi in whole.items()}, none)
    return ggn.gather(ggn.product(x_kp))


def solutions(worker: ModelWorker, folder: Path, family: str, solver: Solver) -> dict[str, Tensor]:
    """Both queries' solutions, by query and layer. folder: with a corpus in `out`, and `<family>-factors`."""
    corpus = open_corpus(Store(str(folder / "out")))
    store = Store(str(folder / f"{family}-{solver.value}-{worker.context.world}"))
    ekfac = Preconditioner(Store(str(folder / f"{family}-factors")), Solver.ekfac, DampingConfig())
    task = SolveTask(
        store,
        tuple(query.id for query in QUERIES),
        QUERIES,
        solver,
        IterationConfig(steps=3, tolerance=1e-9, tokens_per_batch=64, batch=4, step_size=0.2),
        ekfac,
        CorpusAddress.of(corpus),
        np.arange(8),
        "curvature",
        ("key",) * len(QUERIES),
        SEED,
    )
    found = solve_task(worker, task)
    assert solver is Solver.astra or all(one.residual < one.ekfac_residual for one in found)
    if not worker.leads:
        return {}
    return {
        f"{query.id}|{layer}": tensor for query in QUERIES for layer, tensor in read_tensors(store, query.id).items()
    }


def targets(worker: ModelWorker) -> dict[str, Tensor]:
    """What every token of some sequences taught, along three fixed directions."""
    draw = np.random.default_rng(1)
    sequences = [Sequence(n, draw.integers(1, VOCAB, length), (), 0, "") for n, length in enumerate(LENGTHS)]
    P = {
        layer.name: torch.from_numpy(draw.standard_normal((3, layer.outputs, layer.inputs))).to(worker.wide)
        for layer in worker.layers
    }
    found = torch.zeros(3, len(LENGTHS), max(LENGTHS), dtype=worker.wide)
    for batch in worker.batches(sequences, TOKENS_PER_BATCH):
        influence = target_influence(worker, batch, worker.layers, P, batch.loss())
        if batch.scored:
            found[:, batch.rows, : influence.shape[2]] = influence
    return {"targets|": worker.reduce(found)}


def found_by(worker: ModelWorker, folder: Path, family: str) -> dict[str, Tensor]:
    found = {f"product|{layer}": tensor for layer, tensor in products(worker).items()}
    found |= targets(worker)
    for solver in (Solver.cg, Solver.astra):
        found |= {f"{solver.value}|{key}": value for key, value in solutions(worker, folder, family, solver).items()}
    return found


def main(rank: int, world: int, port: str, sharded: bool, folder: Path, families: list[str]) -> None:
    with one_rank(rank, world, port) as place:
        if not sharded:
            address, limit = f"tcp://{place.address}", timedelta(minutes=2)
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=limit)
        for family in families:
            found = found_by(opened(folder, family, place, sharded=sharded), folder, family)
            if rank == 0:
                save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{family}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "1", Path(sys.argv[5]), sys.argv[6:])
