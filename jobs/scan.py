"""Scan a corpus: which of its sequences most raised (or lowered) the probability of each query's completion?

python jobs/scan.py model=demo corpus=demo queries=demo output=runs/demo
"""

import hydra
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.pipeline import answer
from infscan.report.terminal import show
from infscan.telemetry import command, sentences


@hydra.main(version_base=None, config_path="../conf", config_name="scan")
def main(cfg: DictConfig) -> None:
    with sentences():
        config = from_hydra(cfg)
        answer(config)
        show(config.output)


if __name__ == "__main__":
    command(main)
