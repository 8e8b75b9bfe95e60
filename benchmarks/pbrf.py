"""PBRF on a tiny language model: do the scores predict where the model moves? (docs/reports/truth.md)

python benchmarks/pbrf.py [--folder runs/pbrf] [--points 125]

A character-level GPT-NeoX is trained to near convergence on pieces of the corpus beside this file; then
jobs/validate.py, whose command is printed, judges EK-FAC and its rivals by the model's responses. The model and every
finished response stay in the folder and are found again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from infscan_studies.truth.train import Sizes, TrainingSettings, build_model, train_language_model

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "minipile.jsonl.gz"
# A character's id is its place; the first stands for every other character.
ALPHABET = "~abcdefghijklmnopqrstuvwxyz .,;:'\"!?-\n0123456789"
SEQUENCES, POINTS, LENGTH, QUERIES, PROMPT, SEED = 500, 125, 32, 10, 16, 0
SIZES = Sizes(layers=2, width=24, heads=2, mlp_width=48)
TRAINING = TrainingSettings(
    epochs=300, batch_sequences=50, learning_rate=3e-3, weight_decay=0.0, final_fraction=0.0, reduction="sum"
)
# Set on time and convergence alone: no score had been seen.
SETTINGS = (
    "truth.coordinates=fisher",
    "truth.draws=64",
    "truth.tolerance=5e-3",
    "truth.max_steps=60",
    "validate.lissa.depths=[10,100,1000,10000]",
    "validate.cg.tolerance=1e-4",
    "validate.cg.max_iterations=60",
    "validate.max_hours=12",
)


def pieces() -> tuple[list[list[int]], list[list[int]]]:
    """Training sequences, and pieces of other documents to measure on: the first characters of random documents."""
    lines = gzip.decompress(CORPUS.read_bytes()).decode().split("\n")
    texts = [text for text in (json.loads(line)["text"].lower() for line in lines if line) if len(text) >= LENGTH]
    chosen = random.Random(SEED).sample(texts, SEQUENCES + QUERIES)
    ids = [[max(ALPHABET.find(character), 0) for character in text[:LENGTH]] for text in chosen]
    return ids[:SEQUENCES], ids[SEQUENCES:]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Left alone where it is there: a file that was written anew counts as changed."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def train(folder: Path, sequences: list[list[int]]) -> None:
    """The model, whole or not at all, and how far it came."""
    if (folder / "model").exists():
        return
    torch.set_num_threads(1)
    model = build_model(SIZES, len(ALPHABET), LENGTH, SEED)
    record = train_language_model(model, sequences, TRAINING)
    print(
        f"trained in {record.seconds:.0f} s: {record.train_losses[0]:.3f} nats per character in the first epoch, "
        f"{record.train_losses[-2]:.4f} and {record.train_losses[-1]:.4f} in the last two",
        flush=True,
    )
    partial = folder / ".model-partial"
    model.save_pretrained(partial)
    partial.rename(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "pbrf")
    parser.add_argument("--points", type=int, default=POINTS)
    options = parser.parse_args()
    disable_progress_bar()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sequences, measured = pieces()
    write(folder / "corpus.jsonl", [{"id": f"piece-{row}", "tokens": ids} for row, ids in enumerate(sequences)])
    write(
        folder / "queries.jsonl",
        [{"id": f"held-out-{row}", "input_ids": ids, "prompt_len": PROMPT} for row, ids in enumerate(measured)],
    )
    train(folder, sequences)
    command = [
        "truth=pbrf", f"model.path={folder}/model", f"corpus.path={folder}/corpus.jsonl", "corpus.tokens_field=tokens",
        f"corpus.sequence_length={LENGTH}", "corpus.packing=document", f"queries.path={folder}/queries.jsonl",
        f"validate.curvature_sequences={SEQUENCES}", f"validate.queries={QUERIES}", f"truth.points={options.points}",
        *SETTINGS, f"output={folder}/validate",
    ]  # fmt: skip
    print(f"$ python jobs/validate.py {' '.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, HERE.parent / "jobs" / "validate.py", *command], check=True, cwd=HERE.parent)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
