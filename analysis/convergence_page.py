"""The page of a comparison of training runs: what differs from the reference and what does not, then the curves.

python -m cce_precision.analysis.convergence_page reports/convergence    # the page, and the README's marked block
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cce_precision.analysis import pages
from cce_precision.analysis.convergence import CONFIDENCE, Difference, Run, differences, failures, late, read, smoothed
from cce_precision.analysis.figures import MARKS, Figure, Panel, Series, give_marks
from cce_precision.analysis.train_models import REFERENCES, Method

__all__ = ["Line", "build", "lines", "markdown", "update_readme"]

WINDOWS = 24  # points of a smoothed training curve
CONTROL = "fp32-perturbed"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Marks of methods beside the variants at their defaults; in the order of a page's methods.


@dataclass(frozen=True)
class Line:
    """What is said of one method. Differences are to the reference; losses in nats."""

    method: str
    seeds: int
    heldout: float  # mean over the seeds, at the end
    difference: Difference | None  # of the held-out loss at the end; None for the reference
    training: Difference | None  # of the mean training loss of the last quarter
    largest: float  # of the differences of the smoothed training loss, with its sign, mean over seeds; NaN: reference
    largest_at: float  # its step
    dE: tuple[float, float]  # relative error of the head's gradient: at the first and the last measurement
    dC: tuple[float, float]
    tokens_per_second: float
    peak_mib: float


def _means(runs: Sequence[Run], curve: str, windows: int | None = None) -> dict[float, float]:
    """Mean over the seeds of a curve, at the steps that all of them have."""
    curves: list[dict[Any, float]] = [getattr(r, curve) for r in runs]
    if windows is not None:
        curves = [smoothed(c, windows) for c in curves]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: statistics.fmean(c[step] for c in curves) for step in steps}


def lines(runs: Sequence[Run]) -> list[Line]:
    """One a method, the reference (the first method) first."""
    by: dict[str, list[Run]] = {}
    for run in runs:
        by.setdefault(run.method, []).append(run)
    reference = next(iter(by))
    heldout = differences(runs, reference, lambda r: r.heldout)
    training = differences(runs, reference, late)
    early = differences(runs, reference, lambda r: smoothed(r.train, WINDOWS))
    found = []
    for method, own in by.items():
        ends = [max(r.heldout) for r in own]
        step, largest = max(
            ((s, d.mean) for s, d in early.get(method, {}).items()), key=lambda x: abs(x[1]), default=(math.nan,) * 2
        )
        errors = {}
        for side in ("dE", "dC"):
            ordered = [[r.gradient[s][side] for s in sorted(r.gradient)] for r in own if r.gradient]
            ends_of = [statistics.fmean(o[i] for o in ordered) if ordered else math.nan for i in (0, -1)]
            errors[side] = (ends_of[0], ends_of[1])
        found.append(
            Line(
                method,
                len(own),
                statistics.fmean(r.heldout[end] for r, end in zip(own, ends)),
                heldout[method][max(heldout[method])] if heldout.get(method) else None,
                training[method]["late"] if training.get(method) else None,
                largest,
                step,
                errors["dE"],
                errors["dC"],
                statistics.median(r.tokens_per_second for r in own),
                max(r.peak_mib for r in own),
            )
        )
    return found


def control_of(found: Sequence[Line]) -> Difference | None:
    """The control's difference to the reference: how far runs drift that are equally right; None without one."""
    return next((line.difference for line in found if line.method == CONTROL), None)


def drift(control: Difference | None) -> float:
    """The largest difference of a run of the control; 0 without one."""
    return max(map(abs, control.each.values()), default=0.0) if control else 0.0


def chance(seeds: int) -> float:
    """How likely it is that so many seeds all differ in one direction, and all more than as many runs of the control,
    where a method is no different from the control: the ranks and the signs are then random."""
    return 1 / math.comb(2 * seeds, seeds) / 2 ** (seeds - 1)


def apart(line: Line, control: Difference | None) -> bool:
    """Whether the method ends elsewhere than the reference: in every seed to the same side and further than any run of
    the control, where that is less likely than 5 % by chance; without a control, where its interval leaves 0 out."""
    d = line.difference
    if d is None or len(d.each) < 2:
        return False
    if control is None:
        return d.apart
    values = list(d.each.values())
    one_side = all(x > 0 for x in values) or all(x < 0 for x in values)
    beyond = min(map(abs, values)) > drift(control)
    return one_side and beyond and chance(min(len(values), len(control.each))) < 1 - CONFIDENCE


def rule(found: Sequence[Line]) -> str:
    """What "apart" means on this page."""
    control = control_of(found)
    if control is None:
        return "the interval leaves 0 out, as one method in twenty does by chance"
    odds = round(1 / chance(max(1, len(control.each))))
    return (
        f"every seed differs to the same side, and by more than every seed of {CONTROL}; of methods that are no "
        f"different, one in {odds} does by chance"
    )


