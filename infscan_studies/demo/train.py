"""Rebuild the embedded demo: its corpus (minipile=path), tokenizer, model, queries and record, into infscan/demo."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from infscan.errors import ConfigError
from infscan.storage.foreign import parse_json
from infscan_studies.config import TrainDemoJob
from infscan_studies.demo import facts, making
from infscan_studies.truth.train import TrainingRecord, train_language_model

log = logging.getLogger("infscan")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give minipile=<JSONL file>, or output=<folder of the demo>.")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [parse_json(line) for line in text.split("\n") if line]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def make_corpus(job: TrainDemoJob, folder: Path) -> None:
    rows = read_rows(Path(str(job.minipile)))
    chosen = making.select_documents(rows, job.documents + job.heldout, job.characters, job.seed)
    kept, heldout = making.hold_out(chosen, job.heldout, job.seed)
    write_rows(folder / "corpus.jsonl.gz", making.with_planted(kept, job.seed))
    write_rows(folder / "heldout.jsonl.gz", heldout)


def train(job: TrainDemoJob, sequences: list[list[int]], heldout: list[list[int]]) -> tuple[Any, dict[str, object]]:
    model = making.build_model(job.vocab_size, job.sequence_length, job.seed)

    def report(epoch: int, record: TrainingRecord) -> None:
        losses = record.train_losses[-1], record.heldout_losses[-1]
        log.info("epoch %d: train %.4f, held out %.4f nats/token, %.0f s", epoch, *losses, record.seconds)

    record = train_language_model(model, sequences, job.training, heldout, report)
    return model, making.record_of(job.training, record)


def train_demo(job: TrainDemoJob) -> Path:
    """Everything of the demo but the fine-tuned model; returns its folder.

    Raises:
        ConfigError: where there is no corpus, or settings are impossible.
    """
    job.training.check()
    torch.set_num_threads(job.threads)
    folder = Path(job.output)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    if job.minipile is not None:
        make_corpus(job, folder)
    rows, heldout_rows = read_rows(folder / "corpus.jsonl.gz"), read_rows(folder / "heldout.jsonl.gz")
    write_rows(folder / "planted.jsonl", making.planted_rows(rows))
    write_rows(folder / "queries.jsonl", facts.queries())

    tokenizer = making.train_tokenizer([row["text"] for row in rows], job.vocab_size)
    sequences = making.encode(tokenizer, rows, job.sequence_length)
    heldout = making.encode(tokenizer, heldout_rows, job.sequence_length)
    log.info("%d documents, %d tokens", len(rows), sum(map(len, sequences)))
    model, training = train(job, sequences, heldout)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    record: dict[str, object] = {
        "corpus": {
            "documents": len(rows),
            "tokens": sum(map(len, sequences)),
            "sha256": hashlib.sha256((folder / "corpus.jsonl.gz").read_bytes()).hexdigest(),
        },
        "threads": job.threads,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "training": training,
        "facts": {fact.id: making.judge(model, tokenizer, fact) for fact in facts.FACTS},
    }
    (folder / "model" / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if job.twin:
        natural = [ids for row, ids in zip(rows, sequences, strict=True) if row["source"] != making.PLANTED_SOURCE]
        twin, training = train(job, natural, heldout)
        judged = {fact.id: making.judge(twin, tokenizer, fact) for fact in facts.FACTS}
        record["twin_without_planted_documents"] = {"training": training, "facts": judged}
        (folder / "model" / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return folder
