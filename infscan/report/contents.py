"""The page's content for one run: its queries, and row by row the published sequences with their margins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infscan.config import from_yaml
from infscan.corpus.near_duplicates import carrying, near_duplicates
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import RunError
from infscan.queries import measured_rows
from infscan.report.assemble import Archive
from infscan.report.histogram import histograms
from infscan.report.proved import Proved, read_proved
from infscan.report.terminal import by_id, how_good, how_much, hub_from, is_hub, log_probabilities, one_line
from infscan.results.manifest import read_manifest
from infscan.results.read import parts_of, read_parts, read_summary, read_top
from infscan.results.schema import read_parquet
from infscan.storage import Store, is_uri

SIDES = ("proponent", "opponent")
# Rows in one chunk: what the page decodes at a time.
PAGE = 10
# Numbers are whole multiples of a row's largest one, divided by this: four digits.
STEPS = 9999
# A sequence's text is cut after so many characters, a question's in the list of queries after so many.
MOST_CHARACTERS = 65_536
_MOST_ASKED = 300
_SEQUENCE = ("sequence_id", "token_ids", "documents", "source", "path", "byte_offset", "loss", "loss_mask", "corpus")


def quantised(values: NDArray[np.floating]) -> dict[str, Any]:
    """Numbers as whole multiples of `unit`, |values| / unit <= 9999: off by at most half a unit."""
    largest = float(np.abs(values).max()) if len(values) else 0.0
    if not largest:
        return {"unit": 0.0, "values": [0] * len(values)}
    unit = float(f"{largest / STEPS:.6g}")
    return {"unit": unit, "values": np.rint(values.astype(np.float64) / unit).astype(int).tolist()}


@dataclass(frozen=True)
class _Pieces:
    """Cuts token ids into the texts that the page colours; without a tokenizer, the ids themselves."""

    tokenizer: Tokenizer | None

    def __call__(self, token_ids: list[int], mask: list[bool] | None = None) -> dict[str, Any]:
        """texts, and where they say anything: spans (tokens in each text), quiet (texts without a loss), more
        (characters that are cut off)."""
        cut = self.tokenizer.pieces(token_ids) if self.tokenizer else [(f"{token} ", 1) for token in token_ids]
        texts, spans, quiet, room, more = [], [], [], MOST_CHARACTERS, 0
        start = 0
        for number, (text, span) in enumerate(cut):
            if room or not text:
                texts.append(text[:room])
                spans.append(span)
                if mask and not any(mask[start : start + span]):
                    quiet.append(number)
            more += len(text) - len(text[:room])
            room -= len(text[:room])
            start += span
        found: dict[str, Any] = {"texts": texts}
        if any(span != 1 for span in spans):
            found["spans"] = spans
        if quiet:
            found["quiet"] = quiet
        if more:
            found["more"] = more
        return found


def run_contents(
    uri: str,
    name: str,
    archive: Archive,
    rows: int,
    tokenizer: Tokenizer | None,
    asking: Tokenizer | None,
    *,
    only: str | None = None,
) -> dict[str, Any]:
    """The run's part of the page's index; heads (a chunk per query) and rows (a chunk per PAGE rows) go to the archive.

    rows: at most so many per query and side. tokenizer: of the scanned model; asking: of the model that was asked.
    only: the id of the one query that is shown; None shows all.
    """
    store = Store(uri)
    summary = read_summary(uri)
    config = from_yaml(store.read("config.yaml").decode())
    # By id, as the tables are: one query's rows are in memory at a time, and a part's tables.
    questions = [question for question in measured_rows(store) if only in (None, question["id"])]
    if not all(question["parts"] for question in questions):
        raise RunError(f"{store.uri}: a query of it measures nothing; restore its queries, or scan again.")
    questions.sort(key=lambda question: question["id"])
    sequences = _sequences(store, uri, rows)
    hub = hub_from(questions, summary)
    measured, answers = by_id(uri, "queries"), by_id(uri, "answers")
    proved = read_proved(store)
    spread = histograms(store, [question["id"] for question in questions])
    published = _by_query(uri)
    following = next(published, None)
    layer_names: list[str] = []
    queries = []
    for question in questions:
        mine = None
        while following and following[0] < question["id"]:
            following = next(published, None)
        if following and following[0] == question["id"]:
            mine, following = following[1], next(published, None)
        head: dict[str, Any] = {"asked": _asked(question, _Pieces(asking))}
        sides: dict[str, Any] = {}
        if mine:
            layer_names = mine.layers
        for side in SIDES:
            found = mine.of(side) if mine else []
            head[side] = {"scores": [_digits(row["score"]) for row, _, _ in found]}
            if found:
                head[side]["layers"] = quantised(np.mean([layers for _, layers, _ in found], axis=0))
            chunks = _rows(found[:rows], sequences, _Pieces(tokenizer), archive, hub, proved)
            sides[side] = {"published": len(found), "chunks": chunks}
        if question["id"] in spread:
            head["histogram"] = spread[question["id"]]
        if effects := proved.of(question["id"]):
            head["proved"] = effects
        known = measured.get(question["id"])
        line = _line(question, summary, asking) | {
            "known": log_probabilities(known) if known else None,
            "verdict": (answers.get(question["id"]) or {}).get("verdict"),
        }
        queries.append(line | {"head": archive.add(0, head), **sides})
    return {
        "name": name,
        "facts": _facts(config, summary),
        "agreement": _agreement(config, summary, only),
        "warnings": list(summary.get("warnings", [])) + _given_up(summary),
        "layers": layer_names,
        "proved": proved.of(None),
        "queries": queries,
    }


def settle(run: dict[str, Any], archive: Archive) -> dict[str, Any]:
    """The run's index once the archive is complete: chunks that were dropped are named no more, and `shown` says what
    is left."""
    for query in run["queries"]:
        for side in SIDES:
            query[side]["chunks"] = [each for each in query[side]["chunks"] if archive.kept(each["chunk"])]
            query[side]["shown"] = sum(each["rows"] for each in query[side]["chunks"])
    return run


@dataclass(frozen=True)
class _Published:
    """One query's rows of top with their margins: (row, by layer, by token)."""

    layers: list[str]
    rows: list[tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float32]]]

    def of(self, side: str) -> list[tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float32]]]:
        return sorted((row for row in self.rows if row[0]["side"] == side), key=lambda row: row[0]["rank"])


