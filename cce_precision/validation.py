"""Checks of the arguments of a call: each names the argument, what was given and what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .numerics import Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "eager")


class Share(Protocol):
    """The rows [start, stop) of a classifier."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Options(NamedTuple):
    """The scalar options of one call."""

    ignore_index: int
    softcap: float | None
    reduction: str
    shift: bool | int
    filter_eps: float | str | None
    backend: str
    tolerance: float | None
    workspace_mb: int | None
    seed: int | None
    validate: bool | str
    label_smoothing: float
    temperature: float


TENSORS = {"e", "c", "targets", "bias"}  # of each call, and no options


def option_names(function: Callable[..., Any]) -> set[str]:
    """The names of a function's options, the tensors of each call left out."""
    return set(inspect.signature(function).parameters) - TENSORS


def by_position(function: Callable[..., Any], given: Sequence[Any], who: str) -> dict[str, Any]:
    """A function's options that are given by their place after the tensors. Raises TypeError for more than have one."""
    parameters = inspect.signature(function).parameters.values()
    names = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD and x.name not in TENSORS]
    if len(given) > len(names):
        raise TypeError(f"{who} takes {len(names)} options by position ({', '.join(names)}), got {len(given)}")
    return dict(zip(names, given))


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_integer(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def check_reduction(reduction: object) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_shift(shift: object) -> int:
    if not isinstance(shift, int):
        raise TypeError(f"shift must be a bool or an int >= 0, got {shift!r} of type {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be a bool or an int >= 0, got {shift!r}")
    return int(shift)


def check_options(options: Options) -> None:
    """Raises TypeError or ValueError for a scalar option that no variant takes."""
    o = options
    if not _is_integer(o.ignore_index):
        raise TypeError(f"ignore_index must be an int, got {o.ignore_index!r} of type {type(o.ignore_index).__name__}")
    check_reduction(o.reduction)
    check_shift(o.shift)
    for name, value, optional in (("softcap", o.softcap, True), ("temperature", o.temperature, False)):
        if value is None and optional:
            continue
        allowed = "None or a finite number > 0" if optional else "a finite number > 0"
        if not _is_number(value):
            raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
        if not (0 < value < math.inf):  # type: ignore[arg-type, operator]
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    if not _is_number(o.label_smoothing):
        raise TypeError(
            f"label_smoothing must be a number in [0, 1], "
            f"got {o.label_smoothing!r} of type {type(o.label_smoothing).__name__}"
        )
    if not 0 <= o.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number in [0, 1], got {o.label_smoothing!r}")
    if o.filter_eps is not None and o.filter_eps != "auto":
        if not _is_number(o.filter_eps):
            raise TypeError(f"filter_eps must be 'auto', None or a probability in [0, 1], got {o.filter_eps!r}")
        if not 0 <= o.filter_eps <= 1:  # type: ignore[operator]
            raise ValueError(f"filter_eps must be 'auto', None or a probability in [0, 1], got {o.filter_eps!r}")
    if o.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {o.backend!r}")
    if o.workspace_mb is not None and not (_is_integer(o.workspace_mb) and o.workspace_mb > 0):
        raise ValueError(f"workspace_mb must be None or an int > 0 (MiB), got {o.workspace_mb!r}")
    if o.seed is not None and not (_is_integer(o.seed) and -(2**63) <= o.seed < 2**63):
        raise ValueError(f"seed must be None or an int of 64 bits, got {o.seed!r}")
    if o.validate not in (True, False, "auto") or isinstance(o.validate, (float,)):
        raise ValueError(f"validate must be True, False or 'auto', got {o.validate!r}")


def check_tolerance(tolerance: object, variant: Variant | None = None, entropy: bool = False) -> None:
    """Raises TypeError or ValueError for a tolerance that is neither None nor a finite number > 0, and for one beside a
    variant (None: impl="auto") that cannot adapt to it, or beside an entropy, whose gradient no filter's bound knows.
    """
    if tolerance is None:
        return
    if not _is_number(tolerance):
        raise TypeError(f"tolerance must be None or a finite number > 0, got {tolerance!r}")
    if not (0 < tolerance < math.inf):  # type: ignore[arg-type, operator]
        raise ValueError(f"tolerance must be None or a finite number > 0, got {tolerance!r}")
    if variant is None:
        return
    if not variant.by_element:
        raise ValueError(
            f"tolerance must be None with impl={variant.name!r}, whose error is what it is; cce_sparse, cce_unbiased "
            "and cce_subsampled (with one filter for both gradients) keep a tolerance, and impl='auto' chooses a "
            f"variant by it, got {tolerance!r}"
        )
    if entropy:
        raise ValueError(
            f"tolerance must be None with return_entropy=True, whose gradient the promise of impl={variant.name!r} "
            f"does not cover, got {tolerance!r}"
        )


def is_zero3(x: object) -> bool:
    """Whether x is a parameter that DeepSpeed's ZeRO-3 shards; outside its module's forward it is an empty tensor."""
    return hasattr(x, "ds_id")


def check_tensors(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    share: Share | None = None,
) -> None:
    """Raises TypeError or ValueError for tensors that do not belong together. `share`: the rows [start, stop) of the
    whole classifier that c and bias are."""
    for name, x in (("e", e), ("c", c), ("targets", targets), ("bias", bias), ("class_weight", class_weight)):
        if x is None and name in ("bias", "class_weight"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    for name, x in (("c", c), ("bias", bias)):
        if x is not None and is_zero3(x) and x.numel() == 0:
            shape = f" of shape {tuple(x.ds_shape)}" if hasattr(x, "ds_shape") else ""
            raise ValueError(
                f"{name} must have its values, got a ZeRO-3 shard{shape} outside its module's forward, where DeepSpeed "
                "leaves it empty: compute the loss inside the forward of a module of the engine's model, which then "
                f"gathers it, or under `with deepspeed.zero.GatheredParameters([{name}])`, the backward pass included"
            )
    for name, x in (("e", e), ("c", c), ("bias", bias)):
        if x is not None and x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if targets.dtype not in INTEGERS:
        raise TypeError(
            f"targets must be integer class indices (int64, int32, int16, int8 or uint8), got {targets.dtype}"
        )
    if class_weight is not None and not class_weight.is_floating_point():
        raise TypeError(f"class_weight must be a floating-point tensor, got {class_weight.dtype}")
    for name, x in (("c", c), ("targets", targets), ("bias", bias), ("class_weight", class_weight)):
        if x is not None and x.device != e.device:
            raise ValueError(f"{name} must be on the device of e, {e.device}, got {x.device}")
    if share is not None and (c.ndim != 2 or c.shape[0] != share.stop - share.start or c.shape[1] == 0):
        raise ValueError(
            f"c must have shape ({share.stop - share.start}, D), the rows [{share.start}, {share.stop}) that "
            f"vocab_parallel_options gives this process, with D >= 1, got {tuple(c.shape)}"
        )
    if share is None and (c.ndim != 2 or 0 in c.shape):
        raise ValueError(f"c must have shape (V, D) with V >= 1 and D >= 1, got {tuple(c.shape)}")
    if e.ndim < 2 or e.shape[-1] != c.shape[1]:
        raise ValueError(
            f"e must have shape (..., D) with at least 2 dimensions and D = {c.shape[1]} as c, got {tuple(e.shape)}"
        )
    if targets.shape != e.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(e.shape[:-1])}, that of e without its last dimension, "
            f"got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != (c.shape[0],):
        rows = "(V,)" if share is None else "that of this process's rows of c,"
        raise ValueError(f"bias must have shape {rows} = ({c.shape[0]},), got {tuple(bias.shape)}")
    if class_weight is not None:
        if share is None and class_weight.shape != (c.shape[0],):
            raise ValueError(f"class_weight must have shape (V,) = ({c.shape[0]},), got {tuple(class_weight.shape)}")
        if share is not None and (class_weight.ndim != 1 or class_weight.shape[0] < share.stop):
            raise ValueError(
                "class_weight must have shape (V,), one weight for each row of the whole classifier on every process, "
                f"hence at least {share.stop}, got {tuple(class_weight.shape)}"
            )
    if int(options.shift) > 0 and int(options.shift) >= targets.shape[-1]:
        raise ValueError(
            f"shift must be smaller than the last dimension of targets, {targets.shape[-1]}, got {options.shift!r}"
        )
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(
            "class_weight must not require a gradient: none is computed for it; pass class_weight.detach()"
        )


def check_whole(whole: bool, return_stats: bool, tolerance: object) -> None:
    """Raises ValueError for what has no form where processes share the vocabulary or the tokens."""
    if not whole and tolerance is not None:
        raise ValueError(
            f"tolerance must be None where processes share the vocabulary or the tokens, got {tolerance!r}: each sees "
            "a part of the gradients alone"
        )
    if not whole and return_stats:
        raise ValueError("return_stats must be False where processes share the vocabulary or the tokens, got True")


def should_check_range(options: Options, targets: Tensor) -> bool:
    """Whether to look at the targets' values: not under torch.compile, and by default not where it would
    synchronise."""
    if torch.compiler.is_compiling():
        return False
    return targets.device.type == "cpu" if options.validate == "auto" else bool(options.validate)


def check_range(targets: Tensor, ignore_index: int, v: int) -> None:
    """Raises ValueError naming the first target that is neither in [0, v) nor `ignore_index`."""
    bad = ((targets < 0) | (targets >= v)) & (targets != ignore_index)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"targets must lie in [0, V) = [0, {v}) or equal ignore_index={ignore_index}, "
            f"got {int(targets[where])} at index {where} and {int(bad.sum()) - 1} more"
        )
