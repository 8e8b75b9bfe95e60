"""Fit EK-FAC factors and put them at factors.path (<output>/factors unless it is given), for scans to reuse.

python jobs/fit.py model=pythia-70m corpus.path=s3://bucket/corpus factors.path=s3://bucket/factors/pythia-70m
"""

import hydra
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.steps.factors import fit
from infscan.steps.run import open_run
from infscan.telemetry import command, sentences


@hydra.main(version_base=None, config_path="../conf", config_name="fit")
def main(cfg: DictConfig) -> None:
    with sentences():
        config = from_hydra(cfg, unused=("queries.path",))
        with open_run(config, needs_queries=False) as run:
            factors = fit(run)
        print(f"factors     {config.factors.path}\nfingerprint {factors.fingerprint}")


if __name__ == "__main__":
    command(main)
