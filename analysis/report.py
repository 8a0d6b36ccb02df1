"""The report: a table from a sweep becomes figures, one self-contained page, and the measured part of the README.

python -m cce_precision.analysis.report reports/readme/results.parquet README.md    # rewrites the README's marked block
"""

from __future__ import annotations

import base64
import importlib.resources
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

from cce_precision.analysis import sweep
from cce_precision.analysis.capture import STAGES
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.drawing import draw, plotly_figure
from cce_precision.analysis.figures import (
    Figure,
    View,
    at_default,
    figures,
    mark,
    metric,
    of_view,
    power,
    stage_figure,
)
from cce_precision.analysis.sweep import Cell, Engine, Failure, Sweep
from cce_precision.numerics import Path as CodePath
from cce_precision.variants import ALL

__all__ = [
    "Option",
    "build",
    "cheapest",
    "main_view",
    "options",
    "plan",
    "readme_block",
    "redraw",
    "run",
    "update_readme",
    "views",
]

TOLERANCES = (1e-1, 3e-2, 1e-2, 5e-3, 3e-3, 2e-3)
ALIKE = 1.2  # times that differ by less are the same
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Option:
    """One way to compute a step, with what it cost and how far it was off. Errors are normwise and relative."""

    variant: str
    eps: float | None
    seconds: float
    relative_time: float  # to the baseline of the same view; NaN without one
    loss: float
    dE: float
    dC: float
    dropped: float = math.nan
    empty: float = math.nan
    hits: float = math.nan
    worst: float = math.nan  # of the rows of dE

    @property
    def error(self) -> float:
        """The largest of the three errors; infinite where one is NaN."""
        return max(math.inf if math.isnan(x) else x for x in (self.loss, self.dE, self.dC))

    @property
    def where(self) -> str:
        return "" if self.eps is None else power(self.eps)

    @property
    def name(self) -> str:
        return f"{self.variant} at {self.where}" if self.where else self.variant


def views(table: pd.DataFrame) -> list[View]:
    """The views of a table: a user's own data first, then captured and trained; stages from the last to the first."""
    rows = table.loc[table["variant"] != "", ["case", "stage", "dtype"]].drop_duplicates()
    stages = [*reversed(STAGES)]
    rank = {name: i for i, name in enumerate(dict.fromkeys(("captured", "trained", *CASES)), 1)}
    found = [View(*map(str, row)) for row in rows.itertuples(index=False)]
    return sorted(
        found,
        key=lambda v: (
            rank.get(v.case, 0),
            v.case,
            stages.index(v.stage) if v.stage in stages else 9,
            v.stage,
            v.dtype,
        ),
    )


def main_view(table: pd.DataFrame) -> View:
    """The view that the answer is about: the trained stage, in bf16 where it was measured."""
    found = views(table)
    first = [v for v in found if (v.case, v.stage) == (found[0].case, found[0].stage)]
    return next((v for v in first if v.dtype == "bf16"), first[0])


def options(table: pd.DataFrame, view: View) -> list[Option]:
    """All that was measured in a view, the cheapest first."""
    rows = of_view(table, view)
    columns = {
        "seconds": ("time", "seconds"),
        "loss": ("loss", "rel"),
        "dE": ("dE", "rel"),
        "dC": ("dC", "rel"),
        "worst": ("dE", "row_max"),
        "dropped": ("filter", "dropped_mass"),
        "hits": ("filter", "hits"),
        "empty": ("dC", "empty_rows"),
    }
    values: dict[tuple[str, float | None], dict[str, float]] = {}
    for field, (quantity, name) in columns.items():
        for variant, eps, value in metric(rows, quantity, name).itertuples(index=False):
            values.setdefault((variant, None if math.isnan(eps) else eps), {})[field] = value
    complete = {key: found for key, found in values.items() if {"seconds", "loss", "dE", "dC"} <= found.keys()}
    base = complete.get(("baseline", None), {}).get("seconds", math.nan)
    result = [Option(v, e, relative_time=found["seconds"] / base, **found) for (v, e), found in complete.items()]
    return sorted(result, key=lambda o: (o.seconds, o.name))


def cheapest(found: Sequence[Option], tolerance: float) -> Option | None:
    """The cheapest option whose loss, dE and dC are all within the tolerance; None where none is."""
    return _choose([o for o in found if o.error <= tolerance])


def as_exact_as(found: Sequence[Option], other: Option) -> Option | None:
    """The cheapest option that is no further off than `other` in any of loss, dE and dC."""
    return _choose([o for o in found if o.loss <= other.loss and o.dE <= other.dE and o.dC <= other.dC])


def _choose(fit: Sequence[Option]) -> Option | None:
    """The cheapest; of those as cheap, up to what timing can tell, the most exact."""
    least = min((o.seconds for o in fit), default=0.0)
    return min((o for o in fit if o.seconds <= ALIKE * least), key=lambda o: (o.error, o.seconds), default=None)


