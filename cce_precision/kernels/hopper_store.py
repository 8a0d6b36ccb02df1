"""How a consumer of the Hopper kernels writes its (64, 256) tile: by parts as wide as its two buffers in shared memory,
of which one fills while the bulk copy engine empties the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, ir
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .hopper import halves

__all__ = ["write"]


@builtin
def async_add_shared_to_global(descriptor, place, source, _semantic=None):  # type: ignore[no-untyped-def]
    """tma.async_copy_shared_to_global that adds: the bulk copy engine's reduction, rounded to nearest.

    One launch adds to an element once, so the order of the sum is that of the launches.
    """
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, place, source.handle)


@gluon.jit
def write(buffers, matrix, value, row, column, ADD: gl.constexpr, FIRST: gl.constexpr, PART: gl.constexpr = 0):
    """matrix[row : row + 64, column : ...] = value, or += value, through buffers FIRST and FIRST + 1: a tile has an
    even number of parts, the first of them here PART. In the end wait for the last copies with tma.store_wait(0).
    """
    width: gl.constexpr = buffers.shape[2]
    half: gl.constexpr = value.shape[1] // 2
    if value.shape[1] > width:
        left, right = halves(value)
        write(buffers, matrix, left, row, column, ADD, FIRST, PART)
        write(buffers, matrix, right, row, column + half, ADD, FIRST, PART + half // width)
    else:
        buffer = buffers.index(FIRST + PART % 2)
        tma.store_wait(1)  # until the copy before the last, which left this buffer, has ended
        gl.thread_barrier()
        buffer.store(value)
        fence_async_shared()
        gl.thread_barrier()
        if ADD:
            async_add_shared_to_global(matrix, [row, column], buffer)
        else:
            tma.async_copy_shared_to_global(matrix, [row, column], buffer)
