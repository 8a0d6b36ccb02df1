"""The error of a live model's head gradients: the operands that its loss sees, the method's dE and dC, and fp64.

The head's input is caught where the model calls its head, so any model will do whose logits are softcap(e c^T + bias);
`head_of` checks that on the model's own logits, and refuses where they are anything else (a logit scale, say).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_precision import linear_cross_entropy
from cce_precision.analysis import sampled
from cce_precision.analysis.train_models import Method

__all__ = ["Head", "head_gradient_errors", "head_of", "relative_errors"]

IGNORED = -100


class Head(NamedTuple):
    """What the loss of a batch is made of: e (N, D), c (V, D), bias (V,) or None, targets (N,), softcap or None."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None


class _Caught(Exception):
    """Ends a forward pass at the head."""


@torch.no_grad()
def head_of(model: nn.Module, ids: Tensor) -> Head:
    """The head's operands on token ids (windows, context), each token's target the next; no gradient.

    Raises ValueError where the model's logits are not softcap(e c^T + bias).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    held: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        held.append(inputs[0].detach())
        raise _Caught

    hook = head.register_forward_pre_hook(catch)
    try:
        with contextlib.suppress(_Caught):  # the hook's own
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    bias = None if head.bias is None else head.bias.detach()
    return Head(held[0].flatten(0, 1), head.weight.detach(), bias, targets.flatten(), softcap)


@torch.no_grad()
def check_head(model: nn.Module, ids: Tensor) -> None:
    """Raises ValueError where the model's logits on ids (1, tokens) are not those of `head_of`'s operands."""
    h = head_of(model, ids)
    z = F.linear(h.e.float(), h.c.float(), None if h.bias is None else h.bias.float())
    if h.softcap is not None:
        z = h.softcap * torch.tanh(z / h.softcap)
    own = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    # A scale other than 1 moves logits by far more than the roundings of 16-bit logits: a few unit round-offs of bf16.
    if not (z - own).norm() <= 2.0**-5 * own.norm():
        raise ValueError(
            f"{type(model).__name__}'s logits are not softcap(e c^T + bias), so its head's gradients cannot be "
            "measured; leave gradient_every at 0"
        )


def _gradients(head: Head, method: Method, seed: int) -> tuple[Tensor, Tensor]:
    """(dE, dC) of the mean loss as the method computes them, in the dtypes of e and c."""
    e, c = head.e.detach().requires_grad_(), head.c.detach().requires_grad_()
    if method.variant is not None:
        loss = linear_cross_entropy(e, c, head.targets, head.bias, softcap=head.softcap, impl=method.variant, seed=seed)
    else:
        z = F.linear(e, c, head.bias).float()
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        loss = F.cross_entropy(z, head.targets, ignore_index=IGNORED)
    assert isinstance(loss, Tensor)
    dE, dC = torch.autograd.grad(loss, (e, c))
    return dE, dC


def head_gradient_errors(
    model: nn.Module,
    ids: Tensor,
    method: Method,
    *,
    autocast: Callable[[], torch.autocast],
    seed: int,
) -> dict[str, float]:
    """Relative errors (norm) of dE and dC on token ids (windows, context), each with its 95 % interval.

    `autocast()`: the precision of the training step. A method whose head is in fp32 keeps fp32 operands.
    Raises ValueError as `head_of`.
    """
    training = model.training
    model.eval()
    with autocast() as cast:
        check_head(model, ids[:1, : min(8, ids.shape[1])])
        head = head_of(model, ids)
        enabled, dtype = torch.is_autocast_enabled(ids.device.type), torch.get_autocast_dtype(ids.device.type)
    del cast
    model.train(training)
    if enabled and not method.fp32:
        bias = None if head.bias is None else head.bias.to(dtype)
        head = head._replace(e=head.e.to(dtype), c=head.c.to(dtype), bias=bias)
    dE, dC = _gradients(head, method, seed)
    return relative_errors(head, dE, dC, seed)


def relative_errors(head: Head, dE: Tensor, dC: Tensor, seed: int) -> dict[str, float]:
    """Relative errors of gradients of the mean loss against fp64, from 256 rows of each, with 95 % intervals."""
    found = sampled.measure(
        head.e, head.c, head.targets, dE=dE, dC=dC, bias=head.bias, softcap=head.softcap, seed=seed, lse="fp64"
    )
    numbers: dict[str, float] = {}
    for name, one in (("dE", found.dE), ("dC", found.dC)):
        assert one is not None
        numbers |= {name: one.rel.value, f"{name}_low": one.rel.low, f"{name}_high": one.rel.high}
    return numbers
