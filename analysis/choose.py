"""Choosing by measurement: every candidate's time, memory and error on the very data, and why it wins or loses.

    choice = measured(problem, tolerance=5e-3)
    choice.best.impl, choice.best.workspace_mb

Errors come from sampled rows (`sampled`); what counts is the upper end of the confidence interval. Where an interval
straddles the demand, more rows are looked at, in the end all. Variants that sample run with several seeds; what counts
is the end of a prediction interval for one seed more. Candidates that meet the demand are timed in turn, the median of
some rounds, of more rounds for those near the fastest; the others once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cce_precision import choosing
from cce_precision.analysis.bench_job import allocated
from cce_precision.analysis.sampled import ExactRows, Measured, Sampled
from cce_precision.analysis.sampled_statistics import prediction_interval
from cce_precision.choosing import BASELINE, Candidate, Choice, Errors
from cce_precision.interface import linear_cross_entropy
from cce_precision.kernels import one_pass_shapes
from cce_precision.numerics import Path, Variant
from cce_precision.problem import Plan, Problem
from cce_precision.validation import check_tolerance
from cce_precision.variants import ALL, DEFAULT, get

__all__ = ["Run", "Timer", "candidates", "measured", "names", "race", "table"]

SEEDS = 4  # of variants that sample
ROUNDS = 5
NEAR = 1.3  # candidates within it of the fastest are timed for longer
MORE = 4  # times as many rows where an interval straddles the demand
NOTHING = Errors(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Run:
    """One way to compute the loss of a problem."""

    impl: str
    workspace_mb: int | None = None

    def __call__(self, problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, dE, dC) of the mean nll."""
        e, c = (x.detach().requires_grad_() for x in (problem.e, problem.c))
        loss = linear_cross_entropy(
            e, c, problem.targets, problem.bias, -1, problem.softcap, impl=self.impl, temperature=problem.temperature,
            workspace_mb=self.workspace_mb, seed=seed, validate=False,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        loss.backward()
        assert e.grad is not None and c.grad is not None
        return loss.detach(), e.grad, c.grad


class Timer:
    """Milliseconds of a call. On a CPU with one thread its own CPU time, which other processes do not lengthen."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.process_time if alone else time.perf_counter

    def __call__(self, work: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = self._clock()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (self._clock() - started)


def race(
    problem: Problem,
    runs: Sequence[Run],
    timer: Timer,
    rounds: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> dict[Run, list[float]]:
    """Times of some rounds, all in turn; those near the fastest are in for twice as many more."""
    times: dict[Run, list[float]] = {one: [] for one in runs}
    entered = list(runs)
    for k in range(3 * rounds):
        if k == rounds:
            middle = {one: statistics.median(found) for one, found in times.items()}
            entered = [one for one in runs if middle[one] <= NEAR * min(middle.values())]
            if len(entered) < 2:
                break
        for one in entered:
            say(f"{one.impl}: time, round {k + 1} of {rounds if k < rounds else 3 * rounds}")
            times[one].append(timer(lambda one=one: one(problem, seed)))  # type: ignore[misc]
    return times


@dataclass
class _Trial:
    """What one candidate has shown so far."""

    run: Run
    variant: Variant
    failure: str = ""
    errors: Errors = NOTHING  # upper ends
    lower: Errors = NOTHING
    memory_mib: float = math.nan
    times: list[float] = field(default_factory=list)
    rows: int = 0

    @property
    def time_ms(self) -> float:
        return statistics.median(self.times) if self.times else math.nan


def candidates(problem: Problem, impls: Sequence[str] | None = None) -> list[Run]:
    """What can run here: variants (all, or those named; torch.compile on a GPU alone, because on a CPU compiling takes
    longer than the choice may), and the one-pass mode in its workspace where it fits."""
    place = problem.e.device.type
    names = list(impls) if impls else [n for n, v in ALL.items() if place == "cuda" or v.path is not Path.COMPILED]
    found = [Run(get(name).name) for name in dict.fromkeys(names)]
    for cost in choosing.TABLE.costs:
        if not cost.one_pass or cost.impl not in {one.impl for one in found}:
            continue
        workspace = cost.workspace_mb(problem.n, problem.v, problem.d)
        wanted = (True, True, problem.bias is not None)
        plan = Plan(get(cost.impl), problem.softcap, problem.temperature, workspace_mb=workspace, one_pass=wanted)
        if place == "cuda" and one_pass_shapes(problem, plan) is not None:
            found.append(Run(cost.impl, workspace))
    return list(dict.fromkeys(found))


def _interval(found: Sequence[Measured | None]) -> tuple[float, float]:
    """(lower, upper) end of an error over the seeds of a variant that samples; of one run its own interval.

    Over several runs: the ends of a prediction interval for one more, widened to the runs' own intervals.
    """
    parts = [one.rel for one in found if one is not None]
    low, high = min(one.low for one in parts), max(one.high for one in parts)
    below, above = prediction_interval([one.value for one in parts])
    return min(low, below), max(high, above)


class _Judge:
    """One choice: a problem, a demand, and trials."""

    def __init__(
        self,
        problem: Problem,
        tolerance: float | None,
        memory_mb: float | None,
        rows: int,
        confidence: float,
        seed: int,
    ) -> None:
        self.problem, self.tolerance, self.memory_mb = problem, tolerance, memory_mb
        self.rows, self.confidence, self.seed = rows, confidence, seed
        self.timer = Timer(problem.e.device)
        self.limit = NOTHING  # the baseline's errors, where they are the demand
        self._exact: dict[int, ExactRows] = {}

    def exact(self, rows: int) -> ExactRows:
        """The exact gradients on so many rows, the same for all candidates; drawn by the sizes that `cce_exact` has."""
        if rows not in self._exact:
            _, de, dc = Run(DEFAULT)(self.problem)
            self._exact[rows] = ExactRows(
                self.problem, (de, dc), rows=rows, columns=rows, seed=self.seed, confidence=self.confidence
            )
        return self._exact[rows]

    def sample(self, trial: _Trial, rows: int) -> None:
        """Runs a candidate and measures its errors on so many rows; memory and one time with the first run."""
        found: list[Sampled] = []
        problem = self.problem
        for k in range(SEEDS if trial.variant.random else 1):
            results: list[tuple[Tensor, Tensor, Tensor]] = []

            def work(k: int = k, results: list[Any] = results) -> None:
                results.append(trial.run(problem, self.seed + k))

            if math.isnan(trial.memory_mib):
                trial.run(problem, self.seed)  # warm-up
                _, trial.memory_mib, _ = allocated(work, problem.e.device)
            else:
                trial.times.append(self.timer(work))
            loss, de, dc = results[0]
            found.append(self.exact(rows).compare(de, dc, loss))
        de_low, de_high = _interval([one.dE for one in found])
        dc_low, dc_high = _interval([one.dC for one in found])
        losses = [one.loss for one in found if one.loss is not None]
        loss_high = max(one.rel for one in losses)
        trial.lower, trial.errors = Errors(loss_high, de_low, dc_low), Errors(loss_high, de_high, dc_high)
        trial.rows = rows

    @property
    def most_rows(self) -> int:
        return max(self.problem.n, self.problem.v)

    def passes(self, errors: Errors) -> bool:
        return errors.gradient <= self.tolerance if self.tolerance is not None else errors.no_worse_than(self.limit)

    def verdict(self, trial: _Trial) -> None:
        """Settles whether the candidate meets the demand; `baseline` is as exact as itself, whatever its interval."""
        itself = self.tolerance is None and trial.run.impl == BASELINE
        while not itself and not self.passes(trial.errors) and self.passes(trial.lower) and trial.rows < self.most_rows:
            self.sample(trial, min(self.most_rows, MORE * trial.rows))
        if not itself and not self.passes(trial.errors):
            trial.failure = self.why(trial.errors)
        elif self.memory_mb is not None and trial.memory_mib > self.memory_mb:
            trial.failure = f"took {trial.memory_mib:,.0f} MiB"

    def why(self, errors: Errors) -> str:
        if self.tolerance is not None:
            side, value = ("dE", errors.dE) if errors.dE >= errors.dC else ("dC", errors.dC)
            return f"error of {side} {value:.2g}"
        named = zip(Errors._fields, errors, self.limit, strict=True)
        name, value, allowed = max(named, key=lambda one: one[1] / one[2] if one[2] else math.inf)
        return f"error of {name} {value:.2g}, {BASELINE} has {allowed:.2g}"


def measured(
    problem: Problem,
    *,
    tolerance: float | None = None,
    memory_mb: float | None = None,
    impls: Sequence[str] | None = None,
    rows: int = 256,
    rounds: int = ROUNDS,
    confidence: float = 0.95,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> Choice:
    """Ranks the variants on the data of a problem by measured time, error and memory of loss and gradients.

    Args:
        problem: operands on the device where they are to be used; targets -1 where ignored.
        tolerance: most relative error of dE and dC; None: no less exact than `baseline` on this data.
        memory_mb: most MiB beyond the inputs, gradients included. A candidate predicted to need twice as much is not
            run.
        impls: names of the candidates; None: all that can run here.
        rows: tokens and vocabulary rows to look at, more where that does not decide.
        rounds: timed rounds. seed: of the sample and of variants that sample.
        say: told what is being done.

    Returns a `Choice`; errors are the upper ends of the intervals, times medians. Raises ValueError for unknown names
    and bad tolerances.
    """
    check_tolerance(tolerance)
    judge = _Judge(problem, tolerance, memory_mb, rows, confidence, seed)
    trials = [_Trial(one, get(one.impl)) for one in candidates(problem, impls)]
    if tolerance is None:
        say(f"{BASELINE}: errors, the demand")
        reference = _Trial(Run(BASELINE), get(BASELINE))
        judge.sample(reference, rows)
        judge.limit = reference.lower
        while reference.rows < judge.most_rows and judge.limit.gradient * choosing.SLACK < reference.errors.gradient:
            judge.sample(reference, min(judge.most_rows, MORE * reference.rows))
            judge.limit = reference.lower
    for trial in trials:
        say(f"{trial.run.impl}: error and memory")
        if too_much := _hopeless(problem, trial.run, memory_mb):
            trial.failure = too_much
            continue
        try:
            judge.sample(trial, rows)
            judge.verdict(trial)
        except torch.OutOfMemoryError:
            trial.failure = "out of memory"
        except (ValueError, RuntimeError, NotImplementedError) as error:  # what a variant cannot do, in its own words
            trial.failure = f"cannot run: {str(error).splitlines()[0][:120]}"
    able = {trial.run: trial for trial in trials if not trial.failure}
    for one, times in race(problem, list(able), judge.timer, rounds, seed, say).items():
        able[one].times = times
    for trial in trials:
        if trial.failure and not trial.times and not math.isnan(trial.memory_mib):
            trial.times.append(judge.timer(lambda trial=trial: trial.run(problem, seed)))  # type: ignore[misc]
    demand = choosing.against(tolerance) + ("" if memory_mb is None else f", at most {memory_mb:,.0f} MiB")
    looked = max((trial.rows for trial in trials), default=rows)
    basis = (
        f"measured on the data, {rows} to {looked} rows of each gradient, upper ends of {confidence:.0%} intervals; "
        f"times: median of {rounds} rounds or more"
    )
    found = [
        Candidate(
            trial.run.impl, trial.run.workspace_mb, trial.time_ms, trial.memory_mib, trial.errors,
            not trial.failure, trial.failure,
        )
        for trial in trials
    ]  # fmt: skip
    return choosing.select(found, demand, basis)


def _hopeless(problem: Problem, one: Run, memory_mb: float | None) -> str:
    """Why a candidate is not even run: it is predicted to need more than twice the memory allowed."""
    if memory_mb is None:
        return ""
    backend = "triton" if problem.e.is_cuda else "eager"
    name = str(problem.operand_dtype).removeprefix("torch.")
    for cost in choosing.TABLE.costs:
        if (cost.backend, cost.dtype, cost.impl, cost.one_pass) == (
            backend,
            name,
            one.impl,
            one.workspace_mb is not None,
        ):
            size = problem.operand_dtype.itemsize * (problem.n + problem.v) * problem.d / choosing.MIB
            needed = size + cost.scratch_mib(problem.n, problem.v, problem.d)
            if needed > 2 * memory_mb:
                return f"predicted to need {needed:,.0f} MiB"
    return ""


def table(choice: Choice, title: str = "") -> Any:
    """The choice as a rich table."""
    from rich import box
    from rich.table import Table

    drawn = Table(
        title=title or None, title_justify="left", caption=f"Demand: {choice.demand}. Basis: {choice.basis}.",
        caption_justify="left", box=box.SIMPLE,
    )  # fmt: skip
    drawn.add_column("", no_wrap=True)
    drawn.add_column("impl", no_wrap=True)
    for heading in ("ms", "MiB", "loss error", "dE error", "dC error"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("why")

    def number(x: float, form: str) -> str:
        return "-" if math.isnan(x) else format(x, form)

    for k, one in enumerate(choice.candidates):
        mark = "->" if k == 0 and one.meets else "" if one.meets else "x"
        errors = (number(x, ".2e") for x in one.errors)
        drawn.add_row(mark, one.name, number(one.time_ms, ".2f"), number(one.memory_mib, ",.0f"), *errors, one.reason)
    return drawn


def names(text: str) -> list[str] | None:
    """Variants by name, separated by commas; None for "all". Raises ValueError for an unknown one."""
    if text == "all":
        return None
    return [get(part.strip()).name for part in text.split(",") if part.strip()]
