"""How fast the TF-IDF filter reads, counts and scores, on one core, and how its memory grows: a corpus made here.

python benchmarks/corpus_tfidf.py [sequences=200000]

Token ids are drawn from a Zipf distribution over 50,304, as an array of uint16 in sequences of 512 tokens.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from infscan.config import CorpusConfig, Packing
from infscan.corpus.addressable import open_corpus
from infscan.corpus.describe import describe, token_files
from infscan.corpus.in_place import DESCRIPTION
from infscan.corpus.packing import PackSettings
from infscan.corpus.tfidf import DocumentFrequencies, TopMatches, block_frequencies
from infscan.storage import Store

VOCAB, T, K = 50_304, 512, 10_000
CHUNK = 4096


def write_corpus(path: Path, sequences: int) -> None:
    rng = np.random.default_rng(0)
    weights = 1.0 / (np.arange(1, VOCAB) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    with path.open("wb") as file:
        for start in range(0, sequences, CHUNK):
            count = min(CHUNK, sequences - start) * T
            ids = np.searchsorted(cumulative, rng.random(count)) + 1
            file.write(np.minimum(ids, VOCAB - 1).astype("<u2").tobytes())


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    sequences = int(sys.argv[1].partition("=")[2]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "a.npy", sequences)
        config = CorpusConfig(path=folder, dtype="uint16")
        kind, files = token_files(config) or ("", [])
        described = describe(kind, files, config, PackSettings(Packing.concat, T, VOCAB, 0))
        store = Store(f"{folder}/described")
        store.write_json(DESCRIPTION, described.to_json())
        corpus = open_corpus(store)
        print(f"{corpus.sequences:,} sequences of {T} tokens; peak memory before: {peak_mib():.0f} MiB")
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
