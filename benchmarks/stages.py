"""Multi-stage influence judged: against conjugate gradients, on facts, and by retraining (docs/stages.md).

python benchmarks/stages.py cg facts lds cost [--folder runs/stages]

cg: the first experiment of Bao et al. 2025 rebuilt (2-layer GPT-NeoX of width 256). facts: the second in small. lds: a
linear datamodeling score by retraining through both stages. cost: a scan with one stage's queries and with two
stages', turn by turn, and what making the queries costs. Trained models, factors, solutions and retrainings stay in
the folder and are found again; each part ends with <folder>/<part>.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_stages import (
    DOT,
    PRETRAINED,
    SINGLE,
    arms,
    interval,
    invented_facts,
    inverse_of,
    multi,
    of_layers,
    recall_at,
    reciprocal_ranks,
)

from infscan.config import Compression, CorpusConfig, DampingConfig, FactorsConfig, ModelConfig, Packing, QueriesConfig
from infscan.corpus.addressable import CorpusAddress
from infscan.influence.agreement import agreement, random_scores
from infscan.influence.cg import Solution, conjugate_gradients, damped
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import Thresholds
from infscan.model.gauss_newton import GaussNewton, damping_vector, join
from infscan.steps.preconditioner import StoredGradients, query_gradients
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.steps.scan import ScanTask, scan_task
from infscan.steps.solve import ekfac_factors
from infscan.steps.stages import StageTask, stage_task
from infscan.storage import Store
from infscan_studies.against_cg import by_lissa, score_solutions
from infscan_studies.config import LissaConfig, ValidateConfig, ValidateJob
from infscan_studies.demo.answers import answers, questions
from infscan_studies.in_process import Study, open_study
from infscan_studies.truth import lds
from infscan_studies.truth.bm25 import bm25_scores
from infscan_studies.truth.retrain import Retrainer, measure_queries, trainings
from infscan_studies.truth.train import Sizes, TrainingSettings, build_model, train_language_model

Row = dict[str, Any]
DEMO = files("infscan.demo")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Recipe:
    """A model, its pretraining and its fine-tuning. alpha: of the proximal term in fine-tuning (0: none)."""

    sizes: Sizes
    length: int
    pretraining: TrainingSettings
    finetuning: TrainingSettings
    alpha: float


def demo_rows(count: int | None, planted: bool = True) -> list[Row]:
    packed = (DEMO / "corpus.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().split("\n") if line]
    natural = [row for row in rows if row["source"] != "planted"]
    if count is None:
        return rows
    mine = [row for row in rows if row["source"] == "planted"] if planted else []
    return mine + random.Random(0).sample(natural, count - len(mine))


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Left alone where it is there: a file that was written anew counts as changed.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


class Bench:
    """One corpus, fine-tuning set and query file below a folder, with the demo's tokenizer."""

    def __init__(self, folder: Path, corpus: list[Row], tuning: list[Row], asked: list[Row], recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "model"), local_files_only=True)
        self.corpus, self.tuning = corpus, tuning
        self.paths = {
            "corpus": write_jsonl(folder / "corpus.jsonl", corpus),
            "tuning": write_jsonl(folder / "tuning.jsonl", tuning),
            "queries": write_jsonl(folder / "queries.jsonl", asked),
        }
        self.sequences = [self.ids(row["text"])[: recipe.length] for row in corpus]
        pairs = [(self.ids(row["prompt"]), self.ids(row["text"])) for row in tuning]
        self.tuned = [(before + after)[: recipe.length] for before, after in pairs]
        self.losses = [([False] * len(before) + [True] * len(after))[: recipe.length] for before, after in pairs]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def pretrain(self, chosen: Sequence[int], seed: int) -> torch.nn.Module:
        model = build_model(self.recipe.sizes, 2048, self.recipe.length, 0)
        train_language_model(
            model, [self.sequences[row] for row in chosen], replace(self.recipe.pretraining, seed=seed)
        )
        return model

    def finetune(self, model: torch.nn.Module, seed: int = 0, alpha: float | None = None) -> torch.nn.Module:
        alpha = self.recipe.alpha if alpha is None else alpha
        train_language_model(
            model, self.tuned, replace(self.recipe.finetuning, seed=seed), losses=self.losses, alpha=alpha
        )
        return model

    def models(self, name: str = "finetuned", alpha: float | None = None) -> tuple[str, str]:
        """Folders of the pretrained and the fine-tuned model, trained where they are not there."""
        first, second = self.folder / "pretrained", self.folder / name
        if not first.exists():
            self._save(self.pretrain(range(len(self.sequences)), 0), first)
        if not second.exists():
            model = AutoModelForCausalLM.from_pretrained(first, local_files_only=True)
            self._save(self.finetune(model, alpha=alpha), second)
        return str(first), str(second)

    def _save(self, model: Any, target: Path) -> None:
        partial = target.with_name(f".{target.name}")
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        partial.rename(target)

    def study(
        self,
        model: str,
        corpus: str,
        *,
        tracked: str = "mlp",
        curvature: int = 10_000,
        candidates: int = 10_000,
        damping: float = 0.1,
    ) -> Study:
        config = CorpusConfig(
            path=str(self.paths[corpus]),
            prompt_field="prompt" if corpus == "tuning" else None,
            packing=Packing.document,
            sequence_length=self.recipe.length,
        )
        job = ValidateJob(
            model=ModelConfig(path=model, tracked=tracked),
            corpus=config,
            factors=FactorsConfig(damping=DampingConfig(relative=damping)),
            queries=QueriesConfig(path=str(self.paths["queries"])),
            output=str(self.folder / f"{Path(model).name}-{corpus}-{tracked}"),
            validate=ValidateConfig(curvature_sequences=curvature, sequences=candidates, queries=10_000),
        )
        return open_study(job)


