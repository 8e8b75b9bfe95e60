"""Re-score candidates with full-rank query gradients; keep margins over layers and tokens (METHOD: query batching)."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.influence.score import score_tokens
from infscan.passes.queries import Inverse, preconditioned
from infscan.passes.rank import Rank
from infscan.queries import Query
from infscan.results.refined import write_unit
from infscan.results.shard_file import read_candidates
from infscan.storage import Store


@dataclass(frozen=True)
class RefineTask:
    """Some candidates of a group of queries, for a group of layers.

    shards: shard names with the sequence_ids to take from each (their tokens lie in the shard's file).
    wanted: sequence_id -> indices into `queries`.
    """

    run: Store
    path: str
    group: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Inverse
    shards: tuple[tuple[str, np.ndarray], ...]
    wanted: dict[int, tuple[int, ...]]
    tokens_per_batch: int


def refine_task(rank: Rank, task: RefineTask) -> int:
    """score_t(q, z) = sum over layers of s_t^T P_q a_t for every wanted pair, written by rank 0. Returns the tokens."""
    P = rank.cached("full-rank", task.group, lambda: preconditioned(rank, task.queries, task.layers, task.inverse))
    sequences = _candidates(task)
    pairs = [(row, query) for row, sequence in enumerate(sequences) for query in task.wanted[sequence.sequence_id]]
    first = {row: index for index, (row, _) in reversed(list(enumerate(pairs)))}
    longest = max(len(sequence) for sequence in sequences)
    layer_scores = torch.zeros(len(pairs), len(task.layers), dtype=rank.wide, device=rank.device)
    token_scores = torch.zeros(len(pairs), longest, dtype=rank.wide, device=rank.device)
    column = {layer.name: index for index, layer in enumerate(task.layers)}
    for batch in rank.batches(sequences, task.tokens_per_batch):
        by_query: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(batch.rows.tolist()):
            for offset, query in enumerate(task.wanted[sequences[row].sequence_id]):
                by_query.setdefault(query, []).append((place, first[row] + offset))
        index = {query: rank.to_device(np.asarray(found, np.int64).T.copy()) for query, found in by_query.items()}

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, index: dict[int, Tensor] = index) -> None:
            T = s_bto.shape[1]
            for query, (places, targets) in index.items():
                scores_nt = score_tokens(s_bto[places], a_bti[places], P[layer.name][query])
                token_scores[targets, :T] += scores_nt
                layer_scores[targets, column[layer.name]] = scores_nt.sum(dim=1)

        rank.backward(batch, task.layers, batch.loss(), consume)
    layer_scores, token_scores = rank.reduce(layer_scores), rank.reduce(token_scores)
    if rank.leads:
        by_layer, by_token = layer_scores.float().cpu().numpy(), token_scores.float().cpu().numpy()
        write_unit(
            task.run,
            task.path,
            [(task.queries[query].id, sequences[row].sequence_id) for row, query in pairs],
            by_layer,
            [by_token[index, : len(sequences[row])] for index, (row, _) in enumerate(pairs)],
            [layer.name for layer in task.layers],
        )
    return sum(len(sequence) for sequence in sequences)


def _candidates(task: RefineTask) -> list[Sequence]:
    """The unit's sequences by sequence_id, from the shard files: the corpus is not read again."""
    found: list[Sequence] = []
    for name, sequence_ids in task.shards:
        for row in read_candidates(task.run, name, sequence_ids, tokens_only=True).to_pylist():
            mask, starts = row["loss_mask"], row["document_starts"]
            found.append(
                Sequence(
                    sequence_id=row["sequence_id"],
                    token_ids=np.asarray(row["token_ids"], np.int64),
                    documents=(),
                    byte_offset=0,
                    path="",
                    loss=None if mask is None else np.asarray(mask, np.bool_),
                    starts=None if starts is None else np.asarray(starts, np.int64),
                )
            )
    assert len(found) == len(task.wanted), "a candidate is missing from its shard's file"
    return sorted(found, key=lambda sequence: sequence.sequence_id)


def refine_units(
    candidates: Sequences[tuple[int, int]], query_groups: Sequences[range], sequences_per_unit: int
) -> list[tuple[int, dict[int, tuple[int, ...]]]]:
    """Cut candidates (query, sequence_id) into units: (query group, sequence_id -> queries by index within the group).

    It depends on the candidates alone, so that micro-batches do too.
    """
    units: list[tuple[int, dict[int, tuple[int, ...]]]] = []
    by_group: list[dict[int, set[int]]] = [{} for _ in query_groups]
    group_of = {query: index for index, group in enumerate(query_groups) for query in group}
    for query, sequence_id in candidates:
        group = group_of[query]
        by_group[group].setdefault(sequence_id, set()).add(query - query_groups[group].start)
    for group, wanted in enumerate(by_group):
        ordered = sorted(wanted)
        for start in range(0, len(ordered), sequences_per_unit):
            chosen = ordered[start : start + sequences_per_unit]
            units.append((group, {sequence_id: tuple(sorted(wanted[sequence_id])) for sequence_id in chosen}))
    return units
