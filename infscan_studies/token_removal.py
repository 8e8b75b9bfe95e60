"""Does a mask of the strongest tokens undo more than the removal of the strongest documents? By retraining.

    python -m infscan_studies.token_removal <run> --recipe <recipe.json> --output <folder> [--shares 0.003 0.01 0.03]

run: a finished one of a model that a study trained (`infscan lds`, whose recipe it is), over all that it was trained
on, with scan.targets=null and scan.top_k of all sequences, so that it says of every token what it taught. Tokens are
ranked by their influence as targets, added up over the queries; documents by that of their tokens. The model is trained
again without the losses of the strongest share of the tokens, without the strongest share of the documents, and without
random ones. What is told is the fall of what the queries measure, in nats, against training on everything with the same
seed. A token is removed where its loss is: all of a removed document's are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from infscan.config import fingerprint
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.errors import RunError
from infscan.influence.agreement import INTERVAL
from infscan.queries import read_measured
from infscan.results.read import read_tokens
from infscan.results.schema import to_parquet
from infscan.storage import Store
from infscan_studies.config import Sizes, TrainingSettings
from infscan_studies.truth.retrain import measure_queries
from infscan_studies.truth.train import build_model, train_language_model

NOTHING, TOKENS, DOCUMENTS = "nothing", "tokens", "documents"
RANDOM_TOKENS, RANDOM_DOCUMENTS = "random tokens", "random documents"
_RESAMPLES = 2000
# Of every sequence, which of its tokens have a loss; the first never has.
Losses = list[NDArray[np.bool_]]


def influence_of_tokens(run: str, lengths: Sequence[int]) -> list[NDArray[np.float64]]:
    """Of every sequence, what its tokens taught as targets, added up over the run's queries.

    Raises:
        RunError: where the run does not say it of every sequence and query.
    """
    table = read_tokens(run)
    found = [np.zeros(length) for length in lengths]
    if table["targets"].null_count or table.num_rows < len(lengths):
        raise RunError(
            f"{run} says of {table.num_rows - table['targets'].null_count} rows what their tokens taught, and there "
            f"are {len(lengths)} sequences; scan with scan.targets=null scan.top_k={len(lengths)}."
        )
    for row in table.to_pylist():
        found[row["sequence_id"]] += np.asarray(row["targets"], np.float64)
    return found


def without_tokens(influence: Sequence[NDArray[np.float64]], count: int) -> Losses:
    """All losses but those of the `count` tokens that raise the queries most; ties by sequence and position."""
    flat = np.concatenate([one[1:] for one in influence])
    kept = np.ones(len(flat), np.bool_)
    kept[np.argsort(-flat, kind="stable")[:count]] = False
    return _cut(kept, [len(one) for one in influence])


def without_documents(scores: NDArray[np.float64], lengths: Sequence[int], count: int) -> Losses:
    """All losses but those of the `count` sequences that raise the queries most; ties by number."""
    gone = set(np.argsort(-scores, kind="stable")[:count].tolist())
    return _cut(np.concatenate([np.full(n - 1, row not in gone) for row, n in enumerate(lengths)]), lengths)


def _cut(kept: NDArray[np.bool_], lengths: Sequence[int]) -> Losses:
    """A loss for every token but the first, one sequence after the other, as a mask of each."""
    parts = np.split(kept, np.cumsum([length - 1 for length in lengths])[:-1])
    return [np.concatenate([[True], part]) for part in parts]


def removed(losses: Losses) -> int:
    """Tokens whose loss is removed."""
    return sum(int((~one).sum()) for one in losses)


@dataclass(frozen=True)
class Study:
    """A recipe that trains without some losses, and measures; what was trained is kept in `store`."""

    store: Store
    corpus: AddressableCorpus
    run: Store
    sizes: Sizes
    training: TrainingSettings

    def measured(self, losses: Losses, seed: int) -> NDArray[np.float64]:
        """f of every query after training; a sequence that has no loss left takes no part."""
        queries = read_measured(self.run)
        key = fingerprint([self.corpus.fingerprint, vars(self.sizes), vars(self.training), [q.id for q in queries]])
        digest = fingerprint([key, seed, [one.tolist() for one in losses]])
        path = f"trained/{digest[:24]}.json"
        if not self.store.exists(path):
            sequences = self.corpus.read(np.arange(self.corpus.sequences))
            chosen = [(one.token_ids.tolist(), mask) for one, mask in zip(sequences, losses, strict=True)]
            chosen = [(ids, mask) for ids, mask in chosen if mask[1:].any()]
            model = build_model(self.sizes, self.corpus.vocab_size, self.corpus.sequence_length, 0)
            train_language_model(
                model,
                [ids for ids, _ in chosen],
                replace(self.training, seed=seed),
                losses=[mask.tolist() for _, mask in chosen],
            )
            self.store.write_json(path, {"measurements": measure_queries(model, queries).tolist()})
        return np.asarray(self.store.read_json(path)["measurements"])


def compare(study: Study, shares: Sequence[float], seeds: Sequence[int], say: Callable[[str], None]) -> pa.Table:
    """A row per removal, share and seed: tokens removed, and the fall of what the queries measure, mean in nats."""
    lengths = [len(one) for one in study.corpus.read(np.arange(study.corpus.sequences))]
    influence = influence_of_tokens(study.run.uri, lengths)
    scores = np.asarray([one.sum() for one in influence])
    total = sum(lengths) - len(lengths)
    whole = _cut(np.ones(total, np.bool_), lengths)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        before = study.measured(whole, seed)
        rng = np.random.default_rng([seed, 7])
        chance = [rng.random(length) for length in lengths]
        for share in shares:
            tokens, documents = max(1, round(share * total)), max(1, round(share * len(lengths)))
            removals = {
                TOKENS: without_tokens(influence, tokens),
                DOCUMENTS: without_documents(scores, lengths, documents),
                RANDOM_TOKENS: without_tokens(chance, tokens),
                RANDOM_DOCUMENTS: without_documents(np.asarray([one[0] for one in chance]), lengths, documents),
            }
            for name, losses in removals.items():
                fall = before - study.measured(losses, seed)
                rows.append({"removed": name, "share": share, "seed": seed, "tokens": removed(losses), "fall": fall})
                say(f"seed {seed}: {name}, {share:g}: {removed(losses)} tokens, {fall.mean():+.3f} nats")
    return pa.Table.from_pylist(rows)


def summary(table: pa.Table, resamples: int = _RESAMPLES) -> list[str]:
    """A line per share: the mean fall of either removal less a random one's, and how many times as much a token does.

    Seeds and queries are resampled together, of all removals alike.
    """
    rows = table.to_pylist()
    lines = []
    for share in sorted({row["share"] for row in rows}):
        by_name = {
            name: [row for row in rows if row["share"] == share and row["removed"] == name]
            for name in (TOKENS, DOCUMENTS, RANDOM_TOKENS, RANDOM_DOCUMENTS)
        }
        falls = {name: np.asarray([row["fall"] for row in mine]) for name, mine in by_name.items()}
        counts = {name: float(np.mean([row["tokens"] for row in mine])) for name, mine in by_name.items()}
        gain = {
            TOKENS: falls[TOKENS] - falls[RANDOM_TOKENS],
            DOCUMENTS: falls[DOCUMENTS] - falls[RANDOM_DOCUMENTS],
        }
        rng = np.random.default_rng(0)
        S, Q = gain[TOKENS].shape
        drawn = [(rng.integers(0, S, S)[:, None], rng.integers(0, Q, Q)) for _ in range(resamples)]
        said = [f"{share:.3%} removed"]
        each = {}
        for name, values in gain.items():
            of_drawn = np.asarray([values[at].mean() for at in drawn])
            low, high = np.percentile(of_drawn, INTERVAL)
            each[name] = values.mean() / counts[name], low / counts[name], high / counts[name]
            said.append(f"{name} ({counts[name]:.0f}): {values.mean():+.3f} nats [{low:+.3f}, {high:+.3f}]")
        # Removed documents may do nothing, and then no interval of a ratio has an end: its bound is of the two ends.
        ratio, least = each[TOKENS][0] / each[DOCUMENTS][0], each[TOKENS][1] / each[DOCUMENTS][2]
        said.append(f"per token {ratio:.1f} times as much, at least {least:.1f} by the intervals' ends")
        lines.append("; ".join(said))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--recipe", required=True, help="the recipe.json that infscan lds wrote")
    parser.add_argument("--corpus", required=True, help="the prepared corpus that was trained on")
    parser.add_argument("--output", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder, _, name = options.recipe.rpartition("/")
    recipe = Store(folder or ".").read_json(name)
    torch.set_num_threads(recipe["threads"])
    output = Store(options.output)
    study = Study(
        output,
        open_corpus(Store(options.corpus)),
        Store(options.run),
        Sizes(**recipe["model"]),
        TrainingSettings(**recipe["training"]),
    )
    table = compare(study, options.shares, range(options.seeds), lambda line: print(line, flush=True))
    output.write("token_removal.parquet", to_parquet(table, {"shares": options.shares, "seeds": options.seeds}))
    print("\n".join(["", *summary(table)]))


if __name__ == "__main__":
    main()