@dataclass(frozen=True)
class Solved:
    """x: the solutions. before: after two thirds of the iterations, to see whether they still move."""

    x_kp: Tensor
    before_kp: Tensor
    residual: list[float]
    iterations: list[int]


def solve(folder: Path, study: Study, v_kp: Tensor, alpha: float, iterations: int) -> Solved:
    """(G + alpha + lambda)^-1 v by conjugate gradients, preconditioned by EK-FAC; kept in a file with its residuals."""
    path = folder.with_suffix(".safetensors")
    facts = folder.with_suffix(".json")
    if not facts.exists():
        ggn = GaussNewton(study.worker, study.curvature, 1024)
        factors = ekfac_factors(study.worker, replace(study.inverse, alpha=alpha))
        lambda_p = damping_vector(study.worker.layers, {name: lam for name, (_, lam) in factors.items()}, v_kp)
        kept = {"before": torch.zeros_like(v_kp)}

        def look(at: int, seconds: float, residual_k: Tensor, x_kp: Tensor) -> None:
            print(f"  CG {at}: largest residual {float(residual_k.max()):.3g}, {seconds:.0f} s", flush=True)
            if at == 2 * iterations // 3:
                kept["before"] = x_kp.clone()

        solved: Solution = conjugate_gradients(
            damped(ggn.product, lambda_p),
            v_kp,
            tolerance=1e-3,
            max_iterations=iterations,
            preconditioner=inverse_of(study, alpha),
            on_iteration=look,
        )
        save_file({"x": solved.x_kp, **kept}, path)
        text = {"residual": solved.residuals[-1].tolist(), "iterations": solved.iterations_k.tolist()}
        facts.write_text(json.dumps(text))
    known = json.loads(facts.read_text())
    tensors = load_file(path)
    return Solved(tensors["x"], tensors["before"], known["residual"], known["iterations"])


