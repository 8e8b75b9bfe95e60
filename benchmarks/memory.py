"""What a scan holds above its model, predicted from shapes alone and measured: docs/sizing.md has the table.

python benchmarks/memory.py        (`make bench`)

One process per setting: it loads the model, notes its resident memory, scans a shard, and reads the highest resident
memory since (Linux: VmHWM, reset before the scan). Predicted: `infscan.sizing.memory`, the number a run prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from floor import SHARD, prepare_corpus
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig, set_seed
from transformers.utils.logging import disable_progress_bar

from infscan.config import Config, Dtype
from infscan.corpus.addressable import CorpusAddress
from infscan.influence.layout import Factored, Spectrum, lay_out, plan_layouts
from infscan.influence.topk_tracker import TopKTracker
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.sizing.memory import DryWorker, scan_cost
from infscan.steps.scan import ScanTask, scan_task
from infscan.storage import Store

RESULTS = Path(__file__).parent / "results" / "memory.json"
RANK = 32
# family, d, blocks, vocabulary, T, tokens per batch, queries, dtype, gradient checkpointing
SETTINGS = (
    ("gpt_neox", 256, 4, 4096, 256, 4096, 10, "float32", False),
    ("gpt_neox", 512, 6, 4096, 256, 4096, 10, "float32", False),
    ("gpt_neox", 512, 6, 4096, 256, 4096, 100, "float32", False),
    ("gpt_neox", 512, 6, 4096, 256, 8192, 10, "float32", False),
    ("gpt_neox", 512, 6, 50304, 512, 4096, 10, "float32", False),
    ("gpt_neox", 512, 6, 4096, 256, 8192, 10, "float32", True),
    ("llama", 512, 6, 32000, 512, 4096, 10, "float32", False),
    ("gpt2", 512, 6, 4096, 256, 4096, 10, "float32", False),
    ("gpt_neox", 1024, 6, 4096, 512, 4096, 10, "float32", False),
)


def shape(family: str, d: int, blocks: int, vocab: int, T: int) -> PretrainedConfig:
    heads = max(1, d // 64)
    if family == "gpt2":
        return GPT2Config(vocab_size=vocab, n_embd=d, n_layer=blocks, n_head=heads, n_positions=T, bos_token_id=0, eos_token_id=0)  # fmt: skip # noqa: E501
    kind = GPTNeoXConfig if family == "gpt_neox" else LlamaConfig
    return kind(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=T,
        bos_token_id=0,
        eos_token_id=0,
    )


def configuration(folder: Path, setting: tuple) -> Config:
    config = Config()
    config.model.path, config.scan.tokens_per_batch, config.scan.rank = str(folder / "model"), setting[5], RANK
    config.model.dtype, config.model.gradient_checkpointing = Dtype(setting[7]), setting[8]
    return config


def resident(field: str) -> int:
    """A field of this process's status, in bytes: VmRSS now, VmHWM the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: Linux only")


def measured(folder: Path, setting: tuple) -> int:
    """Bytes above the loaded model that a scan of one shard takes at most; in a process of its own."""
    _, _, _, vocab, T, budget, Q, _, _ = setting
    config = configuration(folder, setting)
    architecture = describe(config.model.path, "mlp")
    store = Store("memory://bench-memory/corpus")
    sequences = 2 * max(1, budget // T)
    prepare_corpus(SimpleNamespace(seed=0, vocab=vocab, length=T, sequences=sequences), folder, store)
    rng = np.random.default_rng(0)

    def columns(n: int) -> np.ndarray:
        return rng.standard_normal((Q * RANK, n), np.float32)

    batch = {
        layer.name: Factored(columns(layer.outputs), columns(layer.inputs), (RANK,) * Q)
        for layer in architecture.layers
    }
    spectra = {layer.name: Spectrum.largest(Q, RANK) for layer in architecture.layers}
    batch = lay_out(batch, plan_layouts(spectra, architecture.layers, T, config.query_group_bytes // 4))
    rank = ModelWorker(WorkerSettings(config.model, architecture.layers, sharded=False), RankContext(threads=2))
    task = ScanTask(
        run=Store("memory://bench-memory/run"),
        corpus=CorpusAddress(store),
        shard=SHARD,
        sequence_ids=np.arange(sequences),
        query_ids=tuple(f"q{n}" for n in range(Q)),
        query_batch="random",
        sides=config.sides,
        candidates=config.candidates,
        thresholds=TopKTracker(Q, config.sides, config.candidates).thresholds,
        tokens_per_batch=budget,
        dense=False,
        fingerprint="random",
    )
    rank.read(task.corpus, task.sequence_ids[:1])
    # What libraries set up once, on the first matrix product, belongs to the process.
    with torch.no_grad():
        rank.model.logits(torch.zeros(1, 2, dtype=torch.int64))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    scan_task(rank, task, batch)
    return resident("VmHWM") - before


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "SETTING"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings, from 0")
    options = parser.parse_args()
    if options.child:
        folder, setting = Path(options.child[0]), SETTINGS[int(options.child[1])]
        print(measured(folder, setting))
        return
    rows = []
    columns = ("family", "d", "blocks", "V", "T", "tokens/batch", "queries", "dtype", "checkpointing")
    for number in options.only or range(len(SETTINGS)):
        setting = SETTINGS[number]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            set_seed(0)
            AutoModelForCausalLM.from_config(shape(*setting[:5])).save_pretrained(folder / "model")
            config = configuration(folder, setting)
            architecture = describe(config.model.path, "mlp", weights=False)
            memory = scan_cost(DryWorker(config, architecture, setting[4], 0.0), setting[6]).memory
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, str(number)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = int(done.stdout.split()[-1])
        row = dict(zip(columns, setting, strict=True))
        rows.append(row | {"weights": memory.weights, "predicted": memory.above_model, "measured": found})
        print(rows[-1], file=sys.stderr, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    if not options.only:
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("model", "tokens/batch", "queries", "predicted MiB", "measured MiB", "predicted / measured")
    for row in rows:
        model = f"{row['family']} d={row['d']} x {row['blocks']}, V={row['V']}, T={row['T']}, {row['dtype']}"
        model += ", checkpointing" if row["checkpointing"] else ""
        table.add_row(
            model, f"{row['tokens/batch']:,}", str(row["queries"]), f"{row['predicted'] / 2**20:,.0f}",
            f"{row['measured'] / 2**20:,.0f}", f"{row['predicted'] / row['measured']:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
