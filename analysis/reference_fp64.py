"""The truth in fp64, with a computed certificate: blocks of tokens, each with its whole row of logits, on any device.

The formulas stand in `references.py`. Radii are carried along by `Enclosure`; by hand is only what correlated errors
demand: the surprisals. Let Delta_j bound the error of logit j. By the mean value theorem the error of q_j = lse - z_j
is at most sum_{k != j} P_k Delta_k + (1 - P_j) Delta_j at some point between, where P and 1 - P are at most exp(2 max
Delta) times what they are here. For the column of a confident row's target both terms are of the size of 1 - P_j:
that is why 1 - P_t keeps its relative accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cce_precision.analysis.reference_enclosure import TINY, Enclosure, rounding
from cce_precision.analysis.references import Magnitudes, Objective, Quantities, Truth
from cce_precision.problem import Problem

CPU_CHUNK = (256, 2048)  # (tokens, columns)
GPU_CHUNK = (2048, 8192)
ROW_BUDGET = 2**29  # logits of one token block
Q_MAX = 2.0**20  # beyond it exp(-q) is 0 and q itself is replaced in products with P


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _logits(problem: Problem, e: Tensor, step: int) -> tuple[Enclosure, Enclosure | None]:
    """(B, V) logits of a token block e (B, D), and the slope of the softcap where there is one."""
    shape = (e.shape[0], problem.v)
    z = Enclosure.zeros(shape, e.device)
    slope = None if problem.softcap is None else Enclosure.zeros(shape, e.device)
    for cols in _slices(problem.v, step):
        y = Enclosure.exact(e).matmul(problem.c[cols].to(e).T)
        if problem.bias is not None:
            y = (y + problem.bias[cols].to(e)).masked()
        if problem.softcap is not None and slope is not None:
            w = (y / problem.softcap).masked()
            flat = w.sech2()
            slope.value[:, cols], slope.radius[:, cols] = flat.value, flat.radius
            y = w.tanh() * problem.softcap
        y = y if problem.temperature == 1 else y / problem.temperature
        z.value[:, cols], z.radius[:, cols] = y.value, y.masked().radius
    return z, slope


@dataclass(frozen=True, eq=False)
class _Softmax:
    """The softmax of a token block, through its surprisals. Per-row tensors are (B, 1)."""

    z: Enclosure  # (B, V) logits
    largest: Tensor  # the largest computed logit, an exact number
    index: Tensor  # its column
    tail: Enclosure  # l, as a function of the computed logits
    moved_rest: Tensor  # exp(2 max Delta) times the sum of P_k Delta_k over the columns but the largest, rounded up
    moved_largest: Tensor  # the same of the largest
    growth: Tensor  # exp(2 max Delta)

    @staticmethod
    def of(z: Enclosure, step: int) -> _Softmax:
        largest, index = z.value.max(1, keepdim=True)
        rows = z.value.shape[0]
        total = Enclosure.zeros((rows,), z.value.device)
        spread = torch.zeros_like(largest)
        for cols in _slices(z.value.shape[1], step):
            distance = largest - z.value[:, cols]
            t = Enclosure(-distance, rounding(distance)).masked().exp()
            here = _columns(cols, index) == index
            t = Enclosure(t.value.masked_fill(here, 0.0), t.radius.masked_fill(here, 0.0))
            total = total + t.sum(1)
            spread += (t.upper * z.radius[:, cols]).sum(1, keepdim=True)
        tail = total.log1p().column()
        growth = (2 * z.radius.amax(1, keepdim=True)).exp()
        grown = (tail.radius - tail.value).exp() * growth  # P of the largest, times the growth
        return _Softmax(z, largest, index, tail, spread * grown, z.radius.gather(1, index) * grown, growth)

    def surprisal(self, z: Enclosure, is_largest: Tensor) -> Enclosure:
        """(B, k) q of the columns with logits `z`; `is_largest` marks the column `index`."""
        q = (self.largest - z.value) + self.tail.value
        moved = self.moved_rest + self.moved_largest.masked_fill(is_largest, 0.0)
        moved = moved + (q + self.tail.radius).clamp(max=1.0) * (z.radius * self.growth)  # 1 - P <= min(1, q)
        # two roundings, each at most U q: of the distance to the largest and of the sum
        return Enclosure(q, moved + (self.tail.radius + TINY) + rounding(q, 2)).masked()

    def block(self, cols: slice) -> tuple[Enclosure, Enclosure]:
        """(B, k) q and P of some columns."""
        q = self.surprisal(self.z[:, cols], _columns(cols, self.index) == self.index)
        return q, (-q).exp()

    def at(self, targets: Tensor) -> Enclosure:
        """(B,) q of one column a row."""
        column = targets.unsqueeze(1)
        z = Enclosure(self.z.value.gather(1, column), self.z.radius.gather(1, column))
        return self.surprisal(z, column == self.index)[:, 0]

    @property
    def lse(self) -> Enclosure:
        value = self.largest + self.tail.value
        moved = self.moved_rest + self.moved_largest
        return Enclosure(value, moved + self.tail.radius + rounding(value))[:, 0]

    def moments(self, weight: Tensor, step: int) -> tuple[Enclosure, Enclosure]:
        """(B,) entropy and smooth head."""
        rows = self.largest.shape[0]
        entropy = Enclosure.zeros((rows,), weight.device)
        smooth = Enclosure.zeros((rows,), weight.device)
        for cols in _slices(weight.shape[0], step):
            q, p = self.block(cols)
            entropy = entropy + (p * _finite(q)).sum(1)
            smooth = smooth + (q * weight[cols]).sum(1)
        return entropy, smooth


def _columns(cols: slice, like: Tensor) -> Tensor:
    """(1, k) indices of the columns."""
    return torch.arange(cols.start, cols.stop, device=like.device).unsqueeze(0)


def _finite(q: Enclosure) -> Enclosure:
    return Enclosure(q.value.clamp(max=Q_MAX), q.radius)


def _weighted(head: Enclosure, coefficient: Enclosure) -> Enclosure:
    """Their product; 0 for a coefficient of 0, also beside an infinite head."""
    zero = coefficient.value == 0
    product = head * coefficient
    return Enclosure(product.value.masked_fill(zero, 0.0), product.radius.masked_fill(zero, 0.0))


@dataclass(frozen=True, eq=False)
class _Upstream:
    """Gradient of the value with respect to the heads of a token block, (B,) each; `rest` = d/d lse + sum(w) sigma."""

    beta: Enclosure
    rest: Enclosure | None
    kappa: Enclosure | None
    sigma: Enclosure | None


class _Call:
    """A problem and an objective on one device: coefficients of the heads as enclosures."""

    def __init__(self, problem: Problem, objective: Objective, device: torch.device) -> None:
        self.problem, self.objective, self.device = problem, objective, device
        self.targets = problem.targets.to(device)
        self.valid = (self.targets >= 0).nonzero()[:, 0]  # (M,) tokens that are not ignored
        self.weight = objective.column_weight(problem, device)  # (V,)
        self.denominator = Enclosure.exact(torch.ones((), dtype=torch.float64, device=device))
        if objective.reduction == "mean":
            counted = torch.ones(len(self.valid), dtype=torch.float64, device=device)
            if objective.class_weight is not None:
                counted = self.weight[self.targets[self.valid]]
            self.denominator = Enclosure.exact(counted).sum(0)

    def _coefficient(self, name: str, rows: Tensor) -> Enclosure:
        return Enclosure.exact(self.objective.per_token(name, rows))

    def nll_coefficient(self, rows: Tensor) -> Enclosure:
        kept = Enclosure.exact(torch.ones((), dtype=torch.float64, device=self.device)) - self.objective.label_smoothing
        coefficient = self._coefficient("nll", rows) * kept
        return coefficient if self.objective.class_weight is None else coefficient * self.weight[self.targets[rows]]

    def smooth_coefficient(self, rows: Tensor) -> Enclosure | None:
        if not (self.objective.label_smoothing or self.objective.uses("smooth")):
            return None
        share = self._coefficient("smooth", rows)
        share = Enclosure(torch.full_like(share.value, self.objective.label_smoothing), share.radius) / self.problem.v
        return share + self._coefficient("smooth", rows)

    def loss(self, rows: Tensor, nll: Enclosure, lse: Enclosure, entropy: Enclosure, smooth: Enclosure) -> Enclosure:
        """(B,) loss of each token."""
        loss = _weighted(nll, self.nll_coefficient(rows))
        smoothing = self.smooth_coefficient(rows)
        if smoothing is not None:
            loss = loss + _weighted(smooth, smoothing)
        if self.objective.uses("lse"):
            loss = loss + lse * self._coefficient("lse", rows)
        if self.objective.uses("z_loss"):
            loss = loss + lse * lse * self._coefficient("z_loss", rows)
        if self.objective.uses("entropy"):
            loss = loss + entropy * self._coefficient("entropy", rows)
        return loss

    def upstream(self, rows: Tensor, lse: Enclosure) -> _Upstream:
        g = self._coefficient("grad_out", rows) / self.denominator
        rest = kappa = sigma = None
        smoothing = self.smooth_coefficient(rows)
        if smoothing is not None:
            sigma = g * smoothing
            rest = sigma * Enclosure.exact(self.weight).sum(0)
        if self.objective.uses("lse") or self.objective.uses("z_loss"):
            slope = self._coefficient("lse", rows) + lse * self._coefficient("z_loss", rows) * 2.0
            rest = g * slope if rest is None else rest + g * slope
        if self.objective.uses("entropy"):
            kappa = g * self._coefficient("entropy", rows)
        return _Upstream(g * self.nll_coefficient(rows), rest, kappa, sigma)


def _logit_gradient(
    p: Enclosure, q: Enclosure, label: Enclosure, is_target: Tensor, entropy: Enclosure, up: _Upstream, weight: Tensor
) -> Enclosure:
    """(B, k) gradient with respect to the logits of some columns; `label` (B, 1) is P_t - 1 in complement form."""
    x = label.where(is_target, p) * up.beta.column()
    factor = None if up.rest is None else up.rest.column()
    if up.kappa is not None:
        centred = (_finite(q) - entropy.column()) * up.kappa.column()
        factor = centred if factor is None else centred + factor
    if factor is not None:
        x = x + p * factor
    if up.sigma is not None:
        x = x - up.sigma.column() * weight
    return x


class _Block(NamedTuple):
    """A token block: its heads, and the gradient with respect to its logits, one block of columns at a time."""

    rows: Tensor  # (B,) tokens
    e: Tensor  # (B, D) fp64
    heads: dict[str, Enclosure]  # (B,) each
    gradient: Iterator[tuple[slice, Tensor, Enclosure]]  # columns, their c (k, D) fp64, x (B, k)


def _blocks(call: _Call, chunk: tuple[int, int] | None) -> Iterator[_Block]:
    problem, device = call.problem, call.device
    tokens, step = chunk or (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK)
    tokens = tokens if chunk else max(1, min(tokens, ROW_BUDGET // problem.v))
    for rows in call.valid.split(tokens):
        e = problem.e[rows.to(problem.e.device)].to(device=device, dtype=torch.float64)
        targets = call.targets[rows]
        z, slope = _logits(problem, e, step)
        softmax = _Softmax.of(z, step)
        nll, lse = softmax.at(targets), softmax.lse
        entropy, smooth = softmax.moments(call.weight, step)
        label = (-nll).expm1()
        heads = {"nll": nll, "lse": lse, "entropy": entropy, "smooth": smooth, "p_complement": -label}
        heads["loss"] = call.loss(rows, nll, lse, entropy, smooth)
        yield _Block(
            rows, e, heads, _gradient(call, softmax, slope, label, entropy, call.upstream(rows, lse), targets, step)
        )


def _gradient(
    call: _Call,
    softmax: _Softmax,
    slope: Enclosure | None,
    label: Enclosure,
    entropy: Enclosure,
    up: _Upstream,
    targets: Tensor,
    step: int,
) -> Iterator[tuple[slice, Tensor, Enclosure]]:
    """Columns, their c in fp64, and the gradient (B, k) with respect to e c^T + bias there."""
    for cols in _slices(call.problem.v, step):
        q, p = softmax.block(cols)
        is_target = _columns(cols, targets) == targets.unsqueeze(1)
        x = _logit_gradient(p, q, label.column(), is_target, entropy, up, call.weight[cols])
        x = x if slope is None else x * slope[:, cols]
        x = x if call.problem.temperature == 1 else x / call.problem.temperature
        yield cols, call.problem.c[cols].to(targets.device, torch.float64), x


def fp64_truth(
    problem: Problem, objective: Objective, device: torch.device, chunk: tuple[int, int] | None = None
) -> Truth:
    """The truth in fp64; see `references.truth`."""
    n, v, d = problem.n, problem.v, problem.d
    call = _Call(problem, objective, device)
    names = ("loss", "nll", "lse", "entropy", "smooth", "p_complement")
    heads = {name: Enclosure.zeros((n,), device) for name in names}
    de, dc, dbias = (Enclosure.zeros(shape, device) for shape in ((n, d), (v, d), (v,)))
    for block in _blocks(call, chunk):
        for name, value in block.heads.items():
            heads[name].add_(block.rows, value)
        for cols, c, x in block.gradient:
            de.add_(block.rows, x.matmul(c))
            dc.add_(cols, x.transpose().matmul(block.e))
            dbias.add_(cols, x.sum(0))
    loss = heads["loss"]
    value = loss if objective.reduction == "none" else loss.sum(0) / call.denominator
    result = {**heads, "value": value, "dE": de, "dC": dc, "dbias": dbias}
    result = {name: enclosure.inflated() for name, enclosure in result.items()}
    radius = Quantities(**{name: enclosure.radius for name, enclosure in result.items()})
    return Truth(**{name: enclosure.value for name, enclosure in result.items()}, radius=radius)


def fp64_magnitudes(
    problem: Problem, objective: Objective, device: torch.device, chunk: tuple[int, int] | None = None
) -> Magnitudes:
    """Sums of absolute terms; see `references.magnitudes`."""
    de, dc, dbias = (
        torch.zeros(shape, dtype=torch.float64, device=device)
        for shape in ((problem.n, problem.d), (problem.v, problem.d), (problem.v,))
    )
    for block in _blocks(_Call(problem, objective, device), chunk):
        for cols, c, x in block.gradient:
            size = x.value.abs()
            de[block.rows] += size @ c.abs()
            dc[cols] += size.T @ block.e.abs()
            dbias[cols] += size.sum(0)
    return Magnitudes(de, dc, dbias)
