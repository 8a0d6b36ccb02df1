"""The truth in ball arithmetic (python-flint, 128 bits) and in mpmath (50 digits), number by number.

The formulas stand in `references.py`. Written for small shapes and for reading: lists of numbers, one row after
another. Balls carry a rigorous radius through every operation, so that nothing about cancellation need be thought of
here; mpmath's digits beyond 34 are its margin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cce_precision.analysis.references import Objective, Quantities, Truth
from cce_precision.problem import Problem

__all__ = ["BITS", "DIGITS", "exact_truth"]

BITS = 128  # of balls
DIGITS = 50  # of mpmath
LEAST = 2.0**-1074  # the smallest positive double

Number = Any  # flint.arb or mpmath.mpf; None where a logit or a surprisal is infinite
Matrix = list[list[Number]]


class Arithmetic(Protocol):
    """What the two kinds of numbers do differently; + - * / are operators on both."""

    def number(self, x: float) -> Number: ...
    def exp(self, x: Number) -> Number: ...
    def expm1(self, x: Number) -> Number: ...
    def log1p(self, x: Number) -> Number: ...
    def tanh(self, x: Number) -> Number: ...
    def product(self, a: Matrix, b: Matrix) -> Matrix:
        """a (M, K) times the transpose of b (N, K)."""
        ...

    def double(self, x: Number) -> tuple[float, float]:
        """The nearest double and a bound of its distance to the exact value."""
        ...


class Balls:
    def __init__(self) -> None:
        import flint

        self.number, self._matrix = flint.arb, flint.arb_mat

    def exp(self, x: Number) -> Number:
        return x.exp()

    def expm1(self, x: Number) -> Number:
        return x.expm1()

    def log1p(self, x: Number) -> Number:
        return x.log1p()

    def tanh(self, x: Number) -> Number:
        return x.tanh()

    def product(self, a: Matrix, b: Matrix) -> Matrix:
        return (self._matrix(a) * self._matrix(b).transpose()).tolist()

    def double(self, x: Number) -> tuple[float, float]:
        nearest = float(x.mid())
        if not math.isfinite(nearest):
            return nearest, 0.0
        distance = (x - self.number(nearest)).abs_upper()
        return nearest, 0.0 if distance.is_zero() else float(distance) * (1 + 2.0**-50) + LEAST


class Mpmath:
    def __init__(self) -> None:
        import mpmath

        self._mp = mpmath.mp
        self.number, self.exp, self.expm1 = mpmath.mpf, mpmath.exp, mpmath.expm1
        self.log1p, self.tanh = mpmath.log1p, mpmath.tanh

    def product(self, a: Matrix, b: Matrix) -> Matrix:
        return [[self._mp.fdot(row, column) for column in b] for row in a]

    def double(self, x: Number) -> tuple[float, float]:
        nearest = float(x)
        if not math.isfinite(nearest):
            return nearest, 0.0
        distance = abs(x - self.number(nearest))
        return nearest, 0.0 if distance == 0 else float(distance) * (1 + 2.0**-50) + LEAST


@contextlib.contextmanager
def _arithmetic(method: str) -> Iterator[Arithmetic]:
    if method == "balls":
        import flint

        with flint.ctx.workprec(BITS):
            yield Balls()
    else:
        import mpmath

        with mpmath.workdps(DIGITS):
            yield Mpmath()


def _transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


class _Row:
    """One token: surprisals, probabilities and heads from its logits; None stands for a logit of -inf."""

    def __init__(self, ar: Arithmetic, z: list[Number], target: int, weight: Sequence[Number]) -> None:
        zero, infinity = ar.number(0), ar.number(math.inf)
        kept = [j for j, logit in enumerate(z) if logit is not None]
        k = max(kept, key=lambda j: ar.double(z[j])[0])
        tail = ar.log1p(sum((ar.exp(z[j] - z[k]) for j in kept if j != k), zero))
        self.q: list[Number] = [None if logit is None else (z[k] - logit) + tail for logit in z]
        self.q[k] = tail  # z_k - z_k is 0, which balls cannot know
        self.p: list[Number] = [zero if q is None else ar.exp(-q) for q in self.q]
        self.lse = z[k] + tail
        self.nll = infinity if self.q[target] is None else self.q[target]
        self.p_complement = ar.number(1) if self.q[target] is None else -ar.expm1(-self.q[target])
        self.entropy = sum((self.p[j] * self.q[j] for j in kept), zero)
        masked = len(kept) < len(z)
        self.smooth = infinity if masked else sum((w * q for w, q in zip(weight, self.q, strict=True)), zero)


class _Call:
    """The coefficients of an objective in the numbers of an arithmetic."""

    def __init__(self, ar: Arithmetic, problem: Problem, objective: Objective, valid: Tensor) -> None:
        self.ar, self.objective = ar, objective
        self.targets = [int(t) for t in problem.targets[valid]]
        self.weight = [ar.number(w) for w in objective.column_weight(problem, valid.device).tolist()]
        self.eps = ar.number(objective.label_smoothing)
        self.share = self.eps / ar.number(len(self.weight))
        names = ("grad_out", "nll", "lse", "z_loss", "entropy", "smooth")
        self.tokens = [
            dict(zip(names, map(ar.number, row), strict=True))
            for row in torch.stack([objective.per_token(name, valid) for name in names], 1).tolist()
        ]
        self.denominator = ar.number(1)
        if objective.reduction == "mean":
            weights = [ar.number(1) if objective.class_weight is None else self.weight[t] for t in self.targets]
            self.denominator = sum(weights, ar.number(0))

    def own_weight(self, i: int) -> Number:
        return self.ar.number(1) if self.objective.class_weight is None else self.weight[self.targets[i]]

    def loss(self, i: int, row: _Row) -> Number:
        on = self.tokens[i]
        terms = (
            (on["nll"] * (1 - self.eps) * self.own_weight(i), row.nll),
            (self.share + on["smooth"], row.smooth),
            (on["lse"], row.lse),
            (on["z_loss"], row.lse * row.lse),
            (on["entropy"], row.entropy),
        )
        return sum((coefficient * head for coefficient, head in terms if coefficient != 0), self.ar.number(0))

    def logit_gradient(self, i: int, row: _Row) -> list[Number]:
        """(V,) gradient of the value with respect to the logits of token i."""
        on, zero = self.tokens[i], self.ar.number(0)
        g = on["grad_out"] / self.denominator
        beta = g * on["nll"] * (1 - self.eps) * self.own_weight(i)
        sigma = g * (self.share + on["smooth"])
        rest = g * (on["lse"] + 2 * on["z_loss"] * row.lse) + sigma * sum(self.weight, zero)
        kappa = g * on["entropy"]
        x = []
        for j, (p, q, w) in enumerate(zip(row.p, row.q, self.weight, strict=True)):
            label = -row.p_complement if j == self.targets[i] else p
            centred = zero if q is None else q - row.entropy
            x.append(beta * label + p * (rest + kappa * centred) - sigma * w)
        return x


def _logits(ar: Arithmetic, problem: Problem, e: Matrix, c: Matrix) -> tuple[list[list[Number]], Matrix]:
    """z (M, V), None where it is -inf, and its derivative with respect to e c^T + bias."""
    bias = [0.0] * problem.v if problem.bias is None else problem.bias.double().tolist()
    temperature, one = ar.number(problem.temperature), ar.number(1)
    z, slope = ar.product(e, c), []
    for row in z:
        slope.append([one / temperature] * problem.v)
        for j, b in enumerate(bias):
            masked = b == -math.inf
            row[j] = None if masked else row[j] + ar.number(b)
            if problem.softcap is not None:
                cap = ar.number(problem.softcap)
                flat = ar.number(0) if masked else ar.exp(-2 * abs(row[j] / cap))
                slope[-1][j] = 4 * flat / ((1 + flat) * (1 + flat)) / temperature  # 1 - tanh^2
                row[j] = cap * (-one if masked else ar.tanh(row[j] / cap))
            if row[j] is not None:
                row[j] = row[j] / temperature
    return z, slope


def exact_truth(problem: Problem, objective: Objective, method: str, device: torch.device) -> Truth:
    """The truth in balls or mpmath; see `references.truth`."""
    problem = _on_cpu(problem)
    n, v, d = problem.n, problem.v, problem.d
    valid = (problem.targets >= 0).nonzero()[:, 0]
    with _arithmetic(method) as ar:
        call = _Call(ar, problem, objective, valid)
        e = [[ar.number(a) for a in row] for row in problem.e[valid].double().tolist()]
        c = [[ar.number(a) for a in row] for row in problem.c.double().tolist()]
        z, slope = _logits(ar, problem, e, c) if e else ([], [])
        rows = [_Row(ar, z_row, t, call.weight) for z_row, t in zip(z, call.targets, strict=True)]
        x = [
            [gradient * s for gradient, s in zip(call.logit_gradient(i, row), slope[i], strict=True)]
            for i, row in enumerate(rows)
        ]
        loss = [call.loss(i, row) for i, row in enumerate(rows)]
        total = sum(loss, ar.number(0))
        mean = ar.number(math.nan) if not rows else total / call.denominator
        per_token: dict[str, list[Number]] = {"loss": loss}
        for name in ("nll", "lse", "entropy", "smooth", "p_complement"):
            per_token[name] = [getattr(row, name) for row in rows]
        result = {name: _doubles(ar, values, (n,), valid) for name, values in per_token.items()}
        result["value"] = result["loss"]
        if objective.reduction != "none":
            result["value"] = _doubles(ar, [mean if objective.reduction == "mean" else total], ())
        result["dE"] = _doubles(ar, ar.product(x, _transposed(c)) if x else [], (n, d), valid)
        across = _transposed(x) if x else []
        result["dC"] = _doubles(ar, ar.product(across, _transposed(e)) if x else [], (v, d))
        result["dbias"] = _doubles(ar, [sum(column, ar.number(0)) for column in across], (v,))
    value, radius = ({name: pair[k].to(device) for name, pair in result.items()} for k in range(2))
    return Truth(**value, radius=Quantities(**radius))


def _doubles(
    ar: Arithmetic, numbers: Sequence[Any], shape: tuple[int, ...], rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values and radii as fp64 tensors of `shape`, 0 outside `rows`; all 0 where there is no number."""
    value, radius = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    flat = [ar.double(x) for row in numbers for x in (row if isinstance(row, list) else [row])]
    if flat:
        pairs = torch.tensor(flat, dtype=torch.float64)
        for out, column in ((value, pairs[:, 0]), (radius, pairs[:, 1])):
            if rows is None:
                out.copy_(column.reshape(shape))
            else:
                out[rows] = column.reshape(len(rows), *shape[1:])
    return value, radius


def _on_cpu(problem: Problem) -> Problem:
    tensors = {name: getattr(problem, name) for name in ("e", "c", "targets", "bias", "column_weight")}
    return dataclasses.replace(problem, **{name: t.cpu() for name, t in tensors.items() if t is not None})
