"""The passes as `torch.library` operators, differentiable once, for all tiled variants.

The plan (variant and scalars) travels as a string, so that `torch.compile` sees constants and the operators stay opaque
to it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import eager, kernels
from .problem import Heads, Plan, Problem, Statistics, Upstream

__all__ = ["backward_of", "choose_backend", "forward_of", "occupancy_of", "statistics_of"]


def _problem(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor | None, plan: Plan) -> Problem:
    return Problem(e, c, targets, bias, weight, plan.softcap, plan.temperature, plan.first_column)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"cce_precision runs in plain PyTorch: {reason}", stacklevel=2)


def choose_backend(problem: Problem, plan: Plan) -> str:
    """ "triton" or "eager". Raises ValueError where backend="triton" was demanded and cannot run this call, with the
    reason."""
    if plan.backend == "eager":
        return "eager"
    reason = kernels.supports(problem, plan)
    if reason is None:
        return "triton"
    if plan.backend == "triton":
        raise ValueError(f"backend='triton' cannot run this call: {reason}; use backend='eager' or 'auto'")
    if problem.e.device.type == "cuda":
        _say_once(reason)
    return "eager"


def _left_by_one_pass(problem: Problem, plan: Plan) -> tuple[Tensor, ...] | None:
    """What the forward pass leaves where it computes the gradients too, in the workspace that the caller allows, as
    tensors without values; None where it does not.
    """
    if plan.one_pass is None or choose_backend(problem, plan) != "triton":
        return None
    return kernels.one_pass_shapes(problem, plan)


def _record_shape(problem: Problem, plan: Plan) -> tuple[int, int]:
    return kernels.record_shape(problem, plan) if choose_backend(problem, plan) == "triton" else (0, 0)


LEFT = 5  # tensors that a forward pass in one leaves


# Returns the heads, a record for the backward pass (or empty), and where the forward pass computes gradients too, what
# `_finished` makes them of (else empty).
@torch.library.custom_op("cce_precision::forward", mutates_args=())
def _forward(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, weight: Tensor | None, seed: Tensor, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decoded = Plan.decode(plan)
    problem = _problem(e, c, bias, targets, weight, decoded)
    left: Sequence[Tensor] = [e.new_empty(0) for _ in range(LEFT)]
    record = torch.zeros(0, 0, dtype=torch.int32, device=e.device)
    with torch.autocast(e.device.type, enabled=False):  # the passes choose the dtype of every product themselves
        if _left_by_one_pass(problem, decoded) is not None:
            heads, left = kernels.forward_one_pass(problem, decoded)
        elif choose_backend(problem, decoded) == "triton":
            heads, record = kernels.forward(problem, decoded, seed)
        else:
            heads = eager.forward(problem, decoded)
    return (*heads, record, *left)  # type: ignore[return-value]


@_forward.register_fake
def _(e, c, bias, targets, weight, seed, plan):  # type: ignore[no-untyped-def]
    decoded = Plan.decode(plan)
    problem = _problem(e, c, bias, targets, weight, decoded)
    new = lambda wanted, kind=problem.compute_dtype: e.new_empty(problem.n if wanted else 0, dtype=kind)  # noqa: E731
    left = _left_by_one_pass(problem, decoded)
    return (
        new(True),
        new(True),
        new(decoded.want_entropy),
        new(decoded.want_smooth),
        new(decoded.want_argmax, torch.int64),
        e.new_empty(_record_shape(problem, decoded), dtype=torch.int32),
        *([e.new_empty(0) for _ in range(LEFT)] if left is None else left),
    )


@torch.library.custom_op("cce_precision::backward", mutates_args=())
def _backward(
    upstream: Sequence[Tensor],  # of nll, lse, entropy, smooth; empty where a head has none
    heads: Sequence[Tensor],  # nll, lse, entropy
    record: Tensor,  # of the forward pass
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weight: Tensor | None,
    seed: Tensor,
    plan: str,
    need: Sequence[int],  # of e, c, bias
) -> tuple[Tensor, Tensor, Tensor]:
    decoded = Plan.decode(plan)
    problem = _problem(e, c, bias, targets, weight, decoded)
    empty = e.new_empty(0)
    outputs = Heads(heads[0], heads[1], heads[2], empty, empty)
    given = Upstream(*(g if g.numel() or not problem.n else None for g in upstream))
    wanted = (bool(need[0]), bool(need[1]), bool(need[2]))
    with torch.autocast(e.device.type, enabled=False):
        if choose_backend(problem, decoded) == "triton":
            gradients = kernels.backward(problem, decoded, outputs, given, wanted, seed, record)
        else:
            gradients = eager.backward(problem, decoded, outputs, given, wanted, seed)
    return tuple(e.new_empty(0) if g is None else g for g in gradients)  # type: ignore[return-value]


@_backward.register_fake
def _(upstream, heads, record, e, c, bias, targets, weight, seed, plan, need):  # type: ignore[no-untyped-def]
    decoded = Plan.decode(plan)
    like = lambda x, wanted: x.new_empty(x.shape) if wanted else e.new_empty(0)  # noqa: E731
    d_e = like(e, need[0])
    if decoded.partial_e and need[0]:
        d_e = d_e.to(_problem(e, c, bias, targets, weight, decoded).compute_dtype)
    return d_e, like(c, need[1]), like(bias, need[2] and bias is not None)


@torch.library.custom_op("cce_precision::finished", mutates_args=())
def _finished(
    left: Sequence[Tensor], factor: Tensor, e: Tensor, c: Tensor, targets: Tensor, need: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(dE, dC) of what a forward pass in one left, times the upstream scalar factor[0]; empty where not wanted."""
    wanted = (bool(need[0]), bool(need[1]))
    gradients = kernels.finished(Problem(e, c, targets), left, factor[:1].reshape(()), wanted)
    return tuple(e.new_empty(0) if g is None else g for g in gradients)  # type: ignore[return-value]


