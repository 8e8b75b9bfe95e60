"""Before the first unit: what ranks will hold is said, held against their devices, and asked of the cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from infscan.config import Offload
from infscan.corpus.plan import default_shard_sequences
from infscan.engine.executor import DeviceNeed
from infscan.errors import ModelError
from infscan.sizing.memory import (
    Codes,
    PassCost,
    PassMemory,
    largest,
    other_passes,
    pass_costs,
    scan_memory,
    serialised_bytes,
)
from infscan.steps.factor_files import COMPLETE
from infscan.steps.inputs import Inputs
from infscan.steps.run import Run
from infscan.steps.volume import size

log = logging.getLogger("infscan")

# A rank's process before it loads a model: torch, transformers, Ray (docs/sizing.md).
_PROCESS_BYTES = 1 << 30
# Of a sequence beside its token ids: its documents' names and offsets, two of them. Measured, with tracemalloc.
_SEQUENCE_BYTES = 800
# Of a row that a shard keeps, while its file is made. Measured (benchmarks/first_wave.py).
_ROW_BYTES = 150
# Sequences of a corpus whose shards are as large as they become.
_MANY = 10**9


def main_and_largest(
    inputs: Inputs, T: int, *, fitting: bool, codes: Codes | None = None
) -> tuple[str, PassMemory, str, int] | None:
    """The name of the scan and what a rank of it will hold; the pass that holds the most, by name, with its bytes. None
    where a family does not say, which is logged.

    codes: of an index, beside the scan or, without queries, in its place.
    """
    gpus, queries = float(inputs.device == "cuda"), len(inputs.queries)
    main = "index" if codes is not None and not queries else "scan"
    try:
        if codes is None:
            memory = scan_memory(inputs.config, inputs.architecture, queries, T, gpus)
        else:
            memory = pass_costs(inputs.config, inputs.architecture, queries, T, gpus, codes=codes)[main].memory
    except ModelError as error:
        log.warning("memory      %s", error)
        return None
    others = other_passes(inputs.config, inputs.architecture, queries, memory, gpus, fitting=fitting)
    held = {main: memory.total} | others
    name = max(held, key=lambda one: held[one])
    return main, memory, name, held[name]


def reserve_memory(run: Run, T: int, codes: Codes | None = None) -> dict[str, int] | None:
    """Log what a rank of the scan will hold, warn where a pass needs more than the device has, and have workers ask a
    shared cluster for the host memory that they need.

    Returns a scanning rank's bytes by part, or None if it is unknown.
    """
    shared = run.config.cluster.address or os.environ.get("RAY_ADDRESS")
    for stage in (run, *run.later) if shared else ():
        if (needed := host_bytes(stage.inputs, T, codes if stage is run else None)) is not None:
            stage.executor.reserve(needed)
    for stage in (run, *run.later):
        _hold_against_devices(stage, T, codes if stage is run else None)
    return use_machine(run, T, codes)


def use_machine(run: Run, T: int, codes: Codes | None = None) -> dict[str, int] | None:
    """Log what a rank of the scan will hold, and have as many workers as this machine has room for, where their number
    is not given.

    Returns a scanning rank's bytes by part, or None if it is unknown; then one worker is at work.
    """
    planned = None
    for stage in (run, *run.later):
        fitting = not stage.folder.factors.exists(COMPLETE)
        found = main_and_largest(stage.inputs, T, fitting=fitting, codes=codes if stage is run else None)
        if found is None:
            continue
        main, memory, name, held = found
        if stage is run:
            log.info("memory      %s%s", memory_line(memory, main), larger_pass(memory, name, held))
            planned = dict(vars(memory))
        on_host = (
            held if stage.inputs.device != "cuda" else serialised_bytes(stage.config, stage.inputs.layers) * fitting
        )
        stage.executor.fill(_process_bytes(stage.inputs, T) + on_host, 1 + len(run.later))
    return planned


def _hold_against_devices(run: Run, T: int, codes: Codes | None) -> None:
    """Say what a GPU of the cluster's kind has no room for; what each has free is seen when its rank is there."""
    inputs = run.inputs
    if inputs.device != "cuda":
        return
    try:
        costs = pass_costs(inputs.config, inputs.architecture, len(inputs.queries), T, 1.0, codes=codes)
    except ModelError:
        return
    if inputs.memory is not None and (said := over_memory(costs, inputs.memory.device)):
        run.telemetry.warn(said)
    run.executor.expect({name: device_need(cost.memory) for name, cost in costs.items()})


