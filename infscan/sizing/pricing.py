"""How a run's phases are counted: what is read, in which dtype, and what a pass over it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from infscan.config import Config, Matmul
from infscan.influence.layers import Layer
from infscan.model.suffix import last_blocks, suffixes
from infscan.sizing.hours import AS_REFINED, Work
from infscan.sizing.memory import PassCost
from infscan.steps.factor_files import layer_groups, products


@dataclass(frozen=True)
class Counted:
    """The sequences that a pass reads. how: `exact`, `given`, or what was sampled.

    sequences, tokens: of the selection. T: tokens of the longest. slices: (sequences, longest) of the factors' slices.
    """

    sequences: int
    tokens: int
    T: int
    how: str = "exact"
    slices: tuple[tuple[int, int], ...] = ()
    prepared_bytes: int = 0


def share(counted: Counted, sequences: int) -> int:
    """Tokens of so many of the sequences."""
    return round(counted.tokens * sequences / max(1, counted.sequences))


@dataclass(frozen=True)
class Dtypes:
    """What a run multiplies in: its model, where it scores again, and its queries; and whether on a GPU."""

    model: str
    refine: str
    queries: str
    gpu: bool

    def products(self, name: str, config: Config) -> str:
        """How a pass multiplies what it adds to the model's forward and backward (`Rates.products`)."""
        if name in ("scan", "sieve"):
            return self.queries
        if name == "check":
            return self.model
        if name == "covariance":
            return "moments" if self.gpu and self.model == "bfloat16" else "float32"
        return "tf32" if self.gpu and config.factors.matmul is Matmul.tf32 else "float32"


@dataclass(frozen=True)
class Pricing:
    """A run as its phases are counted."""

    config: Config
    layers: Sequence[Layer]
    costs: Mapping[str, PassCost]
    dtypes: Dtypes
    parameters: int = 0
    shards: int = 0

    def work(self, name: str, sequences: int, tokens: int, times: int = 1) -> Work:
        """A pass that goes over the same tokens so many times, forward and back each time."""
        own = tokens * self.costs[name].own_flop_per_token
        # A dry run's own part is of the largest layer group. Over all of them, every layer counts once.
        own *= self.share_of_largest if name in ("covariance", "lambda") else times
        forward = times * tokens * self.forward_and_backward(name)
        return self.priced(Work(name, times * sequences, times * tokens, forward + own, own_flop=own))

    def forward_and_backward(self, name: str) -> float:
        """FLOP of a token in the model's own forward and backward of a pass."""
        cost = self.costs[name]
        return cost.flop_per_token - cost.own_flop_per_token

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        factors = self.config.factors
        return layer_groups(self.layers, self.config.group_bytes, factors.blocks)

    @property
    def share_of_largest(self) -> float:
        """All layers' products of a factors' pass over those of the largest group."""
        by_name = {layer.name: layer for layer in self.layers}

        sizes = [sum(products(by_name[name]) for name in names) for names in self.groups]
        return sum(sizes) / max(sizes)

    @property
    def sieved(self) -> float:
        """The share of the tracked products that a sieve's backward has; of scan.sieve=auto the longest that it
        tries."""
        blocks = self.config.scan.sieve
        if isinstance(blocks, str):
            blocks = max(suffixes(self.layers), default=None)
        mine = self.layers if blocks is None else last_blocks(self.layers, blocks)
        return sum(layer.size for layer in mine) / sum(layer.size for layer in self.layers)

    def priced(self, work: Work) -> Work:
        """With what it moves and waits for."""
        dtype = self.dtypes.refine if work.name in AS_REFINED else self.dtypes.model
        return replace(
            work, dtype=dtype, products=self.dtypes.products(work.name, self.config), gathered=self._gathered(work)
        )

    def _gathered(self, work: Work) -> float:
        """Weights that each rank of a sharded worker receives: once forward and once back in a micro-batch, and once
        more where activations are made again; a sieve's backward those of its blocks."""
        config, ranks = self.config, self.config.cluster.ranks_per_worker
        if ranks < 2:
            return 0.0
        batches = work.tokens / config.tokens_per_batch / (config.cluster.num_workers or 1) / ranks
        times = 3.0 if config.model.gradient_checkpointing else 2.0
        if work.name == "sieve":
            times = 1 + (times - 1) * self.sieved
        itemsize = 4 if self.dtypes.model == "float32" else 2
        return batches * times * self.parameters * itemsize * (ranks - 1) / ranks
