"""Background questions, asked along in the scan: which rows are near the top of whatever is asked?

They are beginnings of the corpus's own sequences, drawn by the seed: a part of each is the prompt, the tokens after it
the completion. Their rows are never published and nothing else depends on them; a published row's `hub` counts them
(docs/reading.md#the-tables).
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection
from infscan.corpus.sequences import Sequence
from infscan.influence.topk_tracker import ScoredRows
from infscan.queries import Part, Query
from infscan.results.shard_file import BACKGROUND
from infscan.steps.run import Run

# Where a run keeps what it asked, as `infscan.queries.MEASURED` has its own.
ASKED_ALONG = "queries/background.jsonl"
# Tokens of a question, and those of them that are its completion, at most.
TOKENS, _COMPLETION = 32, 8
# How many times as many are drawn as are wanted: some sequences are too short, or have no loss there.
_DRAWN = 3


@dataclass(frozen=True)
class Background:
    """queries: in the order of the batch's last columns. sequence_ids: int64, whose beginning each is."""

    queries: tuple[Query, ...] = ()
    sequence_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def near(self, best: ScoredRows) -> list[tuple[int, int, int]]:
        """(question, side, sequence_id) of the questions' strongest rows, without each one's own sequence."""
        rows = zip(best.queries.tolist(), best.sides.tolist(), best.sequence_ids.tolist(), strict=True)
        return [(query, side, row) for query, side, row in rows if row != self.sequence_ids[query]]


NO_BACKGROUND = Background()


def background(run: Run, plan: Plan, corpus: AddressableCorpus) -> Background:
    """scan.background_queries questions; fewer of a corpus that has no more sequences to ask."""
    wanted = run.config.scan.background_queries
    if not wanted:
        return NO_BACKGROUND
    selection = plan.selection
    drawn = Selection.of(selection.size, min(selection.size, _DRAWN * wanted), run.config.seed + 2)
    ids = selection.at(drawn.ids())
    order = np.random.default_rng(run.config.seed).permutation(len(ids))
    return asked_of(corpus.read(ids[order]), wanted)


def asked_of(sequences: Sequences[Sequence], wanted: int) -> Background:
    """The first so many sequences that a question can be made of, as questions `background#00`, `background#01`, ..."""
    queries: list[Query] = []
    ids: list[int] = []
    for sequence in sequences:
        positions = _measured(sequence)
        if positions and len(queries) < wanted:
            tokens = tuple(sequence.token_ids[: positions[-1] + 1].tolist())
            queries.append(Query(f"{BACKGROUND}{len(queries):02d}", (Part(tokens, positions),)))
            ids.append(sequence.sequence_id)
    return Background(tuple(queries), np.asarray(ids, np.int64))


def _measured(sequence: Sequence) -> tuple[int, ...]:
    """The positions that are the completion, of those with a loss in training; none of a sequence of three tokens."""
    count = min(len(sequence), TOKENS)
    start = count - min(_COMPLETION, count // 2)
    if count < 4:
        return ()
    return tuple(at for at in range(start, count) if sequence.loss is None or bool(sequence.loss[at]))
