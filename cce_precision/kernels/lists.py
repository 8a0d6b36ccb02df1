"""Lists of hits, from the bits that hits.py leaves: the tokens of each block of columns, and the blocks of each token.

Capacities instead of sizes, so that the host waits for nothing: where the hits are more than `Lists.capacity`, the
lists are empty and `Lists.fits` is 0. No float is added here, and every list is in rising order, so nothing depends on
how the programs run beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .entry import entry
from .hits import BLOCK
from .launch import cdiv, config_for, next_power_of_2
from .primitives import wide

__all__ = ["BATCH", "Lists", "counts_of", "lists_of"]

BATCH = 64  # tokens that one program gathers at a time


@dataclass(frozen=True)
class Lists:
    """All int32. Slots number the hits by block and then by token."""

    fits: Tensor  # () 1, or 0 where the hits were too many and the lists are empty
    hits: Tensor  # () int64, how many there are, in any case
    starts: Tensor  # (blocks + 1,) slots of block b: starts[b] to starts[b + 1]
    tokens: Tensor  # (capacity,) by slot
    units: Tensor  # (blocks + 1,) batches of block b: units[b] to units[b + 1]
    unit_block: Tensor  # (most batches,) the block of each batch
    row_starts: Tensor  # (N + 1,)
    blocks: Tensor  # (capacity,) the blocks of token i, rising: row_starts[i] to row_starts[i + 1]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[0]


@triton.jit
def spread(words, BITS: tl.constexpr):
    """The bits of words (R,) as int32 (R, BITS)."""
    return (words.to(tl.int32)[:, None] >> tl.arange(0, BITS)[None, :]) & 1


@triton.jit
def every_bit(tile, v, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The word (int16) of a column tile, of which there may be several, that has a bit for every block of columns."""
    there = tl.minimum(tl.maximum(tl.cdiv(v, WIDTH) - tile * BITS, 0), BITS)
    return ((1 << there) - 1).to(tl.int16)


@entry
@triton.jit
def count_kernel(
    words,  # (tiles, N) int16
    lse,  # (N,) fp32, inf where ignored; a token whose lse is NaN has every bit
    column_counts,  # (tiles x BITS,) int32, out
    row_counts,  # (N,) int32, zeros, in and out
    n,
    v,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of a block
):
    tile = tl.program_id(0)
    total = tl.zeros((BITS,), tl.int32)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS)
        word = tl.load(words + wide(n) * tile + rows, mask=rows < n, other=0)
        value = tl.load(lse + rows, mask=rows < n, other=0.0)
        word = tl.where(value == value, word, every_bit(tile, v, BITS, WIDTH))
        bits = spread(word, BITS)
        total += tl.sum(bits, 0)
        tl.atomic_add(row_counts + rows, tl.sum(bits, 1), mask=word != 0)
    tl.store(column_counts + tile * BITS + tl.arange(0, BITS), total)


@entry
@triton.jit
def tokens_kernel(
    words,  # (tiles, N) int16
    lse,  # (N,) fp32
    starts,  # (tiles x BITS + 1,) int32
    units,  # (tiles x BITS + 1,) int32
    tokens,  # (capacity,) out
    unit_block,  # out
    fits,
    n,
    v,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,  # most batches of a block
):
    if tl.load(fits) != 0:
        tile = tl.program_id(0)
        block = tile * BITS + tl.arange(0, BITS)
        place = tl.load(starts + block)
        first_unit, last_unit = tl.load(units + block), tl.load(units + block + 1)
        unit = first_unit[:, None] + tl.arange(0, UNITS)[None, :]
        tl.store(unit_block + unit, tl.broadcast_to(block[:, None], (BITS, UNITS)), mask=unit < last_unit[:, None])
        for first in range(0, n, ROWS):
            rows = first + tl.arange(0, ROWS)
            word = tl.load(words + wide(n) * tile + rows, mask=rows < n, other=0)
            value = tl.load(lse + rows, mask=rows < n, other=0.0)
            bits = spread(tl.where(value == value, word, every_bit(tile, v, BITS, WIDTH)), BITS)
            rank = tl.cumsum(bits, 0)
            tl.store(tokens + place[None, :] + rank - 1, tl.broadcast_to(rows[:, None], (ROWS, BITS)), mask=bits != 0)
            place += tl.sum(bits, 0)


