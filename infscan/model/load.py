"""Load a model onto one rank: whole, or its share of a ZeRO-3 partition. The only importer of DeepSpeed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from infscan.config import Dtype, ModelConfig, Offload
from infscan.errors import ModelError, UnwritableError
from infscan.model.architecture import load_config, weight_files
from infscan.model.attention import repeat_grouped_heads
from infscan.model.checkpoint import Checkpoint
from infscan.model.experts import run_by_expert
from infscan.model.family import (
    auto_class,
    build_on_meta,
    first_line,
    is_about_attention,
    no_attention,
    with_attention,
)
from infscan.model.folder import model_folder
from infscan.model.gathered import GatherLimits, blocks, largest_block
from infscan.model.loaded import LoadedModel, RankContext
from infscan.model.losses import head_is_last
from infscan.storage import scratch_file

# Where a shard begins in its file, in bytes.
_ALIGNED = 64


def resolve_dtype(dtype: Dtype, config: PretrainedConfig, device: str) -> torch.dtype:
    """`auto`: float32 on CPU; on GPU the checkpoint's own, or bfloat16 for float16, which gradients overflow."""
    if dtype is not Dtype.auto:
        return getattr(torch, dtype.value)
    if not device.startswith("cuda"):
        return torch.float32
    declared = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    if isinstance(declared, str):
        declared = getattr(torch, declared.removeprefix("torch."))
    return torch.bfloat16 if declared is torch.float16 else declared


