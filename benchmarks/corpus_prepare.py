"""What preparing costs: tokenising and packing against the tokenizer library alone, reading back, planning.

python benchmarks/corpus_prepare.py --files 1000000

The texts are benchmarks/corpus/minipile.jsonl.gz, the tokenizer the embedded demo's, all on one thread. The million
files are hard links to a few small ones; the file of a terabyte is a name and a size.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import tokenizers

from infscan.config import CorpusConfig, Packing
from infscan.corpus.addressable import open_corpus
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.packing import PackSettings
from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.storage import InputFile, Store, localise

MINIPILE = Path(__file__).parent / "corpus" / "minipile.jsonl.gz"
T = 512
REPEATS = 7
LINKS = 50_000  # a filesystem's limit is 65,000 for one inode
PER_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000, help="small ones, to be listed and planned")
    given = parser.parse_args()
    model = str(localise("infscan://demo/model", ()))
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        tokenising(Path(folder), tokenizer, tokenizers.Tokenizer.from_file(f"{model}/tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        planning(Path(folder), given.files)


def tokenising(folder: Path, tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    (folder / "in.jsonl").write_bytes(gzip.decompress(MINIPILE.read_bytes()))
    texts = [json.loads(line)["text"] for line in (folder / "in.jsonl").read_text().splitlines()]
    config = CorpusConfig(path=str(folder / "in.jsonl"))
    pack = PackSettings(Packing.concat, T, library.get_vocab_size(), tokenizer.eos_id)
    (piece,) = document_splits(document_files(config), config)
    ratios, ours, theirs = [], [], []
    for repeat in range(REPEATS):
        started = time.process_time()
        rows = library.encode_batch(texts, add_special_tokens=False)
        alone = time.process_time() - started
        tokens = sum(len(row.ids) for row in rows)
        del rows
        store = Store(f"{folder}/out-{repeat}")
        started = time.process_time()
        part = prepare_part(piece, 0, config, pack, tokenizer, store)
        prepared = time.process_time() - started
        assert part.counts.tokens_read == tokens
        ours.append(tokens / prepared)
        theirs.append(tokens / alone)
        ratios.append(alone / prepared)
    print(f"{len(texts):,} texts, {tokens:,} tokens; the library alone: {max(theirs):,.0f} tokens/s")
    print(
        f"reading, tokenising, packing and writing: {max(ours):,.0f} tokens/s, {max(ours) / max(theirs):.2f} of it "
        f"(fastest of {REPEATS}; ratio of neighbours, median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    write_manifest(store, config, pack, tokenizer.digest, [part])
    corpus = open_corpus(store)
    started = time.process_time()
    for start in range(0, corpus.sequences, 256):
        corpus.read(np.arange(start, min(start + 256, corpus.sequences)))
    print(f"read back by number: {corpus.tokens / (time.process_time() - started):,.0f} tokens/s")


def planning(folder: Path, files: int) -> None:
    for group in range(-(-files // LINKS)):
        seed = folder / f"_{group}"
        seed.write_text('{"text": "a small document"}\n' * (40 + group))
        for at in range(group * LINKS, min((group + 1) * LINKS, files)):
            below = folder / f"{at // PER_FOLDER:05d}"
            if at % PER_FOLDER == 0:
                below.mkdir()
            os.link(seed, below / f"{at:07d}.jsonl")
    report("before", now())
    config = CorpusConfig(path=str(folder))
    started = now()
    found = document_files(config)
    report(f"listing {len(found):,} files", started)
    started = now()
    pieces = document_splits(found, config)
    lines = [piece.to_json() for piece in pieces]
    report(f"{len(pieces):,} parts of them, {sum(map(len, lines)) / 2**20:.0f} MiB as JSON", started)
    started = now()
    pieces = document_splits([InputFile("s3://bucket/one.jsonl", 1 << 40, "tag")], config)
    # Four bytes of text a token, about.
    sequences = (1 << 40) // 4 // T
    plan = Plan("", sequences, Selection.of(sequences), default_shard_sequences(sequences))
    plan.shards_table()
    report(f"a file of 1 TiB: {len(pieces):,} parts; {plan.num_shards:,} shards of {sequences:,} sequences", started)


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process's CPU."""
    return time.perf_counter(), time.process_time()


def report(name: str, started: tuple[float, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    passed, cpu = (end - start for end, start in zip(now(), started, strict=True))
    print(f"{name}: {passed:.1f} s, {cpu:.1f} of CPU; peak {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
