"""Models of random weights in real shapes: what a pass takes beside its floor, the forward and the activation-gradient
backward alone, which nothing that scores gradients can do without."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from infscan.config import Config, Dtype
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries
from infscan.model.architecture import Architecture, describe, load_config
from infscan.model.loaded import LoadedModel, RankContext
from infscan.model.worker import Batch, LayerConsumer, ModelWorker, WorkerSettings
from infscan.sizing.dry import Dry
from infscan.sizing.memory import DryWorker, scan_cost
from infscan.steps.factors import CovarianceSums, lambda_consumer, lambda_sums
from infscan.steps.scan import scoring
from tests.gpu.kit.device import host_waits, is_cuda, peak_bytes, release, seconds


@dataclass(frozen=True)
class Shape:
    """A Llama. T, tokens: of a sequence, and of a micro-batch."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    T: int = 512
    tokens: int = 4096

    def write(self, folder: Path) -> Path:
        """config.json alone, which is all that a random model needs."""
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": self.vocab,
            "hidden_size": self.width, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 8 * self.T, "tie_word_embeddings": self.tied, "rms_norm_eps": 1e-5,
            "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16",
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder


SHAPES = (
    Shape("8b", 32, 4096, 14336, 32, 8, 128256),
    Shape("1b", 16, 2048, 8192, 32, 8, 128256, tied=True),
    Shape("160m", 12, 768, 2048, 12, 12, 32000),
)
SMALL = Shape("small", 2, 64, 128, 4, 2, 512, T=64, tokens=256)
# (queries, rank) of a scan: the last is what `scan.rank=auto` allots to many queries, on average.
SCANS = ((10, 32), (256, 32), (1000, 8))


