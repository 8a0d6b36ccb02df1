"""The report: a table from a sweep becomes figures, one self-contained page, and the measured part of the README.

python -m cce_precision.analysis.report reports/readme/results.parquet README.md    # rewrites the README's marked block
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cce_precision.analysis import pages, sweep
from cce_precision.analysis.figures import Figure, at_default, figures, metric, of_view, stage_figure
from cce_precision.analysis.report_answers import (
    ALIKE,
    Option,
    answers,
    as_exact_as,
    cheapest,
    detail_rows,
    filter_sentences,
    main_view,
    number,
    option_row,
    options,
    percent,
    sentences,
    subject_lines,
    views,
)
from cce_precision.analysis.report_compare import Change, changed, load, said, unmeasured
from cce_precision.analysis.sweep import Cell, Engine, Failure, Sweep
from cce_precision.numerics import Path as CodePath
from cce_precision.variants import ALL

__all__ = [
    "ALIKE",
    "Option",
    "as_exact_as",
    "build",
    "cheapest",
    "main_view",
    "number",
    "options",
    "plan",
    "readme_block",
    "load",
    "redraw",
    "run",
    "update_readme",
    "views",
]

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


# -- the page ----------------------------------------------------------------------------------------------------------


def _picture(figure: Figure, folder: Path, stem: str) -> dict[str, str]:
    return pages.picture(figure, folder / f"{stem}.svg", folder / f"{stem}.png")


def build(
    table: pd.DataFrame,
    out: Path,
    failures: Iterable[Failure] = (),
    notes: Iterable[str] = (),
    changes: Sequence[Change] | None = None,
) -> Path:
    """Writes `out/figures/*.png`, `*.svg` and `out/index.html`, and returns the page's path.

    `changes`: against an earlier table, which the page then shows.

    Raises ValueError for a table without a single measured variant.
    """
    found = views(table)
    if not found:
        raise ValueError("the table holds no measured variant, so there is nothing to report")
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    main = main_view(table)
    drawn = {view: figures(table, view) for view in found}
    cases = dict.fromkeys(v.case for v in found)
    ranks = [replace(figure, name=f"ranks-{case}") for case in cases if (figure := stage_figure(table, case))]
    static = [_picture(figure, folder, f"{figure.name}-{main.slug}") for figure in drawn[main]]
    others = [
        _picture(figure, folder, f"{figure.name}-{v.slug}") | {"label": v.label}
        for v in found
        if v != main
        for figure in drawn[v]
        if figure.name == "error"
    ]
    at_main = options(table, main)
    default = options(at_default(of_view(table, main)), main)
    first = of_view(table, main).iloc[0]
    return pages.write(
        out,
        "report.html",
        ranks,
        {v.label: drawn[v] for v in found},
        found.index(main),
        view=main,
        first=first,
        seed=int(of_view(table, main)["seed"].max()),
        sentences=sentences(at_main, default),
        answers=answers(at_main),
        default=[option_row(o) for o in default],
        details=detail_rows(of_view(table, main)),
        changes=changes,
        number=number,
        budget_tokens=_budget_tokens(table),
        static=static,
        others=others,
        subjects=subject_lines(table),
        ranks=[_picture(figure, folder, figure.name) for figure in ranks],
        summaries={name: variant.summary for name, variant in ALL.items()},
        failures=[f"{f.cell}: {f.reason}" for f in failures],
        notes=list(notes),
        calls=sweep.CALLS,
        alike=percent(ALIKE - 1),
    )


def _budget_tokens(table: pd.DataFrame) -> str:
    found = table.loc[(table["quantity"] == "budget") & (table["metric"] == "tokens"), "value"]
    return f"{found.max():,.0f}" if len(found) else "none"


# -- the command -------------------------------------------------------------------------------------------------------


def plan(variants: Sequence[str] | None = None, **options: Any) -> tuple[Sweep, list[str]]:
    """The sweep of these options (see `sweep.plan`) and what the page must say of it. `variants` None: the quick."""
    tokens = options.get("tokens")
    notes = (
        [f"At most {tokens:,} tokens of each head, in runs of {sweep.RUN} spread evenly; --tokens 0 takes all."]
        if tokens
        else []
    )
    if variants is None:
        variants = [name for name, variant in ALL.items() if variant.path is not CodePath.COMPILED]
        notes.append(
            f"Left out by default: {', '.join(name for name in ALL if name not in variants)}. It needs a C++ compiler "
            "and compiles for tens of seconds. --variants all includes it."
        )
    elif list(variants) == ["all"]:
        variants = list(ALL)
    return sweep.plan(variants=variants, **options), notes


def run(
    todo: Sweep,
    out: Path,
    engine: Engine,
    command: str,
    console: Console,
    notes: Sequence[str] = (),
    against: pd.DataFrame | None = None,
) -> int:
    """Runs a sweep under a progress bar, builds the page, and returns the command's exit code.

    0: all cells ran; 1: some raised, which the page and the console name, or an error has grown beyond the factor that
    the table `against` records, or that table has none of these errors; 130: interrupted, the same command resumes.
    """
    done = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("sweep", total=len(todo.cells))

        def on_cell(cell: Cell, reason: str | None) -> None:
            nonlocal done
            done += reason is None
            progress.update(task, advance=1, description=f"{str(cell):<48}"[:48])
            if reason is not None:
                progress.console.print(f"failed: {cell}: {reason}", markup=False)

        try:
            outcome = sweep.run(todo, out, engine, command, on_cell)
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped with {done} of {len(todo.cells)} cells done; the same command resumes")
            return 130
    grown = False
    if not outcome.table.empty:
        changes = None if against is None else changed(against, outcome.table)
        page = build(outcome.table, out, outcome.failures, notes, changes)
        console.print(f"{page} ({len(outcome.table)} rows in {out / 'results.parquet'})")
        grown = said(changes, console, unmeasured(against, outcome.table))
    for failure in outcome.failures:
        console.print(f"no result: {failure.cell}: {failure.reason}", markup=False)
    return 1 if outcome.failures or grown else 0


def redraw(out: Path, console: Console, against: pd.DataFrame | None = None) -> int:
    """The page again, from the folder's table; 1 as `run` for `against`. Raises ValueError where there is no table."""
    file = out / "results.parquet"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; run the sweep first")
    table = pd.read_parquet(file)
    changes = None if against is None else changed(against, table)
    console.print(str(build(table, out, changes=changes)))
    return int(said(changes, console, unmeasured(against, table)))


