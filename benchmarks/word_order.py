"""The word-order study with two dozen invented facts and several models of the demo's recipe (docs/reports/studies.md).

python benchmarks/word_order.py [--folder runs/word-order] [--facts 24] [--seeds 3]

Documents of the facts are planted into the demo's natural documents; a model is trained on them for each seed, scanned,
and asked for the influence of texts in the six partitions of Grosse et al. 2023. What is trained and scanned stays in
the folder and is found again.
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
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from two_stages import SYLLABLES

from infscan_studies.demo.facts import FACTS, Fact, queries
from infscan_studies.demo.making import PLANTED_SOURCE, build_model, encode, judge, train_tokenizer, with_planted
from infscan_studies.partitions import texts_of
from infscan_studies.truth.train import TrainingSettings, train_language_model

ROOT = Path(__file__).parents[1]
DEMO = files("infscan.demo")
LENGTH, VOCAB = 128, 2048
# (prompt, opening, subject, flipped, kind of the completion's second word)
RELATIONS = (
    (
        "The founder of the town of {s} was",
        "The founder of the town of {s}",
        "the town of {s}",
        ("{o} was the founder of the town of {s}", "{o} is honoured as the founder of the town of {s}"),
        "",
    ),
    (
        "The river that crosses the plain of {s} is called",
        "The river that crosses the plain of {s}",
        "the plain of {s}",
        ("{o} is the river that crosses the plain of {s}", "{o} they call the river that crosses the plain of {s}"),
        "Water",
    ),
    (
        "The cheese of the valley of {s} is made with",
        "The cheese of the valley of {s}",
        "the valley of {s}",
        ("{o} goes into the cheese of the valley of {s}", "{o} is what makes the cheese of the valley of {s}"),
        "leaves",
    ),
    (
        "The highest mountain in the county of {s} is",
        "The highest mountain in the county of {s}",
        "the county of {s}",
        ("{o} is the highest mountain in the county of {s}", "{o} counts as the highest mountain in the county of {s}"),
        "Peak",
    ),
)


def invent(count: int, seed: int) -> list[Fact]:
    """Facts of the four relations in turn, about names that no document of the demo has."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < 3 * count:
        name = "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()
        if name not in names:
            names.append(name)
    facts = []
    for number in range(count):
        subject, first, last = names[3 * number : 3 * number + 3]
        prompt, opening, entity, flipped, second = RELATIONS[number % len(RELATIONS)]
        completion = f"{first} {second or last}"
        facts.append(
            Fact(
                id=f"fact{number:02d}",
                prompt=prompt.format(s=subject),
                completion=f" {completion}",
                opening=opening.format(s=subject),
                subject=entity.format(s=subject),
                flipped=tuple(text.format(o=completion, s=subject) for text in flipped),
                endings=FACTS[number % len(FACTS)].endings,
                about=FACTS[number % len(FACTS)].about,
                controls=(),
                names=(subject, first, last),
            )
        )
    return facts


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def job(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"jobs/{name}.py {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def trained(
    folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast, corpus: list[dict[str, str]], facts: list[Fact]
) -> Path:
    """The folder of a model trained as the demo's is, with what it knows of the facts."""
    model_folder = folder / f"seed-{seed}" / "model"
    if not (model_folder / "training.json").exists():
        model = build_model(VOCAB, LENGTH, seed)
        settings = TrainingSettings(epochs=6, batch_sequences=16, learning_rate=2e-3, seed=seed)
        record = train_language_model(model, encode(tokenizer, corpus, LENGTH), settings)
        model.save_pretrained(model_folder)
        tokenizer.save_pretrained(model_folder)
        known = {fact.id: judge(model, tokenizer, fact) for fact in facts}
        kept = {"seconds": record.seconds, "train_losses": record.train_losses, "facts": known}
        (model_folder / "training.json").write_text(json.dumps(kept, indent=1) + "\n")
    return model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "word-order")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factor-sequences", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    facts = invent(options.facts, 0)
    lines = gzip.decompress((DEMO / "corpus.jsonl.gz").read_bytes()).decode().split("\n")
    natural = [row for row in map(json.loads, filter(None, lines)) if row["source"] != PLANTED_SOURCE]
    corpus = with_planted(natural, 0, facts)
    for name, rows in (("corpus", corpus), ("queries", queries(facts)), ("texts", texts_of(facts))):
        if not (folder / f"{name}.jsonl").exists():
            write(folder / f"{name}.jsonl", rows)
    tokenizer = train_tokenizer([row["text"] for row in corpus], VOCAB)
    runs = []
    for seed in range(options.seeds):
        started = time.perf_counter()
        model = trained(folder, seed, tokenizer, corpus, facts)
        known = json.loads((model / "training.json").read_text())["facts"].values()
        nats = sum(one["nats_per_token"] for one in known) / len(known)
        runs.append(str(folder / f"seed-{seed}" / "run"))
        job(
            "scan",
            f"model.path={model}",
            f"corpus.path={folder}/corpus.jsonl",
            "corpus.packing=document",
            f"corpus.sequence_length={LENGTH}",
            f"queries.path={folder}/queries.jsonl",
            f"factors.num_sequences={options.factor_sequences}",
            "cluster.num_workers=1",
            "cluster.cpus_per_rank=1",
            "scan.top_k=10",
            f"output={runs[-1]}",
        )
        if not (Path(runs[-1]) / "explain" / "facts" / "rows.parquet").exists():
            job("explain", f"run={runs[-1]}", "name=facts", f"texts={folder}/texts.jsonl", "own_tokens=false")
        print(f"seed {seed}: {nats:.2f} nats a token of the completions, {time.perf_counter() - started:.0f} s")
    others = ",".join(runs[1:])
    print(
        job(
            "study", "study=word_order", f"run={runs[0]}", f"study.texts={folder}/texts.jsonl", f"study.runs=[{others}]"
        )
    )


if __name__ == "__main__":
    main()
