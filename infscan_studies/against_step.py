"""Scores against the effect of a step of training: every scored sequence is trained on alone (`truth.steps`), every
query is measured after each, and each method, damping and set of layers is judged by how well it foretells that.

Nothing is retrained and the model's folder is not touched, so that it can be asked of a user's own model. Effects and
scores are files below <output>, found again by a validation that was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from infscan.config import fingerprint, plain
from infscan.errors import ConfigError
from infscan.influence.agreement import pearson, spearman
from infscan.results.schema import to_parquet
from infscan.results.tensor_files import read_tensors, write_tensors
from infscan.steps.gradients import dtype_name
from infscan.storage import Store
from infscan_studies.bank_judged import kinds_of, over_queries
from infscan_studies.bank_scores import Labelled, RecipeScores, at_random
from infscan_studies.config import BankMethod, StepConfig, ValidateJob
from infscan_studies.in_process import Study
from infscan_studies.truth.steps import effects_on, find_learning_rate

NAME = "against_step"
_TRIED, _PER_FILE = 8, 8
_NUMBERS = ("pearson", "spearman", "top", "over_bm25", "over_any", "lead_pearson", "lead_spearman", "lead_top")
# Over a kind's queries: the mean of each number with its interval. top: the effect of the row's strongest sequences,
# nats; over_bm25, over_any: how much more that is than that of BM25's strongest and of the mean sequence; lead_...: how
# far a number is above that of the row that leads are over.
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("label", "method", "tracked")),
        ("damping", pa.float64()),
        ("sequences", pa.int64()),
        ("kind", pa.string()),
        ("queries", pa.int64()),
        *((f"{name}{end}", pa.float64()) for name in _NUMBERS for end in ("", "_low", "_high")),
        ("seconds", pa.float64()),
    ]
)


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[None, pa.Table, dict[str, Any]]:
    """Fit, train on every scored sequence, score, judge; the table goes to <output>/validate/against_step.parquet.

    Raises:
        ConfigError: where it would take longer than validate.max_hours, or the model is not in float32.
    """
    truth = config.truth
    assert isinstance(truth, StepConfig)
    scored = RecipeScores(Store(config.output) / "validate", config, truth.sweep)
    scored.sets()
    if scored.worker.model.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"model.dtype={config.model.dtype.value}: a step of training is lost in the rounding of "
            f"{dtype_name(scored.worker.model.dtype)}; use float32."
        )
    effect_nq, measured = measured_effects(scored.study, config, log)
    rows = list(scored.labelled(log))
    ids = tuple(query.id for query in scored.study.queries)
    rows.append(at_random(len(effect_nq), ids, config.seed))
    table = pa.Table.from_pylist(judged(rows, ids, effect_nq, truth, config.seed), SCHEMA)
    facts: dict[str, Any] = {
        **measured,
        "sequences": len(effect_nq),
        "queries": list(ids),
        "optimizer": truth.optimizer.value,
        "top": truth.top,
        "against": truth.against,
        "any": float(effect_nq.mean()),
        "sweep": plain(truth.sweep),
        **{f"fingerprint_{name}": value for name, value in scored.study.fingerprints.items()},
    }
    Store(config.output).write(f"validate/{NAME}.parquet", to_parquet(table, facts))
    return None, table, facts


def judged(
    rows: Sequence[Labelled], ids: Sequence[str], effect_nq: NDArray[np.float64], truth: StepConfig, seed: int
) -> list[dict[str, Any]]:
    """The table's rows, by label and kind of query. ids: of the effects' queries.

    Raises:
        ConfigError: where no row is that which leads are to be over.
    """
    labels = [one.label for one in rows]
    if truth.against not in labels:
        raise ConfigError(f"truth.against={truth.against} is no row of the sweep; its rows are {', '.join(labels)}.")
    numbers = {one.label: _numbers(one, ids, effect_nq, truth.top) for one in rows}
    bm25_q = numbers.get(BankMethod.bm25.value, {}).get("top")
    base = next(one for one in rows if one.label == truth.against)
    found: list[dict[str, Any]] = []
    for one in rows:
        mine, columns = numbers[one.label], [ids.index(name) for name in one.query_ids]
        if bm25_q is not None:
            mine["over_bm25"] = mine["top"] - bm25_q[columns]
        mine["over_any"] = mine["top"] - effect_nq.mean(axis=0)[columns]
        if set(one.query_ids) <= set(base.query_ids):
            shared = [base.query_ids.index(name) for name in one.query_ids]
            for name in ("pearson", "spearman", "top"):
                mine[f"lead_{name}"] = mine[name] - numbers[truth.against][name][shared]
        for kind, places in kinds_of(one.query_ids).items():
            row = {"label": one.label, **one.facts, "kind": kind, "queries": len(places)}
            for name, values_q in mine.items():
                each = over_queries(values_q[places], seed, truth.sweep.resamples)
                row |= {name: each.mean, f"{name}_low": each.low, f"{name}_high": each.high}
            found.append(row)
    return found


def _numbers(
    one: Labelled, ids: Sequence[str], effect_nq: NDArray[np.float64], top: int
) -> dict[str, NDArray[np.float64]]:
    """By query: how its scores agree with the effects, and the mean effect of its strongest sequences. Scores that
    tell nothing apart agree to 0."""
    effect_qn, scores_qn = effect_nq.T[[ids.index(name) for name in one.query_ids]], one.scores_nq.T
    best_qk = np.argsort(-scores_qn, axis=1, kind="stable")[:, :top]
    return {
        "pearson": np.nan_to_num(pearson(scores_qn, effect_qn)),
        "spearman": np.nan_to_num(spearman(scores_qn, effect_qn)),
        "top": np.take_along_axis(effect_qn, best_qk, axis=1).mean(axis=1),
    }


def measured_effects(
    study: Study, config: ValidateJob, log: Callable[[str], None]
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """What a step on each scored sequence adds to every query, nats, [N, Q]; and its learning rate and seconds.

    Raises:
        ConfigError: where the sequences still missing would take longer than validate.max_hours.
    """
    truth = config.truth
    assert isinstance(truth, StepConfig)
    known = {name: study.fingerprints[name] for name in ("model", "corpus", "queries")}
    wanted: dict[str, Any] = {"of": known, "sequences": [one.sequence_id for one in study.candidates]}
    wanted |= {"optimizer": truth.optimizer.value, "learning_rate": truth.learning_rate, "fall": truth.fall}
    store = Store(config.output) / f"validate/effects-{fingerprint(wanted)[:16]}"
    if not store.exists("rate.json"):
        tried = study.candidates[:: max(1, len(study.candidates) // _TRIED)][:_TRIED]
        rate = truth.learning_rate or find_learning_rate(study.worker, tried, truth.optimizer, truth.fall, 1)
        store.write_json("rate.json", {"learning_rate": rate})
    rate = float(store.read_json("rate.json")["learning_rate"])
    units = [study.candidates[start : start + _PER_FILE] for start in range(0, len(study.candidates), _PER_FILE)]
    missing = [number for number in range(len(units)) if not store.exists(_file(number))]
    for done, number in enumerate(missing):
        started = time.process_time()
        found_nq = effects_on(study.worker, units[number], study.queries, truth.optimizer, rate)
        seconds = time.process_time() - started
        if not done and (hours := len(missing) * seconds / 3600) > config.validate.max_hours:
            raise ConfigError(
                f"{len(study.candidates)} steps of {seconds / len(units[number]):.2g} s would take {hours:.2g} hours, "
                f"more than validate.max_hours={config.validate.max_hours:g}; lower validate.sequences or .queries, or "
                "raise it."
            )
        write_tensors(store, _file(number), {"effect": found_nq, "seconds": torch.tensor([seconds])}, {})
        log(f"steps on {done + 1} of {len(missing)} groups of sequences that were missing")
    read = [read_tensors(store, _file(number)) for number in range(len(units))]
    effect_nq = torch.cat([one["effect"] for one in read]).numpy()
    return effect_nq, {"learning_rate": rate, "effect_seconds": float(sum(one["seconds"] for one in read))}


def _file(number: int) -> str:
    return f"{number:06d}.safetensors"