def load(settings: ModelConfig, context: RankContext, *, sharded: bool) -> LoadedModel:
    """Load a checkpoint for forward and activation-gradient backward.

    On the device `meta` no weight is read: the shapes alone, for `infscan.sizing`.

    Raises:
        ModelError: for a folder, a parameter or a family that cannot be loaded, by name.
    """
    on_meta = context.device == "meta"
    if not on_meta:
        torch.set_num_threads(context.threads)
    if context.device.startswith("cuda"):
        torch.cuda.set_device(context.device)
    folder = model_folder(settings.path, weights=not on_meta, revision=settings.revision)
    config = with_attention(_without_dropout(load_config(folder)), settings.attention_implementation)
    dtype = resolve_dtype(settings.dtype, config, context.device)
    if on_meta:
        module = build_on_meta(config, dtype).requires_grad_(False).eval()
        size = sum(parameter.numel() for parameter in module.parameters())
        loaded = LoadedModel(module, context, dtype, size, size)
    elif sharded:
        loaded = _load_zero3(settings, folder, config, dtype, context)
    else:
        if context.device.startswith("cuda"):
            module = load_onto(folder, config, dtype, context.device)
        else:
            module = _load_whole(folder, config, dtype)
            _detach_from_file(module)
        size = sum(parameter.numel() for parameter in module.parameters())
        loaded = LoadedModel(module, context, dtype, size, size)
    loaded.on_gpu = context.device.startswith("cuda")
    if loaded.on_gpu:
        repeat_grouped_heads()
    run_by_expert(loaded.module)
    if not on_meta:
        loaded.head_is_last = head_is_last(loaded.module, context.device)
    if settings.gradient_checkpointing:
        _checkpoint_activations(loaded.module)
    return loaded


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Every dropout of the configuration set to 0.

    eval() is not enough: checkpointed blocks are put in training mode, and some families drop inside the block itself.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _load_whole(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    weight_files(folder)
    try:
        module, info = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_about_attention(error):
            raise no_attention(config, error) from None
        raise ModelError(
            f"{folder}: the weights cannot be loaded ({first_line(error)}); save or copy the model again."
        ) from None
    _refuse_incomplete(folder, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return module.requires_grad_(False).eval()


def load_onto(folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A whole model on its device, tensor by tensor from the memory-mapped checkpoint: the host never holds all of it,
    as often as there are ranks on it.

    Raises:
        ModelError: where a tensor has no place, a place has no tensor, or shapes differ.
    """
    config, checkpoint = _as_stored(folder, config, dtype)
    with no_init_weights(), torch.device(device):
        module: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    module.tie_weights()
    _fill(module, checkpoint)
    return module.requires_grad_(False).eval()


def _detach_from_file(module: PreTrainedModel) -> None:
    """Copy weights that are mapped from the checkpoint's file into memory of their own, one at a time.

    What is written to the file later would be computed with, and what is cut off from it would end the process.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _refuse_incomplete(folder: Path, missing: set[str], unexpected: set[str]) -> None:
    # Rotary tables and causal masks that older checkpoints saved are recomputed, never read.
    recomputed = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
    unexpected = {key for key in unexpected if not key.endswith(recomputed)}
    if missing or unexpected:
        raise ModelError(
            f"{folder}: the weights do not fit config.json: missing {sorted(missing)[:3]} ({len(missing)}), "
            f"unexpected {sorted(unexpected)[:3]} ({len(unexpected)}); save the model again, or fix config.json."
        )


def zero_config(settings: ModelConfig, device: str, gathered: GatherLimits) -> dict[str, Any]:
    """DeepSpeed's configuration. Its own offload to NVMe compiles code for asynchronous reads: here it is the offload
    to the host's memory, whose place a mapped file takes (`_onto_disk`)."""
    zero = settings.zero
    limits: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": gathered.live,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        "stage3_prefetch_bucket_size": gathered.ahead,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
    }
    if zero.offload is not Offload.none:
        pinned = zero.offload is Offload.cpu and device.startswith("cuda")
        limits["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": limits}


def _start_group(context: RankContext) -> Any:
    """Import DeepSpeed with its environment set, and join the worker group."""
    assert context.address is not None, "a sharded model needs its group's address"
    host, _, port = context.address.rpartition(":")
    on_gpu = context.device.startswith("cuda")
    # DeepSpeed takes the local rank for the number of the device.
    local = context.device.partition(":")[2] or "0"
    os.environ.update(
        RANK=str(context.rank), LOCAL_RANK=local, WORLD_SIZE=str(context.world), MASTER_ADDR=host, MASTER_PORT=port
    )
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    import deepspeed
    import deepspeed.ops

    if not on_gpu:
        # Otherwise it compiles a shared-memory op: two minutes cold, and a crash without a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=context.timeout_s),
        auto_mpi_discovery=False,
        verbose=False,
    )
    return deepspeed


def _load_zero3(
    settings: ModelConfig, folder: Path, config: PretrainedConfig, dtype: torch.dtype, context: RankContext
) -> LoadedModel:
    """Each rank reads its own slice of every parameter from the memory-mapped checkpoint, so none holds it whole."""
    deepspeed = _start_group(context)
    config, checkpoint = _as_stored(folder, config, dtype)
    gathered = GatherLimits.of(settings.zero, largest_block(checkpoint.module))
    zero = zero_config(settings, context.device, gathered)
    if dtype is torch.bfloat16:
        zero["bf16"] = {"enabled": True}
    # By the settings, never by Init's own `dtype`: DeepSpeed 0.19 overrules that on hardware without float16.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=zero):
        module = auto_class(config).from_config(config, dtype=dtype)
    module.tie_weights()
    if settings.zero.offload is Offload.nvme:
        _onto_disk(list(module.parameters()), settings.zero.offload_path)
    _fill(module, checkpoint, context.rank)
    module.requires_grad_(False)
    module.eval()
    parameters = list(module.parameters())
    if any(parameter.dtype is not dtype for parameter in parameters):
        raise ModelError(
            f"model.dtype={str(dtype).removeprefix('torch.')}: ZeRO-3 makes {parameters[0].dtype} of it; use float32 "
            "or bfloat16, or model.sharding=none with cluster.ranks_per_worker=1."
        )
    size = sum(parameter.ds_numel for parameter in parameters)
    for block in blocks(module) if gathered.by_block else ():
        deepspeed.utils.set_z3_leaf_module(block, True)
    engine, *_ = deepspeed.initialize(model=module, config=zero)
    _gather_outside_transforms(engine.optimizer)
    held = sum(parameter.ds_tensor.numel() for parameter in parameters)
    # The module, never the engine: both of the engine's backward paths want an optimizer.
    return LoadedModel(engine.module, context, dtype, size, held)


def _gather_outside_transforms(offload: Any) -> None:
    """Have DeepSpeed gather and release parameters as plain tensors, also where a function of the model is
    differentiated or mapped over (torch.func): what is gathered there would be the transform's, and no parameter's."""

    def outside(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def run(module: nn.Module) -> None:
            with temporarily_clear_interpreter_stack():
                function(module)

        return run

    for when in ("pre", "post"):
        for way in ("forward", "backward"):
            name = f"{when}_sub_module_{way}_function"
            setattr(offload, name, outside(getattr(offload, name)))


def _onto_disk(parameters: Sequence[Any], folder: str | None) -> None:
    """Move a rank's shards into one file that is mapped into memory.

    They are written once and then only read: under pressure the kernel drops their pages and reads them back. The file
    has no name any more when this returns, so it goes with the process, however that ends.

    Raises:
        ModelError: where the folder is missing or takes no file of that size.
    """
    aligned = [-(-p.ds_tensor.numel() * p.ds_tensor.element_size() // _ALIGNED) * _ALIGNED for p in parameters]
    try:
        with scratch_file(folder, sum(aligned)) as path:
            mapped = torch.from_file(path, shared=True, size=sum(aligned), dtype=torch.uint8)
    except UnwritableError as error:
        raise ModelError(f"model.zero.offload_path: a rank's shard cannot be put there: {error}") from None
    start = 0
    for parameter, size in zip(parameters, aligned, strict=True):
        shard = parameter.ds_tensor
        used = shard.numel() * shard.element_size()
        shard.data = mapped[start : start + used].view(shard.dtype)
        start += size


def _as_stored(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> tuple[PretrainedConfig, Checkpoint]:
    """The configuration as its checkpoint has it, and the checkpoint: what it brings twice, and unlike, is not tied.

    Raises:
        ModelError: for a tie that no configuration unties.
    """
    checkpoint = Checkpoint.of(folder, build_on_meta(deepcopy(config), dtype))
    untied = checkpoint.untied()
    if not untied:
        return config, checkpoint
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = False
    checkpoint = Checkpoint.of(folder, build_on_meta(deepcopy(config), dtype))
    still = [pair for pair in untied if pair[0] in checkpoint.module.all_tied_weights_keys]
    if still:
        raise ModelError(
            f"{folder}: {still[0][0]} and {still[0][1]} are one parameter by config.json, and the checkpoint brings "
            "two different ones; fix config.json, or use model.sharding=none with cluster.ranks_per_worker=1."
        )
    return config, checkpoint


@torch.no_grad()
def _fill(module: PreTrainedModel, checkpoint: Checkpoint, rank: int = 0) -> None:
    """Put every parameter, or the rank's slice of it where it is partitioned, and every persistent buffer in place.

    Raises:
        ModelError: where a tensor has no place, a place has no tensor, or shapes differ.
    """
    # By each of its names: a parameter that is tied has several.
    places: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    places |= dict(module.named_buffers(remove_duplicate=False))
    _widen(module, places)
    filled: set[int] = set()
    for name, tensor in checkpoint.tensors():
        place = places[name]
        shape = tuple(getattr(place, "ds_shape", place.shape))
        if shape != tuple(tensor.shape):
            raise ModelError(
                f"{checkpoint.folder}: {name} has shape {tuple(tensor.shape)} in the checkpoint and {shape} by "
                "config.json; fix config.json."
            )
        if hasattr(place, "ds_tensor"):
            _fill_shard(place, tensor, rank)
        else:
            place.copy_(tensor)
        filled.add(id(place))
    names = {name for name, place in places.items() if id(place) in filled}
    _refuse_incomplete(checkpoint.folder, *checkpoint.refusable(names))
    # Tables of angles, made in the model's dtype, are rounded to it: they are made again, as `from_pretrained` does.
    for name in names:
        places[name]._is_hf_initialized = True
    for child in module.modules():
        child.__dict__["_is_hf_initialized"] = not child._non_persistent_buffers_set
    module.initialize_weights()


def _widen(module: PreTrainedModel, places: Mapping[str, Any]) -> None:
    """What a family keeps in float32 whatever its dtype; a partitioned parameter is in the dtype it was made in."""
    kept = module._keep_in_fp32_modules_strict
    if not kept:
        return
    pattern = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in kept))
    for name, place in places.items():
        if pattern.search(name) and not hasattr(place, "ds_tensor") and place.dtype.itemsize < 4:
            place.data = place.data.float()


def _fill_shard(parameter: Any, tensor: Tensor, rank: int) -> None:
    part = parameter.ds_tensor.ds_numel
    low, high = part * rank, min(part * (rank + 1), parameter.ds_numel)
    shard = parameter.ds_tensor.data
    shard.zero_()
    if high > low:
        shard[: high - low].copy_(tensor.reshape(-1)[low:high])


def _checkpoint_activations(module: nn.Module) -> None:
    """Recompute each block in backward. Dropout stays off: only the checkpointing wrappers are put in training mode."""
    assert isinstance(module, PreTrainedModel)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    module.eval()
    for child in module.modules():
        if getattr(child, "gradient_checkpointing", None) is not None:
            child.training = True
