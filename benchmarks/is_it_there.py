"""Is the answer there? The rule of `infscan.results.answers` on questions with and without one.

What was found is in docs/reports/answers.md.

python benchmarks/is_it_there.py --model runs/real/inputs/model --dictionary .../usr/share/dictd
    [--folder runs/is-it-there] [--documents 72] [--tracked REGEX] [--sequences 48] [--factors FOLDER] [--signs]

Questions are those of `make demo-real` and of benchmarks/questions/is_it_there.jsonl. A hash of the id puts each into
the first set, on which the rule was chosen, or the second, on which it is counted. The third, `wide`, was written
later, for a count with more questions: its rows say so, and `elsewhere` marks those that nothing answers though the
words of their completions stand in the corpus, of something else. Each set has a corpus of its own: the entries that
answer its questions and others, none of which states the answer of another question that none answers. The corpora
share no entry. What is scanned stays in the folder and is found again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_scores import Ready, ready, score
from numpy.typing import NDArray
from rankings import table

from infscan.config import Measure
from infscan.corpus.sequences import Sequence as CorpusSequence
from infscan.influence.certificate import binomial_interval
from infscan.influence.similarity import StateMoments, Whitening, best_cosines, standing
from infscan.influence.spread import ShardSpread, Spread
from infscan.model.hidden import hidden_states
from infscan.model.worker import Batch
from infscan.queries import Query
from infscan.results.answers import ALIKE_STATING, STANDS_OUT, STANDS_OUT_STATING, Scale
from infscan.results.statements import UNLIKELY, Asked
from infscan.steps.inputs import read_measured_queries
from infscan.steps.refine import Context
from infscan.steps.similarity import counted
from infscan.storage import Store
from infscan_studies.demo.real import QUESTIONS, Question, choose, read_entries, write_documents, write_questions

SETS = ("first", "held-out", "wide")
# A question takes 4 bytes for every tracked weight.
MOST = 22
ALIKE = 6.5
BANK = Path(__file__).parent / "questions/is_it_there.jsonl"


def bank() -> list[dict[str, Any]]:
    return [json.loads(line) for line in BANK.read_text("utf-8").splitlines()]


def questions_of(name: str) -> list[Question]:
    """A set's questions, of the first two at most so many of each kind; the real demo's are in the first set."""
    rows = bank()
    several = [Question(row["id"], row["prompt"], row["completion"], tuple(row["entries"])) for row in rows]
    later = {row["id"]: row["set"] for row in rows if "set" in row}
    if name in later.values():
        return [one for one in several if later.get(one.id) == name]
    digests = {one.id: sha256(one.id.encode()).digest() for one in several}
    mine = [one for one in several if one.id not in later and digests[one.id][0] % 2 == SETS.index(name)]
    mine = [*(QUESTIONS if name == SETS[0] else ()), *sorted(mine, key=lambda one: digests[one.id])]
    answered = [one for one in mine if one.entries][:MOST]
    return [*answered, *[one for one in mine if not one.entries][:MOST]]


def states(question: Question, text: str) -> bool:
    return Asked(question.id, question.completion, ()).place((), [text]) is not None


def documents_of(name: str, entries: dict[str, str], count: int) -> dict[str, str]:
    """A set's corpus: an entry may be in one of them, by its hash; those that answer are where they are asked for."""
    questions = questions_of(name)
    earlier = SETS[:2] if name not in SETS[:2] else [each for each in SETS[:2] if each != name]
    others = {entry for each in earlier for one in questions_of(each) for entry in one.entries}
    wanted = {entry for one in questions for entry in one.entries}
    elsewhere = {row["id"] for row in bank() if row.get("elsewhere")}
    unanswered = [one for one in questions if not one.entries and one.id not in elsewhere]
    if name not in SETS[:2]:
        # The hash leaves nothing to a third set but what the first two did not choose.
        others |= {entry for each in SETS[:2] for entry in documents_of(each, entries, count)}
    mine = {
        entry: text
        for entry, text in entries.items()
        if entry in wanted
        or (
            entry not in others
            and (name not in SETS[:2] or sha256(entry.encode()).digest()[1] % 2 == SETS.index(name))
            and not any(states(one, text) for one in unanswered)
        )
    }
    chosen = choose(mine, count, [one for one in questions if one.entries])
    for one in unanswered:
        assert not any(states(one, text) for text in chosen.values()), f"{one.id} is answered"
    return chosen


