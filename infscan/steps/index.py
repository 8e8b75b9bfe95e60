"""Index a corpus: a code of every sequence's whitened gradient, from one forward and one backward (docs/index-ask.md).

A pass like the scan's over the same plan: a shard is a unit, its file's presence is the fact that it is done, and
index.json, written last, says what the codes are of and which files they are in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import fingerprint
from infscan.config.jobs import IndexConfig
from infscan.corpus import sequences as corpus_of
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, shard_name
from infscan.corpus.read_ahead import Reads
from infscan.engine.executor import Step
from infscan.errors import ConfigError, DamagedError, RunError
from infscan.influence.codes import CodeSettings, LayerCode, layer_code
from infscan.influence.layers import Layer
from infscan.influence.packed import Stored, store
from infscan.influence.precision import multiplying
from infscan.influence.routed import Routed
from infscan.model.suffix import ends_at
from infscan.model.worker import ModelWorker
from infscan.results.index_file import (
    FOLDER,
    MANIFEST,
    SUFFIX,
    CodesFile,
    IndexManifest,
    codes_bytes,
    codes_path,
    column_of,
    read_header,
    row_bytes,
)
from infscan.steps.factors import Factors
from infscan.steps.inputs import Inputs
from infscan.steps.preconditioner import Preconditioner, layer_factors
from infscan.steps.run import Run
from infscan.steps.volume import check_disk_for_index, size
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

log = logging.getLogger("infscan")


def code_settings(settings: IndexConfig) -> CodeSettings:
    return CodeSettings(settings.code.value, settings.width, 1 if settings.bits == 1 else 8, settings.seed)


def indexed_layers(layers: Sequence[Layer], pattern: str | None) -> tuple[Layer, ...]:
    """The tracked layers that the index has codes of.

    Raises:
        ConfigError: where the pattern names none.
    """
    found = tuple(layer for layer in layers if pattern is None or re.search(pattern, layer.name))
    if not found:
        raise ConfigError(
            f"index.layers={pattern!r} names none of the {len(layers)} tracked layers, such as {layers[-1].name}; give "
            "a regular expression over their names, or null for all."
        )
    return found


def index_fields(inputs: Inputs, corpus: AddressableCorpus, factors: Factors, settings: IndexConfig) -> dict[str, Any]:
    """What an index is of, by name: an index whose fields differ answers for something else."""
    identity = factors.inverse.identity
    return {
        "model": inputs.architecture.fingerprint,
        "tokenizer": corpus.tokenizer,
        "corpus": corpus.fingerprint,
        **corpus.reading.fields(),
        "factors": identity.fingerprint if identity else None,
        "damping": factors.inverse.damping.facts() if identity else None,
        "alpha": factors.inverse.alpha,
        "layers": [layer.name for layer in indexed_layers(inputs.layers, settings.layers)],
        "code": asdict(code_settings(settings)),
    }


@dataclass(frozen=True)
class IndexPass:
    """What indexing a plan is: by a pass of its own (`index`), or beside a scan of the plan (`infscan.steps.scan`).

    fields, by_layer: as of `IndexManifest`. fingerprint: what every file's header has.
    """

    store: Store
    fields: dict[str, Any]
    by_layer: dict[str, int]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    code: CodeSettings
    gradient_norm: bool
    fingerprint: str

    def codes(self, shard: str) -> CodesTask:
        """A shard's part."""
        return CodesTask(self.store, shard, self.layers, self.inverse, self.code, self.gradient_norm, self.fingerprint)


def index_pass(run: Run, plan: Plan, corpus: AddressableCorpus, factors: Factors, settings: IndexConfig) -> IndexPass:
    """Begin an index, or go on with it: from here on it is not finished.

    Raises:
        RunError: for files of another index.
        StorageError: where a local disk has no space for what is missing.
    """
    code, layers = code_settings(settings), indexed_layers(run.inputs.layers, settings.layers)
    fields = index_fields(run.inputs, corpus, factors, settings)
    key = fingerprint([fields, plan.to_json(), run.inputs.dtype, settings.gradient_norm])
    by_layer = {layer.name: code.code_bytes(layer) for layer in layers}
    run.folder.fence()
    run.store.remove(MANIFEST)
    made = IndexPass(run.store, fields, by_layer, layers, factors.inverse, code, settings.gradient_norm, key)
    left = plan.selection.size - sum(file.rows for file in finished(run, plan, made).values())
    row = row_bytes(by_layer, gradient_norm=settings.gradient_norm)
    check_disk_for_index(left, row, run.store)
    log.info(
        "index       %d rows of %d bytes (%d coordinates of %d bits in %d layers): %s",
        plan.selection.size,
        row,
        sum(code.coordinates(layer) for layer in layers),
        code.bits,
        len(layers),
        size(plan.selection.size * row),
    )
    return made


