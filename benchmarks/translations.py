"""A question in English, answered in French and German only: does influence find the answer? (docs/studies.md)

python benchmarks/translations.py --model runs/real/inputs/model --handbook .../usr/share/doc/debian-handbook/html
    [--folder runs/translations] [--questions 14] [--paragraphs 56] [--longest 160] [--wordless] [--sequences 64]

The handbook has every paragraph in many languages. Of some paragraphs the first English sentence is the question: its
last words are the completion, the rest is the prompt, and the paragraph itself is in the corpus in French and German
alone. Other paragraphs are there in all three. Each question ranks all of them, by EK-FAC influence at full rank, by
the gradient dot product and its cosine, and by BM25. Scores are kept in the folder (scores.npz), from which the tables
are made again. --wordless: only questions that share no word of four letters with either answer, which no search for
words can find.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from exact_scores import ready, score
from rankings import table

from infscan.config import Measure
from infscan.influence.certificate import binomial_interval
from infscan.steps.inputs import read_measured_queries
from infscan.steps.refine import Context
from infscan.storage import Store
from infscan_studies.truth.bm25 import bm25_scores

LANGUAGES = {"en": "en-US", "fr": "fr-FR", "de": "de-DE"}
# Characters of an English paragraph, at least.
_SHORTEST = 80
# Words of a question, and those of them that are its completion.
_WORDS, _COMPLETION = (10, 26), 5


def paragraphs(handbook: Path, longest: int) -> dict[str, dict[str, str]]:
    """The paragraphs, of so many English characters at most, that are translated into every language: id -> language ->
    text.

    Files have the same paragraphs in the same order in every language; where they do not, a file is left out.
    """
    found: dict[str, dict[str, str]] = {}
    for file in sorted((handbook / LANGUAGES["en"]).glob("*.html")):
        texts = {language: _paragraphs_of(handbook / folder / file.name) for language, folder in LANGUAGES.items()}
        if len({len(one) for one in texts.values()}) != 1:
            continue
        for number, each in enumerate(zip(*texts.values(), strict=True)):
            if _SHORTEST <= len(each[0]) <= longest and all(_translated(each[0], other) for other in each[1:]):
                found[f"{file.stem}-{number}"] = dict(zip(texts, each, strict=True))
    return found


def _paragraphs_of(file: Path) -> list[str]:
    """The text of every innermost `div.para`."""
    pieces = re.findall(r'<div class="para">((?:(?!<div).)*?)</div>', file.read_text("utf-8"), re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", piece)).split()) for piece in pieces]


def _translated(english: str, other: str) -> bool:
    """Some paragraphs were never translated, or in part only."""
    words = [set(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in (english, other)]
    return len(words[0] & words[1]) < len(words[0]) / 2


def question_of(text: str) -> tuple[str, str] | None:
    """(prompt, completion) of a paragraph's first sentence; None where it is too short, too long or no sentence."""
    sentence = re.match(r"[A-Z][^.!?:;()]*[.!?](?=\s|$)", text)
    words = sentence[0].rstrip(".!?").split(" ") if sentence else []
    if not _WORDS[0] <= len(words) <= _WORDS[1]:
        return None
    return " ".join(words[:-_COMPLETION]), " " + " ".join(words[-_COMPLETION:])


def make(folder: Path, given: argparse.Namespace) -> None:
    """Write corpus.jsonl and queries.jsonl. What is taken is drawn by the hash of its id."""
    found = paragraphs(given.handbook, given.longest)
    order = sorted(found, key=lambda name: sha256(name.encode()).digest())
    asked = [name for name in order if _can_be_asked(found[name], wordless=given.wordless)][: given.questions]
    chosen = sorted({*asked, *[name for name in order if name not in asked][: given.paragraphs - len(asked)]})
    print(f"{len(found)} paragraphs are in {', '.join(LANGUAGES)}; {len(chosen)} taken, {len(asked)} of them asked")
    rows = [
        {"id": f"{name}-{language}", "text": text, "source": language}
        for name in chosen
        for language, text in found[name].items()
        if not (language == "en" and name in asked)
    ]
    queries = []
    for name in sorted(asked):
        prompt, completion = question_of(found[name]["en"]) or ("", "")
        queries.append({"id": _query_id(name), "prompt": prompt, "completion": completion})
    for path, lines in (("corpus.jsonl", rows), ("queries.jsonl", queries)):
        (folder / path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), "utf-8")


def _can_be_asked(texts: dict[str, str], *, wordless: bool) -> bool:
    question = question_of(texts["en"])
    if question is None:
        return False
    return not wordless or not any(_shared("".join(question), texts[language]) for language in ("fr", "de"))


