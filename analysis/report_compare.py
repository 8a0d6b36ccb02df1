"""Two tables of a sweep side by side: which errors have grown, and which have fallen.

The relative error of loss, dE, dC and dbias of a cell has changed when the two differ by more than the factor `growth`
that the older table records with it (`metrics.py`): 1 + 4 standard errors of their ratio, if the errors of rows are
independent. Another machine's order of sums or another seed stays below it; a change of the numerics does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from cce_precision.analysis.figures import power
from cce_precision.analysis.report_answers import number
from cce_precision.analysis.sweep import COLUMNS

__all__ = ["Change", "changed", "load", "said", "unmeasured"]

CALL = ["case", "stage", "variant", "dtype", "n", "v", "d", "eps", "seed", "quantity"]


@dataclass(frozen=True)
class Change:
    """A relative error in two tables."""

    cell: str
    quantity: str
    before: float
    after: float
    growth: float  # factor up to which it has not changed

    @property
    def grown(self) -> bool:
        return not self.after <= self.before * self.growth

    @property
    def fallen(self) -> bool:
        return self.after * self.growth < self.before

    @property
    def factor(self) -> float:
        return 1.0 if self.after == self.before else self.after / self.before if self.before else math.inf


def load(file: Path) -> pd.DataFrame:
    """A table that a sweep wrote. Raises ValueError for a file that is none, or that records no factors."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        table = pd.read_parquet(file)
    except Exception as error:  # whatever pyarrow says of a file that is no table
        raise ValueError(f"{file} is no table of a sweep: {error}") from None
    if missing := set(COLUMNS) - set(table.columns):
        raise ValueError(f"{file} is no table of a sweep: it has no columns {', '.join(sorted(missing))}")
    if not (table["metric"] == "growth").any():
        raise ValueError(f"{file} records no factors of growth: it was made by an earlier version")
    return table


def _errors(table: pd.DataFrame) -> pd.DataFrame:
    """rel and growth of each call and quantity; eps is -1 where there is none."""
    keyed = table.assign(eps=table["eps"].fillna(-1.0))
    columns = {name: keyed[keyed["metric"] == name].set_index(CALL)["value"] for name in ("rel", "growth")}
    return pd.DataFrame(columns)


def changed(before: pd.DataFrame, after: pd.DataFrame) -> list[Change]:
    """All errors that both tables hold: the grown, then the fallen, then the others, the largest factor first."""
    both = _errors(before).join(_errors(after), lsuffix="_before", rsuffix="_after", how="inner")
    found = []
    for key, row in both.iterrows():
        case, stage, variant, dtype, _, _, _, eps, _, quantity = key  # type: ignore[misc]
        where = f"at {power(eps)}" if eps > 0 else ""
        cell = " ".join(filter(None, (case, stage, dtype, variant, where)))
        found.append(Change(cell, quantity, *(float(row[k]) for k in ("rel_before", "rel_after", "growth_before"))))
    return sorted(found, key=lambda c: (not c.grown, not c.fallen, -c.factor))


def unmeasured(before: pd.DataFrame | None, after: pd.DataFrame) -> int:
    """How many errors of the older table the newer lacks; 0 without an older one."""
    return 0 if before is None else len(_errors(before).index.difference(_errors(after).index))


def said(changes: Sequence[Change] | None, console: Console, missing: int = 0) -> bool:
    """Prints what changed, and how many errors are `missing`. Whether an error has grown, or the tables hold none in
    common, which shows nothing.
    """
    if changes is None:
        return False
    if not changes:
        console.print("nothing is compared: no error stands in both tables (case, dtype, tokens, seed, ... must agree)")
        return True
    grown, fallen = [c for c in changes if c.grown], [c for c in changes if c.fallen]
    if grown or fallen:
        table = Table(box=box.SIMPLE, padding=(0, 1))
        for heading in ("", "cell", "error of", "before", "after", "factor", "allowed"):
            table.add_column(heading)
        for c in (*grown, *fallen):
            word = "grown" if c.grown else "fallen"
            numbers = (number(c.before, 3), number(c.after, 3), number(c.factor, 3), number(c.growth, 3))
            table.add_row(word, c.cell, c.quantity, *numbers)
        console.print(table)
    alike = len(changes) - len(grown) - len(fallen)
    console.print(f"errors in both tables: {len(changes)}; grown: {len(grown)}; fallen: {len(fallen)}; alike: {alike}")
    if missing:
        console.print(f"errors of the earlier table that were not measured now: {missing}")
    return bool(grown)
