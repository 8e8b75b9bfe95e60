"""Stores of gradients by bergson, for benchmarks/index_lds.py, in an environment of its own.

python run_bergson_index.py FOLDER [--widths 11 16 22 32]; FOLDER: model/, scanned.jsonl and queries.jsonl, as
index_lds.py writes them. Of the MLP layers, each gradient projected on both sides to `width` columns as bergson does
it, it writes scores [Q, N] for every width:

- store-<width>.npy: inner products of what `bergson build` stores of queries and of what is scanned;
- preconditioned-<width>.npy: the same with the inverse of the stored gradients' second moment (its `autocorrelation`),
  which is LoGra's score;
- trackstar-<width>.npy: its pipeline `trackstar`, cosines of gradients whitened by that moment (of the scanned alone).

Prints a line of JSON: seconds by phase, and a stored row's bytes by width.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from bergson.build import build, build_query
from bergson.cli.trackstar import trackstar
from bergson.config.config import (
    DataConfig,
    DistributedConfig,
    HessianConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
)
from bergson.data import load_gradients, load_scores
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.score.score import score_dataset
from shared import Phases, arguments


def main() -> None:
    # A micro-batch of more tokens than the model's context, 64 here, is refused.
    options = arguments(__doc__, tokens_per_batch=64, widths=[11, 16, 22, 32])
    phases, sizes = Phases(), {}
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    queries = QuerySetConfig(dataset=str(options.folder / "queries.jsonl"), aggregation="none")

    def scores_of(folder: Path) -> np.ndarray:
        return load_scores(folder)[:].astype(np.float32).T

    for width in options.widths:

        def index(name: str, width: int = width) -> IndexConfig:
            return IndexConfig(
                run_path=str(output / f"{name}-{width}"),
                model=str(options.folder / "model"),
                data=DataConfig(dataset=str(options.folder / "scanned.jsonl")),
                distributed=DistributedConfig(nproc_per_node=1),
                token_batch_size=options.tokens_per_batch,
                filter_modules="*attention*",
                projection_dim=width,
                overwrite=True,
            )

        with phases.timed(f"build {width}"):
            build(index("stored"), PreprocessConfig())
            build_query(index("query"), queries, PreprocessConfig())
        stored, asked = (load_gradients(output / f"{name}-{width}") for name in ("stored", "query"))
        sizes[width] = stored.shape[1] * stored.dtype.itemsize
        np.save(output / f"store-{width}.npy", asked.astype(np.float32) @ stored.astype(np.float32).T)
        with phases.timed(f"preconditioned {width}"):
            approximate_hessians(index("hessian"), HessianConfig(method="autocorrelation"))
            score_dataset(
                index("scores"),
                ScoreConfig(query_path=str(output / f"query-{width}"), higher_is_better=True),
                PreprocessConfig(hessian_path=str(output / f"hessian-{width}")),
            )
        np.save(output / f"preconditioned-{width}.npy", scores_of(output / f"scores-{width}"))
        with phases.timed(f"trackstar {width}"):
            config = TrackstarConfig(
                query=queries, preprocess_cfg=PreprocessConfig(unit_normalize=True), mix_hessians=False
            )
            trackstar(index("trackstar"), config)
        np.save(output / f"trackstar-{width}.npy", scores_of(output / f"trackstar-{width}" / "scores"))
    print(json.dumps({"seconds": phases.seconds, "bytes": sizes}))


if __name__ == "__main__":
    main()
