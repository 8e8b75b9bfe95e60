"""How fast the TF-IDF filter reads, counts and scores, on one core, and how its memory grows: a corpus made here.

python benchmarks/corpus_tfidf.py --sequences 200000 --length 512 --layout npy

Token ids are drawn from a Zipf distribution over 50,304, as an array of uint16; with `--layout prepared` that array is
prepared first, and the filter reads the Parquet parts.
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from infscan.config import CorpusConfig, Packing
from infscan.corpus.addressable import open_corpus
from infscan.corpus.describe import describe, token_files
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.in_place import DESCRIPTION
from infscan.corpus.packing import PackSettings
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.tfidf import DocumentFrequencies, TopMatches, block_frequencies
from infscan.storage import Store

VOCAB, K, EOS = 50_304, 10_000, 0
CHUNK = 4096


def write_corpus(path: Path, sequences: int, length: int) -> None:
    """Documents of length - 1 tokens and EOS, one after another."""
    rng = np.random.default_rng(0)
    weights = 1.0 / (np.arange(1, VOCAB) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    with path.open("wb") as file:
        for start in range(0, sequences, CHUNK):
            count = min(CHUNK, sequences - start)
            ids = np.minimum(np.searchsorted(cumulative, rng.random((count, length))) + 1, VOCAB - 1)
            ids[:, -1] = EOS
            file.write(ids.astype("<u2").tobytes())


def lay_down(folder: str, length: int, layout: str) -> None:
    config = CorpusConfig(path=f"{folder}/a.npy", dtype="uint16", eos_id=EOS, in_place=layout == "npy")
    pack = PackSettings(Packing.concat, length, VOCAB, EOS)
    store = Store(f"{folder}/corpus")
    arrays = token_files(config)
    if arrays is not None:
        store.write_json(DESCRIPTION, describe(*arrays, config, pack).to_json())
    else:
        pieces = document_splits(document_files(config), config)
        parts = [prepare_part(piece, n, config, pack, None, store) for n, piece in enumerate(pieces)]
        write_manifest(store, config, pack, None, parts)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--layout", choices=("npy", "prepared"), default="npy", help="what the filter reads")
    given = parser.parse_args()
    sequences, length, layout = given.sequences, given.length, given.layout
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "a.npy", sequences, length)
        # In a process of its own, whose memory is not this one's.
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            other.submit(lay_down, folder, length, layout).result()
        corpus = open_corpus(Store(f"{folder}/corpus"))
        print(f"{layout}: {corpus.sequences:,} sequences of {length} tokens; peak before: {peak_mib():.0f} MiB")
        started = time.process_time()
        found = DocumentFrequencies(0, np.zeros(VOCAB, np.int64))
        for block in corpus.token_blocks(0, corpus.sequences):
            found += block_frequencies(block, VOCAB)
        report("frequencies", corpus.tokens, time.process_time() - started)
        rng = np.random.default_rng(1)
        for queries in (10, 100):
            asked = [rng.zipf(1.3, 30).clip(max=VOCAB - 1) for _ in range(queries)]
            best = TopMatches(asked, found.idf(), K)
            started, at = time.process_time(), 0
            for block in corpus.token_blocks(0, corpus.sequences):
                best.add(np.arange(at, at + len(block)), block)
                at += len(block)
            best.result()
            report(f"scores of {queries} queries, k={K:,}", corpus.tokens, time.process_time() - started)


def report(name: str, tokens: int, seconds: float) -> None:
    print(f"{name}: {60 * tokens / seconds / 1e6:,.0f} million tokens a minute and core; peak {peak_mib():.0f} MiB")


if __name__ == "__main__":
    main()