def settings(folder: Path, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Of a scan of a set's corpus for its questions, which are written into its folder."""
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    entries = read_entries(given.dictionary / "foldoc.dict.dz", given.dictionary / "foldoc.index")
    write_documents(documents_of(name, entries, given.documents), here / "corpus.jsonl")
    write_questions(here / "queries.jsonl", questions_of(name))
    return {
        "model": {"path": given.model, "tracked": given.tracked},
        "corpus": {"path": str(here / "corpus.jsonl"), "packing": "document", "sequence_length": 96},
        "queries": {"path": str(here / "queries.jsonl")},
        "factors": {"num_sequences": given.sequences, "slices": 4},
        "scan": {"tokens_per_batch": 512},
        "cluster": {"backend": "in_process"},
        "output": str(here / "run"),
    }


def compute(folder: Path, name: str, given: argparse.Namespace) -> None:
    """A set's scores at full rank, and what the model gives the completions: scores.npz."""
    fitted = given.factors or (None if name == SETS[0] else str(folder / SETS[0] / "run/factors"))
    it = ready(settings(folder, name, given), Store(fitted) if fitted else None)
    queries = read_measured_queries(it.inputs)
    found = score(it, queries)
    np.savez(
        folder / name / "scores.npz",
        **found,
        similarity=likeness(it, queries),
        names=np.asarray(it.names),
        queries=np.asarray([one.id for one in queries]),
        measured=np.asarray([len(one.parts[0].positions) for one in queries]),
    )


def signs(it: Ready, name: str, texts: dict[str, str]) -> dict[str, NDArray[np.float32]]:
    """Scores of the documents that state an answer for its question, [n] each: as they are, without the separator
    before them, and on the completion's first token alone."""
    asked = [one for one in questions_of(name) if one.entries]
    pairs = [
        (number, row) for number, one in enumerate(asked) for row, doc in enumerate(it.names) if states(one, texts[doc])
    ]
    rows = sorted({row for _, row in pairs})
    place = {row: number for number, row in enumerate(rows)}
    golds = [it.sequences[row] for row in rows]
    separator = int(golds[0].token_ids[0])
    bare = [Context((), (separator,), it.inputs.architecture.context).before(one) for one in golds]
    ids = {one.id for one in asked}

    def of(measure: Measure, sequences: Sequence[CorpusSequence]) -> NDArray[np.float32]:
        config = replace(it.config, queries=replace(it.config.queries, measure=measure))
        queries = [one for one in read_measured_queries(replace(it.inputs, config=config)) if one.id in ids]
        number = {one.id: at for at, one in enumerate(queries)}
        found = score(it, queries, sequences)["ekfac"]
        return np.asarray([found[number[asked[query].id], place[row]] for query, row in pairs])

    return {
        "as they are": of(Measure.completion, golds),
        "without the separator": of(Measure.completion, bare),
        "on the first token": of(Measure.first, golds),
    }


def sign_lines(found: dict[str, NDArray[np.float32]]) -> list[str]:
    """How many are opponents in each way, and how many change their sign."""
    usual = np.sign(found["as they are"])
    lines = []
    for way, scores in found.items():
        changed = int((np.sign(scores) != usual).sum())
        lines.append(f"{way}: {int((scores < 0).sum())} of {len(scores)} opponents, {changed} with another sign")
    return lines


def likeness(it: Ready, queries: Sequence[Query]) -> NDArray[np.float32]:
    """Similarity of every question to every document [Q, N], as `top.similarity` has it; whitened by all documents."""
    worker, moments = it.worker, None
    states = []
    for batch in worker.batches(it.sequences, it.config.tokens_per_batch):
        h_btd = hidden_states(worker.model, batch.ids_bt).to(worker.wide)
        moments = moments or StateMoments(h_btd.shape[-1], worker.device)
        moments.add(h_btd[counted(batch)])
        states.append((batch, h_btd))
    assert moments is not None
    whitening = Whitening.of(moments.total_nn).to(worker.device, worker.wide)
    found = np.zeros((len(queries), len(it.sequences)), np.float32)
    own = []
    for query in queries:
        ids = np.asarray([query.parts[0].token_ids], np.int64)
        one = Batch(np.arange(1), torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool))
        h_btd = hidden_states(worker.model, one.ids_bt).to(worker.wide)
        own.append(whitening.directions(h_btd[counted(one)]))
    for batch, h_btd in states:
        x_btd, counts_bt = whitening.directions(h_btd), counted(batch)
        for number, own_id in enumerate(own):
            found[number, batch.rows] = best_cosines(own_id, x_btd, counts_bt).numpy()
    return found


def judged(folder: Path, name: str) -> list[dict[str, Any]]:
    """A set's questions with what the rules are given: z of the strongest document and of the strongest one that states
    the completion, similarity's z of the most similar document and of the most similar one that states it, and nats a
    token. Documents are all, for both scales."""
    found = dict(np.load(folder / name / "scores.npz"))
    texts = {row["id"]: row["text"] for row in map(json.loads, (folder / name / "corpus.jsonl").open(encoding="utf-8"))}
    spread = Spread(len(found["queries"]))
    spread.add(ShardSpread.of(found["ekfac"].T))
    scale, by_id = Scale(spread, len(found["queries"])), {one.id: one for one in questions_of(name)}
    rows = []
    for query, query_id in enumerate(found["queries"].tolist()):
        question, scores = by_id[query_id], found["ekfac"][query]
        z = (scores - scale.centres[query]) / scale.scales[query]
        stating = [row for row, doc in enumerate(found["names"].tolist()) if states(question, texts[doc])]
        order = np.argsort(-scores)
        alike = standing(found["similarity"][query], np.full(len(scores), query, np.int32), found["similarity"])
        rows.append(
            {
                "id": query_id,
                "answered": bool(question.entries),
                "z": float(z.max()),
                "stating": stating,
                "strongest_states": bool(order[0] in stating),
                "z_stating": float(max(z[row] for row in stating)) if stating else None,
                "alike": float(alike.max()),
                "alike_stating": float(max(alike[row] for row in stating)) if stating else None,
                "elsewhere": bool(stating) and not question.entries,
                "document": str(found["names"][order[0]]),
                "nats": float(found["nats"][query] / found["measured"][query]),
                "opponents": sum(scores[row] < 0 for row in stating),
                "strongest_opponent": bool(order[-1] in stating),
            }
        )
    return rows


