"""Rigorous bounds of the error of every variant: loss, heads and gradients of one call, evaluated without running it.

    bound(problem, plan, objective, seed=...) -> Quantities     |computed - exact| <= bound, elementwise

The analysis follows the passes line by line (`bounds_logits` forward, `bounds_gradients` backward) with running errors
(`bounds_model.Computed`): each rounding is charged where it happens, with the magnitude that it has there. Sums and
products may be added in any order, fused or not; exp, log and tanh may err by `Machine.ulps`. What a filter does is
known up to the entries that lie within the error of P of its threshold, so it enters with its sign. The bounds are
computed in fp64 and inflated by 1 + 1e-4 for their own rounding.

`bounds_certificate` bounds the random filters for all seeds at once, and what dropping does from a kernel's statistics.

Sources: Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4 (sums, Kahan's included); Blanchard,
Higham and Higham, doi 10.1093/imanum/draa038 (log-sum-exp); Blanchard, Higham, Lopez, Mary and Pranesh, hal-02491076
(block FMA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cce_precision.analysis.bounds_gradients import Factors, GradientBounds, Rows, tiled_gradients
from cce_precision.analysis.bounds_kernels import kernel_softmax
from cce_precision.analysis.bounds_logits import plain_softmax, precision, tiled_softmax
from cce_precision.analysis.bounds_model import AMPERE, CPU, HOPPER, INTERPRETER, MACHINES, Computed, Machine
from cce_precision.analysis.bounds_plain import plain_gradients
from cce_precision.analysis.bounds_softmax import Blocks, Softmax
from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages
from cce_precision.analysis.references import Objective, Quantities
from cce_precision.eager.tiles import block_shape, vocabulary_order
from cce_precision.kernels import one_pass_shapes
from cce_precision.numerics import Path, unit_roundoff
from cce_precision.problem import Plan, Problem

__all__ = ["AMPERE", "CPU", "HOPPER", "INFLATION", "INTERPRETER", "MACHINES", "Call", "Machine", "bound"]

INFLATION = 1 + 1e-4  # for the rounding of the bounds themselves
KERNEL_TILE = 64  # least columns that a kernel adds up before it rescales
KEPT = 2**23  # logits up to which a softmax is kept between the forward and the backward bounds


class Call:
    """One call in visiting order, cut into blocks of valid tokens."""

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        objective: Objective,
        machine: Machine,
        stages: Stages = ALL_STAGES,
        order: Tensor | None = None,
    ) -> None:
        self.problem, self.plan, self.objective, self.machine, self.stages = problem, plan, objective, machine, stages
        self.variant, self.tiled = plan.variant, plan.variant.path is Path.TILED
        self.p = precision(problem, machine, Stage.SOFTMAX, stages)
        self.valid = (problem.targets >= 0).nonzero()[:, 0]
        self.order = order
        if order is None and self.tiled:
            self.order = vocabulary_order(problem, self.variant, self.valid)
        self.ids = torch.arange(problem.v, device=problem.e.device) if self.order is None else self.order
        self.targets = problem.positions(self.order)
        self.c = problem.c.detach().double()[self.ids]
        self.bias = None if problem.bias is None else problem.bias.detach().double()[self.ids]
        self.weight = objective.column_weight(problem, problem.e.device)[self.ids]
        self.height, self.width = block_shape(problem, plan, by_tile=self.variant.tile_ordered)
        if not self.variant.tile_ordered:
            self.height = max(1, min(len(self.valid), KEPT // problem.v))
        _, width = block_shape(problem, plan, by_tile=False)
        if machine is not CPU:
            width = min(width, KERNEL_TILE)
        self.width_of_sums = min(width, problem.v)
        self._kept: list[Rows] = []

    def rows(self) -> Iterator[Rows]:
        """The blocks of valid tokens, computed again each time where they are too many to keep."""
        if self._kept:
            yield from self._kept
            return
        keep = len(self.valid) * self.problem.v <= KEPT
        for start in range(0, len(self.valid), self.height):
            index = self.valid[start : start + self.height]
            e, targets = self.problem.e.detach()[index].double(), self.targets[index]
            softmax = self.softmax(self.problem, e, self.c, self.bias, targets, self.weight)
            block = Rows(slice(start, start + len(index)), index, e, targets, softmax)
            if keep:
                self._kept.append(block)
            yield block

    def softmax(
        self, problem: Problem, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor
    ) -> Softmax:
        """The softmax of rows e (B, D) over some columns c (V, D), as what runs the call forms it."""
        arguments = (problem, e, c, bias, targets, weight, self.machine)
        if not self.tiled:
            return plain_softmax(*arguments, self.stages)
        if self.machine.kernels is not None:
            return kernel_softmax(*arguments, self.stages)
        width = min(self.width_of_sums, len(c))
        return tiled_softmax(*arguments, Blocks(width, -(-len(c) // width)), self.stages)

    def share_softmax(self, other: Call) -> None:
        """Takes over the softmax of another call of the same problem and objective, where it is the same and kept."""
        if self._softmax_key() == other._softmax_key():
            self._kept = other._kept

    def _softmax_key(self) -> tuple[object, ...]:
        """All of the plan and the stages that the softmax and its blocks depend on."""
        first = self.stages & {Stage.LOGITS, Stage.SOFTMAX}
        return self.variant.path, self.variant.sort_vocabulary, self.height, self.width_of_sums, self.machine, first

    def head(self, name: str) -> Computed:
        """A head of all valid tokens, (M,)."""
        return self._heads[name]

    def forward(self) -> None:
        names = ("nll", "lse", "entropy", "smooth", "complement")
        parts: dict[str, list[Computed]] = {name: [] for name in names}
        for block in self.rows():
            for name in names:
                parts[name].append(getattr(block.softmax, name))
        empty = torch.zeros(0, dtype=torch.float64, device=self.c.device)
        self._heads = {
            name: Computed(torch.cat([x.value for x in xs] or [empty]), torch.cat([x.error for x in xs] or [empty]))
            for name, xs in parts.items()
        }

    # The objective, as `interface.py` and PyTorch's autograd compute it from the heads.

    def coefficient(self, name: str) -> Computed:
        return Computed.exact(self.objective.per_token(name, self.valid))

    def denominator(self) -> Computed:
        if self.objective.reduction != "mean":
            return Computed.exact(1.0, like=self.c)
        if self.objective.class_weight is None:
            return Computed.exact(float(len(self.valid)), like=self.c)
        weights = Computed.exact(self._token_weight())
        return weights.sum(0, self.p, self.machine.total_depth(self.problem.n))

    def _token_weight(self) -> Tensor:
        """(M,) class weight of each token's target."""
        return self.weight[self.targets[self.valid]]

    def _nll_coefficient(self) -> Computed:
        """(M,) what the nll counts in the loss, each factor of it rounded once."""
        o, p = self.objective, self.p
        factor = self.coefficient("nll")
        if o.class_weight is not None:
            factor = (factor * Computed.exact(self._token_weight())).rounded(p)
        if o.label_smoothing:
            kept = Computed.exact(1 - o.label_smoothing, like=self.c).rounded(p)
            factor = (factor * kept).rounded(p)
        return factor

    def _smooth_coefficient(self) -> Computed | None:
        o = self.objective
        if not (o.label_smoothing or o.uses("smooth")):
            return None
        share = Computed.exact(o.label_smoothing / self.problem.v, like=self.c).rounded(
            self.p, 2 if o.label_smoothing else 0
        )
        return self.coefficient("smooth") + share

    def losses(self) -> Computed:
        """(M,) loss of each token."""
        p, o = self.p, self.objective
        plain = o.class_weight is None and not o.label_smoothing and not o.uses("smooth")
        terms = [(self.head("nll"), self._nll_coefficient())]
        smooth = self._smooth_coefficient()
        if smooth is not None:
            terms.append((self.head("smooth"), smooth))
        for name in ("lse", "entropy"):
            if o.uses(name):
                terms.append((self.head(name), self.coefficient(name)))
        if o.uses("z_loss"):
            terms.append(((self.head("lse") * self.head("lse")).rounded(p), self.coefficient("z_loss")))
        if plain and len(terms) == 1 and bool((terms[0][1].value == 1).all()):
            return terms[0][0]
        products = [(head * factor).rounded(p, 2) for head, factor in terms]
        total, size = products[0], products[0].upper
        for product in products[1:]:
            total, size = total + product, size + product.upper
        return Computed(total.value, total.error + (len(products) - 1) * p.u * (1 + 4 * p.u) * size)

    def value(self, losses: Computed) -> Computed:
        p = self.p
        if self.objective.reduction == "none":
            return losses
        total = losses.sum(0, p, self.machine.total_depth(self.problem.n))
        if self.objective.reduction == "sum":
            return total
        mean = total.over(self.denominator()).rounded(p)
        return Computed(mean.value, torch.where(mean.value.isnan(), 0.0, mean.error))  # the mean of nothing is NaN

    def factors(self) -> Factors:
        o, p = self.objective, self.p
        g = self.coefficient("grad_out")
        unit = bool((g.value == 1).all())
        if o.reduction == "mean":
            g, unit = g.over(self.denominator()).rounded(p), False

        def times(factor: Computed) -> Computed:
            exact = unit or bool((factor.upper == 1).all())
            return g * factor if exact else (g * factor).rounded(p)

        lse = entropy = smooth = None
        if o.uses("lse"):
            lse = times(self.coefficient("lse"))
        if o.uses("z_loss"):
            slope = (self.head("lse") * self.coefficient("z_loss") * Computed.exact(2.0, like=self.c)).rounded(p, 2)
            lse = times(slope) if lse is None else (lse + times(slope)).rounded(p)
        if o.uses("entropy"):
            entropy = times(self.coefficient("entropy"))
        share = self._smooth_coefficient()
        if share is not None:
            smooth = times(share)
        total = Computed.exact(self.weight).sum(0, p, self.machine.total_depth(self.problem.v))
        if self.objective.class_weight is None and self.problem.column_weight is None:
            total = Computed.exact(float(self.problem.v), like=self.c)
        return Factors.of(times(self._nll_coefficient()), lse, entropy, smooth, total, p)

    def gradients(self, seed: Tensor) -> GradientBounds:
        factors, rows = self.factors(), self.rows
        if not self.tiled:
            return plain_gradients(self.problem, self.machine, factors, rows, self.c, self.weight, self.stages)
        return tiled_gradients(
            self.problem, self.variant, self.machine, factors, rows, self.c, self.weight, self.ids, self.width, seed,
            self.stages,
        )  # fmt: skip

    def one_pass_excess(self) -> tuple[Tensor, Tensor]:
        """What the one-pass mode of the kernels may err beyond two passes, (M, D) and (V, D); 0 where it is not taken.

        It rounds powers where they round P (a P that is rounded exactly may come from one that is not), and for dC the
        rows that the powers meet; powers below the normal range may be lost. All of it is rounded once more at the end.
        """
        e, c = self.problem.e.detach().double(), self.problem.c.detach().double()
        more_e, more_c = e.new_zeros(len(self.valid), e.shape[1]), torch.zeros_like(c)
        if self.machine.kernels is None or one_pass_shapes(self.problem, self.plan) is None:
            return more_e, more_c
        dtype, g = self.problem.operand_dtype, self.factors().nll.upper
        u, tiny = unit_roundoff(dtype), torch.finfo(dtype).tiny
        for block in self.rows():
            p = block.softmax.p.upper.scatter(1, block.targets[:, None], 0.0)
            factor, rows = g.expand(len(self.valid))[block.place][:, None], block.e.abs()
            more_e[block.place] = factor * (u * (p @ c.abs()) + tiny * c.abs().sum(0))
            more_c += (2 * u * (1 + u) * p + tiny).T @ (factor * rows)
        return more_e * (1 + 2 * u), more_c * (1 + 2 * u)

    def quantities(self, seed: int, gradients: bool = True) -> Quantities:
        """What `bound` returns."""
        self.forward()
        losses, n, d = self.losses(), self.problem.n, self.problem.d

        def spread(x: Tensor) -> Tensor:
            """(M, ...) of the valid tokens as (N, ...)."""
            return torch.zeros(n, *x.shape[1:], dtype=torch.float64, device=x.device).index_copy(0, self.valid, x)

        value = self.value(losses).error
        result = {
            "loss": spread(losses.error),
            "value": spread(value) if self.objective.reduction == "none" else value,
            "p_complement": spread(self.head("complement").error),
            "dE": torch.zeros(0, d, dtype=torch.float64),
            "dC": torch.zeros(0, d, dtype=torch.float64),
            "dbias": torch.zeros(0, dtype=torch.float64),
        }
        result |= {name: spread(self.head(name).error) for name in ("nll", "lse", "entropy", "smooth")}
        if gradients:
            g = self.gradients(torch.full((), seed, dtype=torch.int64, device=self.c.device))
            undo = torch.argsort(self.ids)
            more_e, more_c = self.one_pass_excess()
            result |= {"dE": spread(g.d_e + more_e), "dC": g.d_c[undo] + more_c, "dbias": g.d_bias[undo]}
        allowed = {name: (x * INFLATION).nan_to_num(nan=math.inf, posinf=math.inf) for name, x in result.items()}
        return Quantities(**allowed)


