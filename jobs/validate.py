"""Judge EK-FAC on a small model: its scores, and its rivals', against the damped inverse solved by conjugate gradients.

python jobs/validate.py model=demo corpus=demo queries=demo output=runs/validate
"""

import logging

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.report.against_cg import show
from infscan.studies.against_cg import validate
from infscan.studies.validation import ValidateJob
from infscan.telemetry import configure_logs, sentences

ConfigStore.instance().store(name="validate_schema", node=ValidateJob)
log = logging.getLogger("infscan")


@hydra.main(version_base=None, config_path="../conf", config_name="validate")
def main(cfg: DictConfig) -> None:
    with sentences():
        configure_logs()
        config = from_hydra(cfg)
        assert isinstance(config, ValidateJob)
        _, table, facts = validate(config, log.info)
        show(table, facts)
        print(f"\nBy query: {config.output}/validate/against_cg.parquet")


if __name__ == "__main__":
    main()
