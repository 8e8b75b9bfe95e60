"""Make a corpus addressable: tokenise, pack and number it into <output>/corpus, to be scanned by any number of runs.

python jobs/prepare.py model=pythia-70m corpus.path='data/*.jsonl.zst' output=s3://bucket/pile
python jobs/prepare.py model=pythia-70m corpus.path=tokens/ corpus.in_place=false corpus.deduplicate=true output=...
"""

import json
from typing import Any

import hydra
from omegaconf import DictConfig

from infscan.config import from_hydra
from infscan.corpus.addressable import AddressableCorpus, PreparedCorpus
from infscan.steps.prepare import prepare_corpus
from infscan.steps.run import open_run
from infscan.telemetry import command, sentences


def statistics(corpus: AddressableCorpus) -> dict[str, Any]:
    """What was read and what became of it; of documents also how long they are, and what was left out and why."""
    if not isinstance(corpus, PreparedCorpus):
        return corpus.counts
    manifest = corpus.manifest
    left_out = {"left_out": manifest.left_out.by_reason} if manifest.left_out.by_reason else {}
    return corpus.counts | {"document_lengths": manifest.lengths.to_json()} | left_out


@hydra.main(version_base=None, config_path="../conf", config_name="prepare")
def main(cfg: DictConfig) -> None:
    with sentences():
        with open_run(from_hydra(cfg, unused=("queries.path",)), needs_queries=False) as run:
            corpus = prepare_corpus(run)
        print(f"corpus      {corpus.store.uri}\nfingerprint {corpus.fingerprint}")
        print(json.dumps(statistics(corpus), indent=2))


if __name__ == "__main__":
    command(main)
