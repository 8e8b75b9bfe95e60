"""Figures of the studies, as PNG and SVG bytes that are the same for the same table."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infscan.errors import ConfigError
from infscan.report.thirds import THIRDS
from infscan.storage import Store
from infscan_studies import word_order
from infscan_studies.layers import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure", pa.Table], None]
_BLUE, _RED, _GREY = "#0b6aa8", "#b3402a", "#8a8a8a"
_SHADES = ("#9ecae1", "#4292c6", "#084594")
_PANELS = 12


def write_figure(store: Store, name: str, draw: Draw, table: pa.Table) -> list[str]:
    """Draw a table and write `<name>.png` and `<name>.svg`; their names.

    Raises:
        ConfigError: where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed, and it draws the figures; install infscan[studies].") from None
    # No date and no random ids in the file; letters stay text, so that an SVG can be searched.
    with rc_context({"svg.hashsalt": "infscan", "svg.fonttype": "none", "font.size": 8, "axes.grid": False}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, table)
        written = []
        for kind, settings in (
            ("png", {"dpi": 150, "metadata": {"Software": None}}),
            ("svg", {"metadata": {"Date": None}}),
        ):
            sink = io.BytesIO()
            figure.savefig(sink, format=kind, **settings)
            store.write(f"{name}.{kind}", sink.getvalue())
            written.append(f"{name}.{kind}")
    return written