@entry
@triton.jit
def blocks_kernel(
    words,  # (tiles, N) int16
    lse,  # (N,) fp32
    row_starts,  # (N + 1,) int32
    blocks,  # (capacity,) out
    fits,
    n,
    v,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if tl.load(fits) != 0:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = tl.load(row_starts + rows, mask=rows < n, other=0)
        value = tl.load(lse + rows, mask=rows < n, other=0.0)[:, None]
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)
            at = words + tile[None, :].to(tl.int64) * n + rows[:, None]
            word = tl.load(at, mask=(rows < n)[:, None] & (tile < tiles)[None, :], other=0)
            word = tl.where(value == value, word, every_bit(tile, v, BITS, WIDTH)[None, :])
            if tl.max(tl.max((word != 0).to(tl.int32), 1), 0) > 0:
                bits = (word.to(tl.int32)[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
                bits = tl.reshape(bits, (ROWS, TILES * BITS))
                rank = tl.cumsum(bits, 1)
                block = first * BITS + tl.broadcast_to(tl.arange(0, TILES * BITS)[None, :], (ROWS, TILES * BITS))
                tl.store(blocks + place[:, None] + rank - 1, block, mask=bits != 0)
                place += tl.sum(bits, 1)


def _starts(counts: Tensor) -> Tensor:
    """(k + 1,) int32 running sums of counts (k,) from 0."""
    out = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])
    return out


def counts_of(words: Tensor, c: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Hits of each block and of each token, int32, of words (column tiles, N)."""
    tiles, n = words.shape
    bits = config_for("forward", c).n // BLOCK
    by_block = torch.empty(tiles * bits, dtype=torch.int32, device=words.device)
    by_token = torch.zeros(n, dtype=torch.int32, device=words.device)
    rows = 512 if words.device.type == "cuda" else 64  # interpreted
    count_kernel[(tiles,)](words, lse, by_block, by_token, n, c.shape[0], ROWS=rows, BITS=bits, WIDTH=BLOCK)
    return by_block, by_token


def lists_of(words: Tensor, c: Tensor, lse: Tensor, tokens: Tensor, blocks: Tensor) -> Lists:
    """The lists of words (column tiles, N), in tokens and blocks (capacity,) int32. No host synchronisation."""
    (tiles, n), v = words.shape, c.shape[0]
    bits = config_for("forward", c).n // BLOCK
    device, capacity = words.device, tokens.numel()
    column_counts, row_counts = counts_of(words, c, lse)
    small = device.type != "cuda"  # interpreted
    hits = column_counts.sum(dtype=torch.int64)
    fits = (hits <= capacity).to(torch.int32)
    column_counts *= fits
    row_counts *= fits
    starts, row_starts = _starts(column_counts), _starts(row_counts)
    units = _starts((column_counts + (BATCH - 1)) // BATCH)
    unit_block = torch.empty(capacity // BATCH + tiles * bits, dtype=torch.int32, device=device)
    tokens_kernel[(tiles,)](
        words,
        lse,
        starts,
        units,
        tokens,
        unit_block,
        fits,
        n,
        v,
        ROWS=64 if small else 256,
        BITS=bits,
        WIDTH=BLOCK,
        UNITS=next_power_of_2(cdiv(n, BATCH)),
    )
    height = 16
    blocks_kernel[(cdiv(n, height),)](
        words,
        lse,
        row_starts,
        blocks,
        fits,
        n,
        v,
        tiles,
        ROWS=height,
        TILES=16,
        BITS=bits,
        WIDTH=BLOCK,
    )
    return Lists(fits, hits, starts, tokens, units, unit_block, row_starts, blocks)
