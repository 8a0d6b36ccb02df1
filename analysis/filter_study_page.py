"""The page of the study of filters: which is cheapest for an error, what averages out and what stays, rare words.

    python -m cce_precision.analysis.filter_study_page reports/unbiased-filter reports/convergence

writes index.html and figures/ from rows.jsonl, and the marked block of README.md. The second folder holds the training
runs whose final losses the page quotes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cce_precision.analysis import convergence_page as training
from cce_precision.analysis import pages
from cce_precision.analysis.convergence import read as read_runs
from cce_precision.analysis.convergence_page import number
from cce_precision.analysis.figures import FLOOR, MARKS, OTHERS, Figure, Level, Mark, Panel, Series, mark
from cce_precision.analysis.filter_estimators import ESTIMATORS
from cce_precision.analysis.filter_study import AVERAGED, DENSE, METHODS, ONE_PASS, ROOM_MB, read
from cce_precision.analysis.filter_study_answers import (
    DEFAULTS,
    SIDES,
    Group,
    Tried,
    cheapest,
    crowded,
    drawn,
    family,
    fit,
    groups_of,
    sentences,
    tried_of,
)
from cce_precision.analysis.train_models import Method

__all__ = ["build", "markdown", "update_readme"]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
WITHIN = (1e-1, 3e-2, 1e-2, 5e-3, 2.5e-3, 1.8e-3)
UNFILTERED = {family(method) for method in DENSE}
WORDS = {  # what the unbiased variants do
    "entries": "sampling by entry, centred",
    "subsets": "stratified subsets, centred",
}
STAYING = ("cce@2^-12", "cce_sparse@2^-12", "cce_exact")  # the same for every seed
TICKS = tuple((float(2**k), str(2**k)) for k in range(7))


# -- pictures ----------------------------------------------------------------------------------------------------------


def _marks() -> None:
    """Gives the curves of averages and the one-pass method marks; what draws nothing keeps its variant's."""
    MARKS.update({label(method): mark(family(method)) for method in STAYING})
    MARKS.update(zip(map(label, AVERAGED), OTHERS))
    MARKS[ONE_PASS] = Mark("#2b83ba", "square-open", "s")
    for method in METHODS:
        if method.endswith(f"@{ROOM_MB}MB"):
            MARKS[family(method)] = Mark(mark(method.partition("@")[0]).colour, "cross-open", "P")


def cost_figure(group: Group) -> Figure:
    """Error of either gradient against what a step costs; a curve a variant, a point a threshold or share."""

    def panel(side: str) -> Panel:
        curves: dict[str, list[Any]] = {}
        for point in group.points:
            if point.error(side) > 0:
                curves.setdefault(family(point.method), []).append(point)
        series = [
            Series(
                name,
                tuple(p.cost for p in points),
                tuple(p.error(side) for p in points),
                tuple(f"{p.method}<br>{group.said(p.cost)}<br>error {p.error(side):.2e}" for p in points),
            )
            for name, points in curves.items()
        ]
        floor = (Level(FLOOR, group.floor[side]),) if group.floor[side] > 0 else ()
        return Panel(f"error of {side}", group.cost_name, f"relative error of {side}", tuple(series), floor)

    caption = (
        "Each curve is a variant at thresholds from 2^-10 to 2^-16, the subsampled one at shares from 1/32 to 1/4; "
        "dense variants are points. Further left is cheaper, further down more exact."
    )
    return Figure(f"cost-{group.slug}", group.title, caption, tuple(map(panel, SIDES)))


def label(method: str) -> str:
    """A method's name for the end of a curve: unbiased 2^-12, subsampled 1/8, cce 2^-12."""
    name, _, settings = method.partition("@")
    eps, _, share = settings.partition("/")
    return f"{name.removeprefix('cce_')} {f'1/{share}' if share else eps}".rstrip()


