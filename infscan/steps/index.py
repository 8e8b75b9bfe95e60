"""Index a corpus: a code of every sequence's whitened gradient, from one forward and one backward (docs/index-ask.md).

A pass like the scan's over the same plan: a shard is a unit, its file's presence is the fact that it is done, and
index.json, written last, says what the codes are of and which files they are in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import fingerprint
from infscan.config.jobs import IndexConfig
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, shard_name
from infscan.engine.executor import Step
from infscan.errors import ConfigError, DamagedError, RunError
from infscan.influence.codes import CodeSettings, LayerCode, layer_code
from infscan.influence.layers import Layer
from infscan.influence.packed import Stored, store
from infscan.influence.precision import multiplying
from infscan.influence.routed import Routed
from infscan.model.worker import LayerConsumer, ModelWorker
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


def index(run: Run, plan: Plan, corpus: AddressableCorpus, factors: Factors, settings: IndexConfig) -> IndexManifest:
    """Write the codes of every shard whose file is not there yet, and index.json.

    Raises:
        RunError: where a shard is given up: an index has all its rows, or is not finished.
        StorageError: where a local disk has no space for them.
    """
    code, layers = code_settings(settings), indexed_layers(run.inputs.layers, settings.layers)
    fields = index_fields(run.inputs, corpus, factors, settings)
    key = fingerprint([fields, plan.to_json(), run.inputs.dtype, settings.gradient_norm])
    by_layer = {layer.name: code.code_bytes(layer) for layer in layers}
    run.folder.fence()
    run.store.remove(MANIFEST)
    files = _finished(run, plan, key)
    left = plan.selection.size - sum(file.rows for file in files.values())
    check_disk_for_index(left, row_bytes(by_layer), run.store)
    log.info(
        "index       %d rows of %d bytes (%d coordinates of %d bits in %d layers): %s",
        plan.selection.size,
        row_bytes(by_layer),
        sum(code.coordinates(layer) for layer in layers),
        code.bits,
        len(layers),
        size(plan.selection.size * row_bytes(by_layer)),
    )

    def task(number: int) -> IndexTask:
        return IndexTask(
            run=run.store,
            corpus=CorpusAddress.of(corpus),
            shard=shard_name(number),
            sequence_ids=plan.ids(number),
            layers=layers,
            inverse=factors.inverse,
            code=code,
            gradient_norm=settings.gradient_norm,
            tokens_per_batch=run.config.tokens_per_batch,
            fingerprint=key,
        )

    step = Step(
        name="index",
        unit_name="shards",
        units=plan.order().tolist(),
        function=index_task,
        task=task,
        is_done=lambda number: codes_path(shard_name(number)) in files,
        progress=lambda number, file: (file.rows, file.tokens),
    )
    run.executor.run(step, lambda number, file: files.update({codes_path(shard_name(number)): file}))
    run.executor.forget()
    manifest = IndexManifest(fields, by_layer, dict(sorted(files.items())))
    if manifest.rows != plan.selection.size:
        raise RunError(f"{run.store.uri} has {manifest.rows} rows where {plan.selection.size} were planned.")
    if manifest.nonfinite:
        run.telemetry.warn(
            f"{manifest.nonfinite} sequences have gradients that are NaN or infinite: no query finds them"
        )
    run.folder.fence()
    run.store.write_json(MANIFEST, manifest.to_json())
    return manifest


def _finished(run: Run, plan: Plan, key: str) -> dict[str, CodesFile]:
    """The files that are there, by name; one that is damaged is removed, to be made again.

    Raises:
        RunError: for a file of another index.
    """

    def look(name: str) -> tuple[str, CodesFile | DamagedError]:
        try:
            return name, read_header(run.store, name, key)
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
class IndexTask:
    """One shard of an index."""

    run: Store
    corpus: CorpusAddress
    shard: str
    sequence_ids: np.ndarray
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    code: CodeSettings
    gradient_norm: bool
    tokens_per_batch: int
    fingerprint: str


@multiplying("exact")
def index_task(worker: ModelWorker, task: IndexTask) -> CodesFile | None:
    """Write the codes of a shard's sequences in one atomic put; returns what index.json says of it, on rank 0."""
    codes = worker.cached("codes", task.fingerprint, lambda: layer_codes(worker, task.code, task.layers, task.inverse))
    with worker.span("read", shard=task.shard):
        sequences = worker.read(task.corpus, task.sequence_ids)
    rows = _Rows(worker, task, len(sequences))
    for batch in worker.batches(sequences, task.tokens_per_batch):
        rows.begin(worker.to_device(batch.rows))
        losses_b = worker.backward(batch, task.layers, batch.loss(), rows.encoding(codes), ones=False)
        if batch.scored:
            rows.losses_n[rows.now] = losses_b
    columns = rows.columns([len(sequence) for sequence in sequences])
    if not worker.leads:
        return None
    path = codes_path(task.shard)
    nonfinite = int((columns.pop("finite") == 0).sum())
    counts = {"rows": len(sequences), "tokens": int(columns["tokens"].sum()), "nonfinite": nonfinite}
    with worker.span("write", shard=task.shard):
        data, seal = codes_bytes(path, columns, task.fingerprint, counts)
        if not task.run.create(path, data):
            # Another attempt was first: its file is the one that counts, also where kernels round differently.
            return read_header(task.run, path, task.fingerprint)
    return CodesFile(len(data), counts["rows"], counts["tokens"], nonfinite, seal)


def layer_codes(
    worker: ModelWorker, code: CodeSettings, layers: Sequence[Layer], inverse: Preconditioner
) -> dict[str, LayerCode]:
    """The maps of these layers on the rank's device."""

    def one(layer: Layer) -> LayerCode:
        known = layer_factors(inverse, layer, worker.device, worker.wide)
        return layer_code(code, layer, known, worker.device, worker.wide)

    return {layer.name: one(layer) for layer in layers}


class _Rows:
    """What is known of a shard's sequences, row by row, on the device; each rank fills in its micro-batches'."""

    def __init__(self, worker: ModelWorker, task: IndexTask, n: int) -> None:
        self.worker, self.task = worker, task
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

    def encoding(self, codes: dict[str, LayerCode]) -> LayerConsumer:
        def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
            u_bd = codes[layer.name].of_tokens(s, a, routed).float()
            self.bad_n[self.now] |= (~torch.isfinite(u_bd).all(dim=1)).to(torch.int32)
            self._keep(layer, store(u_bd.cpu().numpy(), self.task.code.bits, layer.size))
            if self.task.gradient_norm:
                self.norms_n[self.now] += squared_norms(layer, s, a, routed)

        return consume

    def _keep(self, layer: Layer, kept: Stored) -> None:
        to = self.worker.to_device
        self.codes[layer.name][self.now] = to(kept.codes)
        for kind, values in (("scale", kept.scales), ("rms", kept.rms), ("left_out", kept.left_out)):
            self.norms[kind, layer.name][self.now] = to(values.astype(np.float32))

    def columns(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The file's columns, and `finite`, on rank 0."""
        task, reduce = self.task, self.worker.reduce
        found: dict[str, Any] = {
            "sequence_id": np.asarray(task.sequence_ids, np.int64),
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