def _query_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def compute(folder: Path, given: argparse.Namespace) -> None:
    """Prepare, fit, score; what is found goes into scores.npz, and of the documents that answer into golds.npz."""
    settings = {
        "model": {"path": given.model, "tracked": given.tracked},
        "corpus": {"path": str(folder / "corpus.jsonl"), "packing": "document", "sequence_length": given.length},
        "queries": {"path": str(folder / "queries.jsonl")},
        "factors": {"num_sequences": given.sequences, "slices": 4},
        "scan": {"tokens_per_batch": 512},
        "cluster": {"backend": "in_process"},
        "output": str(folder / "run"),
    }
    it = ready(settings, Store(given.factors) if given.factors else None)
    queries = read_measured_queries(it.inputs)
    ids = [one.id for one in queries]
    golds = [row for row, name in enumerate(it.names) if _query_id(name[:-3]) in ids]
    if not (folder / "scores.npz").exists():
        found = score(it, queries)
        tokens = [one.token_ids[1:] for one in it.sequences]
        words = bm25_scores(tokens, [one.parts[0].token_ids for one in queries]).astype(np.float32)
        np.savez(folder / "scores.npz", **found, bm25=words, names=np.asarray(it.names), queries=np.asarray(ids))
    # The documents that answer: without the separator before them, and on the completion's first token alone.
    separator = int(it.sequences[0].token_ids[0])
    bare = [Context((), (separator,), it.inputs.architecture.context).before(it.sequences[row]) for row in golds]
    without = score(it, queries, bare)["ekfac"]
    first = replace(it.config, queries=replace(it.config.queries, measure=Measure.first))
    on_first = score(it, read_measured_queries(replace(it.inputs, config=first)), [it.sequences[row] for row in golds])
    np.savez(folder / "golds.npz", golds=np.asarray(golds), without=without, first=on_first["ekfac"])


def report(folder: Path) -> None:
    """The tables of what is in the folder."""
    found = dict(np.load(folder / "scores.npz"))
    names, ids = found["names"].tolist(), found["queries"].tolist()
    texts = {row["id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open(encoding="utf-8"))}
    asked = {row["id"]: row for row in map(json.loads, (folder / "queries.jsonl").open(encoding="utf-8"))}
    golds = [[row for row, name in enumerate(names) if _query_id(name[:-3]) == query] for query in ids]
    print(f"{len(ids)} questions, {sum(map(len, golds))} documents that answer, {len(names)} in all")
    print("\n".join(table(found, golds)))
    for language in ("fr", "de"):
        print(f"\nanswers in {language}:")
        print("\n".join(table(found, [[row for row in mine if names[row].endswith(language)] for mine in golds])))
    # A name that is spelt alike in both languages is what BM25 can find.
    wordless = [
        [row for row in mine if not _shared(asked[query]["prompt"] + asked[query]["completion"], texts[names[row]])]
        for query, mine in zip(ids, golds, strict=True)
    ]
    print(f"\nof {sum(map(len, wordless))} answers that share no word of four letters with their question:")
    print("\n".join(table(found, wordless)))
    if not (folder / "golds.npz").exists():
        return
    again = dict(np.load(folder / "golds.npz"))
    place = {row: at for at, row in enumerate(again["golds"].tolist())}
    pairs = [(query, row) for query, mine in enumerate(golds) for row in mine]
    signs = {
        "after the separator": [found["ekfac"][query, row] for query, row in pairs],
        "without it": [again["without"][query, place[row]] for query, row in pairs],
        "on the completion's first token": [again["first"][query, place[row]] for query, row in pairs],
    }
    for name, scores in signs.items():
        negative = int((np.asarray(scores) < 0).sum())
        low, high = binomial_interval(negative, len(pairs))
        print(f"{name}: {negative} of {len(pairs)} are opponents [{low:.0%}, {high:.0%}]")
    changed = int((np.sign(signs["after the separator"]) != np.sign(signs["without it"])).sum())
    print(f"the separator changes the sign of {changed} of {len(pairs)}")


def _shared(question: str, text: str) -> set[str]:
    words = [set(re.findall(r"[^\W\d_]{4,}", one.lower())) for one in (question, text)]
    return words[0] & words[1]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", required=True)
    asked.add_argument("--handbook", required=True, type=Path)
    asked.add_argument("--folder", type=Path, default=Path("runs/translations"))
    asked.add_argument("--questions", type=int, default=14)
    asked.add_argument("--paragraphs", type=int, default=56)
    asked.add_argument(
        "--longest", type=int, default=160, help="characters: the translations are to fit --length tokens"
    )
    asked.add_argument("--tracked", default=r"layers\.(13|27)\.mlp\..*")
    asked.add_argument("--sequences", type=int, default=64)
    asked.add_argument("--factors", help="where they are; else they are fitted on this corpus")
    asked.add_argument("--length", type=int, default=128)
    asked.add_argument("--wordless", action="store_true", help="questions that share no word with their answers")
    given = asked.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not (given.folder / "corpus.jsonl").exists():
        make(given.folder, given)
    if not (given.folder / "golds.npz").exists():
        compute(given.folder, given)
    report(given.folder)


if __name__ == "__main__":
    main()
