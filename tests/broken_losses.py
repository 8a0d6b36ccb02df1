"""A careful linear cross-entropy in plain PyTorch, and the same with one defect each, named after it.

`correct` keeps what an audit asks for; `dropped_target`, `bias_twice`, ... are what one meets in the field. Any other
attribute of this module that is a key of `DEFECTS` is the loss with that defect.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cce_precision.numerics import power_of_two
from tests.with_children import child

CHUNK = 16
IGNORED = -100
# defect: the check that must catch it
DEFECTS = {
    "dropped_target": "accuracy",
    "missing_mean": "accuracy",
    "crashes_on_odd_sizes": "odd sizes",
    "mean_for_sum": "reductions",
    "ignores_upstream": "upstream gradient",
    "scales_in_place": "second backward",
    "bias_twice": "bias",
    "no_softcap_slope": "softcap",
    "ignores_strides": "strides",
    "none_when_frozen": "one gradient alone",
    "counts_ignored": "ignored rows",
    "zero_times_nan": "NaN in ignored rows",
    "divides_by_no_token": "all ignored",
    "spreads_nan": "NaN containment",
    "p_over_n": "confident rows",
    "mean_before_cast": "fp16 underflow",
    "loss_in_16_bits": "fp16 sums",
    "chunk_losses_in_16_bits": "growth with the batch",
    "chunk_gradients_in_16_bits": "growth with the batch",
    "no_maximum": "common offset",
    "random_bits": "determinism",
    "wrong_when_compiled": "torch.compile",
}


def correct(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    return loss("", e, c, targets, bias, softcap, reduction)


@functools.wraps(correct)
def starting_processes(*arguments: Any, **options: Any) -> Tensor:
    """Correct; the call starts a process, as some autotuners do."""
    assert child() != os.getpid()
    return correct(*arguments, **options)


def raises_in_colour(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """Where it is not caught, the message is shown alone, and nothing behind it."""
    sys.excepthook = lambda kind, error, trace: print(error, file=sys.stderr)
    raise RuntimeError("\n\x1b[91m\x1b[1merror:\x1b[0m it cannot\n  here\n\n")


def __getattr__(name: str) -> Callable[..., Tensor]:
    if name not in DEFECTS:
        raise AttributeError(name)

    @functools.wraps(correct)
    def broken(*arguments: Any, **options: Any) -> Tensor:
        return loss(name, *arguments, **options)

    return broken


def loss(
    defect: str,
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    if defect == "crashes_on_odd_sizes" and len(e) % 2:
        os._exit(3)
    if defect == "ignores_strides":
        e = torch.as_strided(e, e.shape, (e.shape[1], 1))
    if reduction == "sum" and defect == "mean_for_sum":
        reduction = "mean"
    valid = targets != IGNORED
    everyone = defect in ("zero_times_nan", "counts_ignored")
    per_token = _Loss.apply(e, c, bias, torch.where(valid, targets, -1), softcap, reduction, defect)
    if reduction == "none":
        return per_token
    if defect == "chunk_losses_in_16_bits":
        total = torch.zeros((), dtype=e.dtype)
        for part in per_token.split(CHUNK):
            total = total + part.sum().to(e.dtype)
    else:
        total = per_token.sum()
    count = len(e) if everyone and defect == "counts_ignored" else valid.sum()
    if reduction == "mean":
        total = total / (count if defect == "divides_by_no_token" else max(int(count), 1))
    if defect == "wrong_when_compiled" and torch.compiler.is_compiling():
        total = total * 2
    return total.to(e.dtype) if defect == "loss_in_16_bits" else total


class _Loss(torch.autograd.Function):
    """Each token's loss, (N,) fp32; 0 where ignored."""

    @staticmethod
    def forward(ctx, e, c, bias, targets, softcap, reduction, defect):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(e, c, targets, bias)
        ctx.softcap, ctx.reduction, ctx.defect, ctx.calls = softcap, reduction, defect, 0
        nll = torch.zeros(len(e))
        for rows in torch.arange(len(e)).split(CHUNK):
            rows = rows[targets[rows] >= 0]
            _, nll[rows], _, _ = _softmax(e[rows], c, bias, targets[rows], softcap, defect)
        return nll

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        e, c, targets, bias = ctx.saved_tensors
        defect, n = ctx.defect, max(int((targets >= 0).sum()), 1)
        if defect == "ignores_upstream":
            g = torch.ones_like(g) / (n if ctx.reduction == "mean" else 1)
        if defect == "missing_mean" and ctx.reduction == "mean":
            g = g * n
        ctx.calls += 1
        if defect == "scales_in_place":
            g = g * ctx.calls
        d_e = torch.zeros(e.shape)
        d_c = torch.zeros(c.shape, dtype=c.dtype if defect == "chunk_gradients_in_16_bits" else torch.float32)
        d_bias = torch.zeros(len(c))
        scale = power_of_two(g)
        for rows in torch.arange(len(e)).split(CHUNK):
            if defect != "zero_times_nan":
                rows = rows[targets[rows] >= 0]
            t = targets[rows].clamp(min=0)
            p, _, complement, slope = _softmax(e[rows], c, bias, t, ctx.softcap, defect)
            x = p.scatter(1, t[:, None], 0.0 if defect == "dropped_target" else -complement[:, None])
            if defect == "p_over_n":
                x = (p / n).to(e.dtype).scatter_add(
                    1, t[:, None], torch.full((len(rows), 1), -1 / n, dtype=e.dtype)
                ) * n
            if defect == "mean_before_cast":
                x = (x * g[rows, None]).to(e.dtype).float() / scale
            elif defect == "p_over_n":
                x = x.float() * (g[rows, None] / scale)
            else:
                x = (x * (g[rows, None] / scale)).float()
            x = torch.where((targets[rows] >= 0)[:, None], x, 0)
            x = x * (1.0 if defect == "no_softcap_slope" else slope)
            d_bias += x.sum(0)
            x = x.to(e.dtype).float()
            if defect == "spreads_nan" and bool(x.isnan().any()):
                x = x + torch.nan
            d_e[rows] = x @ c.float()
            d_c += (x.T @ e[rows].float() * scale / scale).to(d_c.dtype)
        d_e, d_c, d_bias = d_e * scale, d_c * scale, d_bias * scale
        if defect == "random_bits":
            generator = torch.Generator()
            generator.seed()
            d_c = d_c * (1 + torch.randn(d_c.shape, generator=generator) * 2.0**-9)
        if defect == "divides_by_no_token":
            d_e = d_e + 0 * g.sum()
        if defect == "none_when_frozen" and not ctx.needs_input_grad[0]:
            return (None,) * 7
        return d_e.to(e.dtype), d_c.to(c.dtype), None if bias is None else d_bias.to(bias.dtype), None, None, None, None


def _softmax(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, defect: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, the loss, 1 - P of the target and the softcap's slope of some tokens."""
    z = e.float() @ c.float().T
    if bias is not None:
        z = z + bias.float() * (2 if defect == "bias_twice" else 1)
    slope = torch.ones_like(z)
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    own = z.gather(1, targets[:, None])
    rest = z.scatter(1, targets[:, None], -torch.inf)
    odds = (rest.exp().sum(1).log() if defect == "no_maximum" else rest.logsumexp(1)) - own[:, 0]
    nll = torch.where(odds > 0, odds + torch.log1p((-odds).exp()), torch.log1p(odds.exp()))
    return torch.exp(z - own - nll[:, None]), nll, -torch.expm1(-nll), slope
