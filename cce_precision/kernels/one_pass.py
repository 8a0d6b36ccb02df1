"""Loss and gradients with three products instead of four, where every token's upstream gradient is the same (mean or
sum reduction).

By chunks of tokens: one logits product writes the powers A_ij = exp(z_ij - r_i) in bf16 over the whole vocabulary, the
target's entry 0, with the target's logit as the reference r_i. The row sum of A is then the odds against the target:
nll = log1p of it, and P_ij = A_ij exp(r_i - lse_i) is known once the row is complete. So dE_i = exp(r_i - lse_i) (A
C)_i and dC += A^T E' with rows e'_i = exp(r_i - lse_i) e_i rounded to bf16; the target's terms are added in fp32.

The upstream gradient is known in the backward pass alone, and dC is to be rounded once. So the last chunk's product
with dC waits for it (`finished`): its epilogue adds the sums of the chunks before, the target's terms and the factor,
and rounds. Where the workspace holds the powers of all tokens, that is the whole product, and there are no fp32 sums.

A row block in which a power came near to overflow is computed again from the row maximum, on the device: right for any
logits. bf16 alone, whose range is that of fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Operand
from ..problem import Heads, Plan, Problem
from .dense import accumulate_product
from .dz import block_rows, write_powers
from .entry import entry
from .exact import products_by_hopper
from .primitives import wide
from .terms import RowTerms, TokensByTarget, finish_columns, scale_into

__all__ = ["Chunks", "Unfinished", "chunks_of", "finished", "forward_one_pass", "shapes"]

_FEWEST_TOKENS = 1024
_FEWEST_KEPT = 128
_COLUMNS_A_SUM = (
    32768  # tensor cores truncate: the error of one long sum over the vocabulary would show beside the rounding of A
)
_LARGEST_EXPONENT = 60.0  # e^60 times any vocabulary stays below the largest fp32
_SUMS = 2**26  # bytes of dC's fp32 sums in a run of columns, where the library computes the product that waits


@dataclass(frozen=True)
class Chunks:
    """How the tokens are shared out."""

    tokens: int  # in a chunk that the forward pass is done with
    kept: int  # the last ones, whose product with dC waits for the backward pass


class Unfinished(NamedTuple):
    """The gradients of sum_i nll_i before their factor is known. Empty where not wanted."""

    unit_e: Tensor  # (N, D) fp32
    sums_c: Tensor  # (V, D) fp32: of the tokens before the kept ones, without the target's terms; empty for none
    powers: Tensor  # (kept, V rounded up to 8) bf16
    rows: Tensor  # (kept, D) bf16: exp(r_i - lse_i) e_i
    label: Tensor  # (N,) fp32: P_t - 1, 0 where ignored


def chunks_of(problem: Problem, plan: Plan) -> Chunks | None:
    """The chunks, or None where one pass does not fit the call or the workspace that it allows.

    The workspace holds everything but the gradients; as many tokens are kept as it holds with them, 128 at least.
    """
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
    room, sums = plan.workspace_mb * 2**20 - 4 * n * d, 4 * v * d
    token = _bytes_kept(problem) + 2 * d + 8 * (v // 256 + 1)  # with a clean copy of e and the statistics
    if plan.one_pass is not None and not plan.one_pass[1]:
        most = room // token // 128 * 128
        return None if most < min(n, _FEWEST_TOKENS) else Chunks(_even(n, most), 0)
    gradients = 2 * (v + n) * d
    if n * token + gradients <= room:
        return Chunks(n, n)
    most = (room - sums) // token // 128 * 128
    if most < min(n, _FEWEST_TOKENS):
        return Chunks(n, n) if n * token <= room else None
    kept = max(_FEWEST_KEPT, (room - sums - gradients) // _bytes_kept(problem) // 128 * 128)
    return Chunks(n, n) if kept >= n else Chunks(_even(n - kept, most), kept)


def _bytes_kept(problem: Problem) -> int:
    """Bytes a token of `Unfinished.powers` and `rows`."""
    return 2 * (_padded(problem.v) + problem.d)


def _padded(v: int) -> int:
    return -(-v // 8) * 8


def _even(tokens: int, most: int) -> int:
    """Tokens a chunk, a multiple of 128: as few chunks of at most `most` as there can be, and all alike."""
    return min(most, -(-tokens // (-(-tokens // most) * 128)) * 128)


def shapes(problem: Problem, plan: Plan) -> Unfinished | None:
    """What `forward_one_pass` leaves, as tensors without values; None where one pass does not fit."""
    if plan.one_pass is None or (chunks := chunks_of(problem, plan)) is None:
        return None
    (need_e, need_c, _), n, d, like = plan.one_pass, problem.n, problem.d, problem.e
    kept = chunks.kept if need_c else 0
    sums = problem.v if need_c and kept < n else 0
    return Unfinished(
        like.new_empty((n, d) if need_e else (0,), dtype=torch.float32),
        like.new_empty((sums, d) if sums else (0,), dtype=torch.float32),
        like.new_empty((kept, _padded(problem.v)) if kept else (0,), dtype=problem.c.dtype),
        like.new_empty((kept, d) if kept else (0,), dtype=problem.c.dtype),
        like.new_empty(n if need_c else 0, dtype=torch.float32),
    )


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


def _plain_terms(targets: Tensor, reference: Tensor, label: Tensor, scale: Tensor) -> RowTerms:
    """Terms that make dZ the powers relative to `reference` (T,), with the label apart."""
    none = torch.zeros_like(reference)
    rows = torch.stack([reference, torch.ones_like(reference), none, none, none, none])
    return RowTerms(targets, rows, label, scale, False, False, False, False)


def _powers(problem: Problem, e: Tensor, targets: Tensor, reference: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Fills powers (T, V); returns (sum of each row's powers, the reference that they are relative to), (T,) each."""

    def terms(r: Tensor) -> RowTerms:
        return _plain_terms(targets, r, r, r)

    stats = write_powers(problem, e, problem.c, terms(reference), powers, None, None)
    _, top = fold_stats(stats)
    high = top - reference > _LARGEST_EXPONENT  # such rows start again from their maximum
    reference = torch.where(high, top, reference)
    height = block_rows(problem.c)
    blocks = -(-high.numel() // height)
    again = torch.nn.functional.pad(high, (0, blocks * height - high.numel())).view(blocks, height).any(1)
    write_powers(problem, e, problem.c, terms(reference), powers, again.to(torch.int32), stats)
    return fold_stats(stats)[0], reference


def forward_one_pass(problem: Problem, plan: Plan) -> tuple[Heads, Unfinished]:
    """The heads, and what `finished` makes the gradients of that plan.one_pass asks for (of e, c; a bias never comes
    here).

    Requires `chunks_of` not None. No host synchronisation.
    """
    chunks, left = chunks_of(problem, plan), shapes(problem, plan)
    assert chunks is not None and left is not None
    n, v, d, device = problem.n, problem.v, problem.d, problem.e.device
    c, targets = problem.c, problem.targets
    counts = targets >= 0
    features = min(1024, triton.next_power_of_2(d))
    z_t = torch.empty(n, dtype=torch.float32, device=device)
    nll, lse, label = torch.zeros_like(z_t), torch.zeros_like(z_t), torch.zeros_like(z_t)
    early = n - left.powers.shape[0]

    def run(chunk: slice, powers: Tensor) -> Tensor:
        """Heads, label and dE of a chunk; fills its powers and returns its rows e'."""
        size = chunk.stop - chunk.start
        inside = counts[chunk]
        e = torch.where(inside[:, None], problem.e[chunk], 0).contiguous()
        target_logits_kernel[(size,)](e, c, targets[chunk], z_t[chunk], d, tuple(c.stride()), FEATURES=features)
        odds, reference = _powers(problem, e, targets[chunk], z_t[chunk], powers)
        gap = torch.log(odds) + (reference - z_t[chunk])  # log of the odds against the target
        moved = torch.clamp(gap, min=0) + torch.log1p(torch.exp(-gap.abs()))
        loss = torch.where(reference == z_t[chunk], torch.log1p(odds), moved)
        nll[chunk] = torch.where(inside, loss, 0)
        lse[chunk] = torch.where(inside, z_t[chunk] + loss, 0)
        label[chunk] = torch.where(inside, torch.expm1(-loss), 0)
        factor = torch.where(inside, torch.exp(reference - z_t[chunk] - loss), 0)  # exp(r - lse)
        if left.unit_e.numel():
            for column in range(0, v, _COLUMNS_A_SUM):
                part = slice(column, min(column + _COLUMNS_A_SUM, v))
                accumulate_product(left.unit_e[chunk], powers[:, part], c[part], column == 0)
            finish_rows_kernel[(size, triton.cdiv(d, features))](
                left.unit_e[chunk], c, targets[chunk], factor, label[chunk], d, tuple(c.stride()), FEATURES=features
            )
        return (e * factor[:, None]).to(c.dtype)

    if early:
        powers = torch.empty((min(chunks.tokens, early), _padded(v)), dtype=c.dtype, device=device)[:, :v]
        for start in range(0, early, chunks.tokens):
            chunk = slice(start, min(start + chunks.tokens, early))
            own = powers[: chunk.stop - start]
            rows = run(chunk, own)
            if left.sums_c.numel():
                accumulate_product(left.sums_c, own.T, rows, start == 0)
        del powers, own
    if early < n:
        left.rows.copy_(run(slice(early, n), left.powers[:, :v]))
    argmax = torch.empty(0, dtype=torch.int64, device=device)
    return Heads(nll, lse, nll.new_empty(0), nll.new_empty(0), argmax), left._replace(label=label[: left.label.numel()])


def finished(problem: Problem, left: Unfinished, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(dE, dC) in the dtypes of e and c: what `forward_one_pass` left times factor (0-dim fp32), each rounded once."""
    d_e = d_c = None
    if left.unit_e.numel():
        d_e = torch.empty(problem.e.shape, dtype=problem.e.dtype, device=factor.device)
        scale_into(d_e, left.unit_e, factor)
    if left.label.numel():
        d_c = torch.empty(problem.c.shape, dtype=problem.c.dtype, device=factor.device)
        _finish_classifier(problem, left, factor, d_c)
    return d_e, d_c


def _finish_classifier(problem: Problem, left: Unfinished, factor: Tensor, d_c: Tensor) -> None:
    """d_c = (the sums + powers^T rows + the target's terms) factor."""
    v, d = d_c.shape
    e, powers = problem.e.contiguous(), left.powers[:, :v]
    base = left.sums_c if left.sums_c.numel() else None
    segments = TokensByTarget.of(problem.targets, v)
    if products_by_hopper(problem.c):
        from .hopper_product import Columns, Labels, add_products

        labels = Labels(e, problem.targets, left.label, segments)
        add_products([powers], left.rows, problem.c, Columns(d_c, factor, labels, 0, base), None)
        return
    terms = _plain_terms(problem.targets, left.label, left.label, factor)
    width = min(v, max(1024, _SUMS // (4 * d) // 8 * 8))
    sums = torch.empty((width, d), dtype=torch.float32, device=d_c.device)
    for start in range(0, v, width):
        run = slice(start, min(start + width, v))
        total = sums[: run.stop - start]
        if base is not None:
            total.copy_(base[run])
        accumulate_product(total, powers[:, run].T, left.rows, base is None)
        finish_columns(d_c, total, start, e, terms, segments, None, None, None)