def draw_sparsity(figure: Figure, table: pa.Table) -> None:
    """Of each query (the first twelve), how many proponents have a score at least so high, and the fitted power law."""
    from matplotlib.ticker import NullFormatter

    rows = [row for row in table.to_pylist() if row["side"] == "proponent"][:_PANELS]
    columns = min(4, max(1, len(rows)))
    grid = figure.subplots(-(-len(rows) // columns) or 1, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, row in zip(grid.flat, rows, strict=False):
        axes.set_visible(True)
        scores = np.asarray(row["scores"])
        ranks = np.arange(1, len(scores) + 1)
        axes.loglog(scores, ranks, ".", color=_BLUE, markersize=3)
        axes.set_title(row["query"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if row["exponent"] is not None:
            x = np.geomspace(row["threshold"], scores[0], 50)
            axes.loglog(x, len(scores) * (x / row["threshold"]) ** (1 - row["exponent"]), color=_RED, linewidth=1)
            label = f"exponent {row['exponent']:.2f} ± {row['exponent_error']:.2f}\nfit p {row['fit']:.2f}"
            axes.text(0.04, 0.06, label, transform=axes.transAxes, color=_RED)
    figure.supxlabel("score")
    figure.supylabel("sequences with at least that score")
    figure.suptitle("The tail of the proponents' scores, and a power law fitted to it")


def draw_layers(figure: Figure, table: pa.Table) -> None:
    """The average over queries by layer, with its interval; below, every query's thirds."""
    above, below = figure.subplots(2, 1)
    mine = table.filter(pc.field("side") == "proponent")
    average = mine.filter(pc.field("query") == ALL).to_pylist()
    x = np.arange(len(average))
    colours = [_SHADES[THIRDS.index(row["third"])] for row in average]
    parts = np.asarray([row["part"] for row in average])
    errors = np.abs(np.asarray([[row["low"], row["high"]] for row in average]).T.reshape(2, -1) - parts)
    above.bar(x, parts, color=colours, yerr=errors, ecolor=_GREY)
    above.axhline(1 / max(1, len(average)), color=_GREY, linestyle=":", linewidth=1)
    above.set_xticks(x, [row["layer"] for row in average], rotation=30, ha="right", fontsize=6)
    above.set_ylabel("part of |layer margins|")
    above.set_title("All queries: mean over queries, 95 % interval; dotted: uniform")
    queries = [query for query in dict.fromkeys(mine["query"].to_pylist()) if query != ALL][:40]
    bottom = np.zeros(len(queries))
    for third, shade in zip(THIRDS, _SHADES, strict=True):
        rows = mine.filter(pc.field("third") == third).to_pylist()
        heights = np.asarray([sum(row["part"] for row in rows if row["query"] == query) for query in queries])
        below.bar(np.arange(len(queries)), heights, bottom=bottom, color=shade, label=third)
        bottom += heights
    below.set_xticks(np.arange(len(queries)), queries, rotation=30, ha="right", fontsize=6)
    below.set_ylabel("part by third")
    below.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def draw_word_order(figure: Figure, table: pa.Table) -> None:
    """Each partition's mean score over the forward texts': the facts as points, their mean with its interval."""
    rows = [row for row in table.to_pylist() if row["partition"] != word_order.DIFFERENCE]
    partitions, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("partition", "method"))
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), word_order.MEASURES, strict=True):
        for number, (method, colour) in enumerate(zip(methods, (_BLUE, _RED, _GREY), strict=False)):
            mine = [row for row in rows if (row["measure"], row["method"]) == (measure, method)]
            at = {partition: place + 0.2 * number for place, partition in enumerate(partitions)}
            each = [row for row in mine if row["fact"] != word_order.ALL]
            average = [row for row in mine if row["fact"] == word_order.ALL]
            axes.plot([row["ratio"] for row in each], [at[row["partition"]] for row in each], ".", color=_GREY)
            for row in average:
                axes.plot([row["low"], row["high"]], [at[row["partition"]]] * 2, color=colour)
            places = [at[row["partition"]] for row in average]
            axes.plot([row["ratio"] for row in average], places, "o", color=colour, label=method)
        axes.axvline(0, color=_GREY, linewidth=0.5)
        axes.set_yticks(range(len(partitions)), partitions)
        axes.set_title("whole completion" if measure == "completion" else measure)
        axes.set_xlabel("mean score / mean score of the texts that state the fact")
    figure.axes[0].invert_yaxis()
    if len(methods) > 1:
        figure.axes[0].legend(frameon=False)


def draw_memorisation(figure: Figure, table: pa.Table) -> None:
    """By query and rank, how much of prompt and completion the row shares in one run of words; framed: all of it."""
    axes = figure.subplots()
    queries = list(dict.fromkeys(table["query"].to_pylist()))[:40]
    rows = [row for row in table.to_pylist() if row["query"] in queries]
    shares = np.full((len(queries), max((row["rank"] for row in rows), default=1)), np.nan)
    for row in rows:
        at = queries.index(row["query"]), row["rank"] - 1
        shares[at] = row["longest"] / max(1, row["words"])
        if row["whole"]:
            axes.plot(at[1], at[0], "s", color=_RED, markersize=6, fillstyle="none")
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(drawn, label="longest shared run of words / words of prompt and completion")
    axes.set_yticks(range(len(queries)), queries)
    axes.set_xticks(range(shares.shape[1]), [str(rank) for rank in range(1, shares.shape[1] + 1)])
    axes.set_xlabel("rank")


def draw_models(figure: Figure, table: pa.Table) -> None:
    """The words that each run's rows share with their query, and what two runs' lists have in common."""
    rows = [row for row in table.to_pylist() if row["query"] == ALL]
    left, right = figure.subplots(1, 2)
    for axes, column, title in (
        (left, "shared_words", "part of the query's words"),
        (right, "overlap", "part of the list in both"),
    ):
        mine = [row for row in rows if row[column] is not None]
        names = [" and ".join(_last(name) for name in (row["run"], row["other"]) if name) for row in mine]
        values = np.asarray([row[column] for row in mine])
        errors = np.abs(np.asarray([[row["low"], row["high"]] for row in mine]).T.reshape(2, -1) - values)
        axes.barh(range(len(mine)), values, xerr=errors, color=_BLUE, ecolor=_GREY)
        axes.set_yticks(range(len(mine)), [f"{n}, top {row['top']}" for n, row in zip(names, mine, strict=True)])
        axes.set_xlim(0, 1)
        axes.set_title(title)


def draw_cross_lingual(figure: Figure, table: pa.Table) -> None:
    """What a query's list and its translation's share, beside unrelated queries; the other language's documents."""
    rows = table.to_pylist()
    left, right = figure.subplots(1, 2)
    average = [row for row in rows if row["query"] == ALL]
    x, width = np.arange(len(average)), 0.38
    values = np.asarray([row["overlap"] for row in average])
    errors = np.abs(np.asarray([[row["low"], row["high"]] for row in average]).T.reshape(2, -1) - values)
    left.bar(x - width / 2, values, width, yerr=errors, color=_BLUE, ecolor=_GREY, label="translations")
    left.bar(x + width / 2, [row["unrelated"] for row in average], width, color=_GREY, label="unrelated")
    left.set_xticks(x, [f"top {row['top']}" for row in average])
    left.set_ylabel("part of the list in both")
    left.legend(frameon=False)
    ranks = sorted(row["rank"] for row in rows if row["rank"] is not None)
    right.step(ranks, np.arange(1, len(ranks) + 1), where="post", color=_BLUE)
    right.set_xscale("log")
    right.set_xlabel("rank of the document in the other language")
    right.set_ylabel("queries with that rank or better")


def draw_side_by_side(figure: Figure, table: pa.Table) -> None:
    """By kind and run: the query's words that rows share, and the thirds of the layers."""
    rows = [row for row in table.to_pylist() if row["query"] == ALL]
    names = [f"{row['kind']}, {_last(row['run'])}" for row in rows]
    left, right = figure.subplots(1, 2, sharey=True)
    values = np.asarray([row["shared_words"] for row in rows])
    errors = np.abs(np.asarray([[row["low"], row["high"]] for row in rows]).T.reshape(2, -1) - values)
    left.barh(range(len(rows)), values, xerr=errors, color=_BLUE, ecolor=_GREY)
    left.set_yticks(range(len(rows)), names)
    left.set_xlabel("part of the query's words, by rarity")
    start = np.zeros(len(rows))
    for third, shade in zip(THIRDS, _SHADES, strict=True):
        parts = np.asarray([row[third] for row in rows])
        right.barh(range(len(rows)), parts, left=start, color=shade, label=third)
        start += parts
    right.set_xlabel("part of |layer margins|")
    right.legend(frameon=False)


def draw_extrapolation(figure: Figure, table: pa.Table) -> None:
    """By query, the sequences after which an unfiltered scan matches the filter's k-th row; dotted: scanned."""
    axes = figure.subplots()
    rows = table.to_pylist()
    queries = list(dict.fromkeys(row["query"] for row in rows))[:40]
    for at, (k, colour) in enumerate(zip(sorted({row["k"] for row in rows}), (*_SHADES, *_SHADES), strict=False)):
        mine = [row for row in rows if row["k"] == k and row["query"] in queries]
        y = [queries.index(row["query"]) + 0.2 * at for row in mine]
        axes.hlines(y, [row["low"] for row in mine], [row["high"] for row in mine], color=colour)
        axes.plot([row["needed"] for row in mine], y, "o", color=colour, markersize=4, label=f"its {k}.")
    if rows:
        axes.axvline(rows[0]["scanned"], color=_GREY, linestyle=":")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set_yticks(range(len(queries)), queries)
    axes.set_xlabel("sequences that an unfiltered scan needs")


def _last(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]