def average_figure(group: Group) -> Figure:
    """Error of gradients averaged over draws, beside what stays."""

    def panel(side: str) -> Panel:
        series = []
        for name, row in drawn(group).items():
            notes = tuple(f"{k} draws: {x:.2e}" for k, x in zip(row["draws"], row[side]))
            series.append(Series(label(name), tuple(map(float, row["draws"])), tuple(row[side]), notes))
        levels = [Level(label(name), group.steps[name][side]) for name in STAYING if name in group.steps]
        return Panel(
            f"error of {side}", "draws averaged", f"relative error of {side}", tuple(series), tuple(levels), ticks=TICKS
        )

    caption = (
        "Gradients of one batch averaged over so many seeds: the root mean square of the errors of several such "
        "averages, which are taken in fp32 and so average out the draws' own rounding too. Lines across: methods that "
        "draw nothing, whose error is the same however often they are averaged."
    )
    return Figure(f"average-{group.slug}", group.title, caption, tuple(map(panel, SIDES)))


def rows_figure(group: Group) -> Figure:
    """Errors of the rows of dC by how often their token is a target, and how many of them are empty."""
    roomy = {m: group.steps.get(f"{m}@{ROOM_MB}MB", group.steps.get(m)) for m in DEFAULTS}
    chosen = {m: step["strata"] for m, step in roomy.items() if step is not None}
    names = list(next(iter(chosen.values())))

    def panel(title: str, key: str, y: str, log: bool) -> Panel:
        series = []
        for m, strata in chosen.items():
            points = [(float(i), strata[n][key], strata[n]["rows"]) for i, n in enumerate(names)]
            seen = [point for point in points if point[1] > 0 or not log]
            notes = tuple(f"{m}, {rows:,} rows: {value:.3g}" for _, value, rows in seen)
            series.append(Series(family(m), tuple(p[0] for p in seen), tuple(p[1] for p in seen), notes))
        ticks = tuple((float(i), name) for i, name in enumerate(names))
        return Panel(title, "times a target in the batch", y, tuple(series), log_x=False, log_y=log, ticks=ticks)

    caption = (
        "Rows of dC by how often their token is a target in the batch; filters at 2^-12, subsets of 1/8. Empty rows "
        "are all zero where the exact ones are not: what the batch says of those words is lost."
    )
    panels = (
        panel("error of the rows together", "error", "relative error", True),
        panel("empty rows", "empty", "share of the rows", False),
    )
    return Figure(f"rows-{group.slug}", group.title, caption, panels)


def estimator_figure(tried: Sequence[Tried]) -> Figure:
    """Errors of the estimators of one group over that of what the variant does, by head, at the first share."""
    some = [t for t in tried if t.share == tried[0].share and t.errors != t.own]
    stages = list(dict.fromkeys(t.stage for t in reversed(some)))
    names = list(dict.fromkeys(t.name for t in some))
    MARKS.update(zip(names, OTHERS))

    def panel(side: str) -> Panel:
        series = []
        for name in names:
            own = {t.stage: t for t in some if t.name == name}
            notes = tuple(f"{name}, {s}: {own[s].errors[side]:.2e}, {own[s].ratio(side):.2f} times" for s in own)
            places = tuple(float(stages.index(s)) for s in own)
            series.append(Series(name, places, tuple(t.ratio(side) for t in own.values()), notes))
        ticks = tuple((float(i), stage) for i, stage in enumerate(stages))
        return Panel(
            f"error of {side}", "the shipped head's stage, or case", "times the variant's own", tuple(series),
            log_x=False, ticks=ticks, guides=((1.0, WORDS[tried[0].group]),),
        )  # fmt: skip

    caption = (
        f"Error over that of {WORDS[tried[0].group]}, all at as many entries a row as subsets of 1/{tried[0].share} "
        "compute; below 1 is better. Shipped head, fp64, nothing rounded."
    )
    title = {"entries": "Estimators from single entries", "subsets": "Estimators from subsets"}[tried[0].group]
    return Figure(f"estimators-{tried[0].group}", title, caption, tuple(map(panel, SIDES)))


