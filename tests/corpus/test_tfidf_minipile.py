"""The filter on a whole mini corpus against arithmetic in whole numbers: the same rows, the same scores, every tie."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from infscan.corpus.tfidf import TopMatches, block_frequencies, block_of

MINIPILE = Path(__file__).parents[2] / "benchmarks" / "corpus" / "minipile.jsonl.gz"
UNIT = 1 << 32
K = 300


def test_every_row_of_the_mini_corpus_is_the_plain_implementations() -> None:
    with gzip.open(MINIPILE, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].split()[:200] for line in lines]
    numbers = {word: n for n, word in enumerate(sorted({word for text in texts for word in text}))}
    corpus = [[numbers[word] for word in text] for text in texts]
    queries = [corpus[n][:40] for n in (0, 17, 4000, 9999)] + [[numbers["the"]] * 3]

    sets = [set(tokens) for tokens in corpus]
    holding = Counter(token for tokens in sets for token in tokens)
    C = len(corpus)
    idf = {w: max(1, round((math.log((C - n + 0.5) / (n + 0.5) + 1)) * UNIT)) for w, n in holding.items()}

    arrays = [np.array(tokens, np.uint32) for tokens in corpus]
    frequencies = block_frequencies(block_of(arrays), len(numbers))
    assert frequencies.counts.tolist() == [holding[token] for token in range(len(numbers))]
    found = TopMatches([np.array(query) for query in queries], frequencies.idf(), K)
    for start in range(0, C, 1000):
        ids = np.arange(start, min(start + 1000, C))
        found.add(ids, block_of([arrays[n] for n in ids]))
    for query, rows in zip(queries, found.result(), strict=True):
        scores = [sum(idf[token] for token in query if token in held) for held in sets]
        expected = sorted(range(C), key=lambda n, scores=scores: (-scores[n], n))[:K]
        assert rows.sequence_ids.tolist() == expected
        assert [int(score * UNIT) for score in rows.scores] == [scores[n] for n in expected]
