"""Two ways to share a model between ranks, over the same pass: DeepSpeed's ZeRO-3, as infscan does, and torch's
`fully_shard` (FSDP2), a block at a time.

python -m tests.gpu.kit.sharded <rank> <world> <port> <cuda|cpu> <shape> <folder> <way>     (a rank)
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext
from tests.gpu.kit.device import is_cuda, wait
from tests.gpu.kit.record import Check
from tests.gpu.kit.shapes import SHAPES, SMALL, Bench, Shape, random_module

WAYS = ("fsdp2", "zero3")
_WORLD, _RUNS, _LIMIT_S = 2, 5, 600.0
# Of ZeRO-3's time: what FSDP2 would have to stay under to be worth a second way.
KEPT_BELOW = 0.85
# Losses of one way against the other's, and against the whole model's.
_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def needs(device: str) -> float:
    """Seconds that it takes on an H100, guessed; hardly any where it cannot be tried."""
    return 90.0 if is_cuda(device) and torch.cuda.device_count() >= _WORLD else 2.0


def compared(shape: Shape, device: str, folder: Path) -> Iterator[Check | dict[str, Any]]:
    """Each way's seconds for a micro-batch, and whether FSDP2 wins; a way that cannot be tried says what it lacks."""
    cards = torch.cuda.device_count() if is_cuda(device) else 0
    if is_cuda(device) and cards < _WORLD:
        yield {"model": shape.name, "needs": f"two cards, and there is {cards}"}
        return
    bench = Bench(shape, "cpu", folder)
    dtype = torch.bfloat16 if is_cuda(device) else torch.float32
    random_module(folder, "cpu", dtype).save_pretrained(folder)
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if way == "zero3" and find_spec("deepspeed") is None:
            yield {"model": shape.name, "sharding": way, "needs": "deepspeed, which is not installed"}
            continue
        found[way] = _run(shape, device, folder, way)
        yield {key: value for key, value in found[way].items() if key != "losses"}
    if not is_cuda(device):
        bench.config.model.dtype = bench.dtype
        found["whole"] = {"losses": _losses(_loaded(bench, RankContext(device="cpu")), bench).tolist()}
    name = str(dtype).removeprefix("torch.")
    for one, other in zip(found, list(found)[1:], strict=False):
        ours, theirs = (torch.tensor(found[which]["losses"], dtype=torch.float64) for which in (one, other))
        error = float((ours - theirs).norm() / theirs.norm())
        yield Check(f"{shape.name}: losses, {one} and {other}", name, error, _LIMITS[name])
    if set(WAYS) <= found.keys():
        ratio = found["fsdp2"]["median_s"] / found["zero3"]["median_s"]
        yield {
            "model": shape.name,
            "fsdp2_over_zero3": ratio,
            "kept_below": KEPT_BELOW,
            "fsdp2_wins": ratio < KEPT_BELOW,
        }


def _run(shape: Shape, device: str, folder: Path, way: str) -> dict[str, Any]:
    """What rank 0 says, once all ranks have ended well.

    Raises:
        RuntimeError: where one has not, with what it said last.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [port, "cuda" if is_cuda(device) else "cpu", shape.name, str(folder), way]
    command = [sys.executable, "-m", __name__]
    logs = [(folder / f"{way}-{rank}.log").open("w+") for rank in range(_WORLD)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(_WORLD), *words], stdout=log, stderr=log, cwd=Path(__file__).parents[3]
        )
        for rank, log in enumerate(logs)
    ]
    try:
        ends = time.monotonic() + _LIMIT_S
        status = [rank.wait(max(1.0, ends - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for code, log in zip(status, logs, strict=True):
        log.seek(0)
        said = log.read()
        log.close()
        if code:
            raise RuntimeError(f"a rank of {way} ended with {code}: {said[-1500:]}")
    found: dict[str, Any] = json.loads((folder / f"{way}.json").read_text())
    return found


def main(rank: int, world: int, port: str, kind: str, name: str, folder: Path, way: str) -> None:
    shape = next(one for one in (SMALL, *SHAPES) if one.name == name)
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    place = RankContext(rank, world, device=device, address=f"127.0.0.1:{port}", timeout_s=_LIMIT_S)
    bench = Bench(shape, device, folder)
    model = _loaded(bench, place) if way == "zero3" else _fully_sharded(bench, place)
    losses_b = _losses(model, bench)
    taken = []
    for _ in range(_RUNS):
        wait(device)
        dist.barrier()
        began = time.perf_counter()
        _losses(model, bench)
        wait(device)
        taken.append(time.perf_counter() - began)
    if rank == 0:
        found = {
            "model": shape.name, "sharding": way, "ranks": world, "dtype": bench.dtype.value, "tokens": shape.tokens,
            "median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken), "runs": _RUNS,
            "peak": torch.cuda.max_memory_allocated() if kind == "cuda" else None, "losses": losses_b.tolist(),
        }  # fmt: skip
        (folder / f"{way}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _loaded(bench: Bench, place: RankContext) -> LoadedModel:
    return load(bench.config.model, place, sharded=place.world > 1)


def _fully_sharded(bench: Bench, place: RankContext) -> LoadedModel:
    """Every block's parameters are gathered for its forward and for its backward, and let go after each."""
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if is_cuda(place.device) else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://{place.address}", rank=place.rank, world_size=place.world)
    whole = load(bench.config.model, RankContext(device=place.device), sharded=False)
    module: Any = whole.module
    for block in module.model.layers:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(module)
    mine = sum(parameter.to_local().numel() for parameter in module.parameters())
    return LoadedModel(module, place, whole.dtype, whole.parameters, mine, whole.head_is_last, whole.on_gpu)


def _losses(model: LoadedModel, bench: Bench) -> torch.Tensor:
    """A micro-batch forward and back, to the embeddings' outputs; its losses, float32 [B]."""
    worker = bench.without_model()
    worker.context, worker.model = model.context, model
    batch = bench.batch
    return worker.backward(batch, (), batch.loss(), lambda *_: None, ones=False).float().cpu()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], Path(sys.argv[6]), sys.argv[7])