# -- tables ------------------------------------------------------------------------------------------------------------


def method_rows(group: Group) -> list[dict[str, str]]:
    """One a method, cheapest first."""
    fronts = {side: group.front(side) for side in SIDES}
    lines = []
    for p in sorted(group.points, key=lambda p: (p.cost, p.error("dE"))):
        strata = group.steps[p.method]["strata"]
        lines.append(
            {
                "method": p.method,
                "colour": mark(family(p.method)).colour,
                "cost": f"{p.cost:.2f}" if group.timed else f"{p.cost:,.0f}",
                "ms": f"{p.ms:.2f}" if p.ms else "",
                "mib": f"{p.mib:,.0f}" if p.mib else "",
                "dE": number(p.error("dE")),
                "dC": number(p.error("dC")),
                "front": " and ".join(side for side in SIDES if p.method in fronts[side]),
                "note": "exact way" if family(p.method) not in UNFILTERED and crowded(group, p.method) else "",
                "unseen": number(strata["0"]["error"]) if "0" in strata else "",
                "empty": f"{strata['0']['empty']:.1%}" if "0" in strata else "",
            }
        )
    return lines


def within_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The cheapest method with both errors within a tolerance, by group."""
    return [
        {
            "within": number(limit),
            "cells": ["-" if p is None else group.named(p) for group in groups for p in (cheapest(group, limit),)],
        }
        for limit in WITHIN
    ]


def average_rows(group: Group) -> list[dict[str, str]]:
    """Slopes and what stays, a line a method."""
    lines, averages = [], drawn(group)
    for name in [*STAYING, *AVERAGED]:
        if name in averages:
            row = averages[name]
            found = {side: fit(row["draws"], row[side]) for side in SIDES}
            first, last = ({side: row[side][i] for side in SIDES} for i in (0, -1))
        elif name in group.steps and name in STAYING:
            found = {}
            first = last = {side: group.steps[name][side] for side in SIDES}
        else:
            continue
        lines.append(
            {"method": name, "colour": mark(label(name)).colour}
            | {f"first_{s}": number(first[s]) for s in SIDES}
            | {f"last_{s}": number(last[s]) for s in SIDES}
            | {f"slope_{s}": f"{found[s].slope:.2f}" if found else "0" for s in SIDES}
            | {f"stays_{s}": number(found[s].stays if found else first[s]) for s in SIDES}
        )
    return lines


def estimator_rows(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys((t.stage, t.share) for t in tried))
    lines = []
    for name in dict.fromkeys(t.name for t in tried):
        own = {(t.stage, t.share): t for t in tried if t.name == name}
        one = next(iter(own.values()))
        cells = [" / ".join(number(own[c].errors[s]) for s in SIDES) if c in own else "-" for c in columns]
        lines.append(
            {
                "name": name,
                "about": ESTIMATORS[name].what,
                "of": one.of_variant,
                "biased": "" if one.unbiased else "biased",
            }
            | {"cells": cells}
        )
    return lines


def training_rows(folder: Path | None) -> list[dict[str, str]]:
    """Final held-out losses of the training runs, differences to their reference; none without a folder."""
    if folder is None:
        return []
    found = training.lines(read_runs(folder))
    control = training.control_of(found)
    return [training.row(line, control) for line in found]


def answer(groups: Sequence[Group], tried: Sequence[Tried], losses: Sequence[dict[str, str]]) -> list[str]:
    """All sentences: of the rows, and of the training runs what filters and samples."""
    some = [r for r in losses if (v := Method.parse(r["method"]).variant) and v.filtered]
    said = sentences(groups, tried)
    if some:
        ends = [f"{r['method']} {r['difference']}{' (apart)' if r['apart'] == 'yes' else ''}" for r in some]
        said.append(
            f"Training, held-out loss at the end less that of {losses[0]['method']} (nats, mean over seeds and 95 % "
            f"interval; apart: beyond what equal runs drift): {'; '.join(ends)}."
        )
    return said


# -- the page ----------------------------------------------------------------------------------------------------------


def build(out: Path, runs: Path | None = None) -> Path:
    """Writes `out`/index.html and `out`/figures from rows.jsonl, and returns the page's path. `runs`: a folder of
    training runs to quote. Raises ValueError where there is no row."""
    rows = read(out)
    if not (groups := groups_of(rows)):
        raise ValueError(f"{out / 'rows.jsonl'} holds no row; measure first")
    _marks()
    tried = tried_of(rows)
    losses = training_rows(runs)
    half = [g for g in groups if g.dtype != "fp32"]
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "cost": [cost_figure(g) for g in half],
        "average": [average_figure(g) for g in groups if drawn(g)],
        "rows": [rows_figure(g) for g in half],
        "estimators": [
            estimator_figure([t for t in tried if t.group == group]) for group in dict.fromkeys(t.group for t in tried)
        ],
    }
    return pages.write(
        out,
        "filter_study.html",
        [f for figures in parts.values() for f in figures],
        sentences=answer(groups, tried, losses),
        pictures={k: [pages.picture(f, folder / f"{f.name}.svg") for f in part] for k, part in parts.items()},
        groups=half,
        methods={g.slug: method_rows(g) for g in half},
        within=within_rows(half),
        averages=[(g.title, average_rows(g)) for g in groups if drawn(g)],
        columns=[f"{stage}, 1/{share}" for stage, share in dict.fromkeys((t.stage, t.share) for t in tried)],
        estimators=estimator_rows(tried),
        entries={f"{t.stage}, 1/{t.share}": f"{t.entries:,.0f}" for t in tried},
        training=losses,
        runs="" if runs is None else os.path.relpath(runs, out),
        failures=[f"{g.title}: {what}" for g in groups for what in g.failures],
        made=list(dict.fromkeys((r["command"], r["device"], r["versions"], r["commit"]) for r in rows)),
    )


def markdown(out: Path, runs: Path | None = None) -> str:
    """The answer, the pictures of the first subject and the tables as Markdown, for a README."""
    rows = read(out)
    groups, tried = groups_of(rows), tried_of(rows)
    half = [g for g in groups if g.dtype != "fp32"]
    losses = training_rows(runs)
    text = [f"- {s}" for s in answer(groups, tried, losses)] + [""]
    text += [f"![{g.title}](figures/{part}-{g.slug}.svg)\n" for g in half[:1] for part in ("cost", "rows")]
    averaged = sorted((g for g in groups if drawn(g)), key=lambda g: g.dtype != "fp32")
    text += [f"![{g.title}](figures/average-{g.slug}.svg)\n" for g in averaged[:1]]
    text += ["The cheapest method with both gradients within a relative error:", ""]
    text += [_line("within", *(g.title for g in half)), "|---" * (1 + len(half)) + "|"]
    text += [_line(row["within"], *row["cells"]) for row in within_rows(half)] + [""]
    if losses:
        text += [f"Training ([runs]({os.path.relpath(str(runs), out)}/README.md)), held-out loss at the end:", ""]
        text += [_line("loss", "held out", f"less {losses[0]['method']}'s", "apart"), "|---" * 4 + "|"]
        text += [_line(r["method"], r["heldout"], r["difference"], r["apart"]) for r in losses] + [""]
    return "\n".join(text)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def update_readme(out: Path, runs: Path | None = None) -> None:
    """Rewrites the marked block of `out`/README.md. Raises ValueError where the markers are missing."""
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, _, rest = text.partition(BEGIN)
    made = f"{head}{BEGIN}\n{markdown(out, runs)}{END}{rest.partition(END)[2]}"
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:3]]
    print(build(*folders))
    update_readme(*folders)
