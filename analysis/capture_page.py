"""The page of `cce-precision capture --train`: what the head is like as it learns, and each variant's errors on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cce_precision.analysis import pages
from cce_precision.analysis.capture_training import SIDES, load, means
from cce_precision.analysis.convergence_page import number
from cce_precision.analysis.figures import FLOOR, MARKS, Figure, Level, Panel, Series
from cce_precision.analysis.heads import THRESHOLDS
from cce_precision.choosing import BASELINE, SLACK
from cce_precision.variants import get

__all__ = ["build", "pictures", "sentences"]


def softmax(table: Any, metric: str) -> Any:
    """A statistic of the head by stage, in the order of training."""
    some = table[(table["quantity"] == "softmax") & (table["metric"] == metric)]
    return some.set_index("stage")["value"]


def sentences(table: Any) -> list[str]:
    """The answer in words."""
    loss, mass = softmax(table, "loss"), softmax(table, "mass_below:2^-12")
    said = [
        f"The loss falls from {loss.iloc[0]:.2f} to {loss.iloc[-1]:.2f} nats. Of the softmax {mass.iloc[0]:.0%} lies "
        f"below 2^-12 at first, {mass.iloc[-1]:.0%} at the end: what a filter at that threshold leaves out or samples."
    ]
    errors = {side: means(table, side, "rel") for side in SIDES}
    seconds = means(table, "time", "seconds")
    for stage in errors["dE"]:
        own = {side: errors[side][stage].dropna() for side in SIDES}
        if BASELINE not in own["dE"]:
            continue
        able = [
            name for name in own["dE"].index
            if name != BASELINE and all(own[side][name] <= SLACK * own[side][BASELINE] for side in SIDES)
        ]  # fmt: skip
        if able:
            best = min(able, key=lambda name: seconds.loc[name, stage])
            share = seconds.loc[best, stage] / seconds.loc[BASELINE, stage]
            said.append(
                f"{stage}: no less exact than {BASELINE} in both gradients {'are' if len(able) > 1 else 'is'} "
                f"{', '.join(able)}; fastest of them {best}, in {share:.2f} times {BASELINE}'s time here."
            )
        else:
            said.append(f"{stage}: every variant measured is less exact than {BASELINE} in a gradient.")
    return said


def pictures(table: Any, seen: dict[str, float]) -> list[Figure]:
    """The page's figures. seen: millions of tokens before each stage."""
    errors = {side: means(table, side, "rel") for side in SIDES}
    seconds = means(table, "time", "seconds")
    last = errors["dE"].columns[-1]

    def curve(name: str, values: Any, form: str = "{:.2e}") -> Series:
        kept = values.dropna()
        notes = tuple(f"{stage}: {form.format(y)}" for stage, y in kept.items())
        return Series(name, tuple(seen[stage] for stage in kept.index), tuple(kept), notes)

    def panel(title: str, y: str, series: list[Series], log: bool, levels: tuple[Level, ...] = ()) -> Panel:
        return Panel(title, "million tokens seen", y, tuple(series), levels, False, log, named=True)

    def error(side: str) -> Panel:
        curves = [curve(name, errors[side].loc[name]) for name in errors[side].index]
        floor = means(table, side, "floor").iloc[0].iloc[-1]
        return panel(f"error of {side}", "relative error", curves, True, (Level(FLOOR, float(floor)),))

    def against_time(side: str) -> Panel:
        points = [
            Series(name, (1e3 * float(seconds.loc[name, last]),), (float(errors[side].loc[name, last]),), (name,))
            for name in errors[side].index
        ]
        return Panel(f"{side}, {last}", "ms", "relative error", tuple(points), named=True)

    masses = [curve(f"2^-{k}", softmax(table, f"mass_below:2^-{k}"), "{:.1%}") for k in THRESHOLDS]
    nats = [curve(name, softmax(table, name), "{:.2f}") for name in ("loss", "entropy")]
    return [
        Figure(
            "error",
            "Errors as the head learns",
            "Relative error (Euclidean norm) of each gradient of the mean loss, from a sample of rows against fp64; "
            "the mean over draws of variants that sample.",
            (error("dE"), error("dC")),
        ),
        Figure(
            "cost",
            "Errors against time",
            "One call with its gradients on the trained head, on the device of this run.",
            (against_time("dE"), against_time("dC")),
        ),
        Figure(
            "softmax",
            "The head's softmax",
            "Left: the mean share of a token's probability in entries below a threshold. Right: loss and entropy.",
            (panel("mass below a threshold", "share", masses, False), panel("nats", "nats", nats, False)),
        ),
    ]


