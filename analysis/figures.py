"""Figures of a report as data, made from the tidy table alone; `drawing.py` draws them.

Colour and marker belong to the variant, in every figure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from cce_precision.analysis.budget_stages import STAGES, Stage
from cce_precision.analysis.sweep import DTYPES, nearest
from cce_precision.numerics import auto_eps
from cce_precision.variants import ALL

__all__ = [
    "MARKS", "OTHERS", "Figure", "Level", "Panel", "Series", "View", "at_default", "figures", "give_marks", "mark",
    "power", "stage_figure",
]  # fmt: skip

FLOOR = "floor: the exact value rounded"


class Mark(NamedTuple):
    """A colour that is readable on white, and a marker in plotly's and matplotlib's words.

    Colours alone do not tell all variants apart for everybody's eyes; colour and marker together do.
    """

    colour: str
    plotly: str = "circle"
    matplotlib: str = "o"


MARKS = {
    "baseline": Mark("#111111", "x", "X"),
    "torch_compile": Mark("#6e7781", "cross", "P"),
    "cce": Mark("#d1410c", "circle", "o"),
    "cce_no_filter": Mark("#7f1d1d", "square", "s"),
    "cce_kahan": Mark("#b97a00", "triangle-up", "^"),
    "cce_kahan_full_c": Mark("#6b4e00", "triangle-down", "v"),
    "cce_kahan_full_e": Mark("#ba8410", "triangle-left", "<"),
    "cce_exact": Mark("#0072b2", "square", "s"),
    "cce_split": Mark("#1f8ac0", "diamond", "D"),
    "cce_sparse": Mark("#009e73", "pentagon", "p"),
    "cce_unbiased": Mark("#c0307f", "star", "*"),
    "cce_subsampled": Mark("#6a3d9a", "hexagon", "h"),
    "initial": Mark("#2a8fc9", "circle", "o"),
    "early": Mark("#b97a00", "square", "s"),
    "trained": Mark("#0072b2", "diamond", "D"),
    FLOOR: Mark("#57606a"),
}
STAGE_MARKS = {
    Stage.LOGITS: "#0072b2", Stage.SOFTMAX: "#882255", Stage.FILTER: "#009e73", Stage.DZ: "#b97a00",
    Stage.PRODUCT: "#332288", Stage.SUM: "#d1410c", Stage.OUTPUT: "#8a929b",
}  # fmt: skip
ULPS = {"to 0.5 ulp": 0.5, "to 1": 1.0, "to 2": 2.0, "to 4": 4.0, "to 16": 16.0, "to 256": 256.0, "more": math.inf}
MARKS |= {stage.value: Mark(colour) for stage, colour in STAGE_MARKS.items()}
MARKS |= dict(
    zip(ULPS, map(Mark, ("#0a4f8a", "#2a8fc9", "#2f8072", "#7a7a22", "#b97a00", "#d1410c", "#7f1d1d")), strict=True)
)
_SPARE = ("#117733", "#882255", "#2f8072", "#7a7a22", "#332288", "#aa4499")


def contrast(colour: str) -> float:
    """Contrast of #rrggbb to white as WCAG 2 defines it; text needs 4.5, a line 3."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 1.05 / (0.05 + sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))


def text_colour(name: str) -> str:
    """The colour of a variant or stage, as dark as text has to be."""
    colour = mark(name).colour
    while contrast(colour) < 4.5:
        colour = "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.95):02x}" for i in (1, 3, 5))
    return colour


def mark(name: str) -> Mark:
    """The mark of a variant or stage; a name not known here gets the same spare colour every time."""
    return MARKS.get(name) or Mark(_SPARE[sum(name.encode()) % len(_SPARE)])


OTHERS = (  # for names that have no mark of their own
    Mark("#7a7a22", "triangle-up", "^"),
    Mark("#882255", "diamond", "D"),
    Mark("#2f8072", "square", "s"),
    Mark("#332288", "triangle-down", "v"),
    Mark("#aa4499", "pentagon", "p"),
    Mark("#117733", "hexagon", "h"),
    Mark("#8a4b08", "cross", "P"),
)


