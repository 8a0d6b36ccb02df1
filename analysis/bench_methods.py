"""What the benchmark compares: every variant of this package, PyTorch's own loss, and thin adapters for other packages.

A method is a name and a function that, for a softcap, gives `call(e, c, targets) -> mean loss`, differentiable. An
adapter raises `Unavailable` with the reason where its package is missing or cannot do the shape; the benchmark then
says so.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_precision import linear_cross_entropy
from cce_precision.analysis.configured import configured
from cce_precision.variants import ALL, get

__all__ = ["DEFAULT", "METHODS", "Call", "Method", "Unavailable", "method"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # e (N, D), c (V, D), targets (N,) -> mean loss


class Unavailable(Exception):
    """A method that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Method:
    """One way to compute the loss. `family`: "ours", "torch" or the package that it comes from."""

    name: str
    family: str
    bind: Callable[[float | None], Call]


def _ours(name: str, workspace_mb: int | None = None) -> Method:
    variant = configured(name)
    label = variant.name + name[name.index("@") :] if "@" in name else variant.name

    label += "" if workspace_mb is None else f"@{workspace_mb}MB"
    return _with_options(label, impl=variant, workspace_mb=workspace_mb)


def _auto(text: str, tolerance: float, workspace_mb: int | None) -> Method:
    """impl="auto", which takes a variant for the tolerance and the workspace (MiB) by the committed table."""
    return _with_options(text, impl="auto", tolerance=tolerance, workspace_mb=workspace_mb)


def _with_options(name: str, **options: Any) -> Method:
    """`linear_cross_entropy` with these options."""

    def bind(softcap: float | None) -> Call:
        return lambda e, c, t: linear_cross_entropy(e, c, t, softcap=softcap, validate=False, **options)  # type: ignore[return-value]

    return Method(name, "ours", bind)


def _package(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from None
    except Exception as error:  # a package may fail in its own ways while it is imported
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from None


def _no_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise Unavailable("it has no softcap")


def _torch(chunked: bool) -> Callable[[float | None], Call]:
    """PyTorch 2.13's F.linear_cross_entropy: the plain expression, or in chunks of tokens."""

    def bind(softcap: float | None) -> Call:
        _no_softcap(softcap)
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Unavailable(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")
        if not chunked:
            return lambda e, c, t: function(e, c, t)
        if "options" not in inspect.signature(function).parameters or not hasattr(
            torch.nn, "LinearCrossEntropyOptions"
        ):
            raise Unavailable(f"F.linear_cross_entropy of PyTorch {torch.__version__} has no chunks")
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda e, c, t: function(e, c, t, options=options)

    return bind


def _cut(impl: str) -> Callable[[float | None], Call]:
    """cut-cross-entropy, with its own defaults for the filter."""

    def bind(softcap: float | None) -> Call:
        function = _package("cut_cross_entropy").linear_cross_entropy  # type: ignore[attr-defined]
        return lambda e, c, t: function(e, c, t, softcap=softcap, impl=impl)

    return bind


def _liger(softcap: float | None) -> Call:
    """liger-kernel's fused linear cross-entropy in Triton (gradients are computed in the forward pass)."""
    function = _package("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction  # type: ignore[attr-defined]
    # bias, class weight, ignore_index, z-loss, smoothing, reduction, softcap
    return lambda e, c, t: function.apply(e, c, t, None, None, -100, 0.0, 0.0, "mean", softcap)[0]


def _liger_sm90(softcap: float | None) -> Call:
    """liger-kernel's CuTe kernels for Hopper."""
    _no_softcap(softcap)
    module = _package("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    return module.liger_fused_linear_cross_entropy_sm90  # type: ignore[attr-defined, no-any-return]


def _liger_sm90_scaled(softcap: float | None) -> Call:
    """liger-kernel's per-token CuTe kernel for Hopper; all benchmark tokens count, so the mean is a plain one."""
    _no_softcap(softcap)
    module = _package("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    function = module.LigerFusedScaledCrossEntropySM90Function  # type: ignore[attr-defined]

    def call(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        nll = function.apply(e, c, t)
        return (nll[0] if isinstance(nll, tuple) else nll).mean()

    return call


def _quack(scaled: bool | None) -> Callable[[float | None], Call]:
    """quack-kernels: its own choice of pipeline (None), or the base one (False)."""

    def bind(softcap: float | None) -> Call:
        _no_softcap(softcap)
        function = _package("quack.linear_cross_entropy").chunked_linear_cross_entropy  # type: ignore[attr-defined]
        if "use_scaled_exp" not in inspect.signature(function).parameters:
            if scaled is None:
                return lambda e, c, t: function(e, c, t)
            raise Unavailable("this release has one pipeline")
        return lambda e, c, t: function(e, c, t, use_scaled_exp=scaled)

    return bind


CUT = "cut-cross-entropy"
METHODS: dict[str, Method] = {
    **{name: _ours(name) for name in ALL},
    "torch": Method("torch", "torch", _torch(chunked=False)),
    "torch-chunked": Method("torch-chunked", "torch", _torch(chunked=True)),
    **{
        f"cut:{impl}": Method(f"cut:{impl}", CUT, _cut(impl))
        for impl in ("cce", "cce_kahan_full_c", "cce_exact", "torch_compile")
    },
    "liger": Method("liger", "liger-kernel", _liger),
    "liger:sm90": Method("liger:sm90", "liger-kernel", _liger_sm90),
    "liger:sm90-scaled": Method("liger:sm90-scaled", "liger-kernel", _liger_sm90_scaled),
    "quack": Method("quack", "quack-kernels", _quack(None)),
    "quack:base": Method("quack:base", "quack-kernels", _quack(False)),
}

DEFAULT = {
    "cuda": [
        "baseline", "torch_compile", "cce_exact", "cce_exact@4096MB", "cce_split", "cce_no_filter", "cce",
        "cce_kahan_full_c", "cce_sparse", "cce_unbiased", "cce_unbiased@2^-14", "cce_subsampled", "cce_subsampled@/16",
        "torch", "torch-chunked", "cut:cce", "cut:cce_kahan_full_c", "cut:cce_exact", "cut:torch_compile",
        "liger", "liger:sm90", "liger:sm90-scaled", "quack", "quack:base",
    ],
    "cpu": ["baseline", "cce_exact", "torch-chunked"],
}  # fmt: skip


@functools.cache
def method(text: str) -> Method:
    """The method called `text`; one of ours may name its workspace (cce_exact@4096MB) or its filter's settings
    (cce_unbiased@2^-14); auto@TOLERANCE or auto@TOLERANCE/WORKSPACE is impl="auto".

    Raises ValueError for an unknown name, listing the known ones and the nearest.
    """
    if text in METHODS:
        return METHODS[text]
    if match := re.fullmatch(r"auto@([\d.]+(?:e-?\d+)?)(?:/(\d+)(?:MB|MiB)?)?", text):
        return _auto(text, float(match[1]), None if match[2] is None else int(match[2]))
    if match := re.fullmatch(r"([\w-]+)@(\d+)(?:MB|MiB)?", text):
        if int(match[2]) == 0:
            raise ValueError(f"the workspace of {text!r} must be at least 1 MB")
        return _ours(match[1], int(match[2]))
    if "@" in text:
        return _ours(text)
    try:
        return METHODS[get(text).name]  # an alias
    except ValueError:
        near = difflib.get_close_matches(text, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{text!r} is no known method; known: {', '.join(METHODS)}, and VARIANT@WORKSPACE{hint}"
        ) from None
