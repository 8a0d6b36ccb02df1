"""The exact dense walk of a backward pass: by runs of columns, dZ, and its two products in one launch.

dC is complete over the tokens: it leaves with the target's terms added, scaled and rounded once. On Hopper it is how
every unfiltered pass goes. `exact_where` is for what the device takes or leaves, where lists of entries overflow or
keep no promise: the library's products cannot wait for a decision made there, so where hopper_product.py's do not run,
these do. The host launches all of it, unless it knows by then that nothing of it counts (answer.py), and waits for
nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .answer import Answer
from .dz import Run, low_of, write_dz
from .elements import DTYPES
from .entry import entry
from .labels import Labels, sums_size
from .launch import Config, architecture, cdiv, hopper_fits, multiprocessors, precision_of
from .primitives import add_parts, grouped, load_tile, multiply_add, round_to, wide
from .schedule import WIDEST, best_width
from .terms import RowTerms, TokensByTarget, clean_rows, label_rows, scale_into

__all__ = [
    "NARROWEST", "config_of", "exact_where", "least_pool", "multiply_where", "products_by_hopper", "room_for", "walk",
]  # fmt: skip

NARROWEST = 256  # columns of a run


@entry
@triton.jit
def products_kernel(
    total_e,  # (N, D) fp32, in and out; or unused
    out_c,  # (V, D) gradient; or unused
    dz,  # (N, W)
    e,  # (N, D) contiguous
    c,  # (W, D)
    targets,  # (N,) int64
    label,  # (N,) fp32
    by_target,  # (N,) int64 tokens sorted by target
    target_starts,  # (V + 1,) int32
    weight,  # (V,) fp32 or unused
    shift,  # (D,) fp32 or unused
    scale,  # () fp32
    active,  # () int32: 0 where nothing is to be done
    shape,  # (N, V, W, D, first column)
    stride_dz,
    stride_c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FLAGS: tl.constexpr,  # (dE, dC, shift, weight)
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
):
    n, v, width, d, start = shape
    features = tl.cdiv(d, N)
    units_c = tl.cdiv(width, M) * features if FLAGS[1] else 0
    units = units_c + (tl.cdiv(n, M) * features if FLAGS[0] else 0)
    units = tl.where(tl.load(active) != 0, units, 0)
    stride_e = (d, 1)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        of_c = unit < units_c
        own = tl.where(of_c, unit, unit - units_c)
        i, j = grouped(own, tl.cdiv(tl.where(of_c, width, n), M), features, GROUP)
        acc = tl.zeros((M, N), tl.float32)
        if of_c:
            for k in range(0, n, K):
                b = load_tile(e, stride_e, k, j * N, n, d, K, N, False)
                acc = multiply_add(load_tile(dz, stride_dz, k, i * M, n, width, K, M, False).T, b, acc, PRECISION)
        else:
            for k in range(0, width, K):
                b = load_tile(c, stride_c, k, j * N, width, d, K, N, False)
                acc = multiply_add(load_tile(dz, stride_dz, i * M, k, n, width, M, K, False), b, acc, PRECISION)
        row, column = i * M + tl.arange(0, M), j * N + tl.arange(0, N)
        at = wide(d) * row[:, None] + column[None, :]
        mask = (row < tl.where(of_c, width, n))[:, None] & (column < d)[None, :]
        if not of_c:
            tl.store(total_e + at, acc + tl.load(total_e + at, mask=mask, other=0.0), mask=mask)
        else:
            classes = start + row
            first = tl.load(target_starts + tl.minimum(start + i * M, v))
            last = tl.load(target_starts + tl.minimum(start + tl.minimum(i * M + M, width), v))
            for at_token in range(first, last, 16):
                place = at_token + tl.arange(0, 16)
                token = tl.load(by_target + place, mask=place < last, other=0)
                is_class = tl.load(targets + token, mask=place < last, other=-1).to(tl.int32)[None, :]
                x = tl.load(label + token, mask=place < last, other=0.0)[None, :]
                x = tl.where(classes[:, None] == is_class, x, 0.0)
                inside = (place < last)[:, None] & (column < d)[None, :]
                rows = tl.load(e + token[:, None] * d + column[None, :], mask=inside, other=0)
                acc = add_parts(acc, x, rows, True, DTYPE, PARTS, PRECISION)
            if FLAGS[2]:
                w = tl.full((M,), 1.0, tl.float32)
                if FLAGS[3]:
                    w = tl.load(weight + classes, mask=row < width, other=0.0)
                acc -= w[:, None] * tl.load(shift + column, mask=column < d, other=0.0)[None, :]
            value = round_to(acc * tl.load(scale), out_c.dtype.element_ty)
            tl.store(out_c + wide(start) * d + at, value, mask=mask)


def config_of(dtype: str, arch: str) -> Config:
    """The tile of the products of operands of a dtype, whose name ends in "32" or "16"."""
    if dtype.endswith("32"):
        return Config(64, 64, 16, 4, 2)
    return Config(128, 128, 64, 8, 3) if arch == "sm_90" else Config(64, 64, 32, 4, 3)


def multiply_where(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    c: Tensor,  # (W, D), the columns from `start` on
    start: int,
    terms: RowTerms,
    segments: TokensByTarget,
    dz: Tensor,  # (N, W) without the labels
    total_e: Tensor | None,  # (N, D) fp32: += dZ c
    d_c: Tensor | None,  # (V, D): its rows of this run = dZ^T e + labels - weight shift, scaled and rounded once
    shift: Tensor | None,  # (D,) fp32
    active: Tensor,  # () int32: 0 where nothing is to be done
) -> None:
    """The products of one run, with fp32 accumulation."""
    n, d = e.shape
    width, weight = c.shape[0], problem.column_weight
    cuda = e.device.type == "cuda"
    config = config_of(str(e.dtype), architecture(e.device)) if cuda else Config(16, 32, 16, 4, 1, group=2)
    m, f = config.m, config.n
    rows = cdiv(width, m) + cdiv(n, m)
    products_kernel[(min(rows * cdiv(d, f), multiprocessors(e.device)),)](
        terms.terms if total_e is None else total_e,
        terms.terms if d_c is None else d_c,
        dz,
        e,
        c,
        terms.targets,
        terms.label,
        segments.tokens,
        segments.starts,
        terms.terms if weight is None else weight,
        terms.terms if shift is None else shift,
        terms.scale,
        active,
        (n, problem.v, width, d, start),
        tuple(dz.stride()),
        tuple(c.stride()),
        M=m,
        N=f,
        K=config.k,
        GROUP=config.group,
        FLAGS=tuple(x is not None for x in (total_e, d_c, shift, weight)),
        PRECISION=precision_of(e),
        DTYPE=DTYPES[e.dtype],
        PARTS=1 if e.element_size() == 4 else 3,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def walk(
    problem: Problem,
    e: Tensor,  # (N, D) contiguous, ignored rows 0
    terms: RowTerms,
    segments: TokensByTarget | None,  # None: the labels stand in the operand
    pool: Tensor,  # uint8 workspace: NARROWEST columns of dZ at least, and on Hopper the labels' sums
    parts: int,  # 2: dZ as a hi + lo pair, on Hopper alone
    total_e: Tensor | None,  # (N, D) fp32: += dZ c
    d_c: Tensor | None,  # (V, D)
    d_bias: Tensor | None,  # (V,) fp32
    shift: Tensor | None,  # (D,) fp32: what dC's rows lose, times the column weight; not on Hopper
    wanted: Answer | None = None,  # whether anything is to be done; None: yes
) -> None:
    """Every entry of dZ, by runs of columns: fills d_c and d_bias, adds to total_e."""
    n, v, d, dtype = problem.n, problem.v, problem.d, problem.operand_dtype
    by_hopper = shift is None and products_by_hopper(problem.c)
    outputs = (total_e is not None, d_c is not None)
    active = None if wanted is None else wanted.flag
    labels = None
    if by_hopper and d_c is not None and segments is not None:
        size = sums_size(n, d)
        labels = Labels.of(e, terms.targets, terms.label, segments, pool[:size], active)
        pool = pool[size:]
    start = 0
    while start < v and not (wanted is not None and wanted.known() is False):
        width, room = room_for(start, n * dtype.itemsize * parts, pool, d_c, WIDEST)
        if by_hopper and active is None:  # what may be left undone goes in as few launches as can be
            width = best_width(n, v - start, d, width, parts, outputs, multiprocessors(e.device))
        stop = min(start + width, v)
        operands = list(room.view(dtype)[: parts * n * width].view(parts, n, width)[:, :, : stop - start])
        c, bias, weight = (
            None if x is None else x[start:stop] for x in (problem.c, problem.bias, problem.column_weight)
        )
        assert c is not None
        run = Run(start, c, bias, weight)
        sums, _ = write_dz(problem, e, run, terms, operands[0], low_of(operands), d_bias is not None, active=active)
        if d_bias is not None and sums is not None:
            d_bias[start:stop].copy_(sums if active is None else torch.where(active != 0, sums, d_bias[start:stop]))
        if by_hopper and any(outputs):
            from .hopper_product import Columns, add_products

            columns = None if d_c is None else Columns(d_c[start:stop], terms.scale, labels, start)
            add_products(operands, e, c, columns, total_e, active)
        elif any(outputs):
            assert segments is not None and active is not None
            multiply_where(problem, e, c, start, terms, segments, operands[0], total_e, d_c, shift, active)
        start = stop


def exact_where(
    problem: Problem,
    terms: RowTerms,
    segments: TokensByTarget,
    pool: Tensor,  # fp32 workspace of `least_pool` bytes at least
    d_e: Tensor | None,  # (N, D)
    d_c: Tensor | None,  # (V, D)
    d_bias: Tensor | None,  # (V,) fp32
    shift_e: Tensor | None,  # (D,) fp32: what dE's rows lose, times sigma
    shift_c: Tensor | None,  # (D,) fp32: what dC's rows lose, times the column weight
    wanted: Answer,  # whether anything is to be done
) -> None:
    """Fills d_e, d_c and d_bias with the gradients of every entry. Until the end d_e holds a copy of e."""
    n, d, active = problem.n, problem.d, wanted.flag
    if wanted.known() is False:
        return
    place = pool if d_e is None else d_e
    e = clean_rows(problem, place.view(-1).view(problem.e.dtype)[: n * d].view(n, d), active)
    total = None if d_e is None else label_rows(problem, terms, shift_e, pool[: n * d].view(n, d), active)
    rest = pool[-(-n * d // 64) * 64 :].view(torch.uint8)
    walk(problem, e, terms, segments, rest, 1, total, d_c, d_bias, shift_c, wanted)
    if d_e is not None and total is not None:
        scale_into(d_e, total, terms.scale, active)


def least_pool(problem: Problem) -> int:
    """Bytes that `exact_where` needs at least: the sums of dE and of the labels, and NARROWEST columns of dZ."""
    n, d = problem.n, problem.d
    return -(-n * d // 64) * 256 + sums_size(n, d) + n * NARROWEST * problem.operand_dtype.itemsize


def room_for(start: int, column: int, pool: Tensor, d_c: Tensor | None, widest: int) -> tuple[int, Tensor]:
    """(W, bytes): room for a run of W columns from `start` on, a multiple of 256 and at most `widest`, of `column`
    bytes each: in the pool (uint8), or where that is wider in the rows of dC that come later.
    """
    width = min(pool.numel() // column // 256 * 256, widest)
    if d_c is not None and width < widest:
        row = d_c.shape[1] * d_c.element_size()
        later = min((d_c.shape[0] - start) * row // (row + column) // 256 * 256, widest)
        if later > width:
            return later, d_c.view(-1).view(torch.uint8)[(start + later) * row :][: later * column]
    return width, pool[: width * column]


def products_by_hopper(c: Tensor) -> bool:
    """Whether hopper_product.py, which needs Gluon, is there and takes the rows of c."""
    if not hopper_fits(c, True):
        return False
    from .hopper_product import products_fit

    return products_fit(c)
