"""Word-order study of G23 on planted facts: forward documents against flipped ones, EK-FAC beside its baselines.

python jobs/word_order.py run=runs/demo dot_product=runs/demo-dot-product
"""

import json

import hydra
import numpy as np
from omegaconf import DictConfig

from infscan.config import from_yaml
from infscan.corpus.addressable import open_corpus
from infscan.corpus.tokenizer import load_tokenizer
from infscan.model.architecture import model_folder
from infscan.report.word_order import show_question, show_table
from infscan.results.schema import to_parquet
from infscan.storage import Store
from infscan.studies.word_order import planted_partitions, run_scores, to_table, word_order
from infscan.telemetry import command, sentences


@hydra.main(version_base=None, config_path="../conf", config_name="word_order")
def main(cfg: DictConfig) -> None:
    with sentences():
        store = Store(cfg.run)
        found = word_order(cfg.run, cfg.dot_product, cfg.planted)
        store.write("studies/word_order.parquet", to_parquet(to_table(found), {}))

        queries = {row["id"]: row for row in map(json.loads, store.read("queries/queries.jsonl").splitlines())}
        query = queries[cfg.question]
        partitions = planted_partitions(cfg.planted)[cfg.question.removesuffix("-first")]
        show_question(
            f"{query['prompt']} →{query['completion']}   (measured on: {query['measure']})",
            run_scores(cfg.run)[cfg.question],
            _texts(store),
            partitions,
        )
        print("\nWord order: the mean score of other documents of a fact, in proportion to its forward ones\n")
        show_table(found)
        print(f"\nThe answer as Parquet: {store.uri}/top/   This study: {store.uri}/studies/word_order.parquet")


def _texts(store: Store) -> dict[str, str]:
    corpus = open_corpus(store / "corpus")
    settings = from_yaml(store.read("config.yaml").decode())
    tokenizer = load_tokenizer(str(model_folder(settings["model"]["path"])))
    sequences = corpus.read(np.arange(corpus.sequences))
    decode = tokenizer.decode if tokenizer else str
    return {sequence.document_id: decode(sequence.token_ids) for sequence in sequences}


if __name__ == "__main__":
    command(main)