def number(value: float) -> str:
    """Two digits, 2.2e-3; "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.2g}".replace("e-0", "e-")


def signed(value: float) -> str:
    """A difference of losses, with its sign, to four decimals."""
    return "-" if math.isnan(value) else "0.0000" if abs(value) < 5e-5 else f"{value:+.4f}"


def interval(d: Difference | None) -> str:
    """+0.0012 ± 0.0031, or the mean alone for one seed."""
    if d is None:
        return ""
    return signed(d.mean) if math.isnan(d.half) else f"{signed(d.mean)} ± {d.half:.4f}"


def sentences(found: Sequence[Line]) -> list[str]:
    """The answer in words."""
    reference, others = found[0], [line for line in found[1:] if line.method != CONTROL]
    control = control_of(found)
    said = []
    if control is not None:
        said.append(
            f"Two runs that are equally right, {reference.method} from weights one rounding apart, end within "
            f"{number(drift(control))} nats of each other in held-out loss; no smaller difference says anything."
        )
    if reference.seeds < 2:
        return [*said, "One seed: differences have no interval, so none is called one."]
    far = [line for line in others if apart(line, control)]
    near = [line for line in others if line not in far]
    if near:
        names = ", ".join(line.method for line in near)
        say = "are" if len(near) > 1 else "is"
        said.append(f"At the end {names} {say} not distinguishable from {reference.method}.")
    for line in sorted(far, key=lambda x: -abs(x.difference.mean if x.difference else 0)):
        assert line.difference is not None
        word, size = "above" if line.difference.mean > 0 else "below", abs(line.difference.mean)
        each = sorted(line.difference.each.values())
        said.append(
            f"{line.method} ends {size:.4f} nats {word} {reference.method} in held-out loss "
            f"({signed(each[0])} to {signed(each[-1])} by seed)."
        )
    return said


# -- pictures ----------------------------------------------------------------------------------------------------------


def _series(name: str, points: dict[Any, float], note: str = "{:.4f}") -> Series:
    kept = {x: y for x, y in points.items() if math.isfinite(y)}
    notes = tuple(f"step {x:g}: {note.format(y)}" for x, y in kept.items())
    return Series(name, tuple(map(float, kept)), tuple(kept.values()), notes)


def pictures(runs: Sequence[Run]) -> list[Figure]:
    """The page's figures that have data."""
    by: dict[str, list[Run]] = {}
    for run in runs:
        by.setdefault(run.method, []).append(run)
    reference = next(iter(by))
    train = differences(runs, reference, lambda r: smoothed(r.train, WINDOWS))
    held = differences(runs, reference, lambda r: r.heldout)

    def panel(title: str, y: str, series: Sequence[Series], log_y: bool = False, named: bool = True) -> Panel:
        return Panel(title, "step", y, tuple(s for s in series if s.x), (), False, log_y, named=named)

    def spread(found: dict[Any, Difference]) -> dict[Any, float]:
        values = {s: statistics.stdev(d.each.values()) for s, d in found.items() if len(d.each) > 1}
        return {s: x for s, x in values.items() if x > 1e-9}  # below: the same numbers

    def mean(found: dict[str, dict[Any, Difference]]) -> list[Series]:
        return [_series(m, {s: d.mean for s, d in x.items()}) for m, x in found.items()]

    def scatter(found: dict[str, dict[Any, Difference]]) -> list[Series]:
        return [_series(m, spread(x)) for m, x in found.items()]

    def of_gradient(side: str) -> list[Series]:
        series = []
        for method, own in by.items():
            steps = sorted(set.intersection(*(set(r.gradient) for r in own)))
            means = {s: statistics.fmean(r.gradient[s][side] for r in own) for s in steps}
            series.append(_series(method, {s: x for s, x in means.items() if x > 0}, "{:.3g}"))
        return series

    figures = [
        Figure(
            "loss",
            "The curves",
            f"Loss in nats, mean over the seeds; training loss over {WINDOWS} runs of steps. Where the curves cannot "
            "be told apart here, the next figure subtracts the reference.",
            (
                panel("training", "loss", [_series(m, _means(own, "train", WINDOWS)) for m, own in by.items()], True),
                panel("held out", "loss", [_series(m, _means(own, "heldout")) for m, own in by.items()], True),
            ),
        ),
        Figure(
            "difference",
            f"Difference to {reference}",
            f"Loss less that of {reference} of the same seed at the same step, mean over the seeds. Above 0: learns "
            "more slowly. A training loss is the method's own, with its own rounding; the held-out loss is evaluated "
            "in the same way for all.",
            (
                panel("training", "difference", mean(train)),
                panel("held out", "difference", mean(held)),
            ),
        ),
        Figure(
            "spread",
            "How far seeds scatter around that",
            "Standard deviation over the seeds of the difference to the reference. It grows with training for every "
            f"method, {CONTROL} included: what grows so is drift, and no property of a method.",
            (
                panel("training", "deviation", scatter(train), True),
                panel("held out", "deviation", scatter(held), True),
            ),
        ),
        Figure(
            "gradient",
            "Error of the head's gradients on the way",
            "Normwise relative error against fp64 on held-out windows, on each method's own model at that step, from "
            "256 rows of each gradient; mean over the seeds.",
            (
                panel("error of dE", "relative error", of_gradient("dE"), True),
                panel("error of dC", "relative error", of_gradient("dC"), True),
            ),
        ),
    ]
    return [figure for figure in figures if figure]