def verdicts(rows: list[dict[str, Any]], rule: Callable[[dict[str, Any]], bool]) -> list[str]:
    """What a rule says of the questions whose completion the model knows, with exact intervals."""
    known = [row for row in rows if -row["nats"] >= UNLIKELY]
    lines = []
    for answered, elsewhere, what in (
        (True, False, "missed"),
        (False, False, "falsely there"),
        (False, True, "falsely there, though only the words are"),
    ):
        mine = [row for row in known if row["answered"] is answered and row["elsewhere"] is elsewhere]
        if not mine:
            continue
        wrong = [row["id"] for row in mine if rule(row) is not answered]
        low, high = binomial_interval(len(wrong), len(mine))
        left = sum(row["answered"] is answered and row["elsewhere"] is elsewhere for row in rows) - len(mine)
        named = f": {', '.join(wrong)}" if wrong else ""
        lines.append(f"{what} {len(wrong)} of {len(mine)} [{low:.1%}, {high:.1%}]{named}; {left} not judged")
    return lines


def strongest(row: dict[str, Any]) -> bool:
    """The strongest document stands out, or states the completion and stands out less."""
    return row["z"] >= (STANDS_OUT_STATING if row["strongest_states"] else STANDS_OUT)


def any_stating(row: dict[str, Any]) -> bool:
    """The same, or any document that states the completion stands out so far."""
    return row["z"] >= STANDS_OUT or (row["z_stating"] is not None and row["z_stating"] >= STANDS_OUT_STATING)


def stating_or_alike(row: dict[str, Any]) -> bool:
    """The same, or one that states it reads like the question: the rule of `infscan.results.answers`."""
    return any_stating(row) or (row["alike_stating"] is not None and row["alike_stating"] >= ALIKE_STATING)


def alike_alone(row: dict[str, Any]) -> bool:
    """What the first set would have chosen of similarity alone: any document that is so like the question."""
    return bool(row["alike"] >= ALIKE)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--dictionary", required=True, type=Path)
    asked.add_argument("--folder", type=Path, default=Path("runs/is-it-there"))
    asked.add_argument("--documents", type=int, default=72)
    asked.add_argument("--tracked", default=r"layers\.(13|29)\.mlp\..*")
    asked.add_argument("--sequences", type=int, default=48)
    asked.add_argument("--factors", help="where they are; else they are fitted on the first set's corpus")
    asked.add_argument("--signs", action="store_true", help="of the documents that answer alone, in three ways")
    asked.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    given = asked.parse_args()
    torch.set_num_threads(1)
    for name in SETS:
        if given.signs:
            if name in given.sets:
                it = ready(settings(given.folder, name, given), Store(given.factors))
                texts = map(json.loads, (given.folder / name / "corpus.jsonl").open(encoding="utf-8"))
                print(f"\n{name}", *sign_lines(signs(it, name, {row["id"]: row["text"] for row in texts})), sep="\n  ")
            continue
        if name in given.sets and not (given.folder / name / "scores.npz").exists():
            compute(given.folder, name, given)
        if not (given.folder / name / "scores.npz").exists():
            continue
        rows = judged(given.folder, name)
        print(f"\n{name}: {len(rows)} questions")
        for row in sorted(rows, key=lambda row: (not row["answered"], -row["z"])):
            stating = row["z_stating"] is not None
            also = f", stating {row['z_stating']:.1f}" if stating else ""
            like = f"alike {row['alike']:4.1f}" + (f", stating {row['alike_stating']:4.1f}" if stating else "")
            print(f"  {row['id']:14} z {row['z']:8.1f}{also:>16}  {like:25} {row['nats']:5.2f} nats a token")
        for rule in (strongest, any_stating, stating_or_alike, alike_alone):
            print(f"  {rule.__name__}: {'; '.join(verdicts(rows, rule))}")
        found = dict(np.load(given.folder / name / "scores.npz"))
        print("\n".join(table(found, [row["stating"] if row["answered"] else [] for row in rows])))
        stating = [row for row in rows if row["answered"]]
        print(
            f"  of {sum(len(row['stating']) for row in stating)} documents that state an answer "
            f"{sum(row['opponents'] for row in stating)} are opponents; "
            f"{sum(row['strongest_opponent'] for row in stating)} of {len(stating)} questions have one as the strongest"
        )


if __name__ == "__main__":
    main()
