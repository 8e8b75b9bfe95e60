"""Fine-tune the embedded model on questions and answers about the planted facts, into infscan/demo (model-answers/)."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infscan_studies.config import FinetuneDemoJob
from infscan_studies.demo import making
from infscan_studies.demo.answers import answers, questions
from infscan_studies.demo.facts import FACTS
from infscan_studies.truth.train import train_language_model

log = logging.getLogger("infscan")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def finetune_demo(job: FinetuneDemoJob) -> Path:
    """The fine-tuned model and its rows, seconds on one core; returns its folder."""
    torch.set_num_threads(job.threads)
    folder = Path(job.output)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def judged() -> dict[str, float]:
        """Nats per token of each fact's answer to its question."""
        found = {}
        for row, fact in zip(questions()[::2], FACTS, strict=True):
            nats = making.completion_nats(model.eval(), ids(row["prompt"]), ids(row["completion"]))
            found[fact.id] = round(sum(nats) / len(nats), 4)
        return found

    rows = answers()
    pairs = [(ids(row.prompt), ids(row.text)) for row in rows]
    before = judged()
    record = train_language_model(
        model,
        [prompt + text for prompt, text in pairs],
        job.training,
        losses=[[False] * len(prompt) + [True] * len(text) for prompt, text in pairs],
        alpha=job.alpha,
    )
    log.info(
        "%d rows, %d steps, %.0f s; last epoch %.4f nats/token",
        len(rows),
        record.steps,
        record.seconds,
        record.train_losses[-1],
    )

    target = folder / "model-answers"
    model.save_pretrained(target)
    for name in TOKENIZER:
        shutil.copy(folder / "model" / name, target)
    facts = {"before": before, "after": judged()}
    training = making.record_of(job.training, record) | {"alpha": job.alpha, "threads": job.threads}
    text = json.dumps({"training": training, "nats_per_token": facts}, indent=1)
    (target / "training.json").write_text(text + "\n")
    write_rows(folder / "answers.jsonl", [asdict(row) for row in rows])
    write_rows(folder / "questions.jsonl", questions())
    return target
