"""Is the answer there? The rule of `infscan.results.answers` on questions with and without one (docs/reports/answers.md).

python benchmarks/is_it_there.py --model runs/real/inputs/model --dictionary .../usr/share/dictd
    [--folder runs/is-it-there] [--documents 240] [--tracked REGEX] [--sequences 64]

Questions are those of `make demo-real` and of benchmarks/questions/is_it_there.jsonl. A hash of the id puts each into
the first set, on which the rule was chosen, or the second, on which it is counted. Each set has a corpus of its own:
the entries that answer its questions and others, none of which states the answer of a question that none answers.
The corpora share no entry. What is scanned stays in the folder and is found again.
"""

from __future__ import annotations

import argparse
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_scores import ready, score

from infscan.results.statements import Asked
from infscan.steps.inputs import read_measured_queries
from infscan.steps.measure import MeasureTask, measure_task
from infscan.storage import Store
from infscan_studies.demo.real import QUESTIONS, Question, choose, read_entries, write_documents, write_questions

SETS = ("first", "held-out")
BANK = Path(__file__).parent / "questions/is_it_there.jsonl"


def questions_of(name: str) -> list[Question]:
    """A set's questions; the real demo's are in the first one."""
    rows = [json.loads(line) for line in BANK.read_text("utf-8").splitlines()]
    bank = [Question(row["id"], row["prompt"], row["completion"], tuple(row["entries"])) for row in rows]
    halves = [sha256(one.id.encode()).digest()[0] % 2 for one in bank]
    mine = [one for one, half in zip(bank, halves, strict=True) if half == SETS.index(name)]
    return [*(QUESTIONS if name == SETS[0] else ()), *mine]


def states(question: Question, text: str) -> bool:
    return Asked(question.id, question.completion, ()).place((), [text]) is not None


def documents_of(name: str, entries: dict[str, str], count: int) -> dict[str, str]:
    """A set's corpus: an entry may be in one of them, by its hash; those that answer are where they are asked for."""
    questions = questions_of(name)
    others = {entry for each in SETS if each != name for one in questions_of(each) for entry in one.entries}
    wanted = {entry for one in questions for entry in one.entries}
    unanswered = [one for one in questions if not one.entries]
    mine = {
        entry: text
        for entry, text in entries.items()
        if entry in wanted
        or (
            entry not in others
            and sha256(entry.encode()).digest()[1] % 2 == SETS.index(name)
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
    fitted = None if name == SETS[0] else Store(str(folder / SETS[0] / "run/factors"))
    it = ready(settings(folder, name, given), fitted)
    queries = read_measured_queries(it.inputs)
    parts = [parts[0] for parts in measure_task(it.worker, MeasureTask(tuple(queries)))]
    found = score(it, queries)
    np.savez(
        folder / name / "scores.npz",
        **found,
        names=np.asarray(it.names),
        queries=np.asarray([one.id for one in queries]),
        nats=np.asarray([-part.log_probability for part in parts]),
        measured=np.asarray([len(one.parts[0].positions) for one in queries]),
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--dictionary", required=True, type=Path)
    asked.add_argument("--folder", type=Path, default=Path("runs/is-it-there"))
    asked.add_argument("--documents", type=int, default=240)
    asked.add_argument("--tracked", default=r"layers\.(5|13|21|29)\.mlp\..*")
    asked.add_argument("--sequences", type=int, default=64)
    asked.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    given = asked.parse_args()
    torch.set_num_threads(1)
    for name in SETS:
        if name in given.sets and not (given.folder / name / "scores.npz").exists():
            compute(given.folder, name, given)


if __name__ == "__main__":
    main()
