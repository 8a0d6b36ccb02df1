"""The entries that a filter keeps, of the hits alone: dZ as a sparse matrix.

`entries_of` gathers the tokens of each block of 16 columns, computes those logits again, and decides by the definition
with the final lse. A hit keeps 16 bits, which of its columns it has, and their values lie packed: programs take room as
they come, so where a value lies differs from run to run, and what it is does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, pairs_a_witness
from ..promise import Seen, distances, row_norms
from .elements import STOCHASTIC, ElementFilter, dz_entries
from .entry import entry
from .hits import BLOCK
from .launch import multiprocessors, precision_of
from .lists import BATCH, Lists
from .primitives import cap, multiply_add
from .terms import RowTerms, matvec

__all__ = ["Buffers", "Entries", "entries_of", "hit_values", "seen_of"]


@triton.jit
def rank(bits, WIDTH: tl.constexpr):
    """How many of the bits (R,) of a hit stand below each of its columns: (R, WIDTH) int32."""
    below = bits[:, None] & ((1 << tl.arange(0, WIDTH)) - 1)[None, :]
    below -= (below >> 1) & 0x5555
    below = (below & 0x3333) + ((below >> 2) & 0x3333)
    below = (below + (below >> 4)) & 0x0F0F
    return (below + (below >> 8)) & 0x1F


@triton.jit
def hit_values(values, masks, offsets, slot, inside, WIDTH: tl.constexpr):
    """The entries (R, WIDTH) fp32 of the hits in the slots (R,): 0 where nothing is kept, and where not `inside`."""
    bits = tl.load(masks + slot, mask=inside, other=0).to(tl.int32)
    at = tl.load(offsets + slot, mask=inside, other=0)[:, None] + rank(bits, WIDTH)
    return tl.load(values + at, mask=((bits[:, None] >> tl.arange(0, WIDTH)[None, :]) & 1) != 0, other=0.0)


@entry
@triton.jit
def gather_kernel(
    e,  # (N, D) contiguous; ignored rows stand in no list
    c,  # (V, D)
    bias,  # (V,) or unused
    targets,  # (N,) int64
    rows_terms,  # (6, N) fp32
    tokens,  # (capacity,) int32
    starts,  # (blocks + 1,) int32
    units,  # (blocks + 1,) int32
    unit_block,  # int32
    masks,  # (capacity,) int16 by slot, out: which columns are kept
    offsets,  # (capacity,) int32 by slot, out: where their values begin
    values,  # (capacity of entries,) fp32, out
    kept_entries,  # () int32: how many there are, in and out
    row_counts,  # (N,) int32: how many of each token, in and out
    room,  # capacity of entries
    seed,  # () int64
    blocks,
    shape,  # (N, V, D, number of the first column in the whole vocabulary)
    stride_c,
    scalars,  # (softcap, temperature, eps)
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    FLAGS: tl.constexpr,  # (bias, softcap, entropy, kind of the filter)
    PRECISION: tl.constexpr,
):
    n, v, d, first_id = shape
    softcap, temperature, eps = scalars
    for unit in range(tl.program_id(0), tl.load(units + blocks), tl.num_programs(0)):
        block = tl.load(unit_block + unit)
        slot = tl.load(starts + block) + (unit - tl.load(units + block)) * M
        last = tl.load(starts + block + 1)
        slots = slot + tl.arange(0, M)
        inside = slots < last
        rows = tl.load(tokens + slots, mask=inside, other=0)
        columns = block * WIDTH + tl.arange(0, WIDTH)
        acc = tl.zeros((M, WIDTH), tl.float32)
        for k in range(0, d, K):
            j = k + tl.arange(0, K)
            at = rows[:, None].to(tl.int64) * d + j[None, :]
            left = tl.load(e + at, mask=inside[:, None] & (j < d)[None, :], other=0)
            at = columns[:, None].to(tl.int64) * stride_c[0] + j[None, :].to(tl.int64) * stride_c[1]
            right = tl.load(c + at, mask=(columns < v)[:, None] & (j < d)[None, :], other=0)
            acc = multiply_add(left, right.T, acc, PRECISION)
        if FLAGS[0]:
            acc += tl.load(bias + columns, mask=columns < v, other=0).to(tl.float32)[None, :]
        z, slope = cap(acc, softcap, FLAGS[1])
        own = columns[None, :] == tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)[:, None]
        own = own | (columns >= v)[None, :]
        x = dz_entries(
            z,
            slope,
            rows,
            inside,
            own,
            first_id + columns,
            columns,
            columns < v,
            rows_terms,
            n,
            rows_terms,
            seed,
            temperature,
            eps,
            FLAGS[2],
            FLAGS[3],
            False,
        )
        # In a row, so that no boolean moves between layouts.
        flat = tl.reshape(x, (M * WIDTH,))
        there = slot + tl.arange(0, M * WIDTH) // WIDTH < last
        kept = ((flat != 0) & there).to(tl.int32)
        total = tl.sum(tl.reshape(kept, (1, M * WIDTH)), 1)  # Triton 3.6 fails on sm_100 for a sum of one dimension
        place = tl.cumsum(kept, 0) - kept + tl.atomic_add(kept_entries + tl.arange(0, 1), total)
        tl.store(values + place, flat, mask=(kept != 0) & (place < room))
        kept = tl.reshape(kept, (M, WIDTH))
        tl.store(masks + slots, tl.sum(kept << tl.arange(0, WIDTH)[None, :], 1).to(tl.int16), mask=inside)
        tl.store(offsets + slots, tl.min(tl.reshape(place, (M, WIDTH)), 1), mask=inside)
        tl.atomic_add(row_counts + rows, tl.sum(kept, 1), mask=inside)


@entry
@triton.jit
def rows_kernel(
    masks,  # (capacity,) int16 by slot
    offsets,  # (capacity,) int32 by slot
    values,  # (capacity of entries,) fp32
    tokens,  # (capacity,) int32 by slot
    starts,  # (blocks + 1,) int32
    blocks,  # (capacity,) int32 by token
    row_starts,  # (N + 1,) int32 hits of each token
    entry_starts,  # (N + 1,) int32 kept entries of each token
    columns,  # (capacity of entries,) int32, out
    weights,  # (capacity of entries,) fp32, out
    counts,  # (2, V) int32: entries of each column, of even and of odd tokens, in and out; or unused
    fits,
    v,
    pairs,  # problem.pairs_a_witness
    steps,
    HITS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The kept entries of one token, by column."""
    if tl.load(fits) != 0:
        row = tl.program_id(0)
        place = tl.load(entry_starts + row)
        last = tl.load(row_starts + row + 1)
        for first in range(tl.load(row_starts + row), last, HITS):
            hit = first + tl.arange(0, HITS)
            block = tl.load(blocks + hit, mask=hit < last, other=0)
            low, high = tl.load(starts + block), tl.load(starts + block + 1)
            for _ in range(steps):  # the slot of this token among the block's, which rise
                middle = (low + high) // 2
                less = tl.load(tokens + middle, mask=low < high, other=0) < row
                high = tl.where(less | (low >= high), high, middle)
                low = tl.where(less & (low < high), middle + 1, low)
            x = hit_values(values, masks, offsets, low, hit < last, WIDTH)
            column = tl.reshape(block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (HITS * WIDTH,))
            x = tl.reshape(x, (HITS * WIDTH,))
            kept = (x != 0).to(tl.int32)
            to = place + tl.cumsum(kept, 0) - 1
            tl.store(columns + to, column, mask=kept != 0)
            tl.store(weights + to, x, mask=kept != 0)
            if COUNTED:
                counts_here = (kept != 0) & (row // 2 % pairs == 0)
                tl.atomic_add(counts + row % 2 * v + column, 1, mask=counts_here, sem="relaxed")
            place += tl.sum(kept, 0)


@dataclass(frozen=True)
class Buffers:
    """Where hits and kept entries are listed. Capacities instead of sizes."""

    tokens: Tensor  # (hits,) int32 by slot
    offsets: Tensor  # (hits,) int32 by slot: where its values begin
    values: Tensor  # (entries,) fp32: x, the columns of a hit in their order
    masks: Tensor  # (hits,) int16 by slot: bit k is whether column k of the block is kept
    blocks: Tensor  # (hits,) int32 by token
    columns: Tensor  # (entries,) int32 by token
    weights: Tensor  # (entries,) fp32 by token: x

    A_HIT: ClassVar[int] = 14  # bytes
    AN_ENTRY: ClassVar[int] = 12

    @staticmethod
    def of(pool: Tensor, hits: int, entries: int) -> Buffers:
        """In the pool (fp32), A_HIT bytes a hit and AN_ENTRY an entry, rounded up to 4 bytes."""
        words = (hits, hits, entries, -(-hits // 2), hits, entries, entries)
        tokens, offsets, values, masks, blocks, columns, weights = pool[: sum(words)].split(words)
        ints = (x.view(torch.int32) for x in (tokens, offsets, blocks, columns))
        tokens, offsets, blocks, columns = ints
        return Buffers(tokens, offsets, values, masks.view(torch.int16)[:hits], blocks, columns, weights)

    @staticmethod
    def by_token(hits: int, entries: int) -> int:
        """Where in the pool, in bytes, the lists by token begin; those by slot lie before it."""
        return 4 * (2 * hits + entries + -(-hits // 2))


@dataclass(frozen=True)
class Entries:
    """The kept entries, by block of columns and by token."""

    lists: Lists
    buffers: Buffers
    starts: Tensor  # (N + 1,) int32: entries of token i are starts[i] to starts[i + 1]
    counts: Tensor | None  # (2, V) int32: entries of each column, of some even and odd tokens; where wanted
    dense: Tensor  # () int32: 1 where a capacity did not hold them, and nothing here counts


def entries_of(
    problem: Problem,
    e: Tensor,
    terms: RowTerms,
    filt: ElementFilter,
    lists: Lists,
    buffers: Buffers,
    counted: bool,  # whether the entries of each column are
) -> Entries:
    """The entries that the filter keeps among the hits; fills the buffers."""
    n, v, c, bias = problem.n, problem.v, problem.c, problem.bias
    cuda = e.device.type == "cuda"
    blocks = lists.starts.numel() - 1
    counts = torch.zeros(n + 1, dtype=torch.int32, device=e.device)
    room = buffers.values.numel()
    depth = 64 if e.element_size() == 2 else 16
    gather_kernel[(8 * multiprocessors(e.device),)](
        e,
        c,
        terms.terms if bias is None else bias,
        terms.targets,
        terms.terms,
        lists.tokens,
        lists.starts,
        lists.units,
        lists.unit_block,
        buffers.masks,
        buffers.offsets,
        buffers.values,
        counts[n:],
        counts,
        room,
        filt.seed,
        blocks,
        (n, v, problem.d, problem.first_column),
        tuple(c.stride()),
        (float(problem.softcap or 1.0), float(problem.temperature), filt.eps),
        M=BATCH,
        WIDTH=BLOCK,
        K=depth if cuda else 16,
        FLAGS=(bias is not None, problem.softcap is not None, terms.entropy, filt.kind),
        PRECISION=precision_of(c),
        num_warps=4,
        num_stages=4,
    )
    starts = torch.zeros(n + 1, dtype=torch.int32, device=e.device)
    torch.cumsum(counts[:n], 0, dtype=torch.int32, out=starts[1:])
    fits = lists.fits * (starts[-1] <= room)
    by_column = torch.zeros((2, v), dtype=torch.int32, device=e.device) if counted else None
    rows_kernel[(n,)](
        buffers.masks,
        buffers.offsets,
        buffers.values,
        lists.tokens,
        lists.starts,
        lists.blocks,
        lists.row_starts,
        starts,
        buffers.columns,
        buffers.weights,
        starts if by_column is None else by_column,
        fits,
        v,
        pairs_a_witness(n),
        n.bit_length(),
        HITS=32,
        WIDTH=BLOCK,
        COUNTED=counted,
        num_warps=1,
    )
    return Entries(lists, buffers, starts, by_column, 1 - fits)


@entry
@triton.jit
def seen_kernel(starts, columns, weights, dense, alpha, norms, out, n, stride, drawn, ENTRIES: tl.constexpr):
    row = tl.program_id(0)
    unit = tl.load(alpha + row)
    most = tl.abs(unit) * drawn
    last = tl.load(starts + row + 1)
    last = tl.where(tl.load(dense) == 0, last, 0)  # else nothing has been listed, and a column may be any number
    mass = tl.zeros((ENTRIES,), tl.float32)
    squares = tl.zeros((ENTRIES,), tl.float32)
    energy = tl.zeros((ENTRIES,), tl.float32)
    for i in range(tl.load(starts + row), last, ENTRIES):
        entry = i + tl.arange(0, ENTRIES)
        x = tl.load(weights + entry, mask=entry < last, other=0.0)
        norm = tl.load(norms + row % 2 * stride + tl.load(columns + entry, mask=entry < last, other=0))
        below = tl.abs(x) <= most
        mass += tl.where(below, 0.0, x)
        square = tl.where(below, x * x, 0.0)
        squares += square
        energy += square * norm * norm
    total = tl.sum(mass, 0)
    tl.store(out + row, tl.where(total == 0.0, 0.0, total / unit))
    tl.store(out + n + row, tl.sum(squares, 0))
    tl.store(out + 2 * n + row, tl.sum(energy, 0))


def seen_of(
    problem: Problem, terms: RowTerms, entries: Entries, filt: ElementFilter, nll: Tensor, centre: Tensor | None
) -> Seen:
    """What the kept entries tell of their filter, without entropy. Meaningless where entries.dense is 1.

    A softcap's slope stands in the entries: the mass above eps is then at least what is given, and an entry above eps
    may count as drawn, so that the promise is the weaker.
    """
    n = problem.n
    out = torch.empty((3, n), dtype=torch.float32, device=nll.device)
    norms = row_norms(problem)
    if centre is not None:
        norms = norms[0], torch.stack([distances(norms[1], matvec(problem.c, x), x) for x in centre])
    drawn = filt.eps * (1 + 2.0**-20) if filt.kind == STOCHASTIC else 0.0
    alpha = terms.terms[1]
    columns, weights = entries.buffers.columns, entries.buffers.weights
    seen_kernel[(n,)](
        entries.starts, columns, weights, entries.dense, alpha, norms[1], out, n, 0 if centre is None else problem.v,
        drawn, ENTRIES=64, num_warps=1,
    )  # fmt: skip
    return Seen(alpha, out[0] + torch.exp(-nll), out[2].sum(), (out[1] * norms[0].square()).sum(), norms)
