"""The passes as Triton kernels. Importing this costs nothing; Triton is imported by the first call that runs one.

Guarantees: no host synchronisation (a CUDA graph captures both passes), the current device and stream, 64-bit offsets,
every sum in one order: every result is bitwise repeatable. Where a call cannot run, `supports` says why.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import Accumulation, Operand, Path, Variant
from ..problem import Heads, Plan, Problem, Upstream

__all__ = [
    "backward",
    "capacity",
    "finished",
    "forward",
    "forward_one_pass",
    "occupancy",
    "one_pass_shapes",
    "record_shape",
    "supports",
]


@functools.cache
def _machine(device: torch.device) -> str | None:
    """Why no kernel can run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        from triton import knobs

        return (
            None
            if device.type == "cpu" and knobs.runtime.interpret
            else f"the kernels run on CUDA devices, not on {device.type}"
        )
    if torch.version.cuda is None:
        return "the kernels are tested on NVIDIA devices alone"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 (Ampere) or newer; this device has {major}.{minor}"
    if not hasattr(torch.ops.aten.mm, "dtype_out"):
        return "this PyTorch has no 16-bit product with fp32 output (torch.mm with out_dtype)"
    return None


def _variant(variant: Variant, dtype: torch.dtype) -> str | None:
    """Why no kernel computes a variant, or None."""
    if variant.path is not Path.TILED:
        return f"impl {variant.name!r} is plain PyTorch and has no kernel"
    if any(f.by_tile for f in (variant.filter_e, variant.filter_c)):
        return _tile_filter(variant, dtype)
    return _element_filter(variant) if by_element(variant) else None


def by_element(variant: Variant) -> bool:
    """Whether the backward pass is that of filtered.py: of filters of single entries, or an fp32 operand."""
    if variant.filter_e.by_tile or variant.filter_c.by_tile:
        return False
    return variant.filtered or variant.operand in (Operand.FP32, Operand.FP32_ABOVE)


def _element_filter(variant: Variant) -> str | None:
    """Why no kernel computes a variant's element filters, or None."""
    if not variant.label_apart or variant.operand is Operand.INPUT:
        return "an element filter beside a label in the operand or an operand in the input dtype has no kernel"
    if {variant.accum_e, variant.accum_c} != {Accumulation.FP32}:
        return "an element filter beside sums in the input dtype has no kernel"
    return None


def _tile_filter(variant: Variant, dtype: torch.dtype) -> str | None:
    """Why no kernel computes a variant's tile filters, or None."""
    filters = [f for f in (variant.filter_e, variant.filter_c) if f]
    if not all(f.by_tile for f in filters):
        return "a tile filter beside an element filter has no kernel"
    if variant.operand in (Operand.FP32, Operand.FP32_ABOVE) and dtype is not torch.float32:
        return f"a tile filter with an fp32 operand beside {dtype} inputs has no kernel (impl {variant.name!r})"
    if filters[0].eps != filters[-1].eps:
        return "two tile filters with different thresholds have no kernel"
    if variant.label_apart or variant.operand is Operand.SPLIT:
        return "a tile filter beside a label apart or a split operand has no kernel"
    if any(size not in (16, 32, 64, 128) for size in variant.tile):
        return f"tiles of {variant.tile} have no kernel; their sides must be 16, 32, 64 or 128"
    return None


def supports(problem: Problem, plan: Plan) -> str | None:
    """None if the kernels can run this call, else the reason why not, as a sentence without a full stop."""
    if problem.e.dtype is not problem.c.dtype:
        return f"the kernels need e and c in one dtype, got {problem.e.dtype} and {problem.c.dtype}"
    if problem.e.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take bfloat16, float16 and float32, not {problem.e.dtype}"
    if problem.v == 0 or problem.d == 0:
        return "the kernels need at least one column and one feature"
    if (plan.variant.filtered or by_element(plan.variant)) and plan.want_smooth and problem.softcap is not None:
        return f"label smoothing under a softcap has no kernel for impl {plan.variant.name!r}"
    return _machine(problem.e.device) or _variant(plan.variant, problem.e.dtype)


