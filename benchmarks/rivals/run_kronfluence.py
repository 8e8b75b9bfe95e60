"""The job of benchmarks/whole_job.py by kronfluence, in its own environment: python run_kronfluence.py FOLDER [...].

FOLDER: model/, fit.jsonl, scanned.jsonl and queries.jsonl, as whole_job.py writes them. Prints a line of JSON, seconds
by phase; writes scores.npy, [Q, N]. EK-FAC with sampled labels, its own damping (0.1 of the mean eigenvalue) and query
gradients of low rank: what infscan does, in kronfluence's words.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from shared import Phases, arguments
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM


class Rows(Dataset):
    def __init__(self, path: Path) -> None:
        with path.open() as lines:
            self.rows = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        return {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])}


class NextToken(Task):
    """Summed negative log-likelihood of the tokens that have a label; MLP layers are tracked."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1).float()
        labels = batch["labels"][:, 1:].flatten()
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)
                labels = torch.where(labels == -100, labels, drawn)
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


def main() -> None:
    options = arguments(__doc__, rank=32, batch_sequences=8)
    phases = Phases()
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32)
    layers = [name for name, part in model.named_modules() if ".mlp." in name and isinstance(part, nn.Linear)]
    task = NextToken(layers)
    model = prepare_model(model, task)
    analyzer = Analyzer("job", model, task, cpu=True, output_dir=str(options.output), disable_tqdm=True)
    fit, scanned, queries = (Rows(options.folder / f"{name}.jsonl") for name in ("fit", "scanned", "queries"))
    factors = FactorArguments(strategy="ekfac")
    mine = {"factors_name": "ekfac", "overwrite_output_dir": True}
    batch = {"per_device_batch_size": options.batch_sequences}
    with phases.timed("covariance"):
        analyzer.fit_covariance_matrices(dataset=fit, factor_args=factors, **batch, **mine)
    with phases.timed("eigendecomposition"):
        analyzer.perform_eigendecomposition(factor_args=factors, **mine)
    with phases.timed("lambda"):
        analyzer.fit_lambda_matrices(dataset=fit, factor_args=factors, **batch, **mine)
    with phases.timed("queries and scan"):
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="ekfac",
            query_dataset=queries,
            train_dataset=scanned,
            per_device_query_batch_size=1,
            per_device_train_batch_size=options.batch_sequences,
            score_args=ScoreArguments(
                damping_factor=None,
                query_gradient_low_rank=options.rank,
                query_gradient_accumulation_steps=len(queries),
            ),
            overwrite_output_dir=True,
        )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    np.save(options.output / "scores.npy", scores.float().numpy())
    phases.show()


if __name__ == "__main__":
    main()
