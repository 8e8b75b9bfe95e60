"""What a run writes, by kind: exact where bytes follow from shapes (factors, query batch), bounds where rows decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infscan.config import Config, Labels, Scores, Solver
from infscan.errors import StorageError
from infscan.influence.blocks import block_sizes
from infscan.influence.layers import Layer
from infscan.influence.layout import stored_dense
from infscan.queries import Query
from infscan.results.tensor_files import DIGEST, tensors_file_bytes
from infscan.steps.factor_files import FactorsPlan, block_keys, layer_groups, partial_bytes
from infscan.steps.gradients import kept_bytes, tokens_of
from infscan.steps.preconditioner import query_groups
from infscan.storage import Store

# Bytes of a float32, of a token id, and of a row's other columns, before compression.
_FLOAT, _TOKEN, _ROW = 4, 4, 100


@dataclass(frozen=True)
class FactorFiles:
    """What fitting writes: finished factors with their labels, and partial sums, which are gone at the end."""

    files: int
    bytes: int
    partial_files: int
    partial_bytes: int


def factor_files(
    config: Config, layers: Sequence[Layer], slices: Sequence[tuple[int, int]], tokens: int
) -> FactorFiles:
    """The factors of these layers in float32.

    slices: of each slice, its sequences and the tokens of the longest. tokens: of all sequences fitted on.
    """
    if config.factors.solver is Solver.identity:
        return FactorFiles(0, 0, 0, 0)
    blocks = config.factors.blocks
    facts = {"digest": DIGEST, "tokens": str(tokens)}

    def moment(kind: str, n: int) -> int:
        squares = {
            key: ("F32", (size, size))
            for name in (kind, f"Q_{kind}")
            for key, size in zip(block_keys(name, blocks), block_sizes(n, blocks), strict=True)
        }
        return tensors_file_bytes(squares | {"eigenvalues": ("F32", (n,))}, facts)

    def spanned(layer: Layer) -> int:
        k = layer.span
        shapes = {
            "reflectors": ("F32", (layer.outputs, k)),
            "weights": ("F32", (k, k)),
            "eigenvalues": ("F32", (layer.kept_outputs,)),
        }
        return tensors_file_bytes(shapes, facts)

    sizes = [spanned(layer) if layer.span else moment("S", layer.outputs) for layer in layers]
    sizes += [moment("A", layer.inputs) for layer in layers if layer.input_of == layer.name]
    bases = {"eigenbases": DIGEST}
    sizes += [tensors_file_bytes({"Lambda": ("F32", (layer.kept_outputs, layer.inputs))}, bases) for layer in layers]
    if config.factors.labels is Labels.sampled:
        sizes += [tensors_file_bytes({"labels": ("I32", slice_)}) for slice_ in slices]
    groups = layer_groups(layers, config.group_bytes, blocks)
    return FactorFiles(
        len(sizes), sum(sizes), 2 * len(groups) * len(slices), partial_bytes(layers, blocks, len(slices))
    )


def query_files(config: Config, layers: Sequence[Layer], queries: int) -> list[int]:
    """Bytes of each file of the query batch."""
    if not queries:
        return []
    groups, grouped = query_groups(queries, layers, config.query_group_bytes)
    rank = config.most_rank
    sizes = []
    for count in map(len, groups):
        for some in grouped:
            shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
            for layer in some:
                O, I = layer.outputs, layer.inputs
                if rank is None or stored_dense(layer, rank):
                    shapes[f"{layer.name}|P"] = ("F32", (count, O, I))
                    continue
                shapes[f"{layer.name}|U"] = ("F32", (count, O, rank))
                shapes[f"{layer.name}|V"] = ("F32", (count, I, rank))
                shapes[f"{layer.name}|values"] = ("F64", (count, rank))
                shapes[f"{layer.name}|totals"] = ("F64", (count,))
            sizes.append(tensors_file_bytes(shapes, {"fingerprint": DIGEST}))
    return sizes


def scanned_in_full(config: Config, queries: int, planned: int) -> int:
    """Sequences that are scanned with all tracked layers: all, or at most the candidates of every query and side with
    the audit. How many a list of candidates has is not known here; it is taken for none."""
    if not config.searches:
        return planned
    found = (
        queries * len(config.sides) * config.sieve_candidates(planned, queries) if config.scan.sieve is not None else 0
    )
    return min(planned, found + config.audited(planned, queries))


def scan_bytes(
    config: Config, layers: Sequence[Layer], queries: int, N: int, T: int, left: float = 1.0, query_tokens: int = 0
) -> dict[str, int]:
    """What a scan of N sequences of T tokens writes, by kind, in bytes before compression.

    left: the share of shards that is still to be done. query_tokens: of all queries, which count as equally long.
    With thresholds, C (1 + ln(N/C)) rows per query and side are written on the way to the C best ones; no sequence is
    stored twice in one file.
    """
    planned, N = N, scanned_in_full(config, queries, N)
    C, boards = config.candidates_of(planned), queries * len(config.sides)
    kept = boards * min(N, C * (1 + math.log(max(N / C, 1))))
    best = boards * min(C, N)
    parts = {
        "query batch": sum(query_files(config, layers, queries)),
        "query gradients": queries * kept_bytes(-(-query_tokens // max(1, queries)), layers, _FLOAT),
        "candidates": left * (min(kept, N) * (T * _TOKEN + _ROW) + kept * _ROW),
        "refined rows": best * (_FLOAT * (T + len(layers)) + _ROW),
        "tables": min(best, boards * config.scan.top_k) * (_FLOAT * (2 * T + len(layers)) + _ROW),
    }
    if config.dense or config.searches:
        parts["dense scores"] = left * _FLOAT * queries * N
    if config.scan.sieve is not None:
        sieved = config.sieve_candidates(planned, queries)
        rows = boards * min(planned, sieved * (1 + math.log(max(planned / sieved, 1))))
        parts["sieve's rows"] = left * rows * _ROW
    return {name: int(size) for name, size in parts.items()}


def size(count: float) -> str:
    """Bytes for people: `429 GiB`, `2.5 MiB`."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}" if count < 1000 * 2**power else f"{count / 2**power:,.0f} {unit}"
    return f"{count:.0f} bytes"


