"""How the host launches a kernel: Triton's own way, and a shorter one where the arguments are of kinds met before.

Triton looks at every argument, option and global of a launch to find the binary compiled for it: 0.1 ms of the host,
while the passes over a small head take some hundred launches in less than 10 ms. The kinds that `kinds` tells apart
decide that choice too, and more finely, so that the binary which Triton launched for them is the right one again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Entry", "Tiles", "entry", "kinds"]


class Tiles:
    """A matrix as the bulk copy engine reads it, by blocks: a tensor descriptor whose checks wait until Triton must
    choose a binary. `layout`: that of a block in shared memory, for Gluon kernels; constants of a module.
    """

    __slots__ = ("base", "block", "layout", "padding", "shape", "strides")

    def __init__(self, base: Tensor, block: tuple[int, int], layout: Any = None) -> None:
        self.base, self.block, self.layout, self.padding = base, block, layout, "zero"
        self.shape, self.strides = base.shape, base.stride()

    def checked(self) -> Any:
        """Triton's own descriptor."""
        where = (self.base, list(self.shape), list(self.strides), list(self.block))
        if self.layout is None:
            return TensorDescriptor(*where)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(*where, self.layout)


def kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a binary depends on of its arguments: of a tensor its dtype and whether its address is a multiple of 16, of
    an integer whether it is 1, whether 16 divides it, and its size; of `Tiles` dtype, block and layout; else the type,
    or of what is no number the value.
    """
    found: list[Any] = []
    for x in arguments:  # the commonest first: this is a good part of a launch
        kind = type(x)
        if kind is int:
            found.append(-1 if x == 1 else (x.bit_length() >> 5) << 2 | (x & 15 == 0) << 1 | (x < 0))
        elif kind is Tiles:
            found.append((x.base.dtype, x.block, id(x.layout)))
        elif isinstance(x, Tensor):
            found.append((x.dtype, x.data_ptr() & 15 == 0))
        elif kind is tuple:
            found.append(kinds(x))
        else:
            found.append(float if kind is float else (kind, x))
    return tuple(found)


def _checked(x: Any) -> Any:
    return x.checked() if type(x) is Tiles else x


class Entry:
    """A kernel that the host launches, as `entry[grid](*arguments, **constants_and_options)`; for all else the function
    of Triton that it was made from.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._compiled = isinstance(fn, triton.JITFunction)  # not interpreted
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}  # kinds -> (binary, constants in their order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            if not self._compiled:
                self.fn[grid](*map(_checked, arguments), **options)
                return
            key = (torch.cuda.current_device(), *options.items(), *kinds(arguments))
            if (known := self._known.get(key)) is None:
                binary = self.fn[grid](*map(_checked, arguments), **options)
                rest = self.fn.arg_names[len(arguments) :]
                self._known[key] = binary, tuple(options[name] for name in rest)
                return
            binary, constants = known
            binary[(*grid, 1, 1)[:3]](*arguments, *constants)

        return launch


def entry(kernel: Any) -> Any:
    """Decorates what `triton.jit` or `gluon.jit` returned, for kernels that the host launches."""
    return Entry(kernel)
