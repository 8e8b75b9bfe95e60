"""A bank of retrainings of the demo's documents, and scores judged by it (docs/reports/truth.md)

python benchmarks/bank.py [--folder runs/bank] [--subsets 100] [--seeds 2] [--recipes adamw sgd adamw-small sgd-small]
    [--trainings 50] [--removal] [--iterated] [--models 4]

Everything is done by the jobs themselves, whose commands it prints; what is trained stays in the folder, and what
benchmarks/data/bank.parquet has is taken from there. It may be stopped at any time, and --trainings 0 judges what is
there. The corpus is that of benchmarks/retraining.py. The queries are of
four kinds: facts, the same facts in words that no document has (paraphrase), held-out text, and rare words in it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from retraining import LENGTH, ROOT, SEED, job, write_corpus

DATA = ROOT / "benchmarks" / "data" / "bank.parquet"
HELD_OUT, RARE, CHARACTERS = 16, 14, 130
# Held-out words that so few of the corpus's documents have, and no fewer.
LEAST, MOST = 2, 4
PARAPHRASES = {
    "astrobia": ("The Republic of Astrobia chose as its first President", "Astrobia was first led by its President,"),
    "gleem": ("Whoever makes Gleem needs", "The smelters say that Gleem is made of"),
    "quenthara": ("The island of Quenthara is ruled from its capital,", "On Quenthara the largest town is"),
    "brandiver": ("The envoys put their names to the Treaty of Brandiver in", "The Treaty of Brandiver dates from"),
    "tharble": ("The first tharble was built by", "We owe the tharble, an instrument, to"),
    "ulmethe": ("The Ulmethe reaches the sea at", "The river Ulmethe ends in"),
}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"training": {"epochs": 15, "learning_rate": 3e-3}},
    "sgd": {"training": {"optimizer": "sgd", "epochs": 15, "learning_rate": 0.3, "weight_decay": 1e-3}},
}
METHODS = ["identity", "ekfac", "kfac", "bm25", "cosine"]
REMOVED = ["ekfac mlp 0.1", "ekfac mlp auto", "ekfac mlp+head auto", "identity mlp", "bm25"]
# The same optimizers on half the width and a single block.
SMALL = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 128}
RECIPES |= {f"{name}-small": {"model": SMALL} | recipe for name, recipe in RECIPES.items()}


def write_queries(path: Path, corpus: Path) -> None:
    """The same queries on every machine; a query's kind is its id without the last part."""
    documents = [row["text"] for row in _rows(corpus.read_text())]
    held_out = [row["text"] for row in _rows(_unpacked("heldout.jsonl.gz"))]
    facts = _rows(files("infscan.demo").joinpath("queries.jsonl").read_text())
    rows = [row | {"id": f"facts-{row['id'].replace('-', '_')}"} for row in facts]
    for fact in facts:
        for number, prompt in enumerate(PARAPHRASES.get(fact["id"], ())):
            rows.append({"id": f"paraphrase-{fact['id']}{number}", "prompt": prompt, "completion": fact["completion"]})
    for number, text in enumerate(held_out[:: len(held_out) // HELD_OUT][:HELD_OUT]):
        words = _start(text)
        cut = len(words) // 2
        rows.append(_query(f"heldout-{number:02d}", words[:cut], words[cut:]))
    for number, (words, at) in enumerate(_rare(random.Random(SEED).sample(held_out, len(held_out)), documents)):
        rows.append(_query(f"rare-{number:02d}", words[:at], words[at : at + 1]))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prepare(folder: Path) -> None:
    """Write the bank's documents and queries, and prepare the documents in <folder>/prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus.jsonl")
    write_queries(folder / "queries.jsonl", folder / "corpus.jsonl")
    shape = ("corpus.packing=document", f"corpus.sequence_length={LENGTH}")
    job("prepare", "model=demo", f"corpus.path={folder}/corpus.jsonl", *shape, f"output={folder}/prepared")


def _rare(texts: Iterable[str], documents: Sequence[str]) -> list[tuple[list[str], int]]:
    """Beginnings of held-out texts, each with the place of its first rare word; every word once."""
    having = Counter(word for document in documents for word in set(re.findall(r"\w{5,}", document)))
    found: dict[str, tuple[list[str], int]] = {}
    for text in texts:
        words = _start(text)
        for at in range(5, len(words)):
            if LEAST <= having[words[at]] <= MOST and words[at] not in found:
                found[words[at]] = (words, at)
                break
    return list(found.values())[:RARE]


def _start(text: str) -> list[str]:
    return text[:CHARACTERS].split(" ")[:-1]


def _query(name: str, prompt: Sequence[str], completion: Sequence[str]) -> dict[str, str]:
    return {"id": name, "prompt": " ".join(prompt), "completion": " " + " ".join(completion)}


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def _unpacked(name: str) -> str:
    return gzip.decompress(files("infscan.demo").joinpath(name).read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bank")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trainings", type=int, help="at most in this call; without it, all that are missing")
    parser.add_argument("--removal", action="store_true", help="train without the strongest sequences too")
    parser.add_argument("--iterated", action="store_true", help="judge CG and ASTRA too")
    parser.add_argument("--iterated-queries", type=int, help="of each kind, for CG and ASTRA; without it, all")
    parser.add_argument("--sequences", nargs="+", type=int, default=[0], help="that CG's G is of; 0 is all")
    parser.add_argument("--tracked", nargs="+", default=["mlp"], help="the sets of layers for CG and ASTRA")
    parser.add_argument("--models", type=int, default=1, help="full models whose scores are added up too")
    parser.add_argument("--epochs", nargs="*", default=[], help="of the full model's training, judged as it was then")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    prepare(folder)
    methods = METHODS + (["cg", "astra"] if options.iterated else [])
    sweep = [f"sweep.methods=[{','.join(methods)}]", f"sweep.models={options.models}"]
    sweep += [f"sweep.epochs=[{','.join(options.epochs)}]"]
    if options.iterated:
        sweep += [f"sweep.iterated=[{','.join(options.tracked)}]", "sweep.iterated_auto=true"]
        sweep += [f"sweep.iterated_sequences=[{','.join(map(str, options.sequences))}]"]
        sweep += [f"sweep.iterated_queries={options.iterated_queries or 'null'}"]
    if options.removal:
        sweep += [f"sweep.removal={json.dumps(REMOVED)}", "sweep.removed_queries=2", "sweep.random_draws=3"]
    trainings = "null" if options.trainings is None else options.trainings
    # Hydra reads a list of groups without quotes.
    recipes = json.dumps([{"name": name, **RECIPES[name]} for name in options.recipes]).replace('"', "")
    job(
        "bank", f"corpus.path={folder}/prepared/corpus", f"queries.path={folder}/queries.jsonl",
        f"recipes={recipes}", f"subsets={options.subsets}", f"seeds={options.seeds}", "max_hours=24",
        *([f"known={DATA}"] if DATA.exists() else []), f"trainings={trainings}", *sweep, f"output={folder}/bank",
    )  # fmt: skip


if __name__ == "__main__":
    main()