def forward(problem: Problem, plan: Plan, seed: Tensor | None = None) -> tuple[Heads, Tensor]:
    """The heads of every token, fp32, and a record for `backward` (`record_shape` says how large); see heads.py, and
    hits.py for filters of single entries, which draw by `seed` (0-dim int64, needed with plan.want_record).
    """
    with _on(problem.e.device):
        if plan.want_record and by_element(plan.variant):
            from . import filtered, hits

            if hits.leaves_record(problem, plan):
                assert seed is not None
                return hits.forward(problem, plan, seed, filtered.capacity(problem, plan))
        from .heads import forward as run

        return run(problem, plan)


def one_pass_shapes(problem: Problem, plan: Plan) -> tuple[Tensor, ...] | None:
    """What `forward_one_pass` leaves, as tensors without values; None where it does not run this call in
    plan.workspace_mb. A function of shapes, dtypes, the device and the plan alone.
    """
    if plan.one_pass is None or problem.e.dtype is not torch.bfloat16 or plan.workspace_mb is None:
        return None
    from .one_pass import shapes

    return shapes(problem, plan)


def forward_one_pass(problem: Problem, plan: Plan) -> tuple[Heads, tuple[Tensor, ...]]:
    """The heads, and what `finished` makes the gradients of that plan.one_pass asks for. Needs `one_pass_shapes`."""
    from .one_pass import forward_one_pass as run

    with _on(problem.e.device):
        return run(problem, plan)


def finished(
    problem: Problem, left: Sequence[Tensor], factor: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dE, dC) of what `forward_one_pass` left: the gradients of sum_i nll_i times factor (0-dim fp32), rounded once to
    the dtypes of e and c; None where `need`, a part of what the forward pass was asked for, says so.
    """
    from .one_pass import Unfinished
    from .one_pass import finished as run

    with _on(factor.device):
        return run(problem, Unfinished(*left), factor, need)


def record_shape(problem: Problem, plan: Plan) -> tuple[int, int]:
    """Shape of the int32 record that `forward` leaves: a function of shapes, dtypes, the device and the plan alone."""
    if not plan.want_record:
        return 0, 0
    if by_element(plan.variant):
        from .hits import record_shape as run
    else:
        from .record import record_shape as run
    return run(problem, plan)


def backward(
    problem: Problem,
    plan: Plan,
    heads: Heads,
    upstream: Upstream,
    need: tuple[bool, bool, bool],
    seed: Tensor,
    record: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e, c and bias; None where `need` says so. `seed` is for random filters.
    `record`: what `forward` left; without it a filter walks over every logit to find what it keeps.
    """
    if by_element(plan.variant):
        from .filtered import backward_filtered

        with _on(problem.e.device):
            return backward_filtered(problem, plan, heads, upstream, need, seed, record)
    from .by_tokens import backward_by_tokens, goes_by_tokens
    from .dense import backward_by_runs

    with _on(problem.e.device):
        if goes_by_tokens(problem, plan, need):
            return backward_by_tokens(problem, plan, heads, upstream, need)
        return backward_by_runs(problem, plan, heads, upstream, need, record)


def capacity(problem: Problem, plan: Plan) -> int | None:
    """How many blocks of 16 columns, over all tokens, a sparse `backward` has room for: with more in which the filter
    may keep an entry (`occupancy`) it takes the dense way. None for plans without a sparse way.
    """
    if problem.n == 0 or not by_element(plan.variant):
        return None
    from .filtered import capacity as run
    from .hits import kept_filter

    return None if kept_filter(problem, plan) is None else run(problem, plan)


def occupancy(problem: Problem, plan: Plan, lse: Tensor, seed: Tensor, record: Tensor | None) -> Tensor:
    """What `capacity` is about, 0-dim int64: as `forward` recorded it, or by one more walk over the logits."""
    from .filtered import occupancy as run

    with _on(problem.e.device):
        return run(problem, plan, lse, seed, record)


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
