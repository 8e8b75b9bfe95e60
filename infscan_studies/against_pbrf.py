"""How near do EK-FAC and its rivals come to the proximal Bregman response? (docs/method.md#ground-truths)

For some training points, the mean response to eps = +1/N and -1/N of every measurement is the reference. Judged against
it, over the points: EK-FAC at full rank, the damped Gauss-Newton solve, LiSSA, the gradient dot product, BM25, random.
One process, no Ray. Every point's responses are one small JSON in storage, so that an interrupted study goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from infscan.config import fingerprint, plain
from infscan.errors import ConfigError, ModelError, RunError
from infscan.influence.agreement import pearson
from infscan.model.gauss_newton import damping_vector
from infscan.results.schema import to_parquet
from infscan.steps.solve import ekfac_factors
from infscan.storage import Store
from infscan_studies.against_cg import against_cg, cg_facts
from infscan_studies.comparison import Comparison, Scored, facts_of, judge, to_table
from infscan_studies.config import CoordinateSystem, PbrfConfig, ResponseConfig, ValidateJob
from infscan_studies.in_process import Study, open_study
from infscan_studies.truth.fisher import check_size, sampled_fisher
from infscan_studies.truth.minimise import Coordinates, DenseCoordinates, LayerCoordinates, PbrfSettings
from infscan_studies.truth.pbrf import both_ways, respond
from infscan_studies.truth.problems import LanguageModelProblem, Problem
from infscan_studies.validation import timed

PBRF = "PBRF"
_LOG_EVERY_S = 10.0
# Gradients of the response that the estimate is made from.
_TIMED_STEPS = 4


@dataclass(frozen=True)
class Recorded:
    """Responses of M points. plus_mq, minus_mq: to eps = +1/N and -1/N, [M, Q].

    residuals_m2: where each of the two minimisations ended, |gradient| relative to the start's. converged_m2: whether
    that is within the tolerance. seconds: what all of them took, now or before.
    """

    plus_mq: NDArray[np.float64]
    minus_mq: NDArray[np.float64]
    residuals_m2: NDArray[np.float64]
    converged_m2: NDArray[np.bool_]
    seconds: float

    @property
    def mean_qm(self) -> NDArray[np.float64]:
        return (self.plus_mq + self.minus_mq).T / 2

    def facts(self, settings: PbrfSettings) -> dict[str, Any]:
        """For a table's footer. both_ways: Pearson of the + and - responses, mean over measurements: 1 at first order.

        points_converged: those that converged for both signs.
        """
        return {
            "settings": plain(settings),
            "minimisations": int(self.converged_m2.size),
            "not_converged": int((~self.converged_m2).sum()),
            "points_converged": int(self.converged_m2.all(axis=1).sum()),
            "residual": {
                "median": float(np.median(self.residuals_m2)),
                "largest": float(self.residuals_m2.max()),
            },
            "both_ways": float(np.nan_to_num(pearson(self.plus_mq.T, self.minus_mq.T)).mean()),
            "seconds": self.seconds,
        }


class Responder:
    """Responses of a problem's training points, from storage where they were found before.

    recipe: what fixes a response apart from the point and the settings, as plain values: model, data, measurements,
    factors. It is part of the key.
    """

    def __init__(
        self,
        problem: Problem,
        query_ids: Sequence[str],
        dampings: Mapping[str, float],
        settings: PbrfSettings,
        coordinates: Coordinates | None,
        store: Store,
        recipe: Any,
    ) -> None:
        self.problem, self.query_ids, self.dampings = problem, tuple(query_ids), dampings
        self.settings, self.coordinates, self.store = settings, coordinates, store
        self.fingerprint = fingerprint(
            {
                "recipe": recipe,
                "queries": self.query_ids,
                "settings": settings,
                "size": problem.size,
            }
        )

    def path(self, point: int) -> str:
        return f"{self.fingerprint[:16]}/point-{point:06d}.json"

    def missing(self, points: Sequence[int]) -> list[int]:
        there = {entry.name for entry in self.store.list(self.fingerprint[:16], ".json")}
        return [point for point in points if self.path(point) not in there]

    def check_affordable(self, points: Sequence[int], max_hours: float) -> float:
        """Hours that the missing points take at most, from the time of a response's first gradients.

        Raises:
            ConfigError: where that is more than `max_hours`, with the estimate and the fix.
        """
        missing = self.missing(points)
        if not missing:
            return 0.0
        each = 2 * self.settings.max_steps * self._gradient_seconds(missing[0])
        hours = len(missing) * each / 3600
        if hours > max_hours:
            raise ConfigError(
                f"The responses of {len(missing)} training points would take up to {hours:.2g} hours ({each:.3g} s "
                f"each: twice {self.settings.max_steps} gradients over {self.problem.size} training points), more than "
                f"validate.max_hours={max_hours:g}. Lower truth.points or truth.max_steps, raise truth.tolerance "
                "or factors.damping.relative, take fewer training points or a smaller model, or raise max_hours "
                "(responses that are finished are kept)."
            )
        return hours

    def _gradient_seconds(self, point: int) -> float:
        """One gradient with the optimiser's own share, from a response broken off; the first of two sets things up."""
        short = replace(self.settings, max_steps=_TIMED_STEPS, tolerance=0.0)
        seconds = 0.0
        for _ in range(2):
            call = partial(respond, self.problem, point, 1 / self.problem.size, self.dampings, short, self.coordinates)
            seconds = timed(call)[1]
        return seconds / _TIMED_STEPS

    def record(self, points: Sequence[int], log: Callable[[str], None]) -> Recorded:
        """Every point's responses, those that are missing found now.

        Raises:
            ModelError: where a response is NaN or infinite.
            RunError: where a file in storage belongs to another point.
        """
        missing, done, last = set(self.missing(points)), 0, time.monotonic()
        rows = []
        for point in points:
            rows.append(self._respond(point))
            done += point in missing
            if point in missing and time.monotonic() - last > _LOG_EVERY_S:
                last = time.monotonic()
                log(f"PBRF: {done} of {len(missing)} points, residual {max(rows[-1]['residuals']):.2g}")
        plus_mq, minus_mq = (np.array([row[side] for row in rows], np.float64) for side in ("plus", "minus"))
        return Recorded(
            plus_mq,
            minus_mq,
            np.array([row["residuals"] for row in rows], np.float64),
            np.array([row["converged"] for row in rows], np.bool_),
            sum(row["seconds"] for row in rows),
        )

    def _respond(self, point: int) -> dict[str, Any]:
        path = self.path(point)
        key = {"recipe": self.fingerprint, "point": point}
        if not self.store.exists(path):
            started = time.perf_counter()
            pair = both_ways(self.problem, point, self.dampings, self.settings, self.coordinates)
            if not all(np.isfinite(one.values).all() for one in pair):
                raise ModelError(f"training point {point}: a response is NaN or infinite; raise factors.damping.")
            found = {
                "plus": pair[0].values.tolist(),
                "minus": pair[1].values.tolist(),
                "residuals": [one.history[-1] for one in pair],
                "steps": [len(one.history) for one in pair],
                "converged": [one.converged for one in pair],
                "seconds": round(time.perf_counter() - started, 3),
            }
            self.store.write_json(path, key | found)
        row: dict[str, Any] = self.store.read_json(path)
        if {name: row.get(name) for name in key} != key:
            raise RunError(f"{self.store}/{path} belongs to another training point; remove it.")
        return row


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[Comparison, pa.Table, dict[str, Any]]:
    """The study of a language model; the table goes to <output>/validate/against_pbrf.parquet.

    Raises:
        InfscanError: for inputs that cannot be used, or a validation that would take too long.
    """
    truth = config.truth
    assert isinstance(truth, PbrfConfig)
    study = open_study(config)
    if any(one.loss is not None for one in study.curvature):
        raise ConfigError(
            "truth=pbrf: its objective is of every token; use a corpus without prompt_field or mask_field."
        )
    if any(one.starts is not None and len(one.starts) > 1 for one in study.curvature):
        raise ConfigError(
            "truth=pbrf: its objective is of whole sequences; use corpus.attention=across, or corpus.packing=document."
        )
    rank, N = study.worker, len(study.curvature)
    points = sampled_points(truth, N, config.seed)
    if truth.coordinates is CoordinateSystem.fisher:
        check_size(sum(layer.size for layer in rank.layers), truth.max_dense_bytes)
    dampings = {name: lam for name, (_, lam) in ekfac_factors(rank, study.inverse).items()}
    dtype = getattr(torch, truth.dtype.value) if truth.dtype is not truth.dtype.auto else rank.wide
    # A copy: in another dtype, and with parameters that ask for gradients, which a scan's must not.
    problem = LanguageModelProblem(
        copy.deepcopy(rank.model.module).to(dtype),
        rank.layers,
        [one.token_ids.tolist() for one in study.curvature],
        study.queries,
    )
    responder = Responder(
        problem,
        [query.id for query in study.queries],
        dampings,
        settings_of(truth),
        coordinates_of(problem, study, dampings, truth, config, dtype, log),
        Store(config.output) / "validate/responses",
        {
            **study.fingerprints,
            "damping": plain(config.factors.damping),
            "dtype": str(dtype),
            "coordinates": [truth.coordinates.value, truth.draws],
        },
    )
    hours = responder.check_affordable(points, config.validate.max_hours)
    log(f"PBRF: {len(points)} of {N} training points, at most {hours * 60:.1f} minutes")
    found = against_cg(
        rank,
        study.queries,
        study.curvature,
        [study.curvature[point] for point in points],
        study.inverse,
        config.validate,
        seed=config.seed,
        fit_seconds=study.fit_seconds,
        log=log,
    )
    recorded = responder.record(points, log)
    extra = {
        "cg": cg_facts(found, config.validate),
        "lissa_scale": found.scale,
        "damping": plain(config.factors.damping),
        "fingerprints": study.fingerprints,
    }
    scored = [*found.scored[:2], found.reference, *found.scored[2:]]
    return concluded(config, found.query_ids, scored, recorded, found.fit_seconds, extra, "against_pbrf")


