"""Damping, layers and methods against the effect of a step of training (docs/reports/truth.md)

python benchmarks/effect_sweep.py smollm2 --model runs/real/inputs/model --dictionary .../usr/share/dictd
    --handbook .../usr/share/doc/debian-handbook/html [--folder runs/effect-sweep] [--set truth.learning_rate=1e-5]
python benchmarks/effect_sweep.py demo [--folder runs/effect-sweep]

smollm2 writes 72 documents and 34 queries of four kinds and runs `infscan validate truth=step` on them; what is fitted,
measured and scored stays in the folder, and is found again. The model is that of `infscan real_demo`; the documents are
entries of its dictionary, and paragraphs of the Debian handbook in French and German. The kinds: facts that entries
state; paraphrases, definitions of entries whose completions say it in other words (by hand, below); heldout, words from
the beginnings of entries that are not among the documents; and translations, English sentences of the handbook of which
the documents have the French and the German one alone. demo: the embedded model, with the documents and queries of
benchmarks/bank.py. Both print the command, and the table as docs/reports/truth.md has it.
"""

from __future__ import annotations

import argparse
import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from bank import prepare
from retraining import LENGTH as SHORT
from retraining import ROOT, job
from translations import _can_be_asked, paragraphs, question_of

from infscan_studies.demo.real import QUESTIONS, Question, read_entries

# Characters of an entry: all of it is one sequence of LENGTH tokens.
SHORTEST, LONGEST, LENGTH = 120, 300, 96
FACTS = tuple(one for one in QUESTIONS if one.entries)
PARAPHRASES = (
    Question("internaut", "An internaut is somebody who", " travels through the web looking for knowledge"),
    Question("microcentury", "A microcentury lasts", " a little under one hour"),
    Question("ravioli code", "Ravioli code is a program built of", " many little independent pieces"),
    Question("coaxial cable", "In a coaxial cable the wire in the middle is", " wrapped in plastic and a metal braid"),
    Question("donuts", "Donuts once meant", " the cells of a computer's store"),
    Question("ff", "A form feed makes the printer", " begin another sheet of paper"),
    Question("thumb", "The thumb of a scrollbar is", " the little block that one drags"),
    Question("balun", "A balun joins", " a symmetrical circuit and an asymmetrical one"),
    Question("id10t", "An ID10T error means that", " the person at the keyboard is the problem"),
    Question("space key", "The space key is", " the widest button of all"),
)
HELD_OUT, WORDS, TRANSLATED, CHARACTERS = 8, 15, 6, 110
TRACKED = r"layers\.(3|8|13|18|23|28)\.|lm_head"


def stretch(text: str, answer: str) -> str:
    """At most LONGEST characters of an entry, with the answer in them."""
    place = max(0, text.find(answer.rpartition(" ")[2]))
    start = 0 if place < 2 * LONGEST // 3 else text.rfind(" ", 0, place - LONGEST // 2) + 1
    return text[start : start + LONGEST]


def write_inputs(folder: Path, given: argparse.Namespace) -> None:
    """corpus.jsonl and queries.jsonl; what is taken is drawn by the hash of its name."""
    entries = read_entries(given.dictionary / "foldoc.dict.dz", given.dictionary / "foldoc.index")
    chosen = {name: stretch(entries[name], one.completion) for one in FACTS for name in one.entries}
    chosen |= {one.id: entries[one.id][:LONGEST] for one in PARAPHRASES}
    texts = set(chosen.values())
    short = [name for name, text in entries.items() if name not in chosen and SHORTEST <= len(text) <= LONGEST]
    short.sort(key=lambda name: sha256(name.encode()).digest())
    # Synonyms share an entry.
    others = {entries[name]: name for name in reversed(short) if entries[name] not in texts}
    drawn = sorted(others.values(), key=short.index)
    chosen |= {name: entries[name] for name in drawn[: given.entries]}
    # Addresses and references are many tokens, and foretold by their form alone.
    away = [name for name in drawn[given.entries :] if not re.search(r"//|@|\[", entries[name])][:HELD_OUT]
    rows = [{"id": name, "text": text, "source": "foldoc"} for name, text in sorted(chosen.items())]
    asked = [_query("fact", one.id, one.prompt, one.completion) for one in FACTS]
    asked += [_query("paraphrase", one.id, one.prompt, one.completion) for one in PARAPHRASES]
    for name in away:
        words = entries[name].split(" ")[:WORDS]
        cut = 2 * len(words) // 3
        asked.append(_query("heldout", name, " ".join(words[:cut]), " " + " ".join(words[cut:])))
    found = paragraphs(given.handbook, CHARACTERS)
    order = sorted(found, key=lambda name: sha256(name.encode()).digest())
    in_two = [name for name in order if _can_be_asked(found[name], wordless=False)][:TRANSLATED]
    for name in in_two:
        prompt, completion = question_of(found[name]["en"]) or ("", "")
        asked.append(_query("translation", name, prompt, completion))
    for name in in_two:
        rows += [{"id": f"{name}-{one}", "text": found[name][one], "source": one} for one in ("fr", "de")]
    for path, lines in (("corpus.jsonl", rows), ("queries.jsonl", asked)):
        (folder / path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), "utf-8")
    print(f"{len(rows)} documents, {len(asked)} queries")


