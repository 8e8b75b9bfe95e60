"""Background queries: hubs are what asking them would count; nothing else of a run depends on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infscan.corpus.addressable import open_corpus
from infscan.corpus.sequences import Sequence
from infscan.errors import ConfigError
from infscan.pipeline import answer
from infscan.results.read import read_scores, read_summary, read_top
from infscan.results.status import read_status
from infscan.steps.background import ASKED_ALONG, asked_of
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.steps.runs import small_run, token_queries, write_jsonl

ASKED = 6


def test_a_hub_is_near_the_top_of_the_background_as_if_it_were_asked(tmp_path: Path) -> None:
    token_queries(tmp_path / "queries.jsonl", 1)
    given = ("scan.rank=null", "scan.scores=all", "scan.top_k=10")
    config = small_run(tmp_path, *given, f"scan.background_queries={ASKED}", f"output={tmp_path / 'along'}")
    with without_ray():
        answer(config)
        answer(small_run(tmp_path, *given, f"output={tmp_path / 'alone'}"))
    along, alone = str(tmp_path / "along"), str(tmp_path / "alone")
    assert read_summary(along)["background_queries"] == ASKED
    assert read_summary(alone)["background_queries"] == 0
    top, before = read_top(along), read_top(alone)
    for name in top.column_names:
        if name in ("score", "scan_score", "z", "share", "document_share"):
            np.testing.assert_allclose(top[name].to_numpy(), before[name].to_numpy(), rtol=1e-4)
        elif name != "hub":
            assert top[name].equals(before[name]), name
    assert set(before["hub"].to_pylist()) == {0}
    assert read_scores(along).column_names == read_scores(alone).column_names
    # The same questions, asked as a run's own.
    corpus = open_corpus(Store(f"{along}/corpus"))
    tokens_of = {one.sequence_id: one.token_ids.tolist() for one in corpus.read(np.arange(corpus.sequences))}
    rows, owners = [], []
    for number, line in enumerate(Store(along).read(ASKED_ALONG).splitlines()):
        [part] = json.loads(line)["parts"]
        asked = part["input_ids"]
        rows.append({"id": f"b{number}", "input_ids": asked, "prompt_len": part["positions"][0]})
        owners += [own for own, tokens in tokens_of.items() if tokens[: len(asked)] == asked]
    assert len(rows) == len(owners) == ASKED
    write_jsonl(tmp_path / "queries.jsonl", rows)
    with without_ray():
        answer(small_run(tmp_path, *given, f"output={tmp_path / 'asked'}"))
    scores = read_scores(str(tmp_path / "asked"))
    near: dict[tuple[int, str], int] = {}
    for n, own in enumerate(owners):
        values, ids = scores[f"score_b{n}"].to_numpy(), scores["sequence_id"].to_numpy()
        for side, turned in (("proponent", values), ("opponent", -values)):
            for row in np.argsort(-turned, kind="stable")[:10]:
                if turned[row] > 0 and ids[row] != own:
                    near[int(ids[row]), side] = near.get((int(ids[row]), side), 0) + 1
    expected = [near.get((row["sequence_id"], row["side"]), 0) for row in top.to_pylist()]
    assert top["hub"].to_pylist() == expected
    assert max(expected) > 0


def test_a_run_with_them_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = small_run(tmp_path, f"scan.background_queries={ASKED}")
    with without_ray():
        answer(config)
        tables = read_top(config.output)
        store = Store(config.output)
        store.remove("_SUCCESS")
        assert {row.query_id for row in read_status(config.output).top} == {"q0", "q1", "q2"}
        for name in store.names("shards")[::2]:
            store.remove(name)
        answer(config)
    assert read_top(config.output).equals(tables)


def test_a_question_is_made_of_tokens_with_a_loss() -> None:
    def sequence(number: int, length: int, loss: list[bool] | None = None) -> Sequence:
        mask = None if loss is None else np.asarray(loss)
        return Sequence(number, np.arange(length), (), 0, "", loss=mask)

    masked = [True, True, True, True, True, False]
    found = asked_of([sequence(7, 3), sequence(8, 6, masked), sequence(9, 6, [False] * 6), sequence(4, 99)], 5)
    assert found.sequence_ids.tolist() == [8, 4]
    assert [query.parts[0].positions for query in found.queries] == [(3, 4), tuple(range(24, 32))]
    assert [len(query.parts[0].token_ids) for query in found.queries] == [5, 32]
    assert len(asked_of([sequence(1, 9), sequence(2, 9)], 1).queries) == 1


@pytest.mark.parametrize("other", ["scan.sieve=1", "factors.solver=cg"])
def test_they_are_asked_of_everything_and_by_the_factors_alone(tmp_path: Path, other: str) -> None:
    with pytest.raises(ConfigError, match=r"scan\.background_queries=6"):
        small_run(tmp_path, "scan.background_queries=6", other)
