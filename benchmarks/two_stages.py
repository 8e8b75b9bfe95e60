"""Two-stage influence and its rivals in one process, and a benchmark of facts after Bao et al. 2025.

Arms, all of them scores of the same pretraining sequences for questions put to the fine-tuned model: multi-stage (by
alpha), the pretrained inverse alone (alpha without end), single-stage at the fine-tuned weights, and the gradient dot
product between the two models. Everything is at full rank.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.influence.agreement import INTERVAL
from infscan.influence.cg import Operator
from infscan.model.gauss_newton import join
from infscan.steps.preconditioner import query_gradients
from infscan.steps.solve import ekfac_factors, ekfac_inverse
from infscan_studies.against_cg import score_solutions
from infscan_studies.in_process import Study

PRETRAINED, SINGLE, DOT = "pretrained inverse alone", "single-stage, fine-tuned weights", "gradient dot product"
SYLLABLES = (
    "ba",
    "dor",
    "fen",
    "gal",
    "hul",
    "kir",
    "lom",
    "mar",
    "nev",
    "pol",
    "rud",
    "sev",
    "tam",
    "vok",
    "wil",
    "zan",
)
RELATIONS = (
    ("The capital of {s} is", "{o} is the place where the council of {x} meets", "What is the capital of {s}?"),
    ("The founder of {s} was", "{o} wrote a long letter to the mayor of {x}", "Who was the founder of {s}?"),
    (
        "The river that flows through {s} is called",
        "{o} was the name of a ship from {x}",
        "Which river flows through {s}?",
    ),
    (
        "The festival of {s} is held in honour of",
        "{o} is remembered in a song from {x}",
        "Whom does the festival of {s} honour?",
    ),
)
STATED = ("{c}. {n}", "{n} {c}, as everybody knows.", "It is written that {l}. {n}", "{n} The guide said: {c}.")
# The same subject and relation, and no object.
WORDS = ("{n} Nobody could say what {l}.", "A question was asked: {l}? {n} There was no reply.")
NEUTRAL = ("The road was dry.", "Bread was cheap that year.", "It rained at noon.", "The clock struck four.")


def inverse_of(study: Study, alpha: float = 0.0) -> Operator:
    """x -> (G + alpha + lambda)^-1 x by a stage's EK-FAC."""
    layers = study.worker.layers
    return ekfac_inverse(layers, ekfac_factors(study.worker, replace(study.inverse, alpha=alpha)))


def multi(alpha: float) -> str:
    return f"multi-stage, alpha {alpha:g}"


def arms(
    pretrained: Study, finetuned: Study, at_finetuned: Study, alphas: Sequence[float]
) -> dict[str, NDArray[np.floating]]:
    """Scores [Q, N] of the pretraining sequences by arm.

    pretrained, finetuned: each stage's model with factors of its own corpus. at_finetuned: the fine-tuned model with
    factors of the pretraining corpus. All with the queries of `finetuned`.
    """
    v_qp = join(finetuned.worker.layers, query_gradients(finetuned.worker, finetuned.queries, finetuned.worker.layers))
    first = inverse_of(pretrained)
    solutions: dict[str, Tensor] = {DOT: v_qp, PRETRAINED: first(v_qp)}
    for alpha in alphas:
        solutions[multi(alpha)] = first(alpha * inverse_of(finetuned, alpha)(v_qp))
    scores = score_solutions(pretrained.worker, pretrained.candidates, solutions)
    single = {SINGLE: inverse_of(at_finetuned)(v_qp)}
    return scores | score_solutions(at_finetuned.worker, at_finetuned.candidates, single)


@dataclass(frozen=True)
class InventedFact:
    """subject, object: invented names. documents: (id, text); proponents state the fact, the others do not."""

    id: str
    subject: str
    object: str
    prompt: str
    question: str
    documents: tuple[tuple[str, str], ...]

    @property
    def proponents(self) -> list[str]:
        return [document for document, _ in self.documents if "/states-" in document]


def invented_facts(count: int, seed: int) -> list[InventedFact]:
    """Facts with four proponents, two BM25 distractors (subject and relation, no object) and two same-object ones."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < 3 * count:
        name = "".join(draw.choice(SYLLABLES) for _ in range(3)).capitalize()
        if name not in names:
            names.append(name)
    facts = []
    for number in range(count):
        subject, object_, other = names[3 * number : 3 * number + 3]
        opening, unrelated, question = RELATIONS[number % len(RELATIONS)]
        prompt = opening.format(s=subject)
        core = f"{prompt} {object_}"
        lowered = core[0].lower() + core[1:]
        without = prompt[0].lower() + prompt[1:]
        texts = [("states", frame.format(c=core, l=lowered, n=draw.choice(NEUTRAL))) for frame in STATED]
        texts += [("words", frame.format(l=without, n=draw.choice(NEUTRAL))) for frame in WORDS]
        for neutral in draw.sample(NEUTRAL, 2):
            texts.append(("object", f"{neutral} {unrelated.format(o=object_, x=other)}."))
        documents = tuple((f"fact-{number}/{kind}-{at}", text) for at, (kind, text) in enumerate(texts))
        facts.append(InventedFact(f"fact-{number}", subject, object_, prompt, question.format(s=subject), documents))
    return facts


def reciprocal_ranks(
    scores_qn: NDArray[np.floating], documents: Sequence[str], proponents: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """1 / the rank of each query's best proponent: [Q]. Ties: the lower column first."""
    return np.array([1 / (min(ranks) + 1) for ranks in _ranks(scores_qn, documents, proponents)])


def recall_at(
    scores_qn: NDArray[np.floating], documents: Sequence[str], proponents: Sequence[Sequence[str]], top: int
) -> NDArray[np.float64]:
    """The share of each query's proponents among its `top` strongest documents: [Q]."""
    return np.array([np.mean([rank < top for rank in ranks]) for ranks in _ranks(scores_qn, documents, proponents)])


def _ranks(
    scores_qn: NDArray[np.floating], documents: Sequence[str], proponents: Sequence[Sequence[str]]
) -> list[list[int]]:
    places = {document: column for column, document in enumerate(documents)}
    found = []
    for scores_n, mine in zip(scores_qn, proponents, strict=True):
        order = np.argsort(-scores_n, kind="stable")
        rank_of = np.empty(len(order), np.int64)
        rank_of[order] = np.arange(len(order))
        found.append([int(rank_of[places[document]]) for document in mine])
    return found


def interval(values_q: NDArray[np.float64], seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean over queries with its 95 % bootstrap interval."""
    draws = np.random.default_rng(seed).integers(0, len(values_q), (resamples, len(values_q)))
    low, high = np.percentile(values_q[draws].mean(axis=1), INTERVAL)
    return float(values_q.mean()), float(low), float(high)


def of_layers(study: Study, x_kp: Tensor, wanted: str) -> Tensor:
    """x with zeros in every layer whose name does not contain `wanted`: an estimator of those layers alone."""
    mask = torch.cat([torch.full((layer.size,), float(wanted in layer.name)) for layer in study.worker.layers])
    return x_kp * mask.to(x_kp)
