"""The answer in words and tables: which variant to take for which precision, from the tidy table of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cce_precision.analysis.capture import STAGES
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.figures import View, at_default, mark, metric, of_view, power
from cce_precision.analysis.metrics import COUNT_EDGES
from cce_precision.variants import ALL

__all__ = [
    "ALIKE",
    "Option",
    "answers",
    "as_exact_as",
    "cheapest",
    "detail_rows",
    "filter_sentences",
    "main_view",
    "number",
    "option_row",
    "options",
    "percent",
    "sentences",
    "subject_lines",
    "views",
]

TOLERANCES = (1e-1, 3e-2, 1e-2, 5e-3, 3e-3, 2e-3)
ALIKE = 1.2  # times that differ by less are the same


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


def detail_rows(rows: pd.DataFrame) -> list[dict[str, str]]:
    """One row a variant at its default threshold: bits, ulps, bias, bound, and dC by how often a word is a target."""
    chosen = at_default(rows)
    wide = chosen.pivot_table(index="variant", columns=["quantity", "metric"], values="value", observed=True)
    lines = []
    for variant in (name for name in ALL if name in wide.index):
        get = lambda quantity, name, v=variant: (  # noqa: E731
            float(wide.loc[v, (quantity, name)]) if (quantity, name) in wide else math.nan
        )
        line = {"variant": variant, "colour": mark(variant).colour}
        for quantity in ("loss", "dE", "dC"):
            error, limit = get(quantity, "budget_relative"), get(quantity, "budget_bound")
            line |= {
                f"{quantity}_{key}": number(value, digits)
                for key, value, digits in (
                    ("bits", -math.log2(get(quantity, "rel")) if get(quantity, "rel") > 0 else math.nan, 3),
                    ("ulp_q50", get(quantity, "ulp_q50"), 2),
                    ("ulp_q99", get(quantity, "ulp_q99"), 2),
                    ("bias", get(quantity, "bias"), 2),
                    ("bias_z", get(quantity, "bias_z"), 2),
                    ("bound", limit, 2),
                    ("over", limit / error if error > 0 else math.nan, 2),
                )
            }
        for _, _, name in COUNT_EDGES:
            for key in ("rel", "row_max"):
                line[f"{key}:{name}"] = number(get("dC", f"{key}:targets={name}"))
            line[f"rows:{name}"] = number(get("dC", f"rows:targets={name}"))
        lines.append(line)
    return lines


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
