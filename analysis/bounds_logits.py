"""Bounds of the forward passes: logits, softmax and the four heads, for the tiled passes and for stored logits.

All of it is dense in the rows that it is given: some rows times V in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cce_precision.analysis.bounds_model import (
    LARGEST_EXPONENT,
    Computed,
    Machine,
    Precision,
    half_ulp,
    inexact_additions,
    largest,
    significand_bits,
)
from cce_precision.analysis.bounds_softmax import NEGLIGIBLE, Blocks, Exact, Softmax, certain, complement_of, slope_of
from cce_precision.analysis.bounds_tensor_core import chain
from cce_precision.analysis.budget_stages import ALL_STAGES, Stage, Stages, stage_dtype
from cce_precision.problem import Problem

__all__ = ["flushed", "plain_softmax", "precision", "products", "tiled_softmax"]

NOTHING_LEFT = 1e4  # stands for an infinite gap between the target's logit and the others
CLOSE_LOOK = 2**21  # products of a block of logits whose bits are looked at one by one


def precision(problem: Problem, machine: Machine, stage: Stage = Stage.DZ, stages: Stages = ALL_STAGES) -> Precision:
    """How a stage rounds; one that is not among `stages` is exact, which is to say fp64."""
    return Precision(
        stage_dtype(stages, stage, problem.compute_dtype), machine.accuracy, machine.roundings, machine.flushes
    )


def products(
    problem: Problem, e: Tensor, c: Tensor, machine: Machine, stages: Stages, in_order: bool = False
) -> Computed:
    """(B, V) e c^T with fp32 (fp64) accumulation; e (B, D), c (V, D) fp64. `in_order`: feature by feature."""
    p = precision(problem, machine, Stage.LOGITS, stages)
    value, absolute = e @ c.T, e.abs() @ c.abs().T
    bits = (significand_bits(problem.e.dtype), significand_bits(problem.c.dtype))
    exact, inexact = sum(bits) <= significand_bits(p.dtype), None
    close = value.numel() * problem.d <= CLOSE_LOOK
    if close and in_order and p.dtype == torch.float32:
        return Computed(value, chain(e, c, machine, problem.operand_dtype))
    if exact and not machine.block and close:
        most = (absolute + value.abs()) / 2 * (1 + problem.d * p.u)
        inexact = inexact_additions(e, c, bits, most, p.dtype)
    operand = stage_dtype(stages, Stage.LOGITS, problem.operand_dtype)
    error = machine.products(p, problem.d, absolute, value.abs(), operand, exact, inexact, largest(e, c))
    return Computed(value, error)


def flushed(left: Computed, right: Tensor, operand: torch.dtype, machine: Machine) -> Tensor:
    """(A, B) what subnormal numbers cost PyTorch's own product of left (A, K) and the exact right (B, K), both fp64.

    An instruction of some CPUs that multiplies bf16 (VDPBF16PS) takes a subnormal operand or result for 0.
    """
    if machine.block or operand != torch.bfloat16:
        return torch.zeros((), dtype=torch.float64, device=right.device)
    least, size = torch.finfo(operand).smallest_normal, right.abs()
    small = torch.where(left.value.abs() - left.error < least, left.upper.clamp(max=least), 0.0)
    lost = small @ size.T + left.upper @ torch.where(size < least, size, 0.0).T
    lost = lost + torch.where(left.upper @ size.T > 0, 2 * right.shape[1] * least, 0.0)  # each product and each sum
    return lost.nan_to_num(nan=math.inf, posinf=math.inf)


def _capped(y: Computed, softcap: float, p: Precision, stored: torch.dtype) -> tuple[Computed, Computed]:
    """tanh(y / softcap) and softcap times it, each step rounded to `stored`; errors by the steepest slope nearby."""
    x = y.value / softcap
    ratio = Computed(x, y.error / softcap).rounded(p, 3)
    if stored != p.dtype:
        ratio = ratio.stored(stored)
    ratio = certain(ratio)
    t = torch.tanh(x)
    slope = 1 / torch.cosh(x.clamp(-350, 350)) ** 2
    steepest = (slope + 0.77 * ratio.error).clamp(max=1.0)  # |tanh''| <= 4 / (3 sqrt 3)
    # tanh saturates: no error exceeds 2
    tanh = Computed(t, (steepest * ratio.error).clamp(max=2.0) + p.function * t.abs() + p.tiny)
    if stored != p.dtype:
        tanh = tanh.stored(stored)
    cap = Computed(t * softcap, tanh.error * softcap).rounded(p, 2)
    return tanh, cap if stored == p.dtype else cap.stored(stored)


def tiled_logits(
    problem: Problem, e: Tensor, c: Tensor, bias: Tensor | None, machine: Machine, stages: Stages
) -> tuple[Computed, Computed | None, Computed | None]:
    """Logits (B, V), slope and tanh, as the tiled passes form them. e (B, D), c (V, D), bias (V,), all fp64."""
    p = precision(problem, machine, Stage.LOGITS, stages)
    y = products(problem, e, c, machine, stages)
    if bias is not None:
        y = certain(Computed(y.value + bias, y.error).rounded(p))
    slope = tanh = None
    if problem.softcap is not None:
        x = y.value / problem.softcap
        tanh, y = _capped(y, problem.softcap, p, p.dtype)
        slope = slope_of(x, tanh, p)
    if problem.temperature != 1.0:
        y = certain(Computed(y.value / problem.temperature, y.error / problem.temperature).rounded(p, 3))
    return y, slope, tanh


def tiled_softmax(
    problem: Problem,
    e: Tensor,  # (B, D) fp64
    c: Tensor,  # (V, D) fp64
    bias: Tensor | None,  # (V,) fp64
    targets: Tensor,  # (B,)
    weight: Tensor,  # (V,) fp64 column weights
    machine: Machine,
    blocks: Blocks,  # of the forward pass
    stages: Stages = ALL_STAGES,
) -> Softmax:
    """The heads of the tiled forward pass (`eager/forward.py`) and the softmax of its backward pass."""
    p = precision(problem, machine, Stage.SOFTMAX, stages)
    z, slope, tanh = tiled_logits(problem, e, c, bias, machine, stages)
    x = Exact.of(z, targets)
    depth, t = machine.sum_depth(blocks.width), blocks.count
    # The sum over the other columns: the arguments' roundings add up to u (m - z_j), however many rescalings; each
    # rescaling costs an exp, a product and a sum.
    exp = math.ceil(2 * machine.ulps)
    steps = depth + exp + (exp + 3) * (t - 1)
    rho = _relative(x.rest_max, x.q, x, p, steps)
    log_s = torch.log(x.rest_sum.clamp(min=1.0)) + 2 * x.delta.amax(1) + rho
    rest = torch.where(x.rest_sum > 0, x.rest_max + torch.log(x.rest_sum), 0.0)
    moved = Exact.moved(x.q, x.delta)
    arithmetic = rho + p.function * log_s
    arithmetic = arithmetic + p.roundings * half_ulp(rest.abs() + moved + arithmetic, p.dtype)
    arithmetic = torch.where(x.rest_sum > 0, arithmetic, 0.0)
    # nll = softplus(rest - z_t), which is convex with slope 1 - P_t.
    gap = torch.where((x.rest_sum > 0) & x.z_t.isfinite(), rest - x.z_t, -NOTHING_LEFT)
    moved_gap = moved + arithmetic + x.delta_t
    gap_rounding = p.roundings * half_ulp(gap.abs() + moved_gap, p.dtype)
    moved_gap = moved_gap + gap_rounding
    off = (x.complement * torch.exp(moved_gap.clamp(max=LARGEST_EXPONENT))).clamp(max=1.0) * moved_gap
    # The tail log1p(exp(-|gap|)) of both costs an exp and a log1p; its derivative with respect to |gap| is at most
    # exp(-|gap|).
    tail = torch.log1p(torch.exp((moved_gap - gap.abs()).clamp(max=0.0)))
    functions = 2 * p.function * (1 + p.function) * tail + 2 * p.tiny
    off = off + functions
    nll = certain(Computed(x.nll, off + half_ulp(x.nll + off, p.dtype)))
    off = (x.complement * x.growth * torch.exp(arithmetic)).clamp(max=1.0) * arithmetic
    off = off + functions + gap_rounding * tail
    lse_arithmetic = off + p.roundings * half_ulp(x.lse.abs() + off + Exact.moved(x.p, x.delta), p.dtype)
    lse = Computed(x.lse, Exact.moved(x.p, x.delta) + lse_arithmetic)

    tau = x.raw + lse.error[:, None]
    tau = tau + p.roundings * p.u * (x.log_p.abs() + tau)
    probability = x.probability(tau, p)
    return Softmax(
        z,
        slope,
        tanh,
        Computed(x.log_p, torch.where(x.log_p > NEGLIGIBLE, tau, 0.0)),
        probability,
        probability,
        nll,
        lse,
        complement_of(nll, p),
        _tiled_entropy(x, p, steps + 3 * (t - 1)),  # a block adds two products and a sum to A
        _tiled_smooth(x, p, weight, lse_arithmetic, machine, blocks),
    )


def _relative(largest: Tensor, weights: Tensor, x: Exact, p: Precision, steps: int) -> Tensor:
    """(B,) relative error of sum exp(z - largest) with softmax `weights`, for computed logits."""
    distance = torch.where(weights > 0, largest[:, None] - x.z, 0.0) + 2 * x.delta.amax(1)[:, None]
    rho = p.u * (p.roundings * (weights * distance).sum(1) + steps) + x.z.shape[1] * p.tiny
    return rho / (1 - rho).clamp(min=2.0**-20)


def _tiled_entropy(x: Exact, p: Precision, steps: int) -> Computed:
    """Entropy as log(total) + A / total, A = sum exp(z - m) (m - z): all terms non-negative, so all errors relative."""
    m = x.z.amax(1)
    distance = torch.where(x.p > 0, m[:, None] - x.z, 0.0) + 2 * x.delta.amax(1)[:, None]
    mean = (x.p * distance).sum(1)  # A / total
    total = _relative(m, x.p, x, p, steps + 4)
    a = p.u * (p.roundings * (x.p * distance**2).sum(1) + (steps + 8) * mean) + total * mean
    log_total = x.lse - m + 2 * x.delta.amax(1) + total
    error = x.entropy_moved() + (a + total) * (1 + total) + p.function * log_total
    return Computed(x.entropy, error + 2 * p.u * (x.entropy + error))


def _tiled_smooth(
    x: Exact, p: Precision, weight: Tensor, lse_arithmetic: Tensor, machine: Machine, blocks: Blocks
) -> Computed:
    """W (lse - o) - sum_j w_j (z_j - o) with o the largest logit of the first block."""
    offset = x.z[:, : blocks.width].amax(1).nan_to_num(neginf=0.0)
    delta = x.raw.amax(1)
    value = (weight * (x.lse[:, None] - x.z)).sum(1)
    spread = weight.abs() * ((x.z - offset[:, None]).abs() + 2 * delta[:, None])
    in_block = machine.sum_depth(blocks.width) if bool((weight == 1).all()) else blocks.width
    absolute = weight.abs().sum()
    distance = (x.lse - offset).abs() + lse_arithmetic + 2 * delta
    error = x.smooth_moved(weight) + p.u * (in_block + blocks.count + 3) * spread.sum(1)
    error = error + absolute * (lse_arithmetic + p.u * (4 + machine.sum_depth(len(weight))) * distance)
    return Computed(value, torch.where(value.isfinite(), error + p.u * (value.abs() + error), 0.0))


def plain_softmax(
    problem: Problem,
    e: Tensor,  # (B, D) fp64
    c: Tensor,  # (V, D) fp64
    bias: Tensor | None,  # (V,) fp64
    targets: Tensor,  # (B,)
    weight: Tensor,  # (V,) fp64 column weights
    machine: Machine,
    stages: Stages = ALL_STAGES,
) -> Softmax:
    """The heads and the softmax of `eager/plain.py`: logits stored in the common dtype, then PyTorch's operations."""
    p = precision(problem, machine, Stage.LOGITS, stages)
    stored = stage_dtype(stages, Stage.LOGITS, problem.operand_dtype)
    y = products(problem, e, c, machine, stages)
    y = Computed(y.value, y.error + flushed(Computed.exact(e), c, stored, machine)).stored(stored)
    if bias is not None:
        b = Computed.exact(bias)
        assert problem.bias is not None
        b = b if _holds(stored, problem.bias.dtype) else b.stored(stored)
        y = certain((y + b).rounded(p).stored(stored))
    slope = tanh = None
    if problem.softcap is not None:
        x = y.value / problem.softcap
        tanh, y = _capped(y, problem.softcap, p, stored)
        slope = slope_of(x, tanh, p)
    if problem.temperature != 1.0:
        y = certain(Computed(y.value / problem.temperature, y.error / problem.temperature).rounded(p, 3))
    z = Exact.of(y, targets)

    p = precision(problem, machine, Stage.SOFTMAX, stages)
    m = z.z.amax(1)
    steps = machine.sum_depth(problem.v) + 8
    rho = _relative(m, z.p, z, p, steps)
    moved, delta = Exact.moved(z.p, z.delta), z.delta.amax(1)
    log_s = z.lse - m + 2 * delta + rho
    tail = rho + p.function * log_s
    # log_softmax subtracts the maximum first; the heads' log-probabilities are off by `own` beyond the logits' errors.
    own = tail[:, None] + 3 * p.u * (z.log_p.abs() + z.raw + 2 * delta[:, None])
    tau = z.raw + moved[:, None] + own
    at_target = lambda t: t.gather(1, targets[:, None])[:, 0]  # noqa: E731
    correlated = z.growth * z.complement * ((z.q * z.delta).sum(1) + z.delta_t)
    nll = certain(Computed(z.nll, torch.minimum(correlated, moved + z.delta_t) + at_target(own) + p.tiny))
    lse_arithmetic = tail + p.u * (z.lse.abs() + moved + tail)
    lse = Computed(z.lse, moved + lse_arithmetic)
    in_lse = z.raw + lse.error[:, None]
    in_lse = in_lse + p.u * (z.log_p.abs() + in_lse)

    log_p = z.log_p.abs()
    entropy = (z.p * ((log_p + 1) * own + (machine.sum_depth(problem.v) + 4 + 2 * machine.ulps) * p.u * log_p)).sum(1)
    entropy = z.growth * entropy * torch.exp(own.amax(1).clamp(max=1.0)) + z.entropy_moved()
    gaps = weight.abs() * (z.lse[:, None] - z.z).abs()
    depth = machine.sum_depth(problem.v) if bool((weight == 1).all()) else problem.v
    smooth_value = (weight * (z.lse[:, None] - z.z)).sum(1)
    own = lse_arithmetic + (depth + 2) * p.u * (moved + z.raw.amax(1))
    smooth = z.smooth_moved(weight) + weight.abs().sum() * own + (depth + 2) * p.u * gaps.sum(1)
    return Softmax(
        y,
        slope,
        tanh,
        Computed(z.log_p, torch.where(z.log_p > NEGLIGIBLE, tau, 0.0)),
        z.probability(tau, p),
        z.probability(in_lse, p),
        nll,
        lse,
        complement_of(nll, p),
        Computed(z.entropy, entropy + p.u * z.entropy),
        Computed(smooth_value, torch.where(smooth_value.isfinite(), smooth, 0.0)),
    )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype
