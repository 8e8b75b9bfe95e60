#!/usr/bin/env python3
"""Is a card right, and how fast? One command on a machine that has a GPU and little else:

    python tests/gpu/verify.py --out results --budget 480

It needs this checkout, torch, transformers, safetensors, pyarrow, fsspec and numpy. results/verify.json is whole after
every result, the most valuable first; `infscan plan plan.calibration=results` reads it. `--device cpu --small` goes the
same ways on a CPU in seconds. docs/gpu.md says what is in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from infscan.model.worker import ModelWorker  # noqa: E402
from infscan.sizing.devices import DEVICES  # noqa: E402
from tests.gpu.kit import agreement, ceilings, faults, forecast, sharded  # noqa: E402
from tests.gpu.kit.device import environment, is_cuda, name_in_table, release  # noqa: E402
from tests.gpu.kit.record import Case, Record  # noqa: E402
from tests.gpu.kit.shapes import SCANS, SHAPES, SMALL, Bench, Shape  # noqa: E402
from tests.gpu.kit.study import Study  # noqa: E402

FAMILIES = ("llama", "gpt_neox", "gpt2")
# Seconds that a case of a shape takes on an H100, guessed.
_NEEDS = {"8b": 25.0, "1b": 12.0, "160m": 8.0, "small": 1.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where all that was measured is right; targets of speed do not count."""
    options = _options(arguments)
    record = Record(Path(options.out) / "verify.json", options.budget)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for case in cases(options.device, options.small, Path(folder), record):
                if options.only in case.name:
                    record.run(case)
                    release(options.device)
                    _derive(record, options.device)
        except Exception as error:  # what was found until now is in the file
            record.fail("the kit", error)
    return 0 if record.found["ok"] else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="verify", help="folder of verify.json")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what no longer fits is skipped")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny shapes, as on a CPU")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    return parser.parse_args(arguments)


def cases(device: str, small: bool, folder: Path, record: Record) -> Iterator[Case]:
    """Every case, the most valuable first; what a case needs is made when its turn comes."""
    record.found["env"] = environment(device)
    yield from _agreeing(device, small, folder)
    yield from _failing(device, folder)
    yield Case("ceilings", "ceilings", partial(ceilings.products, device, 64 if small else 8192), 8)
    yield Case("copies", "ceilings", partial(ceilings.copies, device, 1 << (20 if small else 28)), 4)
    for shape in (SMALL,) if small else SHAPES:
        yield from _measuring(shape, device, folder)
    yield from _decomposing(device, small, record)
    shape = SMALL if small else SHAPES[1]
    yield Case(
        "sharding", "sharding", partial(sharded.compared, shape, device, folder / "sharding"), sharded.needs(device)
    )
    shape = SMALL if small else SHAPES[0]
    yield Case("logra", "logra", partial(forecast.logra, record.path, folder, device, shape), 2 if small else 30)


def _agreeing(device: str, small: bool, folder: Path) -> Iterator[Case]:
    yield Case("products", "checks", partial(agreement.products, device, d=32 if small else 256), 5)
    yield Case("decomposition", "checks", partial(agreement.decomposition, device, 96 if small else 1024), 5)
    heads = partial(agreement.grouped_heads, folder / "heads", device, 64 if small else 4096)
    yield Case("grouped heads", "checks", heads, 10)
    size = {} if small else {"width": 256, "sequences": 1024, "tokens_per_batch": 4096}
    for family in FAMILIES[:1] if small else FAMILIES:
        made = cache(partial(_known, folder / family, family, **size))
        for name, run in agreement.OF_A_STUDY.items():
            yield Case(f"{family}: {name}", "checks", lambda made=made, run=run: run(*made(), device), 10)


def _known(folder: Path, family: str, **size: int) -> tuple[Study, ModelWorker]:
    """A study, and the CPU rank in float64 that has fitted its factors."""
    study = Study.make(folder, family, **size)
    return study, agreement.reference(study)


def _failing(device: str, folder: Path) -> Iterator[Case]:
    made = cache(partial(_known, folder / "faults", "gpt_neox"))
    yield Case("memory halving", "checks", lambda: faults.memory_halving(made()[0], device), 10)
    yield Case("resume", "checks", lambda: faults.resumed_fit(made()[0], device), 10)
    if is_cuda(device):
        yield Case("sticky error", "faults", faults.sticky_error, 20)


def _measuring(shape: Shape, device: str, folder: Path) -> Iterator[Case]:
    """The floor first: the others are told in it."""
    bench, needs = Bench(shape, device, folder / shape.name), _NEEDS[shape.name]
    table = name_in_table(device)
    peak = DEVICES[table].bfloat16_flops if table else None
    yield Case(f"{shape.name}: floor", "floors", partial(bench.floor, peak), needs)
    for queries, rank in SCANS:
        yield Case(f"{shape.name}: scan of {queries}", "scan", partial(bench.scan, queries, rank), needs)
    blocks = min(2, shape.layers)
    yield Case(f"{shape.name}: covariance", "fit", partial(bench.covariance, blocks), needs / 2)
    yield Case(f"{shape.name}: lambda, tf32", "fit", partial(bench.lambda_, blocks, "tf32"), needs / 2)
    yield Case(f"{shape.name}: lambda, exact", "fit", partial(bench.lambda_, blocks, "exact"), needs / 2)
    bench.close()


def _decomposing(device: str, small: bool, record: Record) -> Iterator[Case]:
    """Larger and larger; how long the next takes is told from the one before."""
    needs = 1.0
    for n in (48, 96) if small else (4096, 8192, 14336):
        yield Case(f"eigh {n}", "eigh", partial(ceilings.decomposition, device, n), needs)
        if done := record.found.get("eigh"):
            needs = done[-1]["median_s"] * 8


def _derive(record: Record, device: str) -> None:
    """What follows from what is there by now."""
    if record.found.get("floors"):
        record.found["calibration"] = forecast.calibration(record.found, device)
    record.found["targets"] = forecast.targets(record.found)
    record.write()


if __name__ == "__main__":
    sys.exit(main())
