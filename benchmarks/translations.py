"""A question in English, answered in French and German only: does influence find the answer? (docs/studies.md)

python benchmarks/translations.py --model runs/real/inputs/model --handbook .../usr/share/doc/debian-handbook/html
    [--folder runs/translations] [--questions 40] [--paragraphs 200] [--tracked REGEX] [--sequences 128]

The handbook has every paragraph in many languages. Of some paragraphs the first English sentence is the question: its
last words are the completion, the rest is the prompt, and the paragraph itself is in the corpus in French and German
alone. Other paragraphs are there in all three. Each question ranks all of them, by EK-FAC influence at full rank, by
the gradient dot product and its cosine, and by BM25. Scores are kept in the folder (scores.npz), from which the tables
are made again.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infscan.api import settings_of_call
from infscan.config import Config, Measure
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.sequences import Sequence as CorpusSequence
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.inverse import tokens_to_core
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query
from infscan.steps.factor_files import store_plan
from infscan.steps.factors import fit_factors, plan_factors
from infscan.steps.inputs import open_inputs, read_measured_queries
from infscan.steps.preconditioner import Preconditioner, core, layer_factors, query_tokens
from infscan.steps.prepare import prepare
from infscan.steps.refine import Context
from infscan.storage import Store
from infscan_studies.truth.bm25 import bm25_scores

LANGUAGES = {"en": "en-US", "fr": "fr-FR", "de": "de-DE"}
# Characters of an English paragraph: its translations are to fit T tokens.
_SHORTEST, _LONGEST = 90, 260
# Words of a question, and those of them that are its completion.
_WORDS, _COMPLETION = (10, 26), 5
Floats = NDArray[np.float32]


def paragraphs(handbook: Path) -> dict[str, dict[str, str]]:
    """The paragraphs that are translated into every language: id -> language -> text.

    Files have the same paragraphs in the same order in every language; where they do not, a file is left out.
    """
    found: dict[str, dict[str, str]] = {}
    for file in sorted((handbook / LANGUAGES["en"]).glob("*.html")):
        texts = {language: _paragraphs_of(handbook / folder / file.name) for language, folder in LANGUAGES.items()}
        if len({len(one) for one in texts.values()}) != 1:
            continue
        for number, each in enumerate(zip(*texts.values(), strict=True)):
            if _SHORTEST <= len(each[0]) <= _LONGEST and all(_translated(each[0], other) for other in each[1:]):
                found[f"{file.stem}-{number}"] = dict(zip(texts, each, strict=True))
    return found


def _paragraphs_of(file: Path) -> list[str]:
    """The text of every innermost `div.para`."""
    pieces = re.findall(r'<div class="para">((?:(?!<div).)*?)</div>', file.read_text("utf-8"), re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", piece)).split()) for piece in pieces]


def _translated(english: str, other: str) -> bool:
    """Some paragraphs were never translated, or in part only."""
    words = [set(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in (english, other)]
    return len(words[0] & words[1]) < len(words[0]) / 2


def question_of(text: str) -> tuple[str, str] | None:
    """(prompt, completion) of a paragraph's first sentence; None where it is too short, too long or no sentence."""
    sentence = re.match(r"[A-Z][^.!?:;()]*[.!?](?=\s|$)", text)
    words = sentence[0].rstrip(".!?").split(" ") if sentence else []
    if not _WORDS[0] <= len(words) <= _WORDS[1]:
        return None
    return " ".join(words[:-_COMPLETION]), " " + " ".join(words[-_COMPLETION:])


def make(folder: Path, handbook: Path, questions: int, count: int) -> None:
    """Write corpus.jsonl and queries.jsonl. What is taken is drawn by the hash of its id."""
    found = paragraphs(handbook)
    order = sorted(found, key=lambda name: sha256(name.encode()).digest())
    asked = [name for name in order if question_of(found[name]["en"])][:questions]
    chosen = sorted({*asked, *[name for name in order if name not in asked][: count - len(asked)]})
    print(f"{len(found)} paragraphs are in {', '.join(LANGUAGES)}; {len(chosen)} taken, {len(asked)} of them asked")
    rows = [
        {"id": f"{name}-{language}", "text": text, "source": language}
        for name in chosen
        for language, text in found[name].items()
        if not (language == "en" and name in asked)
    ]
    queries = []
    for name in sorted(asked):
        prompt, completion = question_of(found[name]["en"]) or ("", "")
        queries.append({"id": _query_id(name), "prompt": prompt, "completion": completion})
    for path, lines in (("corpus.jsonl", rows), ("queries.jsonl", queries)):
        (folder / path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), "utf-8")