def check_disk_for_factors(config: Config, plan: FactorsPlan, store: Store) -> None:
    """Raises StorageError where the partial sums and the factors will not fit the disk of factors.path."""
    # How long sequences and how many tokens there are changes labels and a number in a header: a guess will do.
    slices = [(stop - start, config.tokens_per_batch) for start, stop in plan.slices]
    written = factor_files(config, plan.layers, slices, plan.selection.size)
    parts = {"partial sums": written.partial_bytes, "factors": written.bytes}
    _refuse(f"factors.path={store.uri}", parts, store.free_bytes(), "fewer factors.slices")


def check_disk_for_scan(
    config: Config, layers: Sequence[Layer], queries: Sequence[Query], N: int, T: int, left: float, store: Store
) -> None:
    """Raises StorageError where what is left of the scan (a share of its shards) will not fit the disk of `output`."""
    parts = scan_bytes(config, layers, len(queries), N, T, left, sum(map(tokens_of, queries)))
    remedy = "a lower scan.candidates" + (", or scan.scores=top" if config.scan.scores is Scores.all else "")
    _refuse(f"output={store.uri}", parts, store.free_bytes(), remedy)


def check_disk_for_index(rows: int, row_bytes: int, store: Store) -> None:
    """Raises StorageError where so many more rows of an index will not fit the disk of `output`."""
    remedy = "a lower index.width, or fewer index.layers"
    _refuse(f"output={store.uri}", {"codes": rows * row_bytes}, store.free_bytes(), remedy)


def _refuse(place: str, parts: Mapping[str, int], free: int | None, remedy: str) -> None:
    if said := no_room(place, parts, free):
        raise StorageError(f"{said}; free some space, choose a folder on another disk, or give {remedy}.")


def no_room(place: str, parts: Mapping[str, int], free: int | None) -> str | None:
    """What is said where these bytes will not fit; free: None of an object store."""
    total = sum(parts.values())
    if free is None or total <= free:
        return None
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    written = ", ".join(f"{name} {size(parts[name])}" for name in largest)
    return f"{place}: about {size(total)} will be written ({written}), and the disk has {size(free)} free"