def give_marks(names: Iterable[str]) -> None:
    """Gives each name without a mark one that none of the others has: the colours of `OTHERS`, then again with the
    next one's marker, and so on."""
    missing = [name for name in dict.fromkeys(names) if name not in MARKS]
    for i, name in enumerate(missing):
        turn, place = divmod(i, len(OTHERS))
        other = OTHERS[(place + turn) % len(OTHERS)]
        MARKS[name] = Mark(OTHERS[place].colour, other.plotly, other.matplotlib)


@dataclass(frozen=True)
class Series:
    """One curve; `notes` are shown on hover, one a point. Points that are not finite are left out."""

    name: str
    x: tuple[float | str, ...]
    y: tuple[float | str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        finite = [
            all(isinstance(v, str) or math.isfinite(v) for v in point) for point in zip(self.x, self.y, strict=True)
        ]
        for field in ("x", "y", "notes"):
            object.__setattr__(self, field, tuple(itertools.compress(getattr(self, field), finite)))


@dataclass(frozen=True)
class Level:
    """A horizontal line across the panel: a variant without a threshold, or the floor."""

    name: str
    y: float
    dash: str = "dot"


@dataclass(frozen=True)
class Panel:
    """Axes and what stands in them. `ticks`: values of x with their labels; none: chosen by the renderer."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    log_x: bool = True
    log_y: bool = True
    ticks: tuple[tuple[float, str], ...] = ()
    guides: tuple[tuple[float, str], ...] = ()  # horizontal guides: (y, label)
    categories: tuple[str, ...] = ()  # names on the y axis, from top to bottom
    named: bool = False  # whether curves are named at their right ends, as levels always are
    stacked: bool = False  # whether each series is one segment of the bars of all categories


@dataclass(frozen=True)
class Figure:
    """Panels side by side (stacked where the page is narrow), with a heading and a caption."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]

    def __bool__(self) -> bool:
        return any(p.levels or any(s.x for s in p.series) for p in self.panels)


class View(NamedTuple):
    """What one page of figures is about."""

    case: str
    stage: str
    dtype: str

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.case, self.stage, self.dtype)))

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() else "-" for c in part) for part in self if part)


def power(eps: float) -> str:
    """2^-12 for 2**-12, otherwise a short decimal."""
    exponent = math.log2(eps) if eps > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent == round(exponent, 9) and exponent.is_integer() else f"{eps:.3g}"


# -- from the table to figures -----------------------------------------------------------------------------------------


def of_view(table: pd.DataFrame, view: View) -> pd.DataFrame:
    return table[(table["case"] == view.case) & (table["stage"] == view.stage) & (table["dtype"] == view.dtype)]


def _order(names: Iterable[str]) -> list[str]:
    known = list(MARKS)
    return sorted(set(names), key=lambda n: (known.index(n) if n in known else len(known), n))


def metric(rows: pd.DataFrame, quantity: str, name: str) -> pd.DataFrame:
    """(variant, eps, value) of one metric, thresholds falling; eps is NaN where a variant has no threshold."""
    found = rows[(rows["quantity"] == quantity) & (rows["metric"] == name)]
    mean = found.groupby(["variant", "eps"], dropna=False, as_index=False)["value"].mean()
    return mean.sort_values(["variant", "eps"])


def _curves(rows: pd.DataFrame, quantity: str, name: str, unit: str = "") -> list[Series]:
    """One series a filtered variant: the metric against eps."""
    data = metric(rows, quantity, name).dropna(subset=["eps"])
    series = []
    for variant in _order(data["variant"]):
        one = data[data["variant"] == variant]
        notes = tuple(f"{power(e)}: {v:.3g}{unit}" for e, v in zip(one["eps"], one["value"], strict=True))
        series.append(Series(variant, tuple(one["eps"]), tuple(one["value"]), notes))
    return series


