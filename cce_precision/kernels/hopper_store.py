"""How a consumer of the Hopper kernels writes its (64, 256) tile: by parts, through two buffers in shared memory that
take turns, so that one fills while the bulk copy engine empties the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, ir
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .hopper import halves

__all__ = ["WRITTEN", "write"]


WRITTEN = 64  # columns of 16 bits of a buffer; of 32 bits half as many


@builtin
def async_add_shared_to_global(descriptor, place, source, _semantic=None):  # type: ignore[no-untyped-def]
    """tma.async_copy_shared_to_global that adds: the bulk copy engine's reduction, rounded to nearest.

    One launch adds to an element once, so the order of the sum is that of the launches.
    """
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, place, source.handle)


@gluon.jit
def write_part(buffers, matrix, value, row, column, ADD: gl.constexpr, FIRST: gl.constexpr, PLACE: gl.constexpr):
    """`write` of what begins at the part `PLACE` of a tile, through buffers FIRST and FIRST + 1."""
    width: gl.constexpr = buffers.shape[2]
    if value.shape[1] > width:
        left, right = halves(value)
        half: gl.constexpr = value.shape[1] // 2
        write_part(buffers, matrix, left, row, column, ADD, FIRST, PLACE)
        write_part(buffers, matrix, right, row, column + half, ADD, FIRST, PLACE + half // width)
    else:
        buffer = buffers.index(FIRST + PLACE % 2)
        tma.store_wait(1)  # of the copy before the last, which left this buffer: a tile has an even number of parts
        gl.thread_barrier()
        buffer.store(value)
        fence_async_shared()
        gl.thread_barrier()
        if ADD:
            async_add_shared_to_global(matrix, [row, column], buffer)
        else:
            tma.async_copy_shared_to_global(matrix, [row, column], buffer)


@gluon.jit
def write(buffers, matrix, value, row, column, ADD: gl.constexpr, WHICH: gl.constexpr):
    """matrix[row : row + 64, column : column + 256] = value, or += value, of consumer WHICH. buffers: (2 a consumer,
    64, columns); in the end wait for the last copies with tma.store_wait(0).
    """
    write_part(buffers, matrix, value, row, column, ADD, 2 * WHICH, gl.constexpr(0))
