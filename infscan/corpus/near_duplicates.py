"""Near-duplicates: sequences that share most of their token n-grams, found by MinHash (Broder 1997)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infscan.errors import ConfigError

# Tokens of a shingle, and hash functions of a MinHash: the estimate's standard error is at most 1 / (2 sqrt(128)).
SHINGLE, _PERMUTATIONS = 5, 128
# Candidates are looked for a little below the threshold: the estimate errs both ways, the exact check after it never.
_MARGIN = 0.1


def near_duplicates(sequences: Sequence[np.ndarray], threshold: float = 0.8) -> list[int]:
    """Of every sequence, the index of the first sequence of its group; of one that is like no other, its own.

    Two are alike where the Jaccard similarity |X and Y| / |X or Y| of their sets of 5-token shingles is at least
    `threshold` (a sequence of fewer tokens is one shingle); groups are what such pairs connect. MinHash with locality
    sensitive hashing names the candidates, which are then compared exactly: no false pair, and a true one is missed
    only where the hashes are far off.

    sequences: token ids, int64 [length].

    Raises:
        ConfigError: for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"similar={threshold}: a Jaccard similarity, above 0 and up to 1.")
    # Here, since it takes a second, and every rank imports this room.
    from datasketch import MinHash, MinHashLSH

    shingles = [_shingles(sequence) for sequence in sequences]
    # The weights say that a pair missed is worse than one compared in vain.
    index = MinHashLSH(max(threshold - _MARGIN, 0.05), num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    first = list(range(len(sequences)))

    def root(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    for number, mine in enumerate(shingles):
        minhash = MinHash(num_perm=_PERMUTATIONS, seed=1)
        minhash.update_batch(mine)
        for other in sorted(int(key) for key in index.query(minhash)):
            if jaccard(mine, shingles[other]) >= threshold:
                low, high = sorted((root(number), root(other)))
                first[high] = low
        index.insert(str(number), minhash)
    return [root(number) for number in range(len(sequences))]


def jaccard(x: set[bytes], y: set[bytes]) -> float:
    """|X and Y| / |X or Y|; 1 for two empty sets."""
    return len(x & y) / len(x | y) if x or y else 1.0


def _shingles(token_ids: np.ndarray) -> set[bytes]:
    ids = np.ascontiguousarray(token_ids, "<i8")
    if len(ids) <= SHINGLE:
        return {ids.tobytes()}
    return {ids[start : start + SHINGLE].tobytes() for start in range(len(ids) - SHINGLE + 1)}