def against_cg(folder: Path, damping: float, iterations: int) -> Row:
    """10 queries x 500 candidates; single-stage at the pretrained weights, and the chain of both stages.

    damping: of both stages' inverses, the reference's too, in proportion to the mean of Lambda.
    """
    training = TrainingSettings(epochs=3, batch_sequences=16, learning_rate=2e-3)
    tuning = TrainingSettings(epochs=6, batch_sequences=8, learning_rate=3e-4, weight_decay=0.0, reduction="sum")
    recipe = Recipe(Sizes(layers=2, width=256, heads=4, mlp_width=1024), 64, training, tuning, 0.01)
    asked = questions()[::2] + questions()[1:8:2]
    bench = Bench(folder / f"cg-{damping:g}", demo_rows(None), [asdict(row) for row in answers()], asked, recipe)
    first, second = bench.models()
    print("models trained", flush=True)
    pretrained = bench.study(first, "corpus", tracked="linear", curvature=32, candidates=500, damping=damping)
    finetuned = bench.study(second, "tuning", tracked="linear", damping=damping)
    layers, alpha = pretrained.worker.layers, recipe.alpha
    v_own = join(layers, query_gradients(pretrained.worker, pretrained.queries, layers))
    v_ft = join(layers, query_gradients(finetuned.worker, finetuned.queries, layers))
    ekfac, back = inverse_of(pretrained), inverse_of(finetuned, alpha)
    brought = solve(bench.folder / "solved-finetuned", finetuned, v_ft, alpha, iterations)
    both = torch.cat([v_own, alpha * brought.x_kp])
    solved = solve(bench.folder / "solved-pretrained", pretrained, both, 0.0, iterations)
    Q = len(v_own)
    ggn = GaussNewton(pretrained.worker, pretrained.curvature, 1024)
    factors = ekfac_factors(pretrained.worker, pretrained.inverse)
    lambda_p = damping_vector(layers, {name: lam for name, (_, lam) in factors.items()}, v_own)
    settings = LissaConfig(depths=[10, 50, 150], batch=4)
    by_depth, _, _ = by_lissa(ggn.product, v_own, lambda_p, len(pretrained.curvature), settings, 0)
    single = {
        "CG": solved.x_kp[:Q],
        "CG, two thirds of the iterations": solved.before_kp[:Q],
        "EK-FAC, all linear layers": ekfac(v_own),
        "EK-FAC, MLP alone": of_layers(pretrained, ekfac(v_own), "mlp"),
        "dot product": v_own,
        **{name: x_kp for name, (x_kp, _) in by_depth.items()},
    }
    chain = {
        "CG": solved.x_kp[Q:],
        "CG, two thirds of the iterations": solved.before_kp[Q:],
        "EK-FAC, all linear layers": ekfac(alpha * back(v_ft)),
        "EK-FAC, MLP alone": of_layers(pretrained, ekfac(alpha * back(v_ft)), "mlp"),
        "pretrained inverse alone (EK-FAC)": ekfac(v_ft),
        "dot product": v_ft,
    }
    found: Row = {"damping": damping}
    for stage, one in (("finetuned", brought), ("pretrained", solved)):
        found[stage] = {"residual": one.residual, "iterations": one.iterations}
    for name, solutions in (("single", single), ("chain", chain)):
        scores = score_solutions(pretrained.worker, pretrained.candidates, solutions)
        scores["random"] = random_scores(Q, len(pretrained.candidates), 0)
        judged = {key: agreement(scores["CG"], values, seed=0) for key, values in scores.items() if key != "CG"}
        found[name] = {key: [one.mean, one.mean_low, one.mean_high] for key, one in judged.items()}
    return found


