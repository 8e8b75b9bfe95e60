"""Make a corpus addressable: tokenise, pack and number it into <output>/corpus, to be scanned by any number of runs.

python jobs/prepare.py model=pythia-70m corpus.path='data/*.jsonl.zst' output=s3://bucket/pile
"""

import json

import hydra
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.runtime.fit import prepare_corpus
from infscan.runtime.run import Run
from infscan.telemetry import sentences


@hydra.main(version_base=None, config_path="../conf", config_name="prepare")
def main(cfg: DictConfig) -> None:
    with sentences():
        with Run(from_hydra(cfg, unused=("queries.path",)), needs_queries=False) as run:
            corpus = prepare_corpus(run)
        print(f"corpus      {corpus.store.uri}\nfingerprint {corpus.fingerprint}")
        print(json.dumps(corpus.counts, indent=2))


if __name__ == "__main__":
    main()