def coordinates_of(
    problem: LanguageModelProblem,
    study: Study,
    dampings: Mapping[str, float],
    truth: PbrfConfig,
    config: ValidateJob,
    dtype: torch.dtype,
    log: Callable[[str], None],
) -> Coordinates:
    """What L-BFGS moves in: EK-FAC's factors layer by layer, or the dense Fisher of all layers together."""
    rank = study.worker
    if truth.coordinates is CoordinateSystem.ekfac:
        factors = {name: one.to(rank.device, dtype) for name, (one, _) in ekfac_factors(rank, study.inverse).items()}
        return LayerCoordinates(problem.tracked, dampings, factors)

    def dense() -> DenseCoordinates:
        G_pp = sampled_fisher(
            rank, study.curvature, draws=truth.draws, seed=config.seed, tokens_per_batch=config.tokens_per_batch
        ).to(dtype)
        return DenseCoordinates(G_pp, damping_vector(rank.layers, dampings, G_pp))

    coordinates, seconds = timed(dense)
    log(f"PBRF: the dense Fisher of {truth.draws} draws and its factor took {seconds:.0f} s")
    return coordinates


def settings_of(truth: ResponseConfig) -> PbrfSettings:
    return PbrfSettings(truth.optimiser, tolerance=truth.tolerance, max_steps=truth.max_steps)