def _levels(rows: pd.DataFrame, quantity: str, name: str) -> list[Level]:
    data = metric(rows, quantity, name)
    flat, floor = data[data["eps"].isna()].set_index("variant")["value"], metric(rows, quantity, "floor")["value"]
    flat, floor = flat[flat.map(math.isfinite)], floor[floor.map(math.isfinite)]
    levels = [Level(v, float(flat[v]), "solid" if v == "baseline" else "dot") for v in _order(flat.index)]
    return levels + ([Level(FLOOR, float(floor.iloc[0]), "dash")] if len(floor) else [])


def _eps_ticks(rows: pd.DataFrame) -> tuple[tuple[float, str], ...]:
    """Ticks at measured thresholds, with room for their labels."""
    values = sorted(map(float, rows["eps"].dropna().unique()), reverse=True)
    room = math.log2(values[0] / values[-1]) / 7 if values else 0.0
    ticks: list[float] = []
    for value in values:
        if not ticks or math.log2(ticks[-1] / value) >= room:
            ticks.append(value)
    return tuple((value, power(value)) for value in reversed(ticks))


def error_against_threshold(rows: pd.DataFrame, view: View) -> Figure:
    panels = tuple(
        Panel(
            f"error of {q}",
            "filter threshold eps",
            "relative error (norm)",
            tuple(_curves(rows, q, "rel")),
            tuple(_levels(rows, q, "rel")),
            ticks=_eps_ticks(rows),
            named=True,
        )
        for q in ("dE", "dC")
    )
    return Figure(
        "error",
        "Error against threshold",
        "Normwise relative error of each gradient against fp64. Horizontal lines are variants without a threshold; "
        "the dashed one is the floor, the error of the exact gradient rounded once to the dtype of the result: nothing "
        "stored in that dtype does better.",
        panels,
    )


def row_quantiles(rows: pd.DataFrame, view: View) -> Figure:
    """Quantiles over rows, at each variant's threshold nearest the default."""
    chosen = at_default(rows)
    panels = []
    for quantity in ("dE", "dC"):
        some = chosen[chosen["quantity"] == quantity]
        wide = some.pivot_table(index="variant", columns="metric", values="value", observed=True)
        names = [f"row_{q}" for q in ("q50", "q90", "q99", "max") if f"row_{q}" in wide]
        order = _order(wide.index)
        series = tuple(
            Series(
                v,
                tuple(float(wide.loc[v, n]) for n in names),
                (v,) * len(names),
                tuple(f"{n.removeprefix('row_')}: {wide.loc[v, n]:.3g}" for n in names),
            )
            for v in order
        )
        title = f"rows of {quantity}"
        panels.append(Panel(title, "relative error of a row", "", series, log_y=False, categories=tuple(order)))
    eps = chosen["eps"].dropna()
    where = f" at eps = {power(float(eps.iloc[0]))}" if len(eps) else ""
    return Figure(
        "rows",
        "Error of single rows",
        "The points of a line are the median, the 90 % and 99 % quantiles and the worst of the rows' own relative "
        f"errors{where}. "
        "An error of 1 is an empty row: a token or a word that this step does not train.",
        tuple(panels),
    )


def _filters(name: str, quantity: str) -> bool:
    """Whether a variant filters this gradient, as far as its record is known."""
    variant = ALL.get(name)
    return variant is None or bool(variant.filter_e if quantity == "dE" else variant.filter_c)


def _counts(name: str, quantity: str) -> bool:
    """Whether the entries that were counted, those of dE, are also what this gradient is made of."""
    variant = ALL.get(name)
    return variant is None or (_filters(name, quantity) and (quantity == "dE" or variant.filter_e == variant.filter_c))


def _drops(name: str) -> bool:
    """Whether what a variant's filter takes away is lost; sampling gives it to others."""
    return name not in ALL or not ALL[name].random


