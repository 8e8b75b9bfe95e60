"""What PBRF needs of a model at theta_s: divergences from its outputs there, a point's loss, measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infscan.corpus.batches import pad
from infscan.errors import ConfigError
from infscan.influence.layers import Layer
from infscan.model.measure import next_tokens, summed_losses
from infscan.queries import Query
from infscan_studies.truth.retrain import measure_queries

Tracked = Mapping[str, tuple[nn.Parameter, ...]]


class Problem(Protocol):
    """A model at theta_s whose tracked parameters (weight [O, I], bias [O]) may move, on N training points."""

    tracked: Tracked
    size: int

    def divergences(self) -> Iterator[Tensor]:
        """Scalars with a graph each, to be used one after another; their sum is (1/N) sum_i D_L."""
        ...

    def loss(self, point: int) -> Tensor:
        """L(z, theta) of a training point."""
        ...

    def measure(self) -> NDArray[np.float64]:
        """f of every measurement at the present parameters, [Q]."""
        ...


def _track(module: nn.Module, layers: Sequence[str]) -> dict[str, tuple[nn.Parameter, ...]]:
    """Let only these layers' weights and biases move."""
    module.requires_grad_(False).eval()
    children = dict(module.named_modules())
    transposed = [name for name in layers if isinstance(children[name], Conv1D)]
    if transposed:
        raise ConfigError(
            f"PBRF moves weights that lie as [O, I], and {transposed[0]} is a Conv1D, whose weight is [I, O]; "
            "validate a model of another family than GPT-2 by PBRF, or this one by truth=cg."
        )
    tracked = {name: tuple(children[name].parameters(recurse=False)) for name in layers}
    for parameter in (parameter for layer in tracked.values() for parameter in layer):
        parameter.requires_grad_(True)
    return tracked


class LanguageModelProblem:
    """A causal LM: D_L is KL(p(theta_s) | p(theta)), summed over the positions that L sums over; f as queries have it.

    sequences: the N training points, token ids of at least two tokens each. Positions that predict nothing take no part
    in D_L, as in L (EK-FAC's pseudo-gradients have the last one too). Outputs at theta_s are kept in memory.

    Raises:
        ConfigError: where they would need more than `max_bytes`, or a layer keeps its weight transposed.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        layers: Sequence[Layer],
        sequences: Sequence[Sequence[int]],
        queries: Sequence[Query],
        *,
        batch_sequences: int = 64,
        max_bytes: int = 4 << 30,
    ) -> None:
        self.module, self.queries, self.size = module, queries, len(sequences)
        self.sequences = [np.asarray(ids, np.int64) for ids in sequences]
        self.tracked: Tracked = _track(module, [layer.name for layer in layers])
        weight = next(module.parameters())
        entries = sum(len(ids) - 1 for ids in self.sequences) * module.get_input_embeddings().num_embeddings
        if entries * weight.element_size() > max_bytes:
            raise ConfigError(
                f"PBRF keeps the outputs of {self.size} sequences, {entries * weight.element_size() / 2**30:.1f} GiB, "
                f"more than max_bytes={max_bytes}; take fewer or shorter sequences, or raise it."
            )
        by_length = sorted(range(self.size), key=lambda row: len(self.sequences[row]))
        self._batches = [by_length[i : i + batch_sequences] for i in range(0, self.size, batch_sequences)]
        with torch.no_grad():
            self._log_p_s = [self._log_p(batch) for batch in self._batches]

    def _padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ids_bt and the mask of real tokens."""
        ids, mask = pad([self.sequences[row] for row in rows])
        device = next(self.module.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _log_p(self, rows: Sequence[int]) -> Tensor:
        """log p at every position that predicts a token: [positions, V]."""
        ids_bt, mask_bt = self._padded(rows)
        predicts_bt = next_tokens(ids_bt, mask_bt)[1]
        logits_btv = self.module(input_ids=ids_bt, use_cache=False).logits
        return torch.log_softmax(logits_btv[predicts_bt], dim=-1)

    def divergences(self) -> Iterator[Tensor]:
        for rows, log_p_s in zip(self._batches, self._log_p_s, strict=True):
            yield nn.functional.kl_div(self._log_p(rows), log_p_s, reduction="sum", log_target=True) / self.size

    def loss(self, point: int) -> Tensor:
        ids_bt, mask_bt = self._padded([point])
        logits_btv = self.module(input_ids=ids_bt, use_cache=False).logits
        return summed_losses(logits_btv, *next_tokens(ids_bt, mask_bt)).sum()

    def measure(self) -> NDArray[np.float64]:
        return measure_queries(self.module, self.queries)


class RegressionProblem:
    """Any module on vectors with L = |h(x) - y|^2 / 2, so that D_L = |h(theta, x) - h(theta_s, x)|^2 / 2.

    x_ni, y_no: the N training points. A measurement is f = -|h(x) - y|^2 / 2 of a test point (test_x_qi, test_y_qo).
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        x_ni: Tensor,
        y_no: Tensor,
        test_x_qi: Tensor,
        test_y_qo: Tensor,
    ) -> None:
        self.module, self.size = module, len(x_ni)
        self.x_ni, self.y_no, self.test_x_qi, self.test_y_qo = x_ni, y_no, test_x_qi, test_y_qo
        self.tracked: Tracked = _track(module, layers)
        with torch.no_grad():
            self._h_s_no = module(x_ni)

    def divergences(self) -> Iterator[Tensor]:
        yield (self.module(self.x_ni) - self._h_s_no).square().sum() / (2 * self.size)

    def loss(self, point: int) -> Tensor:
        return (self.module(self.x_ni[point]) - self.y_no[point]).square().sum() / 2

    @torch.no_grad()
    def measure(self) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (
            -(self.module(self.test_x_qi) - self.test_y_qo).square().sum(dim=1).double().div(2).cpu().numpy()
        )
        return values
