"""Fine-tune the embedded model on questions and answers about the planted facts, into infscan/demo (model-answers/).

python jobs/finetune_demo.py        seconds on one core
"""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from infscan.studies import demo
from infscan.studies.answers import answers, questions
from infscan.studies.facts import FACTS
from infscan.telemetry import command
from infscan.truth.train import TrainingSettings, train_language_model

log = logging.getLogger("finetune_demo")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@hydra.main(version_base=None, config_path="../conf", config_name="finetune_demo")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    folder = Path(cfg.output)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def judged() -> dict[str, float]:
        """Nats per token of each fact's answer to its question."""
        found = {}
        for row, fact in zip(questions()[::2], FACTS, strict=True):
            nats = demo.completion_nats(model.eval(), ids(row["prompt"]), ids(row["completion"]))
            found[fact.id] = round(sum(nats) / len(nats), 4)
        return found

    rows = answers()
    pairs = [(ids(row.prompt), ids(row.text)) for row in rows]
    settings = TrainingSettings(**OmegaConf.to_container(cfg.training))  # type: ignore[arg-type]
    before = judged()
    record = train_language_model(
        model,
        [prompt + text for prompt, text in pairs],
        settings,
        losses=[[False] * len(prompt) + [True] * len(text) for prompt, text in pairs],
        alpha=cfg.alpha,
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
    training = demo.record_of(settings, record) | {"alpha": cfg.alpha, "threads": cfg.threads}
    text = json.dumps({"training": training, "nats_per_token": facts}, indent=1)
    (target / "training.json").write_text(text + "\n")
    write_rows(folder / "answers.jsonl", [asdict(row) for row in rows])
    write_rows(folder / "questions.jsonl", questions())


if __name__ == "__main__":
    command(main)
