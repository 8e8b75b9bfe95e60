"""Judge EK-FAC on a small model: its scores, and its rivals', against a ground truth.

python jobs/validate.py model=demo corpus=demo queries=demo output=runs/validate      # conjugate gradients
python jobs/validate.py truth=pbrf validate.curvature_sequences=300 output=...        # responses of the same model
python jobs/validate.py truth=pbrf_regression output=...                          # responses of an MLP on invented data
python jobs/validate.py truth=coverage truth.run=... truth.filter=... output=...  # what jobs/tfidf.py keeps of a scan
Retraining has a job of its own: jobs/lds.py.
"""

import logging

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.report.validation import show, show_coverage
from infscan.studies import against_cg, against_pbrf, coverage, regression
from infscan.studies.validation import CoverageConfig, PbrfConfig, RegressionConfig, Truth, TruthConfig, ValidateJob
from infscan.telemetry import command, configure_logs, sentences

ConfigStore.instance().store(name="validate_schema", node=ValidateJob)
for schema in (TruthConfig, PbrfConfig, RegressionConfig, CoverageConfig):
    ConfigStore.instance().store(group="truth", name=f"{schema.name.value}_schema", node=schema)
STUDIES = {
    Truth.cg: (against_cg.validate, "against_cg", show),
    Truth.pbrf: (against_pbrf.validate, "against_pbrf", show),
    Truth.pbrf_regression: (regression.validate, "against_pbrf_regression", show),
    Truth.coverage: (coverage.validate, coverage.NAME, show_coverage),
}
log = logging.getLogger("infscan")


@hydra.main(version_base=None, config_path="../conf", config_name="validate")
def main(cfg: DictConfig) -> None:
    with sentences():
        configure_logs()
        config = from_hydra(cfg)
        assert isinstance(config, ValidateJob)
        config.truth.check()
        study, name, report = STUDIES[config.truth.name]
        _, table, facts = study(config, log.info)
        report(table, facts)
        print(f"\nBy query: {config.output}/validate/{name}.parquet")


if __name__ == "__main__":
    command(main)