def error_against_kept(rows: pd.DataFrame, view: View) -> Figure:
    panels = []
    for quantity in ("dE", "dC"):
        hits = metric(rows, "filter", "hits").rename(columns={"value": "hits"})
        both = metric(rows, quantity, "rel").merge(hits, on=["variant", "eps"]).dropna(subset=["eps"])
        both = both[(both["hits"] > 0) & both["variant"].map(lambda name, side=quantity: _counts(name, side))]
        series = tuple(
            Series(
                v,
                tuple(one["hits"]),
                tuple(one["value"]),
                tuple(
                    f"eps {power(e)}: {h:.0f} a row, {x:.3g}"
                    for e, h, x in zip(one["eps"], one["hits"], one["value"], strict=True)
                ),
            )
            for v in _order(both["variant"])
            for one in [both[both["variant"] == v].sort_values("hits")]
        )
        levels = tuple(level for level in _levels(rows, quantity, "rel") if level.name in (FLOOR, "baseline"))
        panels.append(
            Panel(f"error of {quantity}", "kept entries a row (mean)", "relative error (norm)", series, levels)
        )
    return Figure(
        "kept",
        "Error against kept entries",
        "What the same number of kept softmax entries buys: dropping is coherent (the lost mass always points the same "
        "way), sampling without bias is not.",
        tuple(panels),
    )


def dropped(rows: pd.DataFrame, view: View) -> Figure:
    def panel(quantity: str, name: str, title: str, y: str) -> Panel:
        curves = _curves(rows, quantity, name)
        side = "dC" if quantity == "dC" else "dE"
        series = tuple(s for s in curves if _filters(s.name, side) and (side == "dC" or _drops(s.name)))
        return Panel(title, "filter threshold eps", y, series, log_y=False, ticks=_eps_ticks(rows), named=True)

    return Figure(
        "dropped",
        "What the filter dropped",
        "Left: softmax mass that dE no longer sees, mean over tokens (sampling loses none on average). Right: "
        "rows of dC left entirely zero although the exact row is not: words whose embedding this step does not touch.",
        (
            panel("filter", "dropped_mass", "dropped mass", "share of the softmax"),
            panel("dC", "empty_rows", "empty rows of dC", "share of the vocabulary"),
        ),
    )


