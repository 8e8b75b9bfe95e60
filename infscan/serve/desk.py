"""Questions on their way: checked when they come, asked together by one thread that holds the model, kept in storage.

A batch of waiting questions is one run of `infscan.pipeline.ask`. Every question is a query of that run under its own
id, which nobody can guess, and is answered from its own rows alone.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.compute as pc

from infscan.config import Config, QueriesConfig
from infscan.config.jobs import ServeJob
from infscan.engine.in_process import ResidentBackend
from infscan.errors import InfscanError, QueryError, RunError, StorageError
from infscan.pipeline import ask
from infscan.queries import Query
from infscan.report.write import report_page
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_answers, read_sequences, read_summary, read_top
from infscan.results.schema import read_parquet
from infscan.steps.ask import CANDIDATES, Indexes
from infscan.steps.inputs import Inputs, open_inputs, read_measured_queries
from infscan.storage import Store

log = logging.getLogger("infscan")

QUESTIONS, ANSWERS = "questions", "answers"
_ID = re.compile(r"q-[0-9a-f]{24}")
# Rows that the index's own answer shows, and characters of a sequence's text.
_FIRST, _MOST_TEXT = 10, 2000
_MOST_PAGES = 16


class BusyError(InfscanError):
    """More questions wait than may."""


@dataclass
class Question:
    """A question and how far it is: waiting, asking, done or failed."""

    id: str
    query: Query
    state: str = "waiting"
    # The folder of its run, below the server's.
    run: str = ""
    error: str = ""
    came: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    exact_s: float | None = None
    # Questions that come with it in one run.
    together: int = 1
    # What of its wording is probably not meant.
    warnings: tuple[str, ...] = ()


class Desk:
    """Takes questions from any number of threads; `work` asks them, on one thread, until `stop`."""

    def __init__(self, found: Indexes, config: Config, job: ServeJob) -> None:
        self.found, self.job = found, job
        self.store = Store(config.output)
        self.store.check_writable()
        # The same model, factors and layers for every run.
        self.config = config
        self.machines = ResidentBackend(config.cluster)
        self.inputs: Inputs = open_inputs(config)
        self._questions: OrderedDict[str, Question] = OrderedDict()
        self._waiting: list[Question] = []
        self._condition = threading.Condition()
        self._stopped = False
        self._verified = False
        self._pages: OrderedDict[str, bytes] = OrderedDict()
        self._runs = 0

    def facts(self) -> dict[str, Any]:
        """What is asked, for the page."""
        return {
            "model": self.config.model.path.rstrip("/").rpartition("/")[2],
            "corpus": (self.config.corpus.path or ", ".join(self.config.corpus.paths)).rstrip("/").rpartition("/")[2],
            "sequences": sum(one.manifest.rows for one in self.found),
            "most_characters": self.job.most_characters,
        }

    def submit(self, asked: dict[str, Any]) -> Question:
        """Check a question and let it wait.

        Raises:
            QueryError: for a question that cannot be measured, by what is wrong with it.
            BusyError: where too many wait.
        """
        question_id, query = f"q-{secrets.token_hex(12)}", self._query(asked)
        # They are for who asks: a run would log them, and they quote the question.
        warnings = tuple(said.removeprefix(f"query {query.id!r}: ") for said in query.warnings)
        question = Question(question_id, replace(query, id=question_id, warnings=()), warnings=warnings)
        with self._condition:
            if len(self._waiting) >= self.job.most_waiting:
                raise BusyError(f"{len(self._waiting)} questions wait already; ask again in a minute.")
            self._questions[question.id] = question
            self._waiting.append(question)
            self._forget_old()
            self._condition.notify()
        return question

    def _query(self, asked: dict[str, Any]) -> Query:
        known = ("prompt", "completion", "contrast", "measure")
        strange = sorted(set(asked) - set(known))
        if strange:
            raise QueryError(f"{strange[0][:40]!r} is no part of a question; there are {', '.join(known)}.")
        texts = {key: asked.get(key) for key in known}
        for key, value in texts.items():
            if value is not None and not isinstance(value, str):
                raise QueryError(f"{key} must be a string.")
        length = sum(len(value or "") for value in texts.values())
        if length > self.job.most_characters:
            raise QueryError(f"the question has {length:,} characters; at most {self.job.most_characters:,} are taken.")
        if not texts["completion"]:
            raise QueryError("completion: give the text whose probability is to be explained.")
        if texts["measure"] not in (None, "completion", "first"):
            raise QueryError(f"measure {texts['measure'][:40]!r} is unknown; give completion or first.")
        config = QueriesConfig(path="", prompt=texts["prompt"] or "", completion=texts["completion"])
        config.contrast = texts["contrast"] or None
        if texts["measure"]:
            config.measure = type(config.measure)(texts["measure"])
        (query,) = read_measured_queries(replace(self.inputs, config=replace(self.config, queries=config)))
        return query

    def _forget_old(self) -> None:
        """What is finished longest is read from storage again where somebody asks for it."""
        for old in list(self._questions.values()):
            if len(self._questions) <= self.job.most_waiting + self.job.most_kept:
                return
            if old.state in ("done", "failed"):
                del self._questions[old.id]

    def work(self) -> None:
        """Ask what waits, batch by batch, until `stop`."""
        while batch := self._next():
            self._ask(batch)
        # Whoever asks a later server for them is told.
        with suppress(StorageError):
            for question in self._waiting:
                self._record(question, f"{ANSWERS}/never-asked")

    def _record(self, question: Question, run: str) -> None:
        self.store.write_json(f"{QUESTIONS}/{question.id}.json", {"run": run})

    def _next(self) -> list[Question]:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._stopped)
            if self._stopped:
                return []
            batch, self._waiting = self._waiting[: self.job.at_once], self._waiting[self.job.at_once :]
            self._runs += 1
            run = f"{ANSWERS}/{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
            for question in batch:
                question.state, question.run, question.together = "asking", run, len(batch)
        return batch

    def _ask(self, batch: Sequence[Question]) -> None:
        run = batch[0].run
        try:
            for question in batch:
                self._record(question, run)
            config = replace(self.config, output=(self.store / run).uri)
            queries = sorted((question.query for question in batch), key=lambda query: query.id)
            ask(config, self.found, queries=queries, machines=self.machines, inputs=self.inputs,
                verify=not self._verified, on_found=lambda: self._mark(batch, "first_s"))  # fmt: skip
            self._verified = True
            self._mark(batch, "exact_s")
            self._settle(batch, "done")
        except InfscanError as error:
            self._settle(batch, "failed", str(error))
        except Exception:
            log.exception("a batch of %d questions failed", len(batch))
            self._settle(batch, "failed", "the question failed for a reason that the server's log has.")

    def _mark(self, batch: Sequence[Question], name: str) -> None:
        for question in batch:
            setattr(question, name, round(time.monotonic() - question.came, 3))

    def _settle(self, batch: Sequence[Question], state: str, error: str = "") -> None:
        with self._condition:
            for question in batch:
                question.state, question.error = state, error

    def stop(self) -> None:
        """Let `work` end; a batch that is being asked is finished first."""
        with self._condition:
            self._stopped = True
            asked = sum(question.state == "asking" for question in self._questions.values())
            self._condition.notify_all()
        if asked:
            log.info(
                "ending      %d questions are being asked, and are answered first; end it again to leave them", asked
            )

    def abandon(self) -> None:
        """Let a batch that is being asked fail at the end of its unit."""
        self.machines.ended.set()

    def look(self, question_id: str) -> dict[str, Any] | None:
        """How far a question is, and the rows that there are; None where there is no such question."""
        question = self._questions.get(question_id)
        if question is None:
            run = self._stored(question_id)
            if run is None:
                return None
            state = "done" if (self.store / run).exists(SUCCESS) else "failed"
            error = "" if state == "done" else "the server ended before it was answered; ask again."
            return self._with_rows({"id": question_id, "state": state, "error": error}, run, state)
        with self._condition:
            ahead = self._waiting.index(question) if question in self._waiting else 0
            seen = {"id": question.id, "state": question.state, "error": question.error, "ahead": ahead}
            seen |= {"first_s": question.first_s, "exact_s": question.exact_s, "together": question.together}
            seen |= {"warnings": list(question.warnings)}
            state = "found" if question.state == "asking" and question.first_s is not None else question.state
        return self._with_rows(seen | {"state": state}, question.run, state)

    def _stored(self, question_id: str) -> str | None:
        if not _ID.fullmatch(question_id) or not self.store.exists(f"{QUESTIONS}/{question_id}.json"):
            return None
        return str(self.store.read_json(f"{QUESTIONS}/{question_id}.json")["run"])

    def _with_rows(self, seen: dict[str, Any], run: str, state: str) -> dict[str, Any]:
        if state == "found":
            table = read_parquet(self.store / run, CANDIDATES)
            mine = (pc.field("query_id") == seen["id"]) & (pc.field("rank") <= _FIRST)
            return seen | {"rows": table.filter(mine).to_pylist()}
        if state == "done":
            uri = (self.store / run).uri
            top = read_top(uri).filter(pc.field("query_id") == seen["id"])
            sequences = read_sequences(uri)
            texts = dict(zip(sequences["sequence_id"].to_pylist(), sequences["text"].to_pylist(), strict=True))
            rows = [row | {"text": (texts[row["sequence_id"]] or "")[:_MOST_TEXT]} for row in top.to_pylist()]
            (answer,) = read_answers(uri).filter(pc.field("query_id") == seen["id"]).to_pylist()
            certificate = read_summary(uri)["certificate"] or {}
            sentences = certificate.get("sentences", {})
            # Of its own rows; where it was asked alone that is all of them.
            said = sentences.get(seen["id"], "" if sentences else certificate.get("sentence", ""))
            return seen | {"run": run, "rows": rows, "certificate": said, "verdict": answer["verdict"] or ""}
        return seen

    def page(self, question_id: str) -> bytes | None:
        """A finished question's page: the report of its run, of this question alone. None where there is none."""
        seen = self.look(question_id)
        if seen is None or seen["state"] != "done":
            return None
        with self._condition:
            if question_id in self._pages:
                return self._pages[question_id]
        page = report_page((self.store / seen["run"]).uri, question_id)
        with self._condition:
            self._pages[question_id] = page
            while len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        return page


def check_asked(inputs: Inputs) -> None:
    """Raises RunError where text cannot be asked: the model has no tokenizer."""
    if inputs.tokenizer is None:
        raise RunError(f"{inputs.config.model.path} has no tokenizer, and people ask in words; use infscan ask.")
