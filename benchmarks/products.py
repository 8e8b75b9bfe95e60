"""What products with the Gauss-Newton matrix cost: in floors, by vectors multiplied at once; in memory, by length.

python benchmarks/products.py                  the floors
python benchmarks/products.py --length 8192    the peak memory of one product, and of a sequence's own tokens explained,
                                               at that length; with --plain with attention in plain operations
python benchmarks/products.py --targets        what taking rows apart by target costs beside refining them: rows that 12
                                               questions share, and rows of one question (the demo's model)

The floor is a forward and an activation-gradient backward, as in benchmarks/floor.py. Processor seconds, best of three.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from infscan.config import Dtype, ModelConfig
from infscan.corpus.sequences import Sequence
from infscan.model import attention_blocks
from infscan.model.architecture import describe
from infscan.model.folder import model_folder
from infscan.model.gauss_newton import GaussNewton
from infscan.model.loaded import RankContext
from infscan.model.losses import Loss
from infscan.model.measure import next_tokens
from infscan.model.token_influence import own_tokens
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.steps.refine import score_pairs
from infscan.steps.targets import pair_targets

VOCAB = 512


def opened(width: int, layers: int, length: int, vocab: int = VOCAB) -> ModelWorker:
    with tempfile.TemporaryDirectory() as folder:
        config = GPTNeoXConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=length,
        )
        torch.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
        settings = WorkerSettings(ModelConfig(folder, Dtype.float32), describe(folder, "mlp").layers, sharded=False)
        return ModelWorker(settings, RankContext())


def sequences(count: int, length: int) -> list[Sequence]:
    draw = np.random.default_rng(0)
    return [Sequence(number, draw.integers(0, VOCAB, length), (), 0, "") for number in range(count)]


def seconds(function: Callable[[], object]) -> float:
    function()
    found = []
    for _ in range(3):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def floors() -> None:
    worker, some = opened(256, 4, 128, 1024), sequences(8, 128)

    def floor() -> None:
        for batch in worker.batches(some, 1024):
            worker.backward(batch, [], Loss(*next_tokens(batch.ids_bt, batch.mask_bt)), lambda *_: None)

    least, ggn = seconds(floor), GaussNewton(worker, some, 1024)
    for count in (1, 2, 4, 8):
        x_kp = torch.randn(count, ggn.size)
        spent = seconds(lambda x_kp=x_kp: ggn.product(x_kp)) / least
        print(f"{count} vectors: {spent:.2f} floors, {spent / count:.2f} a vector", flush=True)


def targets(wanted: list[tuple[int, ...]], apart: int) -> None:
    """wanted: by row, its questions. apart: so many rows are taken apart, all are refined."""
    folder = str(model_folder("infscan://demo/model"))
    settings = WorkerSettings(ModelConfig(folder, Dtype.float32), describe(folder, "mlp").layers, sharded=False)
    worker, layers, rows = ModelWorker(settings, RankContext()), settings.layers, sequences(len(wanted), 64)
    P = {layer.name: torch.randn(12, layer.outputs, layer.inputs) for layer in layers}
    refined = seconds(lambda: score_pairs(worker, rows, wanted, layers, P, 4096, lambda *_: None))
    spent = seconds(lambda: pair_targets(worker, rows[:apart], wanted[:apart], layers, P, 4096))

    def alone() -> None:
        for query in wanted[0]:
            pair_targets(worker, rows[:apart], [(query,)] * apart, layers, P, 4096)

    both, one_by_one = 1 + spent / refined, 1 + seconds(alone) / refined
    print(
        f"{len(wanted)} rows refined for {len(wanted[0])} questions, {apart} taken apart: {refined:.2f} s, together "
        f"{both:.2f} times that; question by question {one_by_one:.2f} times",
        flush=True,
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(length: int, plain: bool) -> None:
    if plain:
        attention_blocks.BLOCK = 1 << 62
    worker, some = opened(64, 1, length), sequences(1, length)
    ggn = GaussNewton(worker, some, length)
    print(f"{length} tokens: {peak():.2f} GiB before", flush=True)
    began = time.process_time()
    ggn.product(torch.randn(1, ggn.size))
    print(f"a product: {peak():.2f} GiB at most, {time.process_time() - began:.0f} s", flush=True)
    began = time.process_time()
    P = {layer.name: torch.randn(1, layer.outputs, layer.inputs) for layer in worker.layers}
    own_tokens(worker, some[0], worker.layers, P, [0])
    print(f"own tokens explained: {peak():.2f} GiB at most, {time.process_time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--targets", action="store_true")
    asked = parser.parse_args()
    if asked.targets:
        targets([tuple(range(12))] * 32, 32)
        targets([tuple(range(12))] * 64, 16)
        targets([(0,)] * 64, 16)
    elif asked.length:
        memory(asked.length, asked.plain)
    else:
        floors()
