"""Rebuild the embedded demo: its corpus (minipile=path), tokenizer, model, queries and record, into infscan/demo.

python jobs/train_demo.py                               trains on the embedded corpus as it is
python jobs/train_demo.py minipile=some/corpus.jsonl.gz selects a corpus from a larger one first
"""

import gzip
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import hydra
import tokenizers
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from infscan.studies import demo, facts
from infscan.telemetry import command
from infscan.truth.train import TrainingRecord, TrainingSettings, train_language_model

log = logging.getLogger("train_demo")


def read_rows(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def make_corpus(cfg: DictConfig, folder: Path) -> None:
    chosen = demo.select_documents(read_rows(Path(cfg.minipile)), cfg.documents + cfg.heldout, cfg.characters, cfg.seed)
    kept, heldout = demo.hold_out(chosen, cfg.heldout, cfg.seed)
    write_rows(folder / "corpus.jsonl.gz", demo.with_planted(kept, cfg.seed))
    write_rows(folder / "heldout.jsonl.gz", heldout)


def train(cfg: DictConfig, sequences: list[list[int]], heldout: list[list[int]]) -> tuple[Any, dict[str, object]]:
    settings = TrainingSettings(**OmegaConf.to_container(cfg.training))  # type: ignore[arg-type]
    model = demo.build_model(cfg.vocab_size, cfg.sequence_length, cfg.seed)

    def report(epoch: int, record: TrainingRecord) -> None:
        losses = record.train_losses[-1], record.heldout_losses[-1]
        log.info("epoch %d: train %.4f, held out %.4f nats/token, %.0f s", epoch, *losses, record.seconds)

    record = train_language_model(model, sequences, settings, heldout, report)
    return model, demo.record_of(settings, record)


@hydra.main(version_base=None, config_path="../conf", config_name="train_demo")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    folder = Path(cfg.output)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    if cfg.minipile is not None:
        make_corpus(cfg, folder)
    rows, heldout_rows = read_rows(folder / "corpus.jsonl.gz"), read_rows(folder / "heldout.jsonl.gz")
    write_rows(folder / "planted.jsonl", demo.planted_rows(rows))
    write_rows(folder / "queries.jsonl", facts.queries())

    tokenizer = demo.train_tokenizer([row["text"] for row in rows], cfg.vocab_size)
    sequences = demo.encode(tokenizer, rows, cfg.sequence_length)
    heldout = demo.encode(tokenizer, heldout_rows, cfg.sequence_length)
    log.info("%d documents, %d tokens", len(rows), sum(map(len, sequences)))
    model, training = train(cfg, sequences, heldout)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    record: dict[str, object] = {
        "corpus": {
            "documents": len(rows),
            "tokens": sum(map(len, sequences)),
            "sha256": hashlib.sha256((folder / "corpus.jsonl.gz").read_bytes()).hexdigest(),
        },
        "threads": cfg.threads,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "training": training,
        "facts": {fact.id: demo.judge(model, tokenizer, fact) for fact in facts.FACTS},
    }
    (folder / "model" / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if cfg.twin:
        natural = [ids for row, ids in zip(rows, sequences, strict=True) if row["source"] != demo.PLANTED_SOURCE]
        twin, training = train(cfg, natural, heldout)
        judged = {fact.id: demo.judge(twin, tokenizer, fact) for fact in facts.FACTS}
        record["twin_without_planted_documents"] = {"training": training, "facts": judged}
        (folder / "model" / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command(main)
