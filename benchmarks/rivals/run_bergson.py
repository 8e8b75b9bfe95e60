"""The job of benchmarks/whole_job.py by bergson, in its own environment: python run_bergson.py FOLDER [...].

FOLDER: model/, fit.jsonl, scanned.jsonl and queries.jsonl, as whole_job.py writes them. Prints a line of JSON, seconds
by phase; writes scores.npy, [Q, N]. Its own steps in its own order (`bergson.hessians.pipeline`), with the factors
fitted on fit.jsonl instead of on all that is scored: EK-FAC with sampled labels, relative damping 0.1, MLP layers.
"""

from __future__ import annotations

import numpy as np
from bergson.build import build_query
from bergson.config.config import (
    DataConfig,
    DistributedConfig,
    HessianConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.distributed import launch_distributed_run
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.score.score import score_dataset
from bergson.utils.step_state import partial_path, promote_step
from shared import Phases, arguments


def main() -> None:
    options = arguments(__doc__, tokens_per_batch=2048)
    phases = Phases()

    def index(name: str, rows: str) -> IndexConfig:
        return IndexConfig(
            run_path=str(options.output / name),
            model=str(options.folder / "model"),
            data=DataConfig(dataset=str(options.folder / f"{rows}.jsonl")),
            distributed=DistributedConfig(nproc_per_node=1),
            token_batch_size=options.tokens_per_batch,
            filter_modules="*attention*",
            overwrite=True,
        )

    hessian = HessianConfig(method="kfac", ev_correction=True)
    inversion = InversionConfig(damping_factor=0.1)
    with phases.timed("queries"):
        queries = QuerySetConfig(dataset=str(options.folder / "queries.jsonl"), aggregation="none")
        build_query(index("query", "queries"), queries, PreprocessConfig())
    with phases.timed("factors"):
        approximate_hessians(index("hessian/kfac", "fit"), hessian)
    with phases.timed("inverse"):
        solved = options.output / "solved"
        config = EkfacConfig(
            hessian_method_path=str(options.output / "hessian/kfac"),
            gradient_path=str(options.output / "query"),
            run_path=str(partial_path(str(solved))),
            ev_correction=True,
        )
        launch_distributed_run("apply_hessian", apply_worker, [config, inversion], DistributedConfig(nproc_per_node=1))
        promote_step(str(solved))
    with phases.timed("scan"):
        score_dataset(
            index("scores", "scanned"),
            ScoreConfig(query_path=str(solved), higher_is_better=True),
            PreprocessConfig(),
        )
    np.save(options.output / "scores.npy", load_scores(options.output / "scores")[:].astype(np.float32).T)
    phases.show()


if __name__ == "__main__":
    main()
