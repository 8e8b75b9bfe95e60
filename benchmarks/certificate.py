"""Whether the certificate holds, and says enough: simulated searches whose truth is known (docs/reports/sieve.md).

python benchmarks/certificate.py [--runs 200] [--rows 20000] [--queries 10] [--audited 1000 2000 4000] ...

In every run a world is drawn: exact scores as sums over layers, heavy-tailed or not, with near-duplicates or without,
and a sieve that sees the last layers alone. Its best rows for any query are the candidates of all; the certificate is
made of them and of a uniform sample, as a scan makes it. In adverse worlds the assumption is broken on purpose.
Reported are the share of runs in which the truth is below the limit, the median distance of both, and how often the
test of the assumption notices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from infscan.influence.certificate import Audit, Certificate, Evidence, certify, certify_together

RESULTS = Path(__file__).parent / "results"
LAYERS = 8
TAILS = ("normal", "t", "lognormal")
ADVERSE = ("blind in the tail", "blind further in", "lower layers")
Floats = NDArray[np.float32]


def drawn(rng: np.random.Generator, tails: str, *shape: int) -> Floats:
    """Symmetric noise with normal tails, with t's (3 degrees of freedom), or with a lognormal's (sigma 1.2)."""
    normal = rng.standard_normal(shape, np.float32)
    if tails == "normal":
        return normal
    if tails == "t":
        squares = sum(rng.standard_normal(shape, np.float32) ** 2 for _ in range(3))
        return normal / np.sqrt(squares / 3)
    return np.sign(normal) * np.exp(1.2 * rng.standard_normal(shape, np.float32))


def world(
    rng: np.random.Generator,
    rows: int,
    queries: int,
    tails: str,
    depth: int,
    *,
    clustered: bool,
    adverse: str,
    top: int,
) -> tuple[Floats, Floats]:
    """(sieve scores, exact scores), [Q, N].

    A layer's score is a row's relevance to the query, half of which all queries share, and noise of its own, both times
    the row's scale. clustered: one row in three has near-duplicates, up to fifty. The sieve adds up the last `depth`
    of LAYERS layers. adverse: a third of the top rows, or of five times as many, have a sieve score near zero; or one
    row in fifty is carried by layers that the sieve does not see.
    """
    sizes = rng.choice([1, 1, 1, 1, 1, 1, 2, 3, 10, 50], rows) if clustered else np.ones(rows, np.intp)
    own = np.repeat(np.arange(rows), sizes)[:rows]
    distinct = int(own[-1]) + 1
    scale = 1.0 if tails == "normal" else np.exp(0.5 * rng.standard_normal(distinct, np.float32))
    relevance = (drawn(rng, tails, 1, distinct) + drawn(rng, tails, queries, distinct)) / np.sqrt(2)
    sieve, exact = np.zeros((queries, rows), np.float32), np.zeros((queries, rows), np.float32)
    for layer in range(LAYERS):
        share = ((relevance + drawn(rng, tails, queries, distinct)) * scale)[:, own]
        if clustered:
            share *= np.exp(0.05 * rng.standard_normal((queries, rows), np.float32))
        exact += share
        if layer >= LAYERS - depth:
            sieve += share
    if adverse == "lower layers":
        carried = rng.random(rows) < 0.02
        exact += np.abs(rng.standard_t(2, (queries, rows))) * 3 * exact.std() * carried
    elif adverse:
        strongest = np.argsort(-exact, axis=1)[:, : top if adverse == "blind in the tail" else 5 * top]
        for query in range(queries):
            lost = rng.choice(strongest[query], strongest.shape[1] // 3, replace=False)
            sieve[query, lost] = 0.1 * sieve.std() * rng.standard_normal(len(lost))
    return sieve, exact


def run(rng: np.random.Generator, options: argparse.Namespace, **kind: Any) -> dict[str, dict[str, Any]]:
    """One world: the truth and the certificates, of the first query alone and of all together, by audited rows."""
    sieve, exact = world(rng, options.rows, options.queries, top=options.top, **kind)
    found = np.unique(best(sieve, options.candidates))
    is_found = np.zeros(options.rows, np.bool_)
    is_found[found] = True
    truth = is_found[best(exact, options.top)].mean(axis=1)
    results = {}
    for size in options.audited:
        rows, audit = rng.choice(options.rows, size, replace=False), Audit(options.rows, size)
        evidence = [Evidence(scores[found], found, scores[rows], is_found[rows]) for scores in exact]
        results[f"one query, {size} audited"] = judged(
            truth[0], certify(evidence[0], audit, options.top, options.queries)
        )
        together = certify_together(evidence, audit, options.top)
        results[f"{options.queries} queries together, {size} audited"] = judged(truth.mean(), together)
    return results


def best(scores_qn: Floats, count: int) -> NDArray[np.intp]:
    """Of every query, the best so many rows, in any order: [Q, count]."""
    return np.argpartition(-scores_qn, count - 1, axis=1)[:, :count]


def judged(truth: np.floating, found: Certificate) -> dict[str, Any]:
    return {
        "truth": float(truth),
        "recall": found.recall,
        "without_assumption": found.without_assumption,
        "noticed": found.p_monotone < 0.05,
        "wrong": bool(found.recall is not None and found.recall > truth + 1e-9),
        "wrong_without": bool(found.without_assumption > truth + 1e-9),
    }


def summary(runs: Sequence[dict[str, Any]], of: str) -> dict[str, Any]:
    mine = [one[of] for one in runs]
    stated = [one for one in mine if one["recall"] is not None]
    too_high = [one["recall"] - one["truth"] for one in mine if one["wrong"]]
    return {
        "truth": float(np.mean([one["truth"] for one in mine])),
        "stated": len(stated) / len(mine),
        "median": float(np.median([one["recall"] for one in stated])) if stated else None,
        "below": float(np.median([one["truth"] - one["recall"] for one in stated])) if stated else None,
        "wrong": float(np.mean([one["wrong"] for one in mine])),
        "by": float(np.mean(too_high)) if too_high else 0.0,
        "noticed": float(np.mean([one["noticed"] for one in mine])),
        "without_assumption": float(np.median([one["without_assumption"] for one in mine])),
        "wrong_without": float(np.mean([one["wrong_without"] for one in mine])),
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    names = ("truth", "stated", "median", "below", "wrong", "by", "noticed", "without_assumption", "wrong_without")
    table = Table(title=title)
    for name in ("world", *names):
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(row["world"], *("-" if row[name] is None else f"{row[name]:.3f}" for name in names))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="of every world")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=300, help="of every query")
    parser.add_argument("--audited", type=int, nargs="+", default=[1_000, 2_000, 4_000])
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 6], help="layers that the sieve sees, of 8")
    parser.add_argument("--worlds", choices=("honest", "adverse", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    kinds = [
        {"tails": tails, "depth": depth, "clustered": clustered, "adverse": ""}
        for tails, clustered, depth in itertools.product(TAILS, (False, True), options.depths)
        if options.worlds != "adverse"
    ]
    kinds += [
        {"tails": tails, "depth": 4, "clustered": False, "adverse": adverse}
        for adverse, tails in itertools.product(ADVERSE, TAILS)
        if options.worlds != "honest"
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, kind in enumerate(kinds):
        seeds = ([options.seed, number, seed] for seed in range(options.runs))
        runs = [run(np.random.default_rng(seed), options, **kind) for seed in seeds]
        alike = ", near-duplicates" if kind["clustered"] else ""
        name = f"{kind['tails']}, last {kind['depth']} of {LAYERS}{alike}" + f", {kind['adverse']}" * bool(
            kind["adverse"]
        )
        for of in runs[0]:
            row = {"world": name, "adverse": bool(kind["adverse"]), **summary(runs, of)}
            found.setdefault(of, []).append(row)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    for of, rows in found.items():
        show(of, rows)
        honest = [row for row in rows if not row["adverse"]]
        if not honest:
            continue
        wrong = [row["wrong"] for row in honest]
        below = [row["below"] for row in honest if row["truth"] >= 0.95 and row["below"] is not None]
        print(f"{of}: above the truth in {np.mean(wrong):.2%} of the runs, {max(wrong):.2%} in the worst world")
        if below:
            print(f"where the truth is 0.95 or more, below it by {np.median(below):.3f}, at most {max(below):.3f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"certificate-{options.worlds}.json").write_text(
        json.dumps({"settings": vars(options), **found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
