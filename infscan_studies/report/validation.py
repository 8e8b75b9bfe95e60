"""A validation on a terminal: a line per method, the average over queries its interval, how far the truth came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from infscan_studies.bank_judged import ALL
from infscan_studies.comparison import AVERAGE, EKFAC
from infscan_studies.config import ProveJob
from infscan_studies.prove import PROPONENT, KindEffect, after_steps, by_kind, words


def show(table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Each method against the reference, EK-FAC's lead over it, its seconds; then how well the reference converged."""
    console = Console(soft_wrap=True, highlight=False, width=120)
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column("method")
    for name in (f"Pearson with {facts['reference']} [95 %]", "Spearman", "recall", "EK-FAC's lead [95 %]", "seconds"):
        shown.add_column(name, justify="right")
    for row in table.filter(pc.field("query") == AVERAGE).to_pylist():
        lead = facts["gain_of_ekfac"].get(row["method"])
        shown.add_row(
            row["method"],
            f"{row['pearson']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['spearman']:+.3f}",
            "-" if row["recall"] is None else f"{row['recall']:.2f}",
            "-" if lead is None else f"{lead[0]:+.3f} [{lead[1]:+.3f}, {lead[2]:+.3f}]",
            f"{row['seconds']:.1f}",
            style="bold" if row["method"] == EKFAC else "",
        )
    console.print(shown)
    console.print()
    for line in lines(facts):
        console.print(line)


def show_effects(table: pa.Table, facts: Mapping[str, Any], job: ProveJob) -> None:
    """A line per kind of rows: what training on one of them does to the completion; then what that says."""
    console = Console(soft_wrap=True, highlight=False, width=120)
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column("trained on")
    for name in ("rows", "effect, nats [95 %]", "raise it", "proponents' lead [95 %]"):
        shown.add_column(name, justify="right")
    found = [(steps, each) for steps in job.counts for each in _kinds(table, steps, job)]
    for steps, each in found:
        shown.add_row(
            each.kind if len(job.counts) == 1 else f"{each.kind}, {'1 step' if steps == 1 else f'{steps} steps'}",
            f"{each.rows:,}",
            f"{each.mean:+.3g} [{each.low:+.3g}, {each.high:+.3g}]",
            f"{each.raises:.0%}",
            "-" if each.lead is None else "{:+.3g} [{:+.3g}, {:+.3g}]".format(*each.lead),
            style="bold" if each.kind == PROPONENT else "",
        )
    console.print(shown)
    console.print()
    for line in words(after_steps(table, job.steps), facts, job):
        console.print(line, markup=False)


def _kinds(table: pa.Table, steps: int, job: ProveJob) -> list[KindEffect]:
    return by_kind(after_steps(table, steps), job.resamples, job.seed)


def show_coverage(table: pa.Table, facts: Mapping[str, Any]) -> None:
    """A line per side and top, a column per k: the queries' average share that the filter keeps."""
    console = Console(soft_wrap=True, highlight=False, width=120)
    rows = table.filter(pc.field("query") == AVERAGE).to_pylist()
    ks = sorted({row["k"] for row in rows})
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    shown.add_column("of the scan's")
    for k in ks:
        shown.add_column(f"best {k:,}", justify="right")
    for side, top in sorted(
        {(row["side"], row["top"]) for row in rows}, key=lambda each: (each[0] != "proponent", each)
    ):
        shares = {row["k"]: row["share"] for row in rows if (row["side"], row["top"]) == (side, top)}
        shown.add_row(f"top {top} {side}s", *("?" if shares[k] is None else f"{shares[k]:.2f}" for k in ks))
    by_chance = (min(1.0, k / facts["sequences"]) for k in ks)
    shown.add_row("any sequence", *(f"{share:.2f}" for share in by_chance), style="dim")
    console.print("Share that the TF-IDF filter keeps, by how many sequences it keeps per query\n")
    console.print(shown)
    if facts["top_k"] < min(max(ks), facts["sequences"]):
        console.print(
            f"\n?: the filter kept {facts['top_k']:,} per query (tfidf.top_k), and ranks beyond are not known"
        )


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What was compared, and how well each truth converged."""
    said = []
    if "pbrf" in facts:
        pbrf = facts["pbrf"]
        missed = f"{pbrf['not_converged']} of {pbrf['minimisations']} minimisations did NOT reach the tolerance of"
        said.append(
            f"PBRF, the reference: {facts['points']} training points, {pbrf['seconds']:.0f} s; "
            + (missed if pbrf["not_converged"] else f"all {pbrf['minimisations']} minimisations reached")
            + f" {pbrf['settings']['tolerance']:g} (relative gradient; median {pbrf['residual']['median']:.2g}, "
            f"largest {pbrf['residual']['largest']:.2g}). Responses to eps = +1/N and -1/N correlate at "
            f"{pbrf['both_ways']:.3f}."
        )
    if "cg" in facts:
        cg = facts["cg"]
        residual, iterations = max(cg["residual"].values()), max(cg["iterations"].values())
        reached = "" if residual <= cg["tolerance"] else f" (the tolerance of {cg['tolerance']:g} was NOT reached)"
        role = ", the reference" if "pbrf" not in facts else ""
        said.append(
            f"CG{role}: {iterations} iterations, largest relative residual {residual:.2g}{reached}, "
            f"{cg['seconds']:.0f} s."
        )
    return [
        *said,
        f"Seconds are for all queries together; EK-FAC's and CG's hold the fit's {facts['fit_seconds']:.1f} s.",
    ]


def show_bank(table: pa.Table) -> None:
    """Each recipe's rows, the best over all queries first: LDS with its interval and share of the ceiling, by kind."""
    rows = table.to_pylist()
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["recipe"] == recipe:
                found.setdefault(row["label"], {})[row["kind"]] = row
        kinds = [kind for kind in next(iter(found.values())) if kind != ALL]
        print(f"{recipe}: LDS over all queries, 95 % interval, share of the ceiling; by kind of query")
        for label, its in sorted(found.items(), key=lambda item: -item[1][ALL]["lds"]):
            whole, values = its[ALL], "".join(f"  {kind} {its[kind]['lds']:+.2f}" for kind in kinds if kind in its)
            interval = f"[{whole['low']:+.2f}, {whole['high']:+.2f}]"
            print(f"{label:<28} {whole['lds']:+.3f} {interval} {whole['share']:.2f}{values}")
        print()


def show_steps(table: pa.Table, facts: Mapping[str, Any]) -> None:
    """A line per row of the sweep, the best over all queries first; agreement by kind of query."""
    found: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        found.setdefault(row["label"], {})[row["kind"]] = row
    kinds = [kind for kind in next(iter(found.values())) if kind != ALL]
    print(
        f"The effect of a step of {facts['optimizer']} ({facts['learning_rate']:.2g}) on each of {facts['sequences']} "
        f"sequences alone, {facts['any']:+.3g} nats in the mean; over all queries, 95 % intervals:\n"
        f"Spearman of scores and effects; Pearson; effect of the strongest {facts['top']}, nats; Spearman by kind"
    )
    for label, its in sorted(found.items(), key=lambda item: -item[1][ALL]["spearman"]):
        said = "  ".join(
            f"{its[ALL][name]:+.3f} [{its[ALL][f'{name}_low']:+.2f}, {its[ALL][f'{name}_high']:+.2f}]"
            for name in ("spearman", "pearson", "top")
        )
        print(
            f"{label:<24} {said}" + "".join(f"  {kind} {its[kind]['spearman']:+.2f}" for kind in kinds if kind in its)
        )
