"""Loss and gradients with three products instead of four, where every token's upstream gradient is the same (mean or
sum reduction).

By chunks of tokens: one logits product writes the powers A_ij = exp(z_ij - r_i) in bf16 over the whole vocabulary, the
target's entry 0, with the target's logit as the reference r_i. The row sum of A is then the odds against the target:
nll = log1p of it, and P_ij = A_ij exp(r_i - lse_i) is known once the row is complete. So dE_i = exp(r_i - lse_i) (A
C)_i and dC += A^T E' with rows e'_i = exp(r_i - lse_i) e_i rounded to bf16; the target's terms are added in fp32.
Gradients leave in fp32, unrounded.

A row block in which a power came near to overflow is computed again from the row maximum, on the device: right for any
logits. Memory: fp32 sums of dC and one chunk's powers. bf16 alone, whose range is that of fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Operand
from ..problem import Heads, Plan, Problem
from .dense import accumulate_product
from .dz import block_rows, write_powers
from .entry import entry
from .primitives import wide
from .terms import RowTerms, clean_rows, scale_into

__all__ = ["forward_one_pass", "scaled", "tokens_a_chunk"]

_FEWEST_TOKENS = 1024
_COLUMNS_A_SUM = (
    32768  # tensor cores truncate: the error of one long sum over the vocabulary would show beside the rounding of A
)
_LARGEST_EXPONENT = 60.0  # e^60 times any vocabulary stays below the largest fp32


def tokens_a_chunk(problem: Problem, plan: Plan) -> int | None:
    """Tokens a chunk, or None where one pass does not fit the call or the workspace that it allows."""
    variant = plan.variant
    plain = problem.bias is None and problem.softcap is None and problem.temperature == 1.0
    heads = plan.want_entropy or plan.want_smooth or plan.want_argmax
    exact = variant.label_apart and not variant.filtered and variant.operand is Operand.INPUT
    if (
        not (plain and exact)
        or heads
        or problem.operand_dtype is not torch.bfloat16
        or plan.workspace_mb is None
        or not problem.n
    ):
        return None
    n, v, d = problem.n, problem.v, problem.d
    fixed = 4 * v * d + 6 * n * d
    token = 2 * v + 8 * (v // 256 + 1) + 2 * d
    most = (plan.workspace_mb * 2**20 - fixed) // token // 128 * 128
    if most < min(n, _FEWEST_TOKENS):
        return None
    chunks = -(-n // most)
    return min(-(-n // (chunks * 128)) * 128, most)


@entry
@triton.jit
def target_logits_kernel(e, c, targets, out, d, stride_c, FEATURES: tl.constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    total = tl.zeros((FEATURES,), tl.float32)
    if target >= 0:
        for k in range(0, d, FEATURES):
            j = k + tl.arange(0, FEATURES)
            left = tl.load(e + wide(d) * row + j, mask=j < d, other=0).to(tl.float32)
            right = tl.load(c + target * stride_c[0] + j.to(tl.int64) * stride_c[1], mask=j < d, other=0).to(tl.float32)
            total += left * right
    tl.store(out + row, tl.sum(total, 0))


@entry
@triton.jit
def fold_stats_kernel(stats, odds, top, n, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Row sums and row maxima over the column tiles, in an order that depends on their number alone."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TILES, ROWS), tl.float32)
    highest = tl.full((TILES, ROWS), float("-inf"), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & (rows < n)[None, :]
        at = stats + tile[:, None].to(tl.int64) * n + rows[None, :]
        total += tl.load(at, mask=inside, other=0.0)
        highest = tl.maximum(highest, tl.load(at + wide(n) * tiles, mask=inside, other=float("-inf")))
    tl.store(odds + rows, tl.sum(total, 0), mask=rows < n)
    tl.store(top + rows, tl.max(highest, 0), mask=rows < n)


def fold_stats(stats: Tensor) -> tuple[Tensor, Tensor]:
    """(row sums, row maxima), (N,) each, of (2, column tiles, N)."""
    _, tiles, n = stats.shape
    odds, top = stats.new_empty(n), stats.new_empty(n)
    fold_stats_kernel[(triton.cdiv(n, 32),)](stats, odds, top, n, tiles, ROWS=32, TILES=32)
    return odds, top


@entry
@triton.jit
def finish_rows_kernel(
    total,  # (N, D) fp32, in and out
    c,  # (V, D)
    targets,  # (N,), -1 where ignored
    factor,  # (N,) fp32 of the sums
    label,  # (N,) fp32 of c_t
    d,
    stride_c,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    value = tl.zeros((FEATURES,), tl.float32)
    target = tl.load(targets + row)
    at = total + wide(d) * row + j
    if target >= 0:
        value = tl.load(at, mask=j < d, other=0.0) * tl.load(factor + row)
        c_t = tl.load(c + target * stride_c[0] + j.to(tl.int64) * stride_c[1], mask=j < d, other=0)
        value += tl.load(label + row) * c_t.to(tl.float32)
    tl.store(at, value, mask=j < d)


@entry
@triton.jit
def add_labels_kernel(
    total,  # (V, D) fp32, in and out
    e,  # (N, D) contiguous
    values,  # (N,) int64 targets in rising order
    tokens,  # (N,) int64 the tokens that they belong to
    label,  # (N,) fp32
    n,
    d,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """The program of the first token of each target adds label_i e_i of all its tokens, in order."""
    place = tl.program_id(0)
    j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    target = tl.load(values + place)
    before = tl.load(values + place - 1, mask=place > 0, other=-1)
    if target != before:
        at = total + target * d + j
        value = tl.load(at, mask=j < d, other=0.0)
        more = target >= 0
        i = place
        while more:
            block = i + tl.arange(0, TOKENS)
            same = tl.load(values + block, mask=block < n, other=-1) == target
            token = tl.load(tokens + block, mask=same, other=0)
            x = tl.load(label + token, mask=same, other=0.0)
            inside = same[:, None] & (j < d)[None, :]
            value += tl.sum(
                x[:, None] * tl.load(e + token[:, None] * d + j[None, :], mask=inside, other=0).to(tl.float32), 0
            )
            more = tl.sum(same.to(tl.int32)) == TOKENS
            i += TOKENS
        tl.store(at, value, mask=j < d)


def scaled(unit: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """unit (fp32, contiguous) times factor (0-dim fp32), rounded once to the dtype of `like`."""
    out = torch.empty(unit.shape, dtype=like.dtype, device=unit.device)
    scale_into(out, unit, factor)
    return out


def _powers(problem: Problem, e: Tensor, targets: Tensor, reference: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Fills powers (T, V); returns (sum of each row's powers, the reference that they are relative to), (T,) each."""

    def terms(r: Tensor) -> RowTerms:
        none = torch.zeros_like(r)
        rows = torch.stack([r, torch.ones_like(r), none, none, none, none])
        return RowTerms(targets, rows, none, none, False, False, False, False)

    stats = write_powers(problem, e, problem.c, terms(reference), powers, None, None)
    _, top = fold_stats(stats)
    high = top - reference > _LARGEST_EXPONENT  # such rows start again from their maximum
    reference = torch.where(high, top, reference)
    height = block_rows(problem.c)
    blocks = -(-high.numel() // height)
    again = torch.nn.functional.pad(high, (0, blocks * height - high.numel())).view(blocks, height).any(1)
    write_powers(problem, e, problem.c, terms(reference), powers, again.to(torch.int32), stats)
    return fold_stats(stats)[0], reference


def forward_one_pass(problem: Problem, plan: Plan) -> tuple[Heads, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The heads, and the gradients of sum_i nll_i that plan.one_pass asks for (of e, c; a bias never comes here), in
    fp32.

    Requires `tokens_a_chunk` not None. No host synchronisation.
    """
    tokens = tokens_a_chunk(problem, plan)
    assert tokens is not None and plan.one_pass is not None
    need_e, need_c, _ = plan.one_pass
    n, v, d, device = problem.n, problem.v, problem.d, problem.e.device
    e, c, targets = clean_rows(problem), problem.c, problem.targets
    counts = targets >= 0
    features = min(1024, triton.next_power_of_2(d))
    z_t = torch.empty(n, dtype=torch.float32, device=device)
    target_logits_kernel[(n,)](e, c, targets, z_t, d, tuple(c.stride()), FEATURES=features)
    nll, lse, label = torch.zeros_like(z_t), torch.zeros_like(z_t), torch.zeros_like(z_t)
    d_e = torch.empty((n, d), dtype=torch.float32, device=device) if need_e else None
    d_c = torch.empty((v, d), dtype=torch.float32, device=device) if need_c else None
    powers = torch.empty((tokens, -(-v // 8) * 8), dtype=c.dtype, device=device)[:, :v]

    for start in range(0, n, tokens):
        chunk = slice(start, min(start + tokens, n))
        size = chunk.stop - start
        inside = counts[chunk]
        odds, reference = _powers(problem, e[chunk], targets[chunk], z_t[chunk], powers[:size])
        gap = torch.log(odds) + (reference - z_t[chunk])  # log of the odds against the target
        moved = torch.clamp(gap, min=0) + torch.log1p(torch.exp(-gap.abs()))
        loss = torch.where(reference == z_t[chunk], torch.log1p(odds), moved)
        nll[chunk] = torch.where(inside, loss, 0)
        lse[chunk] = torch.where(inside, z_t[chunk] + loss, 0)
        label[chunk] = torch.where(inside, torch.expm1(-loss), 0)
        factor = torch.where(inside, torch.exp(reference - z_t[chunk] - loss), 0)  # exp(r - lse)
        if d_e is not None:
            for column in range(0, v, _COLUMNS_A_SUM):
                run = slice(column, min(column + _COLUMNS_A_SUM, v))
                accumulate_product(d_e[chunk], powers[:size, run], c[run], column == 0)
            finish_rows_kernel[(size, triton.cdiv(d, features))](
                d_e[chunk], c, targets[chunk], factor, label[chunk], d, tuple(c.stride()), FEATURES=features
            )
        if d_c is not None:
            scaled = (e[chunk] * factor[:, None]).to(c.dtype)
            accumulate_product(d_c, powers[:size].T, scaled, start == 0)
    if d_c is not None:
        values, order = torch.sort(targets, stable=True)
        width = min(512, features)
        add_labels_kernel[(n, triton.cdiv(d, width))](d_c, e, values, order, label, n, d, TOKENS=16, FEATURES=width)
    argmax = torch.empty(0, dtype=torch.int64, device=device)
    return Heads(nll, lse, nll.new_empty(0), nll.new_empty(0), argmax), (d_e, d_c, None)
