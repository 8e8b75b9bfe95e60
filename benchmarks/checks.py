"""What checking costs: the scan of a corpus with every check of its inputs, and with all of them taken out, by turns.

    python benchmarks/checks.py --sequences 20000 --pairs 7

Taken out: the looks at corpus files and parts before and after they are read, the sampled digests, the fingerprint of
the model that a rank loaded, and the question to storage whether the lease is this driver's. All of it is CPU time of
this process, which other work on the machine disturbs less than seconds; of the scans with checks it also says what
was spent within them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from infscan import pipeline
from infscan.corpus import parts
from infscan.corpus.in_place import InPlace
from infscan.engine.lease import Lease
from infscan.model import worker
from infscan.storage import Identity
from tests.steps.runs import in_process, small_run, tiny_model, token_queries

T = 64
CHECKS: list[tuple[Any, str]] = [
    (InPlace, "_look_at"),
    (InPlace, "_check_unchanged"),
    (parts, "stamp_of"),
    (Identity, "check"),
    (worker, "fingerprint_of"),
    (Lease, "confirm"),
]
# CPU seconds within each check.
within: list[float] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=20_000, help=f"of {T} tokens each")
    parser.add_argument("--pairs", type=int, default=7, help="scans with checks, and as many without")
    given = parser.parse_args()
    sequences, pairs = given.sequences, given.pairs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny_model(root / "model", layers=1, width=32)
        token_queries(root / "queries.jsonl", 8, seed=1)
        (root / "corpus").mkdir()
        tokens = np.random.default_rng(0).integers(1, 97, sequences * T).astype(np.uint16)
        for number, some in enumerate(np.split(tokens, 8)):
            np.save(root / "corpus" / f"{number}.npy", some)
        _scan(root, "first")
        found: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(pairs):
            # First one, then the other, so that a machine that slows down is no cost of either.
            for checked in (pair % 2 == 0, pair % 2 == 1):
                with _checks(checked):
                    found[checked].append(_scan(root, f"{pair}-{checked}"))
        ratios = [one / other for one, other in zip(found[True], found[False], strict=True)]
        print(f"{sequences} sequences of {T} tokens, {pairs} pairs")
        share = sum(within) / sum(found[True])
        with_s, without_s = (statistics.median(found[one]) for one in (True, False))
        print(f"with checks {with_s:.2f} s, without {without_s:.2f} s of CPU")
        print(f"ratio: median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}")
        print(
            f"within checks (the whole run's): {share:.4%} of the scans' CPU time, {len(within) // pairs} calls a run"
        )


def _scan(root: Path, name: str) -> float:
    """Seconds of the scan alone; factors and the description of the corpus are the first run's."""
    config = small_run(
        root, f"corpus.path={root / 'corpus'}", "corpus.tokens_field=null", "corpus.packing=concat",
        f"corpus.sequence_length={T}", "factors.num_sequences=200", "scan.shard_sequences=256",
        "scan.tokens_per_batch=4096", f"factors.path={root / 'factors'}", f"output={root / name}",
    )  # fmt: skip
    spent = []
    scan = pipeline.scan

    def timed(*given: Any) -> Any:
        began = time.process_time()
        result = scan(*given)
        spent.append(time.process_time() - began)
        return result

    with mock.patch.object(pipeline, "scan", timed):
        pipeline.answer(in_process(config))
    return spent[0]


@contextmanager
def _checks(wanted: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for place, name in CHECKS:
            check = getattr(place, name)
            stack.enter_context(mock.patch.object(place, name, _timed(check) if wanted else _nothing))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a check."""


def _timed(check: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return check(*given, **named)
        finally:
            within.append(time.process_time() - began)

    return timed


if __name__ == "__main__":
    main()