def bound(
    problem: Problem,
    plan: Plan,
    objective: Objective | None = None,
    *,
    seed: int = 0,
    machine: Machine | str = CPU,
    gradients: bool = True,
    order: Tensor | None = None,
) -> Quantities:
    """Elementwise bounds of the error of a call: every entry computed by `plan` is within its bound of the exact one.

    Args:
        problem: the flat call. softcap and temperature are its own, as in `truth`.
        plan: the variant and the workspace. Blocks are those of the eager passes.
        objective: reduction, upstream gradient, coefficients; exact numbers that are representable in the compute
        dtype, or
            products that the caller's program rounds once each. The mean nll by default.
        seed: of the random filters: their draws are known, so the bound is that of this one run.
        machine: how products, sums and elementary functions round; a record or its name in `MACHINES`.
        gradients: False leaves dE, dC and dbias empty.
        order: (V,) int64, the columns as the call visited them, where that is known: mean logits that are equal but for
            rounding may stand either way. By default in the order of eager's rounding.

    Returns fp64 tensors on the device of e; 0 in ignored tokens; inf where nothing can be said (an overflow, or
    logits so large that their rounding swamps the softmax). Memory: some 20 fp64 copies of one block of logits, of at
    most 2^23 entries.
    """
    machine = MACHINES[machine] if isinstance(machine, str) else machine
    call = Call(problem, plan, Objective() if objective is None else objective, machine, order=order)
    return call.quantities(seed, gradients)