def facts(folder: Path) -> Row:
    """40 invented facts, half of them asked in fine-tuning, with and without a proximal term; MRR, recall@10 by arm."""
    invented = invented_facts(40, 0)
    corpus = [{"id": name, "source": "facts", "text": text} for fact in invented for name, text in fact.documents]
    corpus += demo_rows(300, planted=False)
    frames = ("Question: {q} Answer:", "A pupil asked: {q} The answer:")
    tuning = [
        {"id": f"{fact.id}-{at}", "prompt": frame.format(q=fact.question), "text": f" {fact.object}."}
        for fact in invented[::2]
        for at, frame in enumerate(frames)
    ]
    asked = [{"id": f.id, "prompt": frames[0].format(q=f.question), "completion": f" {f.object}"} for f in invented]
    training = TrainingSettings(epochs=15, batch_sequences=16, learning_rate=2e-3)
    tuned = TrainingSettings(epochs=8, batch_sequences=8, learning_rate=5e-4, weight_decay=0.0, reduction="sum")
    recipe = Recipe(Sizes(layers=2, width=128, heads=4, mlp_width=512), 64, training, tuned, 0.1)
    bench = Bench(folder / "facts", corpus, tuning, asked, recipe)
    by_id = {fact.id: fact for fact in invented}
    found: Row = {}
    for name, alpha in (("proximal", recipe.alpha), ("free", 0.0)):
        first, second = bench.models(name, alpha)
        print(f"{name}: models trained", flush=True)
        pretrained, finetuned = bench.study(first, "corpus"), bench.study(second, "tuning")
        scores = arms(pretrained, finetuned, bench.study(second, "corpus"), ALPHAS)
        queries = finetuned.queries
        scores["BM25"] = bm25_scores(
            [one.token_ids for one in pretrained.candidates], [query.parts[0].token_ids for query in queries]
        )
        documents = [one.document_id for one in pretrained.candidates]
        proponents = [by_id[query.id].proponents for query in queries]
        seen = np.array([int(query.id.removeprefix("fact-")) % 2 == 0 for query in queries])
        rows = {}
        for arm, values in scores.items():
            mrr, recall = (
                reciprocal_ranks(values, documents, proponents),
                recall_at(values, documents, proponents, 10),
            )
            rows[arm] = {
                kind: {"mrr": interval(mrr[mine]), "recall": interval(recall[mine])}
                for kind, mine in (("all", seen | ~seen), ("seen", seen), ("unseen", ~seen))
            }
        model = finetuned.worker.model.module
        nats = -measure_queries(model, queries) / [len(query.parts[0].positions) for query in queries]
        found[name] = {
            "arms": rows,
            "nats": {"seen": float(nats[seen].mean()), "unseen": float(nats[~seen].mean())},
        }
    return found


def retraining(folder: Path, subsets: int) -> Row:
    """300 of the demo's documents; every model pretrained on half of them, then fine-tuned on all answers."""
    training = TrainingSettings(epochs=15, batch_sequences=16, learning_rate=3e-3)
    tuned = TrainingSettings(epochs=6, batch_sequences=8, learning_rate=5e-4, weight_decay=0.0, reduction="sum")
    found: Row = {}
    for name, alpha in (("proximal", 0.1), ("free", 0.0)):
        recipe = Recipe(Sizes(layers=2, width=64, heads=2, mlp_width=256), 64, training, tuned, alpha)
        bench = Bench(folder / f"lds-{name}", demo_rows(300), [asdict(row) for row in answers()], questions(), recipe)
        first, second = bench.models()
        finetuned = bench.study(second, "tuning")
        pretrained = bench.study(first, "corpus")
        scores = arms(pretrained, finetuned, bench.study(second, "corpus"), ALPHAS)
        queries = finetuned.queries

        def train(chosen: np.ndarray, seed: int, bench: Bench = bench, queries: Any = queries) -> np.ndarray:
            return measure_queries(bench.finetune(bench.pretrain(chosen.tolist(), seed), seed), queries)

        kept = lds.half_subsets(len(bench.sequences), subsets, 0)
        rows = [{"recipe": asdict(recipe), "rows": bench.sequences, "tuning": bench.tuned}]
        retrainer = Retrainer(Store(str(bench.folder / "retrainings")), rows, [q.id for q in queries], train)
        pairs = trainings(kept, [0])
        for number, (chosen, seed) in enumerate(pairs):
            retrainer.measure(chosen, seed)
            if number % 8 == 7:
                print(f"  {name}: {number + 1} of {len(pairs)} retrainings", flush=True)
        actual = lds.actual(retrainer, kept, [0]).mean(axis=1)
        scores["random"] = lds.random_scores(len(bench.sequences), len(queries), 0).T
        # Candidates are all sequences, in order.
        assert [one.sequence_id for one in pretrained.candidates] == list(range(len(bench.sequences)))
        predicted = {arm: lds.predict(kept, values.T) for arm, values in scores.items()}
        best = multi(alpha or 0.01)
        found[name] = {
            "lds": {arm: _estimate(lds.lds(values, actual, 0)) for arm, values in predicted.items()},
            "minus": {
                arm: _estimate(lds.lds_difference(predicted[best], predicted[arm], actual, 0))
                for arm in (PRETRAINED, SINGLE, DOT)
            },
            "of": best,
        }
    return found


