"""What an audit shows: a table on the screen, and one page for all cards of a folder, which loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cce_precision.analysis import pages
from cce_precision.analysis.audit import STATUSES, Card, Outcome, read
from cce_precision.analysis.audit_checks import ALLOWANCES, CHECKS

__all__ = ["build", "sentence", "table"]

STYLES = {"pass": "green", "fail": "bold red", "limit": "yellow", "not offered": "dim"}
MARKS = {"pass": "✓", "fail": "✗", "limit": "~", "not offered": "–"}


def sentence(card: Card) -> str:
    """A card in one line."""
    counts = [f"{card.count(status)} {status}" for status in STATUSES if card.count(status)]
    return f"{card.target} ({card.version}) on {card.device}: {', '.join(counts)}"


def failing(card: Card) -> str:
    """The checks that a card fails, as a list in words; empty if there is none."""
    return ", ".join(o.check for o in card.outcomes if o.status == "fail")


def table(card: Card) -> Any:
    """A card as a rich table."""
    from rich import box
    from rich.table import Table

    drawn = Table(title=sentence(card), title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for heading in ("check", "", "what was found"):
        drawn.add_column(heading, no_wrap=heading != "what was found")
    for outcome in card.outcomes:
        status = f"[{STYLES[outcome.status]}]{outcome.status}[/]"
        drawn.add_row(outcome.check, status, outcome.summary.replace("[", "\\["))
    return drawn


def _cell(card: Card, name: str) -> dict[str, str]:
    for outcome in card.outcomes:
        if outcome.check == name:
            return {"status": outcome.status, "mark": MARKS[outcome.status], "summary": outcome.summary}
    return {"status": "not offered", "mark": "", "summary": "not asked"}


def _rows(outcome: Outcome) -> list[dict[str, str]]:
    """The findings of an outcome, as text: the worst dozen."""
    form = lambda x: "not finite" if x is None else f"{x:.2e}"  # noqa: E731
    ratio = lambda f: float("inf") if f["ratio"] is None else f["ratio"]  # noqa: E731
    worst = sorted(outcome.findings, key=ratio, reverse=True)[:12]
    return [
        {key: str(f[key]) for key in ("trial", "quantity", "note")}
        | {"holds": "yes" if f["holds"] else "no"}
        | {key: form(f[key]) for key in ("relative", "relative allowed", "floor")}
        for f in worst
    ]


def build(out: Path) -> Path:
    """Writes out/index.html from the cards in out/cards. Raises ValueError where there is none."""
    cards = read(out)
    order: Sequence[str] = [name for name in CHECKS if any(o.check == name for card in cards for o in card.outcomes)]
    return pages.write(
        out,
        "audit.html",
        cards=cards,
        checks=[CHECKS[name] for name in order],
        allowances=ALLOWANCES,
        cell=_cell,
        rows=_rows,
        sentence=sentence,
        failing=failing,
        marks=MARKS,
        anchor=lambda card: card.name,
    )