# -- the README --------------------------------------------------------------------------------------------------------


def readme_block(table: pd.DataFrame) -> str:
    """The README's table of variants with what was measured, in Markdown, between its markers."""
    main = main_view(table)
    rows = of_view(table, main)
    measured = options(at_default(rows), main)
    default = {o.variant: o for o in measured}
    first = rows.iloc[0]
    lines = [
        BEGIN,
        f"Normwise relative errors on `{main.label}` ({first['n']:,} tokens, V = {first['v']:,}, D = {first['d']:,}); "
        f"filters at their default threshold. {' '.join(filter_sentences(measured))}",
        "",
        "| variant | what it is | loss | dE | dC | rows of dC left empty | softmax dropped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variant in ALL.items():
        if name in default:
            o = option_row(default[name])
            cells = (f"`{name}`", variant.summary, o["loss"], o["dE"], o["dC"], o["empty"], o["dropped"])
            lines.append(f"| {' | '.join(cells)} |")
    floors = [number(float(metric(rows, q, "floor")["value"].iloc[0])) for q in ("dE", "dC")]
    lines += [f"| floor | the exact gradient, rounded once | | {floors[0]} | {floors[1]} | | |", END]
    return "\n".join(lines)


def update_readme(readme: Path, table: pd.DataFrame) -> None:
    """Rewrites the marked block. Raises ValueError where the markers are missing."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, _, rest = text.partition(BEGIN)
    readme.write_text(head + readme_block(table) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    update_readme(Path(sys.argv[2]), pd.read_parquet(sys.argv[1]))
