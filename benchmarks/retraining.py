"""LDS and QLD on a tiny language model: do the scores predict what retraining does? (docs/reports/truth.md)

python benchmarks/retraining.py [--folder runs/retraining] [--subsets 64] [--seeds 2] [--solvers ekfac identity cg]

Everything is done by the jobs themselves, whose commands it prints; what is trained stays in the folder and is found
again. The corpus: the demo's planted documents and as many natural ones, at random, as make 300.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS, LENGTH, SEED = 300, 64, 0
TRAINING = ("study.training.epochs=15", "study.training.learning_rate=3e-3")
# What a scan is told for each method; every one scores at full rank.
SOLVERS = {
    "ekfac": [],
    "identity": ["factors=identity"],
    "cg": ["factors.solver=cg"],
    "astra": ["factors.solver=astra"],
}


def write_corpus(path: Path) -> None:
    """The same documents on every machine."""
    packed = files("infscan.demo").joinpath("corpus.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().split("\n") if line]
    planted = [row for row in rows if row["source"] == "planted"]
    natural = [row for row in rows if row["source"] != "planted"]
    chosen = planted + random.Random(SEED).sample(natural, DOCUMENTS - len(planted))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    # Left alone where it is there: a file that was written anew counts as changed.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_proponents(path: Path) -> None:
    """Which sequences state a query's fact, so that trainings without any of them are reported by name."""
    documents = [json.loads(line)["id"] for line in (path.parent / "corpus.jsonl").read_text().splitlines()]
    planted = files("infscan.demo").joinpath("planted.jsonl").read_text().splitlines()
    stating: dict[str, list[int]] = {}
    for row in map(json.loads, planted):
        if row["partition"] == "forward":
            # A document is a sequence, in the corpus's order.
            stating.setdefault(row["fact"], []).append(documents.index(row["id"]))
    rows = [
        {"query_id": query, "sequence_ids": ids} for fact, ids in stating.items() for query in (fact, f"{fact}-first")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(name: str, *overrides: str) -> float:
    """Run a job as a user would; its seconds."""
    print(f"$ python jobs/{name}.py {' '.join(overrides)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "jobs" / f"{name}.py", *overrides], check=True, cwd=ROOT)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "retraining")
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--solvers", nargs="+", default=["ekfac", "identity", "cg"], choices=list(SOLVERS))
    parser.add_argument("--steps", type=int, default=20, help="of cg and astra, for each query")
    parser.add_argument("--workers", type=int, default=2, help="of a scan, one core each")
    parser.add_argument("--no-qld", action="store_true", help="leave out the retrainings without the strongest 1 %%")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl")
    write_proponents(folder / "proponents.jsonl")

    model, corpus = f"model.path={folder}/study/model", f"corpus.path={folder}/prepared/corpus"
    shape = ("corpus.packing=document", f"corpus.sequence_length={LENGTH}")
    job("prepare", "model=demo", f"corpus.path={folder}/corpus.jsonl", *shape, f"output={folder}/prepared")
    study = (corpus, f"output={folder}/study", *TRAINING, f"study.subsets={options.subsets}")
    study += (f"study.seeds={options.seeds}", f"study.qld={str(not options.no_qld).lower()}", "study.max_hours=6")
    job("lds", *study)
    scores = []
    for solver in options.solvers:
        output = folder / f"scan-{solver}"
        job(
            "scan", model, corpus, "queries=demo", f"corpus.sequence_length={LENGTH}", "corpus.packing=document",
            f"cluster.num_workers={options.workers}", "cluster.cpus_per_rank=1", "scan=exact", "scan.scores=all",
            f"factors.iteration.steps={options.steps}", f"output={output}", *SOLVERS[solver],
        )  # fmt: skip
        scores.append(f"+scores.{solver}={output}")
    job("lds", *study, *scores, f"proponents={folder}/proponents.jsonl")


if __name__ == "__main__":
    main()