def _query_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def score(worker: ModelWorker, sequences: Sequence[CorpusSequence], queries: Sequence[Query], inverse: Preconditioner,
          tokens_per_batch: int) -> dict[str, Floats]:  # fmt: skip
    """Full-rank scores of every query and sequence. Gradients g, V in the eigenbases, summed over layers:

    ekfac [Q, N] = <V / (Lambda + lambda), g>; dot [Q, N] = <V, g>; self_influence [N] = <g / (Lambda + lambda), g>;
    squares [N] = <g, g>; query_squares [Q] = <V, V>.
    """
    known = {layer.name: layer_factors(inverse, layer, worker.device, worker.wide) for layer in worker.layers}
    tokens = query_tokens(worker, queries, worker.layers)
    C = {layer.name: torch.stack([core(one, layer, known[layer.name]) for one in tokens.pop(layer.name)]).flatten(1)
         for layer in worker.layers}  # fmt: skip
    count = len(sequences)
    found = {name: np.zeros((len(queries), count)) for name in ("ekfac", "dot")}
    found |= {name: np.zeros(count) for name in ("self_influence", "squares")} | {"query_squares": np.zeros(len(queries))}
    for layer in worker.layers:
        factors, lam = known[layer.name] or (None, 0.0)
        assert factors is not None
        found["query_squares"] += (C[layer.name] * (factors.Lambda + lam).flatten()).square_().sum(1).numpy()
    done, started = 0, time.monotonic()
    for batch in worker.batches(sequences, tokens_per_batch):

        def consume(layer: Layer, s: torch.Tensor, a: torch.Tensor, _: Routed | None, rows: Any = batch.rows) -> None:
            factors, lam = known[layer.name] or (None, 0.0)
            assert factors is not None
            damped = (factors.Lambda + lam).flatten()
            g_bx = torch.stack([tokens_to_core(*pair, factors).flatten() for pair in zip(s, a, strict=True)])
            found["ekfac"][:, rows] += (C[layer.name] @ g_bx.T).numpy()
            found["squares"][rows] += g_bx.square().sum(1).numpy()
            found["self_influence"][rows] += (g_bx.square() / damped).sum(1).numpy()
            found["dot"][:, rows] += (C[layer.name] @ (g_bx * damped).T).numpy()

        worker.backward(batch, worker.layers, batch.loss(), consume)
        done += len(batch.rows)
        print(f"\r{done} of {count} sequences, {time.monotonic() - started:.0f} s", end="", flush=True)
    print()
    return {name: values.astype(np.float32) for name, values in found.items()}


def compute(folder: Path, model: str, tracked: str, sequences: int, length: int) -> None:
    """Prepare, fit, score; everything into scores.npz."""
    config: Config = settings_of_call("scan", (), {
        "model": {"path": model, "tracked": tracked, "dtype": "float32"},
        "corpus": {"path": str(folder / "corpus.jsonl"), "packing": "document", "sequence_length": length},
        "queries": {"path": str(folder / "queries.jsonl")},
        "factors": {"num_sequences": sequences, "slices": 4},
        "scan": {"tokens_per_batch": 1024},
        "cluster": {"backend": "in_process"},
        "output": str(folder / "run"),
    })  # fmt: skip
    inputs = open_inputs(config)
    queries = read_measured_queries(inputs)
    store = Store(config.output)
    executor = InProcessExecutor(WorkerSettings(config.model, inputs.layers, sharded=False), RankContext(device="cpu", threads=1))  # fmt: skip
    corpus = prepare(config.corpus, inputs.architecture, inputs.tokenizer, store / "corpus", executor)
    started = time.monotonic()
    plan = store_plan(store / "factors", plan_factors(inputs, corpus))
    fit_factors(executor, store / "factors", corpus, plan, config.factors.labels, config.seed)
    print(f"factors of {plan.selection.size} sequences: {time.monotonic() - started:.0f} s")
    inverse = Preconditioner(store / "factors", config.factors.solver, config.factors.damping)
    worker = executor.worker
    read = worker.read(CorpusAddress.of(corpus), np.arange(corpus.sequences))
    names = [one.documents[0].id for one in read]
    golds = [row for row, name in enumerate(names) if any(_query_id(name[:-3]) == query.id for query in queries)]
    started = time.monotonic()
    found = score(worker, read, queries, inverse, config.tokens_per_batch)
    print(f"scores of {len(read)} sequences, {len(queries)} questions: {time.monotonic() - started:.0f} s")
    # The documents that answer: without the separator before them, and on the completion's first token alone.
    separator = int(read[0].token_ids[0])
    bare = [Context((), (separator,), inputs.architecture.context).before(read[row]) for row in golds]
    without = score(worker, bare, queries, inverse, config.tokens_per_batch)["ekfac"]
    first = replace_measure(config, Measure.first)
    on_first = score(worker, [read[row] for row in golds], read_measured_queries(open_inputs(first)), inverse,
                     config.tokens_per_batch)["ekfac"]  # fmt: skip
    tokens = [one.token_ids[1:] for one in read]
    asked = [[*query.parts[0].token_ids] for query in queries]
    np.savez(folder / "scores.npz", **found, without=without, first=on_first, golds=np.asarray(golds),
             bm25=bm25_scores(tokens, asked).astype(np.float32), names=np.asarray(names),
             queries=np.asarray([query.id for query in queries]))  # fmt: skip


def replace_measure(config: Config, measure: Measure) -> Config:
    from dataclasses import replace

    return replace(config, queries=replace(config.queries, measure=measure))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--handbook", required=True, type=Path)
    asked.add_argument("--folder", type=Path, default=Path("runs/translations"))
    asked.add_argument("--questions", type=int, default=40)
    asked.add_argument("--paragraphs", type=int, default=200)
    asked.add_argument("--tracked", default=r"layers\.(6|13|20|27)\.mlp\..*")
    asked.add_argument("--sequences", type=int, default=128)
    asked.add_argument("--length", type=int, default=128)
    given = asked.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not (given.folder / "scores.npz").exists():
        make(given.folder, given.handbook, given.questions, given.paragraphs)
        compute(given.folder, given.model, given.tracked, given.sequences, given.length)


if __name__ == "__main__":
    main()