class Bench:
    """A shape on a device."""

    def __init__(self, shape: Shape, device: str, folder: Path) -> None:
        self.shape, self.device = shape, device
        self.dtype = Dtype.bfloat16 if is_cuda(device) else Dtype.float32
        self.config = Config()
        self.config.model.path, self.config.model.dtype = str(shape.write(folder)), self.dtype
        self.config.scan.tokens_per_batch = shape.tokens
        # Every layer in columns, in the plan as in what is measured.
        self.config.scan.query_group_bytes = 1
        self.architecture: Architecture = describe(str(folder), "mlp", weights=False)

    @cached_property
    def worker(self) -> ModelWorker:
        """A rank whose model is made on its device, not read."""
        settings = WorkerSettings(self.config.model, self.architecture.layers, sharded=False)
        worker = ModelWorker(settings, RankContext(device="meta"))
        worker.context = RankContext(device=self.device, threads=torch.get_num_threads())
        module = random_module(Path(self.architecture.folder), self.device, worker.model.dtype)
        size = sum(parameter.numel() for parameter in module.parameters())
        kind = {"head_is_last": True, "on_gpu": is_cuda(self.device)}
        worker.model = LoadedModel(module, worker.context, worker.model.dtype, size, size, **kind)
        return worker

    @cached_property
    def batch(self) -> Batch:
        B, T = self.shape.tokens // self.shape.T, self.shape.T
        made = torch.Generator().manual_seed(0)
        ids_bt = torch.randint(1, self.shape.vocab, (B, T), generator=made).to(self.device)
        return Batch(np.arange(B), ids_bt, torch.ones(B, T, dtype=torch.bool, device=self.device), padded=False)

    @cached_property
    def floor_flop(self) -> float:
        """Of a token's forward and activation-gradient backward, as the plan counts it."""
        cost = self._planned(1, 1)
        return cost.flop_per_token - cost.own_flop_per_token

    @cached_property
    def floor_s(self) -> float:
        """Seconds of a micro-batch, the least: what is told in floors, or apart from one, is not to hold another job's
        noise."""
        return seconds(self._pass((), _nothing), self.device)["min_s"]

    def close(self) -> None:
        """Give the device's memory back."""
        self.__dict__.pop("worker", None)
        self.__dict__.pop("batch", None)
        release(self.device)

    def floor(self, peak_flops: float | None) -> Iterator[dict[str, Any]]:
        """Tokens per second; of the peak, what 4 N a token make (MFU), N without embeddings."""
        run = self._pass((), _nothing)
        found = seconds(run, self.device)
        self.floor_s = found["min_s"]
        tokens_per_s = self.shape.tokens / found["median_s"]
        N = self.architecture.parameters - self.shape.vocab * self.shape.width * (not self.shape.tied)
        yield {
            "model": self.shape.name, "dtype": self.dtype.value, "tokens": self.shape.tokens, **found,
            "tokens_per_s": tokens_per_s, "flops": tokens_per_s * self.floor_flop,
            "mfu": tokens_per_s * 4 * N / peak_flops if peak_flops else None,
            "host_waits": host_waits(run, self.device), "peak": peak_bytes(run, self.device),
        }  # fmt: skip

    def scan(self, queries: int, rank: int) -> Iterator[dict[str, Any]]:
        """The scan with so many queries: in floors, and its memory as planned and as taken."""
        laid_out = self._laid_out(queries, rank)
        scores_bq = torch.zeros(len(self.batch.rows), queries, device=self.device)
        run = self._pass(self.architecture.layers, scoring(scores_bq, laid_out))
        found, cost = seconds(run, self.device), self._planned(queries, rank)
        own_s = found["min_s"] - self.floor_s
        peak, predicted = peak_bytes(run, self.device), cost.memory.total
        yield {
            "model": self.shape.name, "queries": queries, "rank": rank, **found,
            "floors": found["min_s"] / self.floor_s, "tokens_per_s": self.shape.tokens / found["median_s"],
            "own_flops": self.shape.tokens * cost.own_flop_per_token / own_s if own_s > 0 else None,
            "host_waits": host_waits(run, self.device), "peak": peak, "predicted": predicted,
            "predicted_over_peak": predicted / peak if peak else None,
        }  # fmt: skip

    def covariance(self, blocks: int) -> Iterator[dict[str, Any]]:
        """A and S of the first blocks' layers, counted for all of them."""
        layers = self._first(blocks)
        sums = CovarianceSums(layers, 1, torch.float32, self.device)
        with multiplying("exact"):
            yield self._fitted("covariance", "moments", layers, sums.consumer(self.batch))

    def lambda_(self, blocks: int, matmul: Multiply) -> Iterator[dict[str, Any]]:
        """Lambda of the first blocks' layers in random bases, counted for all of them."""
        layers = self._first(blocks)
        bases = {one.name: (self._basis(one.outputs), self._basis(one.inputs)) for one in layers}
        consume = lambda_consumer(lambda_sums(layers, torch.float32, self.device), bases, matmul)
        with multiplying("exact"):
            yield self._fitted("lambda", "tf32" if matmul == "tf32" else "float32", layers, consume)

    def _fitted(self, name: str, products: str, layers: tuple[Layer, ...], consume: LayerConsumer) -> dict[str, Any]:
        run = self._pass(layers, consume)
        found = seconds(run, self.device)
        own_s = found["min_s"] - self.floor_s
        whole_s = own_s * len(self.architecture.layers) / len(layers)
        return {
            "model": self.shape.name, "pass": name, "products": products, "layers": len(layers), **found,
            "floors": 1 + whole_s / self.floor_s,
            "own_flops": self._own_flop(layers, consume) / own_s if own_s > 0 else None,
            "host_waits": host_waits(run, self.device),
        }  # fmt: skip

    def _own_flop(self, layers: Sequence[Layer], consume: LayerConsumer) -> float:
        """Of a micro-batch, what a consumer multiplies: counted while it runs once."""
        seen = Dry()

        def counting(layer: Layer, s_bto: torch.Tensor, a_bti: torch.Tensor, routed: Routed | None) -> None:
            with seen:
                consume(layer, s_bto, a_bti, routed)

        self._pass(layers, counting)()
        return float(seen.flop)

    def _pass(self, layers: Sequence[Layer], consume: LayerConsumer) -> Callable[[], object]:
        batch, worker = self.batch, self.worker
        return lambda: worker.backward(batch, layers, batch.loss(), consume, ones=False)

    def _first(self, blocks: int) -> tuple[Layer, ...]:
        return self.architecture.layers[: 3 * blocks]

    def _basis(self, n: int) -> BlockDiagonal:
        return BlockDiagonal((torch.randn(n, n, device=self.device) / n**0.5,))

    def _laid_out(self, queries: int, rank: int) -> Mapping[str, LayerQueries]:
        """Random columns for every layer."""
        dtype = self.worker.model.dtype

        def columns(n: int) -> torch.Tensor:
            return torch.randn(queries * rank, n, dtype=dtype, device=self.device)

        return {
            one.name: LayerQueries.factored(columns(one.outputs), columns(one.inputs), (rank,) * queries)
            for one in self.architecture.layers
        }

    def _planned(self, queries: int, rank: int) -> Any:
        self.config.scan.rank = rank
        sized = DryWorker(self.config, self.architecture, self.shape.T, float(is_cuda(self.device)))
        return scan_cost(sized, queries)


def _nothing(layer: Layer, s_bto: torch.Tensor, a_bti: torch.Tensor) -> None:
    return None


def random_module(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A model of small random weights, norms at one, made on the device."""
    with torch.device(device), no_init_weights():
        module = AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype, attn_implementation="sdpa")
    module.tie_weights()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return module.to(device).requires_grad_(False).eval()