# -- the page ----------------------------------------------------------------------------------------------------------


def row(line: Line, control: Difference | None) -> dict[str, str]:
    """A line as the texts of a table."""
    return {
        "method": line.method,
        "summary": summary(line.method),
        "colour": MARKS[line.method].colour if line.method in MARKS else "#000000",
        "heldout": f"{line.heldout:.4f}",
        "difference": interval(line.difference),
        "apart": "" if line.difference is None or line.seeds < 2 else "yes" if apart(line, control) else "no",
        "training": interval(line.training),
        "largest": "" if math.isnan(line.largest) else f"{signed(line.largest)} at {line.largest_at:.0f}",
        "dE": " to ".join(map(number, line.dE)),
        "dC": " to ".join(map(number, line.dC)),
        "speed": f"{line.tokens_per_second:,.0f}",
        "peak": f"{line.peak_mib:,.0f}",
    }


def summary(method: str) -> str:
    """What a method is, in a few words."""
    known = dict(zip(REFERENCES, ("as transformers has it", "head and loss in fp32", "fp32, other last bits at start")))
    variant = Method.parse(method).variant
    return known[method] if variant is None else variant.summary


def described(runs: Sequence[Run]) -> str:
    """What was trained, in one sentence."""
    about = runs[0].about
    r, t = about["recipe"], about["tokens"]
    what = r["model"] or f"{Path(r['config']).stem} {r['size']}"
    seeds = len({run.seed for run in runs})
    seen = r["steps"] * r["batch"] * r["context"] / 1e6
    return (
        f"{what}, V = {t['vocabulary']:,}, {r['precision']}, {r['steps']:,} steps of {r['batch']} windows of "
        f"{r['context']} tokens ({seen:.1f} M tokens of {t['training'] / 1e6:.1f} M), "
        f"{seeds} seed{'s' * (seeds > 1)}, on {about['device']}"
    )


def build(out: Path) -> Path:
    """Writes `out`/index.html from runs.jsonl and returns its path. Raises ValueError where there is no run."""
    runs = read(out)
    give_marks([r.method for r in runs])
    found = lines(runs)
    drawn = pictures(runs)
    return pages.write(
        out,
        "convergence.html",
        drawn,
        about=runs[0].about,
        described=described(runs),
        reference=found[0].method,
        rule=rule(found),
        sentences=sentences(found),
        failures=failures(out),
        rows=[row(line, control_of(found)) for line in found],
        measured=any(not math.isnan(line.dE[0]) for line in found),
        pictures=[pages.picture(figure) for figure in drawn],
        commands=list(dict.fromkeys(r.about["command"] for r in runs)),
    )


def markdown(out: Path) -> str:
    """The table and the answer as Markdown, for a README."""
    runs = read(out)
    found = lines(runs)
    head = (
        "method", "held-out loss", f"less {found[0].method}'s", "apart", "training loss, last quarter",
        "largest on the way", "error of dE, start to end", "error of dC", "tokens/s",
    )  # fmt: skip
    keys = ("method", "heldout", "difference", "apart", "training", "largest", "dE", "dC", "speed")
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in found:
        texts = row(line, control_of(found))
        table.append("| " + " | ".join(f"`{texts[k]}`" if k == "method" else texts[k] for k in keys) + " |")
    return "\n".join(
        [f"{described(runs)}.", "", *(f"- {s}" for s in sentences(found)), "", *table, "", f"Apart: {rule(found)}.", ""]
    )


def update_readme(out: Path) -> None:
    """Rewrites the marked block of `out`/README.md. Raises ValueError where the markers are missing."""
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: the markers {BEGIN} and {END} are missing")
    head, _, rest = text.partition(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{markdown(out)}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    update_readme(Path(sys.argv[1]))
    print(build(Path(sys.argv[1])))
