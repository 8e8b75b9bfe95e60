"""G23's TF-IDF filter: the sequences that share rare tokens with a query, from one pass over the whole corpus.

python jobs/tfidf.py model=pythia-1b corpus.path=s3://bucket/pile queries.path=queries.jsonl output=runs/filter
python jobs/scan.py  model=pythia-1b corpus=filtered corpus.path=runs/filter queries.path=queries.jsonl output=runs/mine
"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.steps.prepare import prepare_corpus
from infscan.steps.run import open_run
from infscan.steps.tfidf import CANDIDATES, TfidfJob, tfidf_filter
from infscan.telemetry import command, sentences

ConfigStore.instance().store(name="tfidf_schema", node=TfidfJob)


@hydra.main(version_base=None, config_path="../conf", config_name="tfidf")
def main(cfg: DictConfig) -> None:
    with sentences():
        config = from_hydra(cfg)
        assert isinstance(config, TfidfJob)
        with open_run(config) as run:
            table = tfidf_filter(run, prepare_corpus(run), config.tfidf)
        print(f"candidates  {config.output}/{CANDIDATES} ({table.num_rows} rows)")
        print(f"to scan     corpus=filtered corpus.path={config.output}")


if __name__ == "__main__":
    command(main)
