"""What a whole job holds, driver and rank, forecast and measured: docs/sizing.md has the table.

python benchmarks/job_memory.py [--only NUMBER ...]     (`make bench`)

For each setting a process of its own is the driver of a run on a local Ray with one worker of one rank: a random model,
random tokens, every step from preparing to publishing. Measured are both processes' highest resident memory (Linux);
forecast is what the run prints, beside each process as it was before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from memory import resident, shape
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

RESULTS = Path(__file__).parent / "results" / "job_memory.json"


@dataclass(frozen=True)
class Setting:
    family: str
    d: int
    blocks: int
    vocab: int
    T: int
    tokens_per_batch: int
    queries: int
    sequences: int

    def words(self, folder: Path) -> list[str]:
        """The command's settings."""
        return [
            f"model.path={folder / 'model'}",
            f"corpus.path={folder / 'corpus.jsonl'}",
            "corpus.tokens_field=tokens",
            "corpus.packing=document",
            "corpus.bos=false",
            f"corpus.sequence_length={self.T}",
            f"queries.path={folder / 'queries.jsonl'}",
            f"factors.num_sequences={2 * self.tokens_per_batch // self.T}",
            "factors.slices=2",
            "scan.check_sequences=8",
            "scan.top_k=10",
            f"scan.tokens_per_batch={self.tokens_per_batch}",
            "cluster.num_workers=1",
            "cluster.cpus_per_rank=1",
            f"output={folder / 'run'}",
        ]

    def write(self, folder: Path) -> None:
        set_seed(0)
        model = AutoModelForCausalLM.from_config(shape(self.family, self.d, self.blocks, self.vocab, self.T))
        model.save_pretrained(folder / "model")
        made = np.random.default_rng(0)

        def ids(n: int) -> list[int]:
            return made.integers(1, self.vocab, n).tolist()

        corpus = [{"id": f"d{row}", "tokens": ids(self.T)} for row in range(self.sequences)]
        queries = [{"id": f"q{row}", "input_ids": ids(24), "prompt_len": 16} for row in range(self.queries)]
        for name, rows in (("corpus", corpus), ("queries", queries)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SETTINGS = (
    Setting("gpt_neox", 256, 4, 4096, 128, 2048, 8, 48),
    Setting("llama", 384, 4, 16000, 128, 1024, 12, 32),
    Setting("gpt2", 512, 2, 8192, 128, 2048, 16, 48),
)


def measured(folder: Path, setting: Setting) -> dict[str, Any]:
    """Run it; what both processes held, and what was forecast of them. In a process of its own."""
    from infscan.api import settings_of_call
    from infscan.model.architecture import describe
    from infscan.pipeline import answer
    from infscan.results.read import read_summary
    from infscan.sizing.hosts import LIBRARIES_BYTES, host_memory
    from infscan.sizing.memory import largest, pass_costs

    config = settings_of_call("scan", tuple(setting.words(folder)), {})
    before = resident("VmRSS")
    answer(config)
    peak = resident("VmHWM")
    ((rank,),) = read_summary(config.output)["workers"]["ranks"]
    architecture = describe(config.model.path, config.model.tracked)
    costs = pass_costs(config, architecture, setting.queries, setting.T, 0.0)
    hosts = host_memory(config, architecture.layers, setting.queries, setting.T, 3, 4)
    name, most = largest(costs)
    return {
        "driver": {"before": before, "peak": peak, "forecast": before + LIBRARIES_BYTES + hosts.driver},
        "rank": {
            "before": rank["process_bytes"],
            "peak": rank["peak_bytes"],
            "forecast": rank["process_bytes"] + LIBRARIES_BYTES + most.total,
            "largest": {"pass": name} | vars(most),
        },
    }


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "SETTING"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(SETTINGS)), help="numbers of settings, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of what was found")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(Path(options.child[0]), SETTINGS[int(options.child[1])])))
        return
    rows = []
    for number in options.only:
        with tempfile.TemporaryDirectory() as name:
            SETTINGS[number].write(Path(name))
            command = [sys.executable, __file__, "--child", name, str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
        rows.append(vars(SETTINGS[number]) | json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("model", "process", "before, MiB", "forecast, MiB", "peak, MiB", "forecast / peak")
    for row in rows:
        model = f"{row['family']} d={row['d']} x {row['blocks']}, V={row['vocab']}"
        for process in ("driver", "rank"):
            found = row[process]
            mib = [f"{found[key] / 2**20:,.0f}" for key in ("before", "forecast", "peak")]
            table.add_row(model, process, *mib, f"{found['forecast'] / found['peak']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
