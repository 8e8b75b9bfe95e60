"""What a notebook does: settings as words, keywords or a typed Config; results as small objects; errors raised."""

from __future__ import annotations

from pathlib import Path

import pytest

import infscan
from infscan.api import RunResult, settings_of_call
from infscan.config import Config, CorpusConfig, ModelConfig, QueriesConfig, ScanConfig, plain
from infscan.errors import ConfigError, InfscanError, RunError
from tests.steps.runs import tiny_model, token_corpus, token_queries


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    tiny_model(folder / "model")
    token_corpus(folder / "corpus.jsonl", 24)
    token_queries(folder / "queries.jsonl", 2)
    return folder


def words(inputs: Path) -> list[str]:
    return [
        f"model.path={inputs}/model",
        f"corpus.path={inputs}/corpus.jsonl",
        "corpus.tokens_field=tokens",
        f"queries.path={inputs}/queries.jsonl",
        "scan.top_k=3",
    ]


def typed(inputs: Path) -> Config:
    return Config(
        model=ModelConfig(path=f"{inputs}/model"),
        corpus=CorpusConfig(path=f"{inputs}/corpus.jsonl", tokens_field="tokens"),
        queries=QueriesConfig(path=f"{inputs}/queries.jsonl"),
        scan=ScanConfig(top_k=3),
    )


def test_words_keywords_and_a_typed_config_are_the_same_settings(inputs: Path) -> None:
    by_words = settings_of_call("scan", (*words(inputs), "output=o"), {})
    by_keywords = settings_of_call(
        "scan",
        (),
        {
            "model": {"path": f"{inputs}/model"},
            "corpus": {"path": f"{inputs}/corpus.jsonl", "tokens_field": "tokens"},
            "queries": {"path": f"{inputs}/queries.jsonl"},
            "scan": {"top_k": 3},
            "output": "o",
        },
    )
    by_config = settings_of_call("scan", (typed(inputs),), {"output": "o"})
    assert plain(by_words) == plain(by_keywords) == plain(by_config)
    assert by_words.factors.corpus.tokens_field == "tokens", "what is not given is inherited, however it was said"


def test_presets_are_keywords_too() -> None:
    config = settings_of_call("scan", (), {"model": "demo", "corpus": "demo", "queries": "demo", "factors": "identity"})
    assert (config.model.path, config.scan.compression.value) == ("infscan://demo/model", "plain")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scan": {"topk": 3}}, r"scan\.topk: there is no such key; did you mean scan\.top_k\?"),
        ({"scan": {"top_k": "many"}}, r"scan\.top_k=many: give a whole number"),
        ({"model": "demmo"}, "did you mean model=demo"),
    ],
)
def test_a_slip_is_raised_as_on_the_command_line(settings: dict, said: str, inputs: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        infscan.scan(*words(inputs), **settings)


def test_one_way_at_a_time(inputs: Path) -> None:
    with pytest.raises(ConfigError, match="give words, or one Config, and keywords"):
        infscan.scan(typed(inputs), "scan.top_k=4", output="o")


def test_a_run_from_end_to_end(inputs: Path, tmp_path: Path) -> None:
    """Fit once, scan with those factors, read the answer, ask how far it is, explain a row, and write the page."""
    output, factors = str(tmp_path / "run"), str(tmp_path / "factors")
    common = (*words(inputs), f"factors.path={factors}")
    fitted = infscan.fit(*common, output=str(tmp_path / "fit"))
    assert len(fitted.factors()) == 4
    found = infscan.scan(*common, output=output)
    assert isinstance(found, RunResult)
    assert found.uri == output
    top = found.top().to_pylist()
    assert {row["rank"] for row in top} == {1, 2, 3}
    assert found.sequences().num_rows == len({row["sequence_id"] for row in top})
    assert found.summary["counts"]["published"]["rows"] == len(top)
    again = infscan.read_run(output)
    assert again.top() == found.top()
    assert infscan.status(output).exit_code == 0
    explained = infscan.explain(run=output, rows=1, own_tokens=False)
    assert explained.tables["rows"].num_rows >= 2
    assert Path(infscan.write_report(run=output, rows=2).uri).stat().st_size > 10_000
    planned = infscan.plan(*common, output=output)
    assert planned.to_json()["corpus"]["sequences"] == found.summary["counts"]["scanned"]["sequences"]


def test_what_a_user_can_fix_is_raised(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InfscanError, match="no such folder"):
        infscan.scan(*words(inputs), output=str(tmp_path / "run"), model={"path": str(tmp_path / "nowhere")})
    with pytest.raises(RunError, match="is no finished run"):
        infscan.read_run(str(tmp_path))