def sampled_points(truth: ResponseConfig, size: int, seed: int) -> list[int]:
    """Seeded, ascending; a larger sample holds the smaller one, whose responses are in storage.

    Raises:
        ConfigError: where there are not so many.
    """
    if truth.points > size:
        raise ConfigError(
            f"truth.points={truth.points} of {size} training points: lower it, or raise "
            "validate.curvature_sequences (no more than the corpus has)."
        )
    return sorted(np.random.default_rng([seed, 2]).permutation(size)[: truth.points].tolist())


def concluded(
    config: ValidateJob,
    query_ids: Sequence[str],
    scored: list[Scored],
    recorded: Recorded,
    fit_seconds: float,
    extra: Mapping[str, Any],
    name: str,
) -> tuple[Comparison, pa.Table, dict[str, Any]]:
    """Judge the methods by the responses and write <output>/validate/<name>.parquet."""
    assert isinstance(config.truth, ResponseConfig)
    found = Comparison(tuple(query_ids), Scored(PBRF, recorded.mean_qm, recorded.seconds), scored, fit_seconds)
    agreements = judge(found, config.validate.resamples, config.seed)
    table = to_table(found, agreements)
    facts = facts_of(found, agreements) | {
        "pbrf": recorded.facts(settings_of(config.truth)),
        **extra,
        "settings": plain(config.validate),
        "truth": {"name": config.truth.name} | plain(config.truth),
    }
    Store(config.output).write(f"validate/{name}.parquet", to_parquet(table, facts))
    return found, table, facts