def cost(folder: Path, repeats: int = 10, sequences: int = 128) -> Row:
    """The embedded models: one shard scanned with the queries of one stage and of two, in turns; seconds of CPU."""
    untrained = TrainingSettings()
    recipe = Recipe(Sizes(), 128, untrained, untrained, 0.01)
    bench = Bench(folder / "cost", demo_rows(None), [asdict(row) for row in answers()], questions(), recipe)
    pretrained = bench.study(str(DEMO / "model"), "corpus", curvature=400, candidates=3)
    finetuned = bench.study(str(DEMO / "model-answers"), "tuning", candidates=3)
    rank, store = pretrained.worker, Store(str(bench.folder / "measured"))
    queries, layers = tuple(pretrained.queries), rank.layers
    corpus = Store(str(bench.folder / "model-corpus-mlp" / "corpus"))
    vectors = StoredGradients(store, {query.id: f"vectors/{query.id}.safetensors" for query in queries})
    inverses = {"one": pretrained.inverse, "two": replace(pretrained.inverse, vectors=vectors)}
    seconds: dict[str, list[float]] = {name: [] for name in ("scan one", "scan two", "queries one", "queries two")}

    def make(stages: str) -> None:
        if stages == "two":
            back = replace(finetuned.inverse, alpha=recipe.alpha)
            names = tuple(vectors.names[query.id] for query in queries)
            stage_task(finetuned.worker, StageTask(store, names, queries, layers, back))
        how = Compression.weighted
        query_task(rank, QueryTask(store, f"batch-{stages}", queries, layers, inverses[stages], 32, how, stages))

    def scan(stages: str, number: int) -> None:
        task = ScanTask(
            run=store / f"runs/{time.time_ns()}-{number}",
            corpus=CorpusAddress(corpus),
            shard="shard-000000",
            sequence_ids=np.arange(sequences),
            query_ids=tuple(query.id for query in queries),
            query_batch=stages,
            sides=SIDES,
            candidates=40,
            thresholds=Thresholds.none(len(queries)),
            tokens_per_batch=4096,
            dense=False,
            fingerprint="cost",
        )
        scan_task(rank, task, read_query_batch(store, [[f"batch-{stages}"]]).batch)

    for number in range(repeats + 1):
        order = ("one", "two") if number % 2 else ("two", "one")
        # Both batches first: a scan is not to pay for what the second stage's model left in the caches.
        steps = [("queries", stages, partial(make, stages)) for stages in order]
        steps += [("scan", stages, partial(scan, stages, number)) for stages in order]
        for what, stages, work in steps:
            started = time.process_time()
            work()
            if number:  # the first turn warms up
                seconds[f"{what} {stages}"].append(time.process_time() - started)
    found: Row = {name: [*interval(np.array(values))] for name, values in seconds.items()}
    for what in ("scan", "queries"):
        ratios = np.array(seconds[f"{what} two"]) / np.array(seconds[f"{what} one"])
        found[f"{what} two / one"] = [*interval(ratios)]
        found[f"{what} two / one, by turn"] = [round(float(ratio), 3) for ratio in ratios]
    return found | {"queries": len(queries), "sequences": sequences, "repeats": repeats}


def _estimate(found: lds.Estimate) -> list[float]:
    return [found.mean, found.low, found.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["cg", "facts", "lds", "cost"])
    parser.add_argument("--folder", type=Path, default=Path("runs/stages"))
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--damping", type=float, default=1.0, help="of cg, relative, as factors.damping.relative")
    parser.add_argument("--iterations", type=int, default=60, help="of cg's reference, at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.folder.absolute()
    for part in options.parts:
        started = time.perf_counter()
        parts: dict[str, Callable[[Path], Row]] = {
            "cg": partial(against_cg, damping=options.damping, iterations=options.iterations),
            "facts": facts,
            "lds": partial(retraining, subsets=options.subsets),
            "cost": cost,
        }
        found = parts[part](folder)
        found["seconds"] = round(time.perf_counter() - started, 1)
        (folder / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