def _query(kind: str, name: str, prompt: str, completion: str) -> dict[str, str]:
    return {"id": f"{kind}-{re.sub(r'[^A-Za-z0-9]', '_', name)[:40]}", "prompt": prompt, "completion": completion}


NUMBERS = {"spearman": "Spearman", "pearson": "Pearson", "top": "effect of the strongest, nats"}
# Of whose rows the kinds of queries are told apart, with intervals.
BY_KIND = ("mlp 1e-05", "mlp 0.1", "mlp auto", "mlp 10", "mlp+attention 0.1", "head 0.1", "mlp+head 0.1")


def lines(path: Path) -> list[str]:
    """The tables of a validation in Markdown: over all queries by layers and damping, then some rows by kind."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        rows.setdefault(row["label"], {})[row["kind"]] = row
    of_all = {label: its["all"] for label, its in rows.items()}
    kinds = list(next(iter(rows.values())))
    found = []
    for method in ("ekfac", "kfac"):
        mine = [row for row in of_all.values() if row["method"] == method]
        if not mine:
            continue
        dampings = sorted({row["damping"] for row in mine if row["damping"] is not None})
        columns = [*(f"{one:g}" for one in dampings), *(["auto"] if method == "ekfac" else [])]
        for name, said in NUMBERS.items():
            found += ["", f"{method}: {said}", "", f"| | {' | '.join(columns)} | dot product |"]
            found.append("|" + "---|" * (len(columns) + 2))
            for tracked in dict.fromkeys(row["tracked"] for row in mine):
                labels = [*(f"{method} {tracked} {one}" for one in columns), f"identity {tracked}"]
                cells = [f"{of_all[label][name]:+.2f}" if label in of_all else "" for label in labels]
                found.append(f"| {tracked} | {' | '.join(cells)} |")
    sets = [f"ekfac {one}" for one in BY_KIND] + ["identity mlp", "identity mlp+attention"]
    others = [label for label, row in of_all.items() if row["method"] not in ("ekfac", "kfac", "identity")]
    for name, said in NUMBERS.items():
        found += ["", said, "", f"| | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 1)]
        for label in [*(one for one in sets if one in rows), *others]:
            cells = [_said(rows[label][kind], name) if kind in rows[label] else "" for kind in kinds]
            found.append(f"| {label} | {' | '.join(cells)} |")
    found += ["", "| | over BM25's | over any | over the default's | seconds |", "|---|---|---|---|---|"]
    for label in [*(one for one in sets if one in rows), *others]:
        row = of_all[label]
        cells = [_said(row, name) if row[name] is not None else "" for name in ("over_bm25", "over_any", "lead_top")]
        found.append(f"| {label} | {' | '.join(cells)} | {'' if row['seconds'] is None else round(row['seconds'])} |")
    return found


def _said(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("of", choices=["smollm2", "demo"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--handbook", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "effect-sweep")
    parser.add_argument("--entries", type=int, default=38, help="beside those that answer")
    parser.add_argument("--curvature", type=int, default=48, help="sequences that factors are fitted on (smollm2)")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of the command")
    given = parser.parse_args()
    folder: Path = given.folder.absolute() / given.of
    folder.mkdir(parents=True, exist_ok=True)
    if given.of == "demo":
        prepare(folder)
        shape = ["model=demo", "model.tracked=linear+head", f"corpus.path={folder}/prepared/corpus"]
        shape += ["corpus.packing=document", f"corpus.sequence_length={SHORT}", "validate.curvature_sequences=300"]
    else:
        if not (folder / "queries.jsonl").exists():
            write_inputs(folder, given)
        shape = [f"model.path={given.model.absolute()}", f"model.tracked='{TRACKED}'"]
        shape += [f"corpus.path={folder}/corpus.jsonl", "corpus.packing=document", f"corpus.sequence_length={LENGTH}"]
        shape += [f"validate.curvature_sequences={given.curvature}", "scan.tokens_per_batch=512"]
    job(
        "validate", "truth=step", *shape, f"queries.path={folder}/queries.jsonl", "factors.damping.auto=true",
        "validate.queries=100", f"output={folder}/run", *given.set,
    )  # fmt: skip
    print("\n".join(lines(folder / "run" / "validate" / "against_step.parquet")))


if __name__ == "__main__":
    main()
