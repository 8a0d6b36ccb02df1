"""Triton's kernels in their interpreter with a GPU's arithmetic: its tiles, its fused exponents, its tensor cores.

    with emulated(): ...        in a process that was started with TRITON_INTERPRET=1

Products of 16-bit operands go through `tensor_core.dot`, which gives an H200's outputs bit for bit, in one chain of
blocks for each output; those of the library too, whose order nobody knows. Tiles are those of the launches on sm_90.
exp2 is rounded correctly, and flushes to 0 below the normal range: a GPU's errs by up to 2 ulp, so what is
found here are rather too small errors.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from cce_precision import kernels
from cce_precision.analysis.tensor_core import HOPPER, TensorCore, dot
from cce_precision.kernels import launch, primitives

__all__ = ["emulated"]

ROWS = 64  # of a product at a time
ARCHITECTURE = "sm_90"


@triton.jit
def fused_update(m, s, a, z, scale, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """primitives.online_softmax_update as a GPU runs it: the exponent is one operation."""
    top = tl.maximum(m, tl.max(z, 1))
    reference = primitives.reference_of(top, scale)
    decay = primitives.decay_of(m, top, scale)
    below = tl.fma(z, scale, -reference[:, None])
    p = tl.exp2(below)
    if ENTROPY:
        step = reference - primitives.reference_of(m, scale)
        a = decay * (a + s * step) - tl.sum(p * tl.maximum(below, -2048.0), 1)
    return top, decay * s + tl.sum(p, 1), a


def product(a: Tensor, b: Tensor, acc: Tensor, core: TensorCore) -> Tensor:
    """acc + a b for a (M, K), b (K, N) of 16 bits and acc (M, N) fp32. What is not finite makes its row or column NaN;
    blocks of zeros alone change nothing and are left out.
    """
    rows, columns = a.isfinite().all(1), b.isfinite().all(0)
    a, b = torch.where(rows[:, None], a, 0), torch.where(columns, b, 0)
    out = acc.clone()
    i, j = (a != 0).any(1).nonzero()[:, 0], (b != 0).any(0).nonzero()[:, 0]
    used = ((a != 0).any(0) & (b != 0).any(1)).nonzero()[:, 0]
    if len(used):
        depth = -(-(int(used[-1]) + 1) // core.block) * core.block
        left, right = (torch.nn.functional.pad(x[:, :depth], (0, max(0, depth - x.shape[1]))) for x in (a[i], b.T[j]))
        for first in range(0, len(i), ROWS):
            part = slice(first, first + ROWS)
            place = i[part, None], j[None, :]
            out[place] = dot(left[part, None, :], right[None, :, :], acc[place], core)
    out[~rows], out[:, ~columns] = torch.nan, torch.nan
    return out


def _tensor(x: Any) -> Tensor:
    """The numbers of an interpreted tensor."""
    data = np.ascontiguousarray(x.handle.data)
    if x.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _exp2(builder: Any, x: Any) -> Any:
    value = np.exp2(x.data.astype(np.float64))
    value = np.where(value < 2.0**-126, 0.0, value) if x.data.dtype == np.float32 else value
    return TensorHandle(value.astype(x.data.dtype), x.dtype.scalar)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)


@contextlib.contextmanager
def emulated(core: TensorCore = HOPPER) -> Iterator[None]:
    """The arithmetic of a GPU for all kernels that this process interprets. Raises RuntimeError where it compiles."""
    if not isinstance(primitives.multiply_add, InterpretedFunction):
        raise RuntimeError("the kernels are compiled in this process; it must be started with TRITON_INTERPRET=1")

    def multiply_add(a: Any, b: Any, acc: Any, PRECISION: Any) -> Any:
        left, right, total = (_tensor(x) for x in (a, b, acc))
        exact = left.dtype is torch.float32
        found = total + left @ right if exact else product(left, right, total, core)
        return tl.core.tensor(TensorHandle(found.numpy(), tl.float32), acc.type)

    def accumulate_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        found = a @ b if a.dtype is torch.float32 else product(a, b, torch.zeros_like(total), core)
        total.copy_(found) if first else total.add_(found)

    def config_for(kernel: str, x: Tensor) -> launch.Config:
        return launch._CONFIGS[kernel][ARCHITECTURE][x.element_size()]

    instead = {"accumulate_product": accumulate_product, "config_for": config_for}
    rewritten = {
        primitives.multiply_add.fn: multiply_add,
        primitives.online_softmax_update.fn: fused_update.rewrite(),
    }
    # not the modules of a Hopper's own kernels, which no interpreter runs
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("hopper")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(mock.patch.dict(InterpretedFunction.rewritten_fn, rewritten))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_exp2", _exp2))
        stack.enter_context(mock.patch.object(InterpreterBuilder, "create_fma", _fma))
        for module in (importlib.import_module(f"{kernels.__name__}.{name}") for name in names):
            for name, function in instead.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, function))
        yield