def number(value: float, digits: int = 2) -> str:
    """2.2e-3, as short as it goes; "-" for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


# -- words from numbers ------------------------------------------------------------------------------------------------


def answers(found: Sequence[Option]) -> list[dict[str, str]]:
    """The cheapest option within each tolerance; tolerances with the same answer share a row."""
    base = next((o for o in found if o.variant == "baseline"), None)
    rows = []
    if base is not None:
        label = "no further off than baseline, in any of the three"
        rows.append({"tolerance": label} | option_row(as_exact_as(found, base)))
    for option, group in itertools.groupby(TOLERANCES, lambda t: cheapest(found, t)):
        tolerances = list(group)
        label = " to ".join(dict.fromkeys(number(t, 1) for t in (tolerances[0], tolerances[-1])))
        rows.append({"tolerance": label} | option_row(option))
    return rows


def option_row(option: Option | None) -> dict[str, str]:
    """An option as the texts of a table; all empty for None."""
    if option is None:
        return dict.fromkeys(("variant", "eps", "time", "loss", "dE", "dC"), "")
    sampled = option.variant in ALL and ALL[option.variant].random
    return {
        "variant": option.variant,
        "colour": mark(option.variant).colour,
        "eps": option.where,
        "time": ratio(option.relative_time),
        "seconds": number(option.seconds),
        "loss": number(option.loss),
        "dE": number(option.dE),
        "dC": number(option.dC),
        "worst": number(option.worst),
        "dropped": "sampled" if sampled else "-" if option.eps is None else percent(option.dropped),
        "empty": percent(option.empty),
        "hits": number(option.hits, 3),
    }


def percent(value: float) -> str:
    if math.isnan(value):
        return "-"
    if abs(value) < 1e-4:
        return "0" if abs(value) < 2.0**-20 else "< 0.01 %"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def ratio(value: float) -> str:
    """A ratio of times, to two digits and without an exponent."""
    return "-" if math.isnan(value) else f"{float(f'{value:.2g}'):.10f}".rstrip("0").rstrip(".")


def sentences(found: Sequence[Option], default: Sequence[Option]) -> list[str]:
    """The answer in words, each sentence only where its numbers were measured."""
    said = []
    at_default = {o.variant: o for o in default}
    base = at_default.get("baseline")
    same = None if base is None else as_exact_as(found, base)
    best = min(found, key=lambda o: (o.error, o.seconds), default=None)
    if base is not None and same is not None:
        also = ", which is also the most exact" if same is best else ""
        said.append(
            f"The cheapest that is no further off than PyTorch's own loss (baseline: loss {number(base.loss)}, "
            f"dE {number(base.dE)}, dC {number(base.dC)}) is {'itself' if same is base else same.name + cost(same)}"
            f": dE {number(same.dE)}, dC {number(same.dC)}{also}."
        )
    if best is not None and best is not same:
        said.append(f"The most exact is {best.name}{cost(best)}: dE {number(best.dE)}, dC {number(best.dC)}.")
    return said + filter_sentences(default)


def filter_sentences(default: Sequence[Option]) -> list[str]:
    """What the filters do at their default thresholds."""
    said = []
    at_default = {o.variant: o for o in default}
    if (cce := at_default.get("cce")) is not None:
        said.append(
            f"The paper's cce at its default threshold {cce.where}, with its sums in the input dtype, is off by "
            f"{number(cce.dE)} in dE and {number(cce.dC)} in dC; {rows_empty(cce)}."
        )
    sparse, unbiased = at_default.get("cce_sparse"), at_default.get("cce_unbiased")
    if sparse is not None and unbiased is not None and percent(sparse.dropped) != "0":
        said.append(
            f"Dropping the entries below {sparse.where} one by one (cce_sparse) loses {percent(sparse.dropped)} of the "
            f"softmax: dE is off by {number(sparse.dE)}, and {rows_empty(sparse)}. Sampling them without bias "
            f"(cce_unbiased) is off by {number(unbiased.dE)}."
        )
    return said


def rows_empty(option: Option) -> str:
    share = percent(option.empty)
    return "none of dC's rows is left empty" if share == "0" else f"{share} of dC's rows are left empty"


def cost(option: Option) -> str:
    """ ", in 4 % of its time", or nothing where no baseline was timed."""
    if math.isnan(option.relative_time):
        return ""
    share = option.relative_time
    return f", in {percent(share)} of the baseline's time" if share < 1 else f", at {ratio(share)} times the baseline's"


def subject_lines(table: pd.DataFrame) -> list[dict[str, str]]:
    """One row of statistics a case and stage, from the rows of quantity `softmax`."""
    rows = table[table["quantity"] == "softmax"].drop_duplicates(["case", "stage", "metric"])
    wide = rows.set_index(["case", "stage", "metric"])["value"]
    lines = []
    for case, stage in dict.fromkeys((v.case, v.stage) for v in views(table)):
        if (case, stage) not in wide.index.droplevel("metric"):
            continue
        one = wide.loc[(case, stage)]
        get = lambda name, one=one: float(one.get(name, math.nan))  # noqa: E731
        lines.append(
            {
                "name": f"{case} {stage}".strip(),
                "shape": f"{get('tokens'):,.0f} x {get('vocabulary'):,.0f} x {get('width'):,.0f}",
                "loss": f"{get('loss'):.2f}",
                "entropy": f"{get('entropy'):.2f}",
                "p_target": number(get("p_target")),
                "entries": number(get("entries:2^-12"), 3),
                "mass": percent(get("mass_below:2^-12")),
                "tiles": percent(get("tiles_by_id")),
            }
        )
    return lines


# -- the page ----------------------------------------------------------------------------------------------------------


def raised(text: str) -> Any:
    """HTML of a text, its powers such as 2^-12 with a raised exponent."""
    import markupsafe

    return markupsafe.Markup(
        re.sub(r"(\d+)\^(-?\d+)", r'<span class="power">\1<sup>\2</sup></span>', str(markupsafe.escape(text)))
    )


def data_uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def _save(figure: Figure, folder: Path, suffix: str) -> dict[str, str]:
    stem = "-".join(filter(None, (figure.name, suffix)))
    draw(figure, folder / f"{stem}.png", folder / f"{stem}.svg")
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "image": data_uri(folder / f"{stem}.svg"),
    }


def build(table: pd.DataFrame, out: Path, failures: Iterable[Failure] = (), notes: Iterable[str] = ()) -> Path:
    """Writes `out/figures/*.png`, `*.svg` and `out/index.html`, and returns the page's path.

    Raises ValueError for a table without a single measured variant.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    found = views(table)
    if not found:
        raise ValueError("the table holds no measured variant, so there is nothing to report")
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    main = main_view(table)
    drawn = {view: figures(table, view) for view in found}
    ranks = [figure for case in dict.fromkeys(v.case for v in found) if (figure := stage_figure(table, case))]
    static = [_save(figure, folder, main.slug) for figure in drawn[main]]
    others = [
        _save(figure, folder, v.slug) | {"label": v.label}
        for v in found
        if v != main
        for figure in drawn[v]
        if figure.name == "error"
    ]
    live = {
        "main": found.index(main),
        "views": [{"label": v.label, "figures": {f.name: plotly_figure(f) for f in drawn[v]}} for v in found],
        "fixed": {f"ranks{i}": plotly_figure(figure) for i, figure in enumerate(ranks)},
    }
    at_main = options(table, main)
    default = options(at_default(of_view(table, main)), main)
    first = of_view(table, main).iloc[0]
    templates = importlib.resources.files("cce_precision.analysis") / "templates"
    source = {name: (templates / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["power"] = raised
    page = environment.from_string(source["page.html"]).render(
        css=source["page.css"],
        js=source["page.js"],
        plotly=get_plotlyjs(),
        live=json.dumps(live, separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
        main=main,
        first=first,
        seed=int(of_view(table, main)["seed"].max()),
        sentences=sentences(at_main, default),
        answers=answers(at_main),
        default=[option_row(o) for o in default],
        static=static,
        others=others,
        subjects=subject_lines(table),
        ranks=[
            _save(figure, folder, case) | {"name": f"ranks{i}"}
            for i, (case, figure) in enumerate(zip(dict.fromkeys(v.case for v in found), ranks))
        ],
        summaries={name: variant.summary for name, variant in ALL.items()},
        failures=list(failures),
        notes=list(notes),
        views=found,
        calls=sweep.CALLS,
        alike=percent(ALIKE - 1),
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


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


def run(todo: Sweep, out: Path, engine: Engine, command: str, console: Console, notes: Sequence[str] = ()) -> int:
    """Runs a sweep under a progress bar, builds the page, and returns the command's exit code.

    0: all cells ran; 1: some raised, which the page and the console name; 130: interrupted, the same command resumes.
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
    if not outcome.table.empty:
        page = build(outcome.table, out, outcome.failures, notes)
        console.print(f"{page} ({len(outcome.table)} rows in {out / 'results.parquet'})")
    for failure in outcome.failures:
        console.print(f"no result: {failure.cell}: {failure.reason}", markup=False)
    return 1 if outcome.failures else 0


def redraw(out: Path, console: Console) -> None:
    """The page again, from the folder's table. Raises ValueError where there is none."""
    file = out / "results.parquet"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; run the sweep first")
    console.print(str(build(pd.read_parquet(file), out)))


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