def index(run: Run, plan: Plan, corpus: AddressableCorpus, made: IndexPass) -> IndexManifest:
    """Write the codes of every shard whose file is not there yet, and index.json.

    Raises:
        RunError: where a shard is given up: an index has all its rows, or is not finished.
    """
    files = finished(run, plan, made)

    address = CorpusAddress.of(corpus)

    def task(number: int) -> IndexTask:
        return IndexTask(
            corpus=address,
            sequence_ids=plan.ids(number),
            tokens_per_batch=run.config.tokens_per_batch,
            codes=made.codes(shard_name(number)),
        )

    step = Step(
        name="index",
        unit_name="shards",
        units=plan.order().tolist(),
        function=index_task,
        task=task,
        is_done=lambda number: codes_path(shard_name(number)) in files,
        progress=lambda number, file: (file.rows, file.tokens),
        reads=lambda number: Reads(address, plan.ids(number)),
    )
    run.executor.run(step)
    run.executor.forget()
    return finish_index(run, plan, made)


def finish_index(run: Run, plan: Plan, made: IndexPass) -> IndexManifest:
    """Write index.json, of the files that are there.

    Raises:
        RunError: where not all shards' are: an index has all its rows, or is not finished.
    """
    manifest = IndexManifest(made.fields, made.by_layer, dict(sorted(finished(run, plan, made).items())))
    if manifest.rows != plan.selection.size:
        raise RunError(
            f"{run.store.uri} has codes of {manifest.rows} sequences where {plan.selection.size} are planned, so that "
            "the index is not finished; run the same command again."
        )
    if manifest.nonfinite:
        run.telemetry.warn(
            f"{manifest.nonfinite} sequences have gradients that are NaN or infinite: no query finds them"
        )
    run.folder.fence()
    run.store.write_json(MANIFEST, manifest.to_json())
    return manifest


def finished(run: Run, plan: Plan, made: IndexPass) -> dict[str, CodesFile]:
    """The files that are there, by name; one that is damaged is removed, to be made again.

    Raises:
        RunError: for a file of another index.
    """

    def look(name: str) -> tuple[str, CodesFile | DamagedError]:
        try:
            return name, read_header(run.store, name, made.fingerprint)
        except DamagedError as error:
            return name, error

    found: dict[str, CodesFile] = {}
    planned = {codes_path(shard_name(number)) for number in range(plan.num_shards)}
    there = sorted(name for name in run.store.names(FOLDER) if name.endswith(SUFFIX) and name in planned)
    for name, file in prefetch(run.store, look, there):
        if isinstance(file, DamagedError):
            run.telemetry.warn(f"{file} It is made again now.")
            run.folder.fence()
            run.store.remove(name)
        else:
            found[name] = file
    return found


@dataclass(frozen=True)
class CodesTask:
    """The codes of a shard: what is kept of each sequence, and where."""

    run: Store
    shard: str
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    code: CodeSettings
    gradient_norm: bool
    fingerprint: str


@dataclass(frozen=True)
class IndexTask:
    """One shard of an index that has a pass of its own."""

    corpus: CorpusAddress
    sequence_ids: np.ndarray
    tokens_per_batch: int
    codes: CodesTask


@multiplying("exact")
def index_task(worker: ModelWorker, task: IndexTask) -> CodesFile | None:
    """Write the codes of a shard's sequences in one atomic put; returns what index.json says of it, on rank 0."""
    with worker.span("read", shard=task.codes.shard):
        sequences = worker.read(task.corpus, task.sequence_ids)
    layers = task.codes.layers
    codes, end = ShardCodes(worker, task.codes, len(sequences)), ends_at(layers)
    for batch in worker.batches(sequences, task.tokens_per_batch):
        codes.begin(worker.to_device(batch.rows))
        losses_b = worker.backward(batch, layers, batch.loss(), codes.consume, ones=False, ends_at=end)
        if batch.scored:
            codes.losses_n[codes.now] = losses_b
    write = codes.written(sequences, task.sequence_ids)
    return None if write is None else worker.later(write)


def layer_codes(
    worker: ModelWorker, code: CodeSettings, layers: Sequence[Layer], inverse: Preconditioner
) -> dict[str, LayerCode]:
    """The maps of these layers on the rank's device."""

    def one(layer: Layer) -> LayerCode:
        known = layer_factors(inverse, layer, worker.device, worker.wide)
        return layer_code(code, layer, known, worker.device, worker.wide)

    return {layer.name: one(layer) for layer in layers}