def _by_query(uri: str) -> Iterator[tuple[str, _Published]]:
    for top, layers, tokens in read_parts(uri):
        if not top.num_rows:
            continue
        # The publisher writes a row's layers together, in one order, and all three tables in the order of top.
        names = layers["layer"][: layers.num_rows // top.num_rows].to_pylist()
        by_layer = layers["score"].to_numpy().reshape(top.num_rows, len(names))
        by_token = tokens["scores"].combine_chunks()
        starts = by_token.offsets.to_numpy()
        values = by_token.values.to_numpy()
        found: dict[str, _Published] = {}
        for number, row in enumerate(top.to_pylist()):
            query = found.setdefault(row["query_id"], _Published(names, []))
            query.rows.append((row, by_layer[number], values[starts[number] : starts[number + 1]]))
        yield from found.items()


def _sequences(store: Store, uri: str, rows: int) -> dict[int, dict[str, Any]]:
    """The sequences that are shown, by sequence_id."""
    wanted = pc.unique(read_top(uri).filter(pc.field("rank") <= rows)["sequence_id"])
    found: dict[int, dict[str, Any]] = {}
    for name in parts_of(store, "sequences", read_manifest(store)):
        table = read_parquet(store, name, list(_SEQUENCE))
        table = table.filter(pc.is_in(table["sequence_id"], value_set=pa.array(wanted)))
        found |= {row["sequence_id"]: row for row in table.to_pylist()}
    return found


def _rows(
    found: list[tuple[dict[str, Any], NDArray[np.float32], NDArray[np.float32]]],
    sequences: dict[int, dict[str, Any]],
    pieces: _Pieces,
    archive: Archive,
    hub: int,
    proved: Proved,
) -> list[dict[str, int]]:
    """The rows of one query and side, PAGE to a chunk; pages of the same depth share a level. hub: as of `hub_from`."""
    ids = [np.asarray(sequences[row["sequence_id"]]["token_ids"], np.int64) for row, _, _ in found]
    pieces_of = [
        tokens[carrying(sequences[row["sequence_id"]]["documents"], by_token)]
        for tokens, (row, _, by_token) in zip(ids, found, strict=True)
    ]
    leads = near_duplicates(pieces_of)
    how = ["exact" if np.array_equal(ids[number], ids[lead]) else "near" for number, lead in enumerate(leads)]
    # A document's rows together, behind its strongest.
    named: dict[tuple[str, str], int] = {}
    for number, (row, _, _) in enumerate(found):
        first = named.setdefault((row["document_id"], row["source"]), number)
        if first != number and leads[number] == number:
            leads[number], how[number] = leads[first], "document"
    copies: dict[int, list[list[Any]]] = {}
    for number, lead in enumerate(leads):
        if lead != number:
            copies.setdefault(lead, []).append([number + 1, how[number]])
    chunks = []
    for start in range(0, len(found), PAGE):
        rows = []
        for number, (row, by_layer, by_token) in enumerate(found[start : start + PAGE], start=start):
            shown: dict[str, Any] = {
                "rank": row["rank"],
                "score": _digits(row["score"]),
                "scan": _digits(row["scan_score"]),
                "layers": quantised(by_layer),
                "tokens": quantised(by_token),
                "sequence": _sequence(sequences[row["sequence_id"]], pieces),
            }
            if row["document_id"] is not None:
                shown["document"] = [row["document_id"], row["source"] or ""]
            if row.get("z") is not None:
                shown["z"] = float(f"{row['z']:.3g}")
            if row.get("similarity") is not None:
                shown["similarity"] = round(row["similarity"], 2)
            if (effect := proved.effects.get((row["query_id"], row["sequence_id"]))) is not None:
                shown["effect"] = _digits(effect)
            if row.get("sign_sure") is False:
                shown["unsure"] = [_digits(row["score_low"]), _digits(row["score_high"])]
            if row.get("states_completion"):
                shown["states"] = True
            elif is_hub(row, hub):
                shown["hub"] = row["hub"]
            if row.get("stands_out") is False:
                shown["weak"] = True
            if leads[number] != number:
                shown["alike"] = [leads[number] + 1, how[number]]
            if number in copies:
                shown["copies"] = copies[number]
            rows.append(shown)
        chunks.append({"chunk": archive.add(1 + start // PAGE, rows), "rows": len(rows)})
    return chunks


def _sequence(row: dict[str, Any], pieces: _Pieces) -> dict[str, Any]:
    return {
        "id": row["sequence_id"],
        "documents": [[each["id"], each["source"], each["start"], each["end"]] for each in row["documents"]],
        "corpus": row["corpus"],
        "place": f"{_short(row['path'])}:{row['byte_offset']}",
        "loss": _digits(row["loss"]),
        "length": len(row["token_ids"]),
        **pieces(row["token_ids"], row["loss_mask"]),
    }


def _asked(question: dict[str, Any], pieces: _Pieces) -> list[dict[str, Any]]:
    """Each part of the question: its texts, the numbers of those that were measured, and the sign they count with."""
    parts = []
    for part in question["parts"]:
        shown = pieces(part["input_ids"])
        measured, positions, start = [], set(part["positions"]), 0
        for number, span in enumerate(shown.get("spans") or [1] * len(shown["texts"])):
            if positions & set(range(start, start + span)):
                measured.append(number)
            start += span
        parts.append(shown | {"measured": measured, "sign": part["sign"]})
    return parts


def _line(question: dict[str, Any], summary: dict[str, Any], asking: Tokenizer | None) -> dict[str, Any]:
    """The query as the list of queries shows it; where only token ids came, their text."""
    prompt, completion = question["prompt"], question["completion"]
    if completion is None:
        part = question["parts"][0]
        start = part["positions"][0]
        decode = asking.decode if asking else lambda ids: " ".join(map(str, ids))
        prompt, completion = decode(part["input_ids"][:start]), decode(part["input_ids"][start:])
    rather = f" rather than {question['contrast'].strip()}" if question.get("contrast") else ""
    agreement = ((summary.get("approximation") or {}).get("queries") or {}).get(question["id"]) or {}
    return {
        "id": question["id"],
        "measure": question["measure"],
        "prompt": (prompt or "")[-_MOST_ASKED:],
        "completion": f"{completion}{rather}"[:_MOST_ASKED],
        "agreement": [agreement[key] for key in ("pearson", "low", "high")] if agreement.get("pearson") else None,
    }


def _facts(config: dict[str, Any], summary: dict[str, Any]) -> list[list[str]]:
    scan, factors = config["scan"], config["factors"]
    corpus = config["corpus"]
    damping = factors["damping"]
    curvature = {
        "ekfac": "EK-FAC",
        "identity": "none: the gradient dot product",
        "cg": "EK-FAC, then conjugate gradients",
    }
    facts = [
        ["model", _short(config["model"]["path"])],
        ["corpus", ", ".join(corpus["paths"]) if corpus["paths"] else _short(corpus["path"])],
        ["scanned", how_much(summary["counts"]).replace(" scanned", "")],
        ["layers that take part", config["model"]["tracked"]],
        ["curvature", curvature.get(factors["solver"], "EK-FAC, then ASTRA")],
    ]
    if factors["solver"] != "identity":
        absolute = damping["absolute"]
        value = f"{damping['relative']:g} of the mean of Lambda" if absolute is None else f"{absolute:g}"
        if absolute is None and summary.get("damping"):
            found = sorted(summary["damping"].values())
            value = f"found by layer: {found[0]:.2g} to {found[-1]:.2g} of the mean of Lambda"
        facts += [["damping", value], ["labels of the Fisher", factors["labels"]]]
    rank = "full" if scan["rank"] is None else f"{scan['rank']}, {scan['compression']}"
    facts.append(["rank of the scan", rank])
    if config["stages"]:
        facts.append(["stages", f"{len(config['stages'])}; stage {scan['stage']} was scanned"])
    return facts


def _agreement(config: dict[str, Any], summary: dict[str, Any], only: str | None) -> str:
    if summary.get("approximation"):
        found = one_line(how_good(summary["approximation"])).removeprefix("Compression: ")
    elif config["scan"]["rank"] is None:
        found = "The scan was at full rank: no sequence was passed over because of a compression."
    else:
        found = (
            "Published scores are at full rank. How well the scan's low-rank scores agree with them was not measured."
        )
    if known := summary.get("certificate"):
        found = f"{known.get('sentences', {}).get(only) or known['sentence']} {found}"
    iteration = summary.get("iteration")
    if iteration:
        found += f" Iterated solutions: {one_line(json.dumps(iteration))[:300]}."
    return found


def _given_up(summary: dict[str, Any]) -> list[str]:
    lost = summary["counts"]["quarantined"]
    if not lost["shards"]:
        return []
    return [f"{lost['sequences']:,} sequences in {lost['shards']} shards could not be scanned: see quarantine/"]


def _digits(value: float) -> float:
    """Six digits are more than agree between two machines."""
    return float(f"{value:.6g}")


def _short(path: str) -> str:
    """Addresses and names as they are; of a path of some machine, what is the same on others."""
    return path if is_uri(path) else path.rstrip("/").rpartition("/")[2]
