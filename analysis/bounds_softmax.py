"""The exact softmax of some rows, how far errors of its logits can move it, and what a pass makes of it.

What the bounds of all forward passes share (`bounds_logits`, `bounds_kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cce_precision.analysis.bounds_model import LARGEST_EXPONENT, Computed, Precision

__all__ = ["NEGLIGIBLE", "Blocks", "Exact", "Softmax", "certain", "complement_of", "slope_of"]

NEGLIGIBLE = -1024.0  # log P below which a term counts as 0
HOPELESS = 300.0  # logits with larger errors say nothing of the softmax


@dataclass(frozen=True)
class Blocks:
    """How a tiled pass cuts the logits: the columns of a block and the number of blocks in a row."""

    width: int
    count: int


@dataclass(frozen=True, eq=False)
class Softmax:
    """Some rows of the exact softmax and of the errors of what a pass computes for it; (B, V) or (B,)."""

    z: Computed  # (B, V) logits
    slope: Computed | None  # (B, V) of the softcap
    tanh: Computed | None  # (B, V) of the softcap's argument
    log_p: Computed  # (B, V) the exponent of P, as the backward pass forms it; not below NEGLIGIBLE
    p: Computed  # (B, V)
    p_lse: Computed  # (B, V) the softmax that the gradient of lse uses: p, but for stored logits
    nll: Computed  # (B,)
    lse: Computed  # (B,)
    complement: Computed  # (B,) 1 - P_t
    entropy: Computed  # (B,)
    smooth: Computed  # (B,)


def certain(x: Computed) -> Computed:
    """Infinite values have no error: masked columns, whose logits are exactly -inf."""
    return Computed(x.value, torch.where(x.value.isinf(), 0.0, x.error))


def slope_of(x: Tensor, tanh: Computed, p: Precision) -> Computed:
    """1 - tanh^2; x is the exact argument."""
    value = 1 / torch.cosh(x.clamp(-350, 350)) ** 2
    error = tanh.error * (2 * tanh.value.abs() + tanh.error) + 2 * p.u * (tanh.upper**2 + value)
    return Computed(value, error)


@dataclass(frozen=True, eq=False)
class Exact:
    """The exact softmax of some rows with logits z, and how far logit errors can move it."""

    z: Tensor  # (B, V)
    raw: Tensor  # (B, V) errors of the logits; infinite in rows where they leave nothing to say
    delta: Tensor  # (B, V) the same, 0 where P underflows even in fp64, because that moves nothing but the nll
    target: Tensor  # (B, 1)
    is_target: Tensor  # (B, V)
    rest_max: Tensor  # (B,) over the columns but the target
    rest_sum: Tensor  # (B,) sum exp(z - rest_max) over them
    q: Tensor  # (B, V) softmax over them, 0 at the target
    nll: Tensor
    lse: Tensor
    p: Tensor  # (B, V)
    log_p: Tensor  # (B, V)
    complement: Tensor  # (B,) 1 - P_t
    entropy: Tensor
    growth: Tensor  # (B,) exp(2 max delta): how far P can move, relatively

    @staticmethod
    def of(z: Computed, targets: Tensor) -> Exact:
        value, target = z.value, targets[:, None]
        is_target = torch.zeros_like(value, dtype=torch.bool).scatter_(1, target, True)
        others = value.masked_fill(is_target, -torch.inf)
        rest_max = others.amax(1)
        reference = torch.where(rest_max.isinf(), 0.0, rest_max)
        terms = torch.exp(others - reference[:, None])
        rest_sum = terms.sum(1)
        z_t = value.gather(1, target)[:, 0]
        gap = reference + torch.log(rest_sum) - z_t
        tail = torch.log1p(torch.exp(-gap.abs()))
        nll = gap.clamp(min=0) + tail
        # the largest and a log1p: what lies near 0 keeps its digits, and a filter leaves errors in proportion to it
        largest, index = value.max(1, keepdim=True)
        distance = value - torch.where(largest.isinf(), 0.0, largest)
        lse = largest[:, 0] + torch.log1p(torch.exp(distance.scatter(1, index, -torch.inf)).sum(1))
        complement = -torch.expm1(-nll)
        q = torch.where(rest_sum[:, None] > 0, terms / rest_sum[:, None], 0.0)
        p_t = torch.exp(-nll)
        p = torch.where(is_target, p_t[:, None], q * complement[:, None])
        log_p = torch.where(is_target, -nll[:, None], value - lse[:, None]).clamp(min=NEGLIGIBLE)
        entropy = -(p * log_p).sum(1)
        hopeless = (z.error > HOPELESS).any(1, keepdim=True)
        delta = torch.where(hopeless, torch.inf, torch.where(p > 0, z.error, 0.0))
        growth = torch.exp(2 * delta.amax(1))
        return Exact(
            value,
            torch.where(hopeless, torch.inf, z.error),
            delta,
            target,
            is_target,
            rest_max,
            rest_sum,
            q,
            nll,
            lse,
            p,
            log_p,
            complement,
            entropy,
            growth,
        )

    @property
    def z_t(self) -> Tensor:
        return self.z.gather(1, self.target)[:, 0]

    @property
    def delta_t(self) -> Tensor:
        """(B,) error of the target's logit, which moves the nll however small P_t is."""
        return self.raw.gather(1, self.target)[:, 0]

    @staticmethod
    def moved(weights: Tensor, delta: Tensor) -> Tensor:
        """(B,) log sum_j w_j exp(delta_j): the change of a log-sum-exp with softmax w."""
        return torch.log1p((weights * torch.expm1(delta)).sum(1))

    def log_p_moved(self) -> Tensor:
        """(B, V) change of log P_j: most where z_j falls by its error and the others rise by theirs, then by
        log(P_j + sum_{k != j} P_k exp(delta_k + delta_j)).
        """
        own, others = torch.expm1(self.raw), self.p * torch.expm1(self.delta)
        total = others.sum(1, keepdim=True)
        rest = torch.maximum(total - others, total * 2.0**-50)  # not less for the rounding of a difference in fp64
        return torch.log1p(own * (1 - self.p).clamp(min=2.0**-50) + (1 + own) * rest)

    def entropy_moved(self) -> Tensor:
        """(B,) change of the entropy: |dH/dz_j| = P_j |log P_j + H| along the way, where P stays within `growth`."""
        relative = self.growth - 1
        spread = self.p * (self.log_p + self.entropy[:, None]).abs()
        weighted = (self.p * self.delta).sum(1)
        first = (spread * self.delta).sum(1) + relative * spread.sum(1) * weighted
        return self.growth * (first + (self.p * self.delta**2).sum(1))

    def smooth_moved(self, weight: Tensor) -> Tensor:
        """(B,) change of the smooth head: its derivative is sum(w) P_j - w_j."""
        total = weight.sum()
        moved = (total * self.p - weight).abs() + total.abs() * self.p * (self.growth - 1)[:, None]
        return (moved * self.raw).sum(1)

    def probability(self, tau: Tensor, p: Precision) -> Computed:
        """P from an exponent that is off by tau (B, V)."""
        return Computed(self.log_p, tau).exp(p)


def complement_of(nll: Computed, p: Precision) -> Computed:
    """1 - P_t = -expm1(-nll)."""
    value = -torch.expm1(-nll.value)
    moved = torch.minimum(torch.exp(-nll.value) * torch.expm1(nll.error.clamp(max=LARGEST_EXPONENT)), 1 + 0 * value)
    return Computed(value, moved + p.function * (value + moved) + torch.where(value > 0, p.tiny, 0.0))
