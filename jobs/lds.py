"""Judge scores by retraining: LDS on half-subsets, QLD without each query's strongest sequences (study.qld=true).

python jobs/lds.py corpus.path=runs/small/corpus output=runs/lds
python jobs/scan.py model.path=runs/lds/model corpus.path=runs/small/corpus scan.scores=all output=runs/small-ekfac ...
python jobs/lds.py corpus.path=runs/small/corpus output=runs/lds +scores.ekfac=runs/small-ekfac
"""

import shutil
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from infscan.config import QueriesConfig
from infscan.corpus.addressable import open_corpus
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ConfigError
from infscan.model.architecture import model_folder
from infscan.queries import read_queries
from infscan.storage import Store
from infscan.studies.retraining import MODEL, RetrainingStudy, Study, lines, read_proponents
from infscan.telemetry import command, sentences
from infscan.truth.train import Sizes, TrainingSettings

TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "sentencepiece")


def open_study(cfg: DictConfig) -> RetrainingStudy:
    values = cast("dict[str, Any]", OmegaConf.to_container(cfg.study))
    settings = TrainingSettings(**values.pop("training"))
    study = Study(model=Sizes(**values.pop("model")), training=settings, **values)
    corpus = open_corpus(Store(cfg.corpus.path))
    tokenizer = load_tokenizer(str(model_folder(cfg.tokenizer))) if cfg.tokenizer else None
    queries = read_queries(
        QueriesConfig(path=cfg.queries.path),
        tokenizer,
        vocab_size=corpus.vocab_size,
        context=corpus.sequence_length,
        bos_id=None,
    )
    return RetrainingStudy(study, corpus, queries, Store(cfg.output))


def save_full_model(study: RetrainingStudy, folder: Path, tokenizer: str | None) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    study.full_model().save_pretrained(partial)
    if tokenizer:
        for path in model_folder(tokenizer).iterdir():
            if path.name.startswith(TOKENIZER_FILES):
                shutil.copy(path, partial)
    partial.rename(folder)


@hydra.main(version_base=None, config_path="../conf", config_name="lds")
def main(cfg: DictConfig) -> None:
    with sentences():
        try:
            torch.set_num_threads(cfg.threads)
            study = open_study(cfg)
        except (TypeError, MissingMandatoryValue) as error:
            raise ConfigError(f"{str(error).splitlines()[0]}; every key stands in conf/lds.yaml.") from None
        folder = study.store.local_path(MODEL)
        if folder is None:
            raise ConfigError(f"output={cfg.output}: the trained model is written to a local folder; give one.")
        print(f"trained by {study.trainer.optimiser}")
        study.claim()
        if not folder.exists():
            save_full_model(study, folder, cfg.tokenizer)
        if not cfg.scores:
            print(
                f"the full model lies in {folder}; scan it with scan.scores=all, then add +scores.<method>=<run>:\n"
                f"python jobs/scan.py model.path={folder} corpus.path={cfg.corpus.path} "
                f"queries.path={cfg.queries.path} scan.scores=all output=..."
            )
            return
        methods = {str(name): study.scores(uri) for name, uri in cfg.scores.items()}
        rows = study.run(methods, read_proponents(cfg.proponents) if cfg.proponents else None)
        print("\n".join([*lines(rows), *study.missed(), f"{study.store}/lds/"]))


if __name__ == "__main__":
    command(main)