@_finished.register_fake
def _(left, factor, e, c, targets, need):  # type: ignore[no-untyped-def]
    like = lambda x, wanted: x.new_empty(x.shape if wanted else 0)  # noqa: E731
    return like(e, need[0]), like(c, need[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    e, c, bias, targets, weight, seed, plan = inputs
    nll, lse, entropy, _, argmax, record, *left = output
    ctx.plan = plan
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax, record, *left)
    ctx.save_for_backward(e, c, bias, targets, weight, seed, nll, lse, entropy, record, *left)


def _differentiate(ctx, *grads):  # type: ignore[no-untyped-def]
    e, c, bias, targets, weight, seed, nll, lse, entropy, record, *left = ctx.saved_tensors
    need = [int(x) for x in ctx.needs_input_grad[:3]]
    if c.dim() != 2:
        raise ValueError(
            "c must have its values in the backward pass too, got a ZeRO-3 shard that DeepSpeed has emptied since the "
            "forward pass: let the module's output be or hold the loss, or keep `with deepspeed.zero."
            "GatheredParameters([c])` open until the backward pass has run"
        )
    if all(g is None for g in grads[:4]):
        return (None,) * 7
    if any(x.numel() for x in left):
        d_e, d_c = torch.ops.cce_precision.finished(left, grads[0], e, c, targets, need[:2])
        return (d_e if need[0] else None, d_c if need[1] else None, None, None, None, None, None)
    upstream = [e.new_empty(0, dtype=nll.dtype) if g is None else g.contiguous() for g in grads[:4]]
    gradients = torch.ops.cce_precision.backward(
        upstream, [nll, lse, entropy], record, e, c, bias, targets, weight, seed, ctx.plan, need
    )
    return (*(g if wanted else None for g, wanted in zip(gradients, need)), None, None, None, None)


def _refuse_second(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "linear_cross_entropy is differentiable once: the gradient of its gradient is not implemented; "
        "use impl='baseline' where second derivatives are needed"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_second)
_finished.register_autograd(_refuse_second)


def forward_of(problem: Problem, plan: Plan, seed: Tensor) -> tuple[Heads, Tensor]:
    """The heads of a tiled variant, differentiable once with respect to e, c and bias; and the record of the forward
    pass, for `occupancy_of`, and for `backward_of` where callers differentiate by themselves.
    """
    outputs = torch.ops.cce_precision.forward(
        problem.e, problem.c, problem.bias, problem.targets, problem.column_weight, seed, plan.encode()
    )
    return Heads(*outputs[:5]), outputs[5]


def backward_of(
    problem: Problem,
    plan: Plan,
    heads: tuple[Tensor, Tensor, Tensor],  # nll, lse, entropy
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    seed: Tensor,
    record: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dE, dC, dbias) of a tiled variant; empty where not needed."""
    gradients = torch.ops.cce_precision.backward(
        [problem.e.new_empty(0, dtype=heads[0].dtype) if g is None else g for g in upstream], list(heads), record,
        problem.e, problem.c, problem.bias, problem.targets, problem.column_weight, seed, plan.encode(),
        [int(x) for x in need],
    )  # fmt: skip
    return gradients


@torch.library.custom_op("cce_precision::occupancy", mutates_args=())
def _occupancy(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, seed: Tensor, record: Tensor, plan: str
) -> Tensor:
    decoded = Plan.decode(plan)
    with torch.autocast(e.device.type, enabled=False):
        return kernels.occupancy(_problem(e, c, bias, targets, None, decoded), decoded, lse, seed, record)


@_occupancy.register_fake
def _(e, c, bias, targets, lse, seed, record, plan):  # type: ignore[no-untyped-def]
    return e.new_empty((), dtype=torch.int64)


@torch.no_grad()
def occupancy_of(
    problem: Problem, plan: Plan, heads: Heads, seed: Tensor, record: Tensor
) -> tuple[Tensor | None, int | None]:
    """(blocks of 16 columns that the filter may keep an entry of, 0-dim int64; how many a sparse backward pass has room
    for); None for both where there is no such pass."""
    capacity = kernels.capacity(problem, plan) if choose_backend(problem, plan) == "triton" else None
    if capacity is None:
        return None, None
    tensors = [None if x is None else x.detach() for x in (problem.e, problem.c, problem.bias)]
    blocks = torch.ops.cce_precision.occupancy(
        *tensors, problem.targets, heads.lse.detach(), seed, record, plan.encode()
    )
    return blocks, capacity


@torch.no_grad()
def statistics_of(problem: Problem, plan: Plan, heads: Heads, seed: Tensor) -> Statistics:
    """What the variant's filter keeps of each row. One more pass over the logits, in plain PyTorch."""
    with torch.autocast(problem.e.device.type, enabled=False):
        return eager.statistics(problem, plan, Heads(*(h.detach() for h in heads)), seed)
