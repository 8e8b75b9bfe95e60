"""Why does this sequence count? Rows of a finished run, or any text, by layer and by token of either side.

python jobs/explain.py run=runs/demo query_ids=[astrobia] rows=2
python jobs/explain.py run=runs/demo query_ids=[astrobia] name=mine text='"The President of Astrobia was Zorlad Pfaff."'
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import absolute, of_finished
from infscan.report.explanation import show_explanation
from infscan.steps.explain import ExplainJob, explain
from infscan.steps.finished import reopen
from infscan.telemetry import command, sentences

ConfigStore.instance().store(name="explain_schema", node=ExplainJob)


@hydra.main(version_base=None, config_path="../conf", config_name="explain")
def main(cfg: DictConfig) -> None:
    with sentences():
        job = of_finished(cfg, ExplainJob)
        job.run = absolute(job.run)
        job.check()
        with reopen(job.run, job.cluster) as run:
            tables = explain(run, job)
        show_explanation(tables, {query.id: query for query in run.queries})
        print(f"\nAll of it as Parquet: {job.folder}/")


if __name__ == "__main__":
    command(main)
