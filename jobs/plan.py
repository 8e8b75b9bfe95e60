"""What would a scan cost? Work, hours, memory, bytes and money, before anything runs; arguments as for jobs/scan.py.

python jobs/plan.py model=pythia-1b corpus.path=s3://bucket/pile/ queries.path=queries.jsonl plan.device=h100
python jobs/plan.py model=shape-52b plan.sequences=10000000 plan.queries=100 plan.device=h100 cluster.ranks_per_worker=8
"""

import json

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.sizing.plan import PlanJob, estimate
from infscan.sizing.show import show
from infscan.telemetry import command, sentences

ConfigStore.instance().store(name="plan_schema", node=PlanJob)
OPTIONAL = ("corpus.path", "factors.corpus.path", "queries.path")


@hydra.main(version_base=None, config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    with sentences():
        config = from_hydra(cfg, unused=OPTIONAL)
        assert isinstance(config, PlanJob)
        found = estimate(config)
        if config.plan.json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            show(found, config)


if __name__ == "__main__":
    command(main)