def _marks() -> None:
    """Lends the curves of the softmax, which are of no variant, marks of some."""
    names = (*(f"2^-{k}" for k in THRESHOLDS), "loss", "entropy")
    lent = ("cce_sparse", "cce_unbiased", "cce_subsampled", "cce_exact", "cce")
    MARKS.update({name: MARKS[variant] for name, variant in zip(names, lent, strict=True)})


def _table_rows(table: Any) -> list[dict[str, Any]]:
    """A row a variant: its summary, its errors with intervals by stage, and its time on the last."""
    wanted = {metric: {side: means(table, side, metric) for side in SIDES} for metric in ("rel", "rel_low", "rel_high")}
    seconds = means(table, "time", "seconds")

    def cell(name: str, stage: str) -> list[dict[str, str]]:
        return [
            {"value": number(wanted["rel"][side].loc[name, stage])}
            | {"interval": " to ".join(number(wanted[m][side].loc[name, stage]) for m in ("rel_low", "rel_high"))}
            for side in SIDES
        ]

    stages = list(wanted["rel"]["dE"])
    return [
        {
            "name": name,
            "summary": get(name).summary,
            "colour": MARKS[name].colour,
            "cells": [cell(name, stage) for stage in stages],
            "ms": f"{1e3 * seconds.loc[name].iloc[-1]:,.1f}",
        }
        for name in wanted["rel"]["dE"].index
    ]


def _stage_rows(table: Any) -> list[tuple[str, list[str]]]:
    """What the head is like, a row a statistic, a column a stage."""

    def row(title: str, form: str, *metrics: str) -> tuple[str, list[str]]:
        columns = [softmax(table, metric) for metric in metrics]
        return title, [" / ".join(form.format(c[stage]) for c in columns) for stage in columns[0].index]

    def powers(name: str) -> list[str]:
        return [f"{name}:2^-{k}" for k in THRESHOLDS]

    at = " / ".join(f"2^-{k}" for k in THRESHOLDS)
    known = "flushed" in set(table["metric"])  # not in captures from before it was counted
    flushed = [row("entries that cce_exact flushes in bf16", "{:.1%}", "flushed")] if known else []
    return [
        row("loss / entropy, nats", "{:.2f}", "loss", "entropy"),
        row("mean probability of the target", "{:.3g}", "p_target"),
        row(f"entries a row at {at}", "{:.0f}", *powers("entries")),
        row(f"mass below {at}", "{:.3f}", *powers("mass_below")),
        row("tiles of 128 x 128 with |P - onehot| >= 2^-12, by id / by mean logit", "{:.0%}", "tiles_by_id",
            "tiles_by_mean_logit"),
        *flushed,
        row("largest / rms entry of e", "{:.3g}", "e_max", "e_rms"),
    ]  # fmt: skip


def build(out: Path) -> Path:
    """Writes `out`/index.html from results.parquet and card.json and returns its path. Raises ValueError where there is
    no finished run."""
    import pandas as pd

    if not (out / "results.parquet").is_file():
        raise ValueError(f"{out} holds no finished run; run cce-precision capture --train --out {out}")
    table, card = pd.read_parquet(out / "results.parquet"), json.loads((out / "card.json").read_text())
    seen = {name: stage["tokens_seen"] / 1e6 for name, stage in card["stages"].items()}
    _marks()
    drawn = pictures(table, seen)
    return pages.write(
        out,
        "capture.html",
        drawn,
        card=card,
        first=table.iloc[0],
        stages=list(seen),
        seen=seen,
        sentences=sentences(table),
        statistics=_stage_rows(table),
        rows=_table_rows(table),
        rows_looked=json.loads((out / "recipe.json").read_text())["rows"],
        failures=[f"{row['stage']}: {row['impl']}: {row['failed']}" for row in load(out) if "failed" in row],
        pictures=[pages.picture(figure) for figure in drawn],
    )