class ShardCodes:
    """What is known of a shard's sequences, row by row, on the device; each rank fills in its micro-batches'.

    now: the micro-batch's rows. losses_n: of all rows, which whoever goes back through the model fills in.
    """

    def __init__(self, worker: ModelWorker, task: CodesTask, n: int) -> None:
        self.worker, self.task = worker, task
        self.maps = worker.cached(
            "codes", task.fingerprint, lambda: layer_codes(worker, task.code, task.layers, task.inverse)
        )
        self.now = torch.zeros(0, dtype=torch.int64)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=worker.device)

        self.losses_n, self.norms_n = zeros(n, dtype=worker.wide), zeros(n, dtype=torch.float64)
        # 1 where all coordinates are finite: a rank multiplies only its own rows.
        self.bad_n = zeros(n, dtype=torch.int32)
        self.codes = {layer.name: zeros(n, task.code.code_bytes(layer), dtype=torch.uint8) for layer in task.layers}
        self.norms = {(kind, layer.name): zeros(n) for kind in ("scale", "rms", "left_out") for layer in task.layers}

    def begin(self, rows: Tensor) -> None:
        """A micro-batch's rows."""
        self.now = rows

    def consume(self, layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        """Encode a layer of the micro-batch; a layer that is not indexed passes by."""
        if layer.name not in self.maps:
            return
        u_bd = self.maps[layer.name].of_tokens(s, a, routed).float()
        self.bad_n[self.now] |= (~torch.isfinite(u_bd).all(dim=1)).to(torch.int32)
        self._keep(layer, store(u_bd.cpu().numpy(), self.task.code.bits, layer.size))
        if self.task.gradient_norm:
            self.norms_n[self.now] += squared_norms(layer, s, a, routed)

    def written(self, sequences: Sequence[corpus_of.Sequence], ids: np.ndarray) -> Callable[[], CodesFile] | None:
        """What writes the file in one atomic put and returns what index.json says of it; None but on rank 0.

        It holds the file's bytes alone. They are made once the file before is written: two would be too much.
        """
        task, worker = self.task, self.worker
        columns = self._columns([len(sequence) for sequence in sequences], ids)
        if not worker.leads:
            return None
        worker.behind.wait()
        path = codes_path(task.shard)
        nonfinite = int((columns.pop("finite") == 0).sum())
        counts = {"rows": len(sequences), "tokens": int(columns["tokens"].sum()), "nonfinite": nonfinite}
        data, seal = codes_bytes(path, columns, task.fingerprint, counts)

        def write() -> CodesFile:
            with worker.span("write", shard=task.shard):
                if not task.run.create(path, data):
                    # Another attempt was first: its file is the one that counts, also where kernels round differently.
                    return read_header(task.run, path, task.fingerprint)
            return CodesFile(len(data), counts["rows"], counts["tokens"], nonfinite, seal)

        return write

    def _keep(self, layer: Layer, kept: Stored) -> None:
        to = self.worker.to_device
        self.codes[layer.name][self.now] = to(kept.codes)
        for kind, values in (("scale", kept.scales), ("rms", kept.rms), ("left_out", kept.left_out)):
            self.norms[kind, layer.name][self.now] = to(values.astype(np.float32))

    def _columns(self, lengths: Sequence[int], ids: np.ndarray) -> dict[str, Any]:
        """The file's columns, and `finite`, on rank 0."""
        task, reduce = self.task, self.worker.reduce
        found: dict[str, Any] = {
            "sequence_id": np.asarray(ids, np.int64),
            "tokens": np.asarray(lengths, np.int32),
            "loss": reduce(self.losses_n).float().cpu().numpy(),
        }
        finite = reduce(self.bad_n).cpu().numpy() == 0
        norms = {key: reduce(values).cpu().numpy() for key, values in self.norms.items()}
        squares = sum(np.square(norms["rms", layer.name].astype(np.float64)) * layer.size for layer in task.layers)
        found["self_influence"] = np.where(finite, squares, np.nan).astype(np.float32)
        if task.gradient_norm:
            found["gradient_norm"] = np.sqrt(reduce(self.norms_n).cpu().numpy()).astype(np.float32)
        for layer in task.layers:
            found[column_of("code", layer.name)] = reduce(self.codes[layer.name]).cpu().numpy()
            # A row with one layer that is not finite is found by no query, whatever its other layers say.
            scale = np.where(finite, norms["scale", layer.name], 0).astype(np.float32)
            found[column_of("scale", layer.name)] = scale
            for kind in ("rms", "left_out"):
                found[column_of(kind, layer.name)] = norms[kind, layer.name].astype(np.float16)
        return found | {"finite": finite}


def squared_norms(layer: Layer, s_bto: Tensor, a_bti: Tensor, routed: Routed | None) -> Tensor:
    """|g|^2 of every sequence's gradient, float64 [B]: sum over t, t' of (s_t . s_t') (a_t . a_t'); g is not formed.

    a without the 1 that a bias multiplies: it adds 1 to every product of two tokens' inputs.
    """
    one = 1.0 if layer.bias and a_bti.shape[-1] == layer.inputs - 1 else 0.0
    if routed is None:
        products_btt = (s_bto @ s_bto.transpose(1, 2)) * (a_bti @ a_bti.transpose(1, 2) + one)
        return products_btt.sum(dim=(1, 2), dtype=torch.float64)
    found = torch.zeros(routed.B, dtype=torch.float64, device=s_bto.device)
    for row, mine in routed.segments():
        s, a = s_bto[mine], a_bti[mine]
        found[row] = ((s @ s.T) * (a @ a.T + one)).sum(dtype=torch.float64)
    return found