def device_need(memory: PassMemory) -> DeviceNeed:
    """What a pass needs of a GPU, as an executor wants to know it."""
    return DeviceNeed(memory.total - memory.activations, memory.activations)


def over_memory(costs: Mapping[str, PassCost], memory: int) -> str | None:
    """What is said where a pass holds more than a device has, before anything runs there.

    Not of a decomposition: a matrix that does not fit is left to the CPU.
    """
    name, held = largest({name: cost for name, cost in costs.items() if name != "eigenbasis"})
    if held.total <= memory:
        return None
    rest = held.total - held.activations
    fix = f"scan.tokens_per_batch lower by {held.activations / (memory - rest):.2g} times" if rest < memory else ""
    fixes = [fix, "model.gradient_checkpointing=true", "fewer queries at a time", "more cluster.ranks_per_worker"]
    return (
        f"a rank holds {size(held.total)} in {name}, and its device has {size(memory)}: micro-batches will be halved "
        f"until they fit; give {', '.join(filter(None, fixes[:-1]))} or {fixes[-1]}."
    )


def host_bytes(inputs: Inputs, T: int, codes: Codes | None = None) -> int | None:
    """Host memory that a rank needs at most, over all steps, its process included; None if it is unknown.

    On a GPU the model and what is computed with it are not in host memory, apart from offloaded weights and from a
    layer group's sums, which are serialised there.
    """
    config, gpus = inputs.config, float(inputs.device == "cuda")
    try:
        costs = pass_costs(config, inputs.architecture, len(inputs.queries), T, gpus, codes=codes)
    except ModelError:
        return None
    if not gpus:
        return _process_bytes(inputs, T) + largest(costs)[1].total
    serialised = 3 * costs["covariance"].memory.factors if "covariance" in costs else 0
    offloaded = 0 if config.model.zero.offload is Offload.none else largest(costs)[1].weights
    return _process_bytes(inputs, T) + serialised + offloaded


def _process_bytes(inputs: Inputs, T: int) -> int:
    """A rank's process, with the sequences of the unit at work, of the next, which it reads meanwhile, and of the last,
    which it writes; of that one also the scores and the rows, of which the first shards keep the most."""
    config = inputs.config
    of_a_unit = config.scan.shard_sequences or default_shard_sequences(_MANY)
    queries = len(inputs.queries) + config.scan.background_queries
    rows = 2 * min(of_a_unit, config.candidates_of(_MANY)) * queries
    return _PROCESS_BYTES + of_a_unit * (3 * (8 * T + _SEQUENCE_BYTES) + 4 * queries) + rows * _ROW_BYTES


def larger_pass(scan: PassMemory, name: str, held: int) -> str:
    """`; check, the largest pass, 1.4 GiB`, where one holds more than the scan."""
    return f"; {name}, the largest pass, {size(held)}" if held > scan.total else ""


def memory_line(memory: PassMemory, name: str = "scan") -> str:
    """`a rank of the scan holds at most 1.2 GiB: weights 88 MiB + queries 38 MiB + activations 969 MiB`"""
    parts = " + ".join(f"{name} {size(part)}" for name, part in vars(memory).items() if part)
    return f"a rank of the {name} holds at most {size(memory.total)}: {parts}"
