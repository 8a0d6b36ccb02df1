"""The error budget of a call: how much of the error of loss, dE and dC each stage of its arithmetic causes.

    for line in budget(Steps(problem), variant)["dE"].lines: print(line.stage.value, line.relative, line.share)

The stages that round as the variant's record says are switched on one after the other, in the order of the computation,
and the rest stays exact. What a stage changes is its error, made from the very numbers that it gets and carried
exactly to the end. So the errors of the stages are vectors that add up to the error of the call: `share`, the part of
the whole error in the direction of the whole, sums to 1. Their norms alone do not add up, as errors are partly
independent: `combined` is the root of the sum of their squares.

Beside each error stands the stage's bound: the growth of the rigorous bound (`bounds`) as the stage is switched on. The
bound of the first k stages holds elementwise for the error of the first k stages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds import CPU, Call
from cce_precision.analysis.budget_passes import Result, run
from cce_precision.analysis.budget_stages import Stage, Stages, with_exact_stages
from cce_precision.analysis.references import Objective, Quantities, Truth, truth
from cce_precision.numerics import Accumulation, Path, Variant
from cce_precision.problem import Plan, Problem

__all__ = ["QUANTITIES", "Budget", "Line", "Steps", "budget", "effective_stages"]

QUANTITIES = ("loss", "dE", "dC")


@dataclass(frozen=True)
class Line:
    """One stage's part. Norms are Frobenius norms relative to that of the exact quantity."""

    stage: Stage
    relative: float  # norm of the stage's error
    share: float  # its projection on the whole error, in units of that; negative where it makes up for others
    bound: float  # norm of what the bound grows by; NaN where bounds were not asked for


@dataclass(frozen=True)
class Budget:
    """Where the error of one quantity of one call comes from. Norms as in `Line`."""

    quantity: str
    relative: float  # norm of the measured error
    bound: float  # norm of the bound of the whole; NaN where bounds were not asked for
    lines: tuple[Line, ...]  # in the order of the stages; those that cannot err are left out
    residual: float  # norm of what the lines leave of the measured error, relative to that error

    @property
    def combined(self) -> float:
        """Root of the sum of squares of the stages' errors: `relative`, if they were independent."""
        return math.sqrt(sum(line.relative**2 for line in self.lines))


def effective_stages(variant: Variant) -> tuple[Stage, ...]:
    """The stages that can err, in the order in which they are switched on.

    A library product on stored logits rounds its own output, so OUTPUT comes first there: PRODUCT is the rest.
    """
    if variant.path is not Path.TILED:
        return (Stage.LOGITS, Stage.SOFTMAX, Stage.DZ, Stage.OUTPUT, Stage.PRODUCT)
    found = [Stage.LOGITS, Stage.SOFTMAX]
    if variant.filtered:
        found.append(Stage.FILTER)
    found += [Stage.DZ, Stage.PRODUCT, Stage.SUM]
    if Accumulation.FP32 in (variant.accum_e, variant.accum_c):
        found.append(Stage.OUTPUT)
    return tuple(found)


class Steps:
    """What the first k stages give and how far they may be off, for one problem, upstream gradient and seed.

    Variants that agree in those stages share it: what is computed is kept.
    """

    def __init__(self, problem: Problem, g: Tensor | None = None, seed: int = 0, exact: Truth | None = None) -> None:
        self.problem, self.g, self.seed = problem, g, seed
        self.objective = Objective("none", grad_out=1.0 if g is None else g)
        self.exact = truth(problem, self.objective) if exact is None else exact
        self._results: dict[tuple[Any, ...], Result] = {}
        self._bounds: dict[tuple[Any, ...], Quantities] = {}
        self._last: Call | None = None  # whose softmax the next bounds may share

    def plan(self, variant: Variant) -> Plan:
        return Plan(variant, softcap=self.problem.softcap, temperature=self.problem.temperature)

    def _prefixes(self, variant: Variant) -> Iterator[tuple[tuple[Any, ...], Stages]]:
        """A key of all that the result of the first 1, 2, ... stages depends on, and the stages."""
        stages = effective_stages(variant)
        for k in range(len(stages)):
            first = frozenset(stages[: k + 1])
            record = dataclasses.replace(with_exact_stages(variant, first), name="", summary="", aliases=())
            yield (record, first, variant.tile_ordered), first

    def results(self, variant: Variant) -> list[Result]:
        """The truth, and what the first 1, 2, ... of `effective_stages` give where the others are exact."""
        found = [Result(self.exact.nll, self.exact.dE, self.exact.dC)]
        for key, stages in self._prefixes(variant):
            if key not in self._results:
                self._results[key] = run(self.problem, self.plan(variant), stages, self.g, self.seed)
            found.append(self._results[key])
        return found

    def bounds(self, variant: Variant) -> list[Quantities]:
        """Elementwise bounds of the error of the first 1, 2, ... stages."""
        found: list[Quantities] = []
        for key, stages in self._prefixes(variant):
            if key not in self._bounds:
                call = Call(self.problem, self.plan(variant), self.objective, CPU, stages)
                if self._last is not None:
                    call.share_softmax(self._last)
                self._bounds[key], self._last = call.quantities(self.seed), call
            found.append(self._bounds[key])
        return found

    def measured(self, variant: Variant) -> Result:
        """What `linear_cross_entropy` itself gives in plain PyTorch."""
        problem = self.problem
        e, c = problem.e.detach().clone().requires_grad_(), problem.c.detach().clone().requires_grad_()
        loss = linear_cross_entropy(
            e, c, problem.targets, problem.bias, ignore_index=-1, softcap=problem.softcap, reduction="none",
            temperature=problem.temperature, impl=variant, backend="eager", seed=self.seed if variant.random else None,
        )  # fmt: skip
        assert isinstance(loss, Tensor)
        loss.backward(torch.ones_like(loss) if self.g is None else self.g.to(loss.dtype))
        assert e.grad is not None and c.grad is not None
        return Result(loss.detach().double(), e.grad.double(), c.grad.double())


def budget(steps: Steps, variant: Variant, bounds: bool = True) -> dict[str, Budget]:
    """The budgets of loss, dE and dC of the nll of all tokens.

    Args:
        steps: of a problem on the CPU, without column weights. Memory: some fp64 blocks of the pass, and with `bounds`
            about 20 fp64 copies of the logits.
        variant: not a compiled one.
        bounds: also the stages' bounds, at several times the cost.

    Raises ValueError for a compiled variant.
    """
    results, call = steps.results(variant), steps.measured(variant)
    allowed = steps.bounds(variant) if bounds else []
    found = {}
    for name in QUANTITIES:
        values = [getattr(result, name) for result in results]
        limits = [torch.zeros_like(values[0]), *(getattr(q, name) for q in allowed)]
        error = getattr(call, name) - values[0]
        size, whole = float(values[0].norm()), float(error.square().sum())
        lines = []
        for k, stage in enumerate(effective_stages(variant)):
            part = values[k + 1] - values[k]
            grown = float((limits[k + 1] - limits[k]).norm()) if bounds else math.nan
            share = float((part * error).sum()) / whole if whole else 0.0
            lines.append(Line(stage, _ratio(float(part.norm()), size), share, _ratio(grown, size)))
        rest = float((error - (values[-1] - values[0])).norm())
        limit = _ratio(float(limits[-1].norm()), size) if bounds else math.nan
        relative = _ratio(math.sqrt(whole), size)
        found[name] = Budget(name, relative, limit, tuple(lines), _ratio(rest, math.sqrt(whole)))
    return found


def _ratio(a: float, b: float) -> float:
    return 0.0 if a == 0 else a / b if b else math.inf
