"""Hooks that hand over each tracked layer's inputs and output gradients during backward, without weight gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.experts import Stacked, listening
from infscan.model.suffix import not_checkpointed

# consume(layer, a, s, routed): a = the layer's input, s = the gradient of the loss with respect to its output, both
# [B, T, n] with routed None; of an expert [M, n], for the tokens that `routed` says.
Consumer = Callable[[Layer, Tensor, Tensor, Routed | None], None]


@contextmanager
def capturing(
    module: PreTrainedModel,
    layers: Sequence[Layer],
    consume: Consumer,
    *,
    detached: bool = True,
    ends_at: str | None = None,
) -> Iterator[None]:
    """While open, every backward through `module` calls `consume` once per tracked layer, last layer first; not for an
    expert that no token goes to.

    a_bti: [B, T, I] without the bias's 1, s_bto: [B, T, O], in the model's dtype; not `detached`, both are functions of
    the embedding's output (s in a backward with create_graph=True), to be differentiated again. That output is
    made to require a gradient, so parameters need none: backward costs activation gradients alone. Under gradient
    checkpointing the forward that is not recorded carries no gradient hook, so each layer is still seen once.
    ends_at: the path of a block (`infscan.model.suffix`), or of the head, whose output has that part instead of the
    embedding's: nothing of it or below is kept for the backward, computed in it or gathered for it.

    Raises (in the forward):
        ModelError: where a layer sees its tokens in a layout from which sequences cannot be separated.
    """
    inputs: dict[str, Tensor] = {}
    batch: list[int] = []
    children = dict(module.named_modules())
    experts = by_stack(layers)

    def on_embedding(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.clear()
        batch[:] = out.shape[:2]
        if ends_at is None:
            out.requires_grad_(True)
        elif out.is_leaf:
            # For gradient checkpointing transformers has it require one.
            out.requires_grad_(False)

    def on_end(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        (out if isinstance(out, Tensor) else out[0]).requires_grad_(True)

    def on_forward(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if not out.requires_grad:
                return
            a_bti = args[0].detach() if detached else args[0]
            _check_shared(layer, a_bti, inputs)
            # Some families (OPT) flatten the batch before their MLP.
            a_bti = _by_sequence(layer, a_bti, batch)

            def on_gradient(s_bto: Tensor) -> None:
                consume(layer, a_bti, _by_sequence(layer, s_bto.detach() if detached else s_bto, batch), None)

            out.register_hook(on_gradient)

        return hook

    def on_stack(stack: str, seen: Stacked) -> None:
        if stack not in experts or not seen.out_so.requires_grad:
            return
        B, T = batch
        a_si = seen.a_si.detach() if detached else seen.a_si

        def on_gradient(s_so: Tensor) -> None:
            s_so = s_so.detach() if detached else s_so
            for expert, layer in experts[stack].items():
                mine = slice(*seen.bounds[expert : expert + 2])
                if mine.start < mine.stop:
                    consume(layer, a_si[mine], s_so[mine], Routed(seen.tokens_s[mine], B, T))

        seen.out_so.register_hook(on_gradient)

    handles = [module.get_input_embeddings().register_forward_hook(on_embedding)]
    if ends_at is not None:
        handles.append(children[ends_at].register_forward_hook(on_end))
    for layer in layers:
        if not layer.stack:
            handles.append(children[layer.name].register_forward_hook(on_forward(layer)))
    try:
        with listening(module, on_stack), not_checkpointed(children, ends_at):
            yield
    finally:
        for handle in handles:
            handle.remove()


def by_stack(layers: Sequence[Layer]) -> Mapping[str, dict[int, Layer]]:
    """The tracked experts of every stack, by their number in it."""
    found: defaultdict[str, dict[int, Layer]] = defaultdict(dict)
    for layer in layers:
        if layer.stack:
            found[layer.stack][int(layer.name.rpartition(".")[2])] = layer
    return dict(found)


def _by_sequence(layer: Layer, x: Tensor, batch: Sequence[int]) -> Tensor:
    """[B, T, n] from that, from [B * T, n], or with axes of length 1 among them."""
    B, T = batch
    if x.shape[:-1] != (B * T,) and _longer(x.shape[:-1]) != _longer((B, T)):
        raise ModelError(
            f"{layer.name} sees a tensor of shape {tuple(x.shape)} for {B} x {T} tokens, so its tokens cannot "
            "be separated by sequence; leave it out with model.tracked=<regex>."
        )
    return x.reshape(B, T, -1)


def _longer(axes: Sequence[int]) -> list[int]:
    return [length for length in axes if length > 1]


def _check_shared(layer: Layer, a_bti: Tensor, inputs: dict[str, Tensor]) -> None:
    """Layers said to share one A must really be fed the same memory; the leader's input is kept until they were."""
    if layer.input_of == layer.name:
        inputs.clear()
        inputs[layer.name] = a_bti
    elif layer.input_of in inputs and inputs[layer.input_of].data_ptr() != a_bti.data_ptr():
        raise ModelError(
            f"{layer.name} was taken to have the same input as {layer.input_of}, and has not; "
            "track them apart with model.tracked=<regex> and report the model's family."
        )


def backward(loss: Tensor) -> None:
    """Run backward of a summed loss; with no parameter asking for a gradient, only activations get one."""
    torch.autograd.backward(loss)