def _by_metric(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A row a variant, a column a metric, at the thresholds nearest the default."""
    chosen = at_default(rows)
    return chosen[chosen["quantity"] == quantity].pivot_table(index="variant", columns="metric", values="value")


def _segments(wide: pd.DataFrame, columns: dict[str, list[str]], total: str) -> tuple[tuple[str, ...], list[Series]]:
    """Bars, one a variant and named with its `total`: segments by name, each the sum of some metrics."""
    known = wide[wide[total].notna()] if total in wide else wide[:0]
    names = {v: f"{v}  {known.loc[v, total]:.2g}" for v in _order(known.index)}
    series = []
    for name, parts in columns.items():
        there = [part for part in parts if part in known]
        values = [max(0.0, float(known.loc[v, there].fillna(0).sum())) for v in names]
        if any(values):
            notes = tuple(f"{v}: {100 * x:.1f} %" for v, x in zip(names, values, strict=True))
            series.append(Series(name, tuple(values), tuple(names.values()), notes))
    return tuple(names.values()), series


def error_budget(rows: pd.DataFrame, view: View) -> Figure:
    panels = []
    for quantity in ("dE", "dC"):
        columns = {stage.value: [f"budget_share:{stage.value}"] for stage in STAGES}
        names, series = _segments(_by_metric(rows, quantity), columns, "budget_relative")
        title = f"error of {quantity} by stage"
        look = {"log_x": False, "log_y": False, "categories": names, "stacked": True}
        panels.append(Panel(title, "share of the error", "", tuple(series), **look))  # type: ignore[arg-type]
    return Figure(
        "budget",
        "Where the error comes from",
        "The stages of the computation that round, drop or sample are switched on one after the other, the rest being "
        "exact: a segment is what one stage adds, as its projection on the whole error, so a bar is 100 %. Beside the "
        "name: the normwise relative error of the whole.",
        tuple(panels),
    )


def errors_and_bounds(rows: pd.DataFrame, view: View) -> Figure:
    panels = []
    for quantity in ("dE", "dC"):
        wide = _by_metric(rows, quantity)
        known = wide.dropna(subset=["budget_bound"]) if "budget_bound" in wide else wide[:0]
        order, ends = _order(known.index), ("budget_relative", "budget_bound")
        series = tuple(
            Series(
                v,
                tuple(float(known.loc[v, end]) for end in ends),
                (v, v),
                tuple(f"{end.removeprefix('budget_')}: {known.loc[v, end]:.2g}" for end in ends),
            )
            for v in order
        )
        title = f"{quantity}: error and bound"
        panels.append(Panel(title, "relative error (norm)", "", series, log_y=False, categories=tuple(order)))
    return Figure(
        "bounds",
        "Error and its rigorous bound",
        "Left end: the measured error. Right end: the norm of the elementwise bound, which no run of this call "
        "exceeds in any element; it is evaluated without running the call.",
        tuple(panels),
    )


def ulp_histogram(rows: pd.DataFrame, view: View) -> Figure:
    panels = []
    for quantity in ("dE", "dC"):
        wide, columns, below = _by_metric(rows, quantity), {}, -1.0
        for name, edge in ULPS.items():
            parts = [m for m in wide if m.startswith("ulp_share:") and below < float(m.split(":")[1]) <= edge]
            columns[name], below = parts, edge
        names, series = _segments(wide, columns, "ulp_q50")
        look = {"log_x": False, "log_y": False, "categories": names, "stacked": True}
        title = f"elements of {quantity}"
        panels.append(Panel(title, "share of the elements", "", tuple(series), **look))  # type: ignore[arg-type]
    return Figure(
        "ulps",
        "Errors in units in the last place",
        "How many elements are off by how much of the spacing of the result's numbers around the exact value; half a "
        "unit is a perfect rounding. Beside the name: the median. Elements that are small because large terms cancel "
        "fill the right end of every bar.",
        tuple(panels),
    )


FIGURES: tuple[Callable[[pd.DataFrame, View], Figure], ...] = (
    error_against_threshold,
    row_quantiles,
    error_budget,
    errors_and_bounds,
    ulp_histogram,
    error_against_kept,
    dropped,
)


def figures(table: pd.DataFrame, view: View) -> list[Figure]:
    """All figures of one view that have data."""
    rows = of_view(table, view)
    return [figure for make in FIGURES if (figure := make(rows, view))]


def at_default(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of variants without a threshold, and of the others at the one threshold nearest their dtype's default."""
    eps = rows["eps"].dropna().unique()
    if not len(eps):
        return rows
    parts = []
    for dtype, some in rows.groupby("dtype", sort=False):
        chosen = nearest(eps, auto_eps(DTYPES[str(dtype)]))
        parts.append(some[some["eps"].isna() | (some["eps"] == chosen)])
    return pd.concat(parts)


def stage_figure(table: pd.DataFrame, case: str) -> Figure:
    """Rank-probability curves of a case's stages, from the rows of quantity `softmax`."""
    rows = table[(table["case"] == case) & (table["quantity"] == "softmax") & table["metric"].str.startswith("rank:")]
    series = []
    for stage in _order(rows["stage"]):
        one = rows[rows["stage"] == stage].drop_duplicates("metric")
        points = sorted((int(m.split(":")[1]), float(v)) for m, v in zip(one["metric"], one["value"], strict=True))
        notes = tuple(f"rank {r:,}: {p:.3g}" for r, p in points)
        series.append(Series(stage or case, tuple(r for r, _ in points), tuple(p for _, p in points), notes))
    panel = Panel(
        "sorted softmax, mean over tokens",
        "rank of the entry in its row",
        "probability",
        tuple(series),
        guides=((2.0**-12, "2^-12, the default eps for bf16"), (2.0**-15, "2^-15, for fp16")),
        named=True,
    )
    return Figure(
        "ranks",
        "How fast the softmax falls",
        "The k-th largest probability of a row, mean over tokens. A filter drops what lies below its threshold's line.",
        (panel,),
    )
