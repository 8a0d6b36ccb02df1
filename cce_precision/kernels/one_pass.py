"""Loss and gradients with three products instead of four, where every token's upstream gradient is the same (mean or
sum reduction).

One logits product writes the powers A_ij = exp(z_ij - r_i) in bf16 over the whole vocabulary, the target's entry 0,
with the target's logit as the reference r_i. The row sum of A is then the odds against the target: nll = log1p of it,
and P_ij = A_ij exp(r_i - lse_i) is known once the row is complete. So dE_i = exp(r_i - lse_i) (A C)_i and dC = A^T E'
with rows e'_i = exp(r_i - lse_i) e_i rounded to bf16; the target's terms are added in fp32.

With few tokens, fewer than 2 D, the powers of all take less memory than fp32 sums of dC. They wait for the backward
pass, which knows the upstream gradient: its products are those of the dense pass, dC rounded once in their epilogue.
With more tokens they still do where the workspace holds them and the products are our own, which is faster. Else they
come by chunks, whose products follow at once into fp32 sums of both gradients; the backward pass scales and rounds
them.

A row block in which a power came near to overflow is computed again from the row maximum, on the device: right for any
logits. bf16 alone, whose range is that of fp32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import Operand
from ..problem import Heads, Plan, Problem, flushed_below
from .dense import accumulate_product, slices
from .entry import entry
from .labels import Labels, sums_size
from .launch import cdiv, descriptor_fits, hopper_fits, multiprocessors, next_power_of_2
from .one_pass_rows import Rows, fill_powers, finish_rows, plain_terms, weighted_rows
from .schedule import WIDEST, best_width
from .terms import TokensByTarget, clean_rows, finish_columns, scale_into

__all__ = ["Unfinished", "finished", "forward_one_pass", "keeps_powers", "shapes", "tokens_a_chunk"]

_FEWEST_TOKENS = 1024
_COLUMNS_A_SUM = (
    32768  # tensor cores truncate: the error of one long sum over the vocabulary would show beside the rounding of A
)
_LIBRARY_BELOW = 2048  # features: with fewer the library's products are faster than hopper_product.py's


class Unfinished(NamedTuple):
    """The gradients of sum_i nll_i before their factor is known: as sums, or as the powers of all tokens. The others
    are empty, and sums that are not wanted.
    """

    sums_e: Tensor  # (N, D) fp32
    sums_c: Tensor  # (V, D) fp32
    powers: Tensor  # (runs x rows, columns of a run) bf16, see `Runs`
    factor: Tensor  # (N,) fp32: exp(r_i - lse_i)
    label: Tensor  # (N,) fp32: P_t - 1, 0 where ignored


class Runs(NamedTuple):
    """How the powers of all tokens lie in memory: runs of columns below each other, each a matrix of its own, so that
    few pages hold what a product reads together.
    """

    count: int
    rows: int
    columns: int

    @staticmethod
    def of(problem: Problem) -> Runs:
        """Of shapes, dtypes and the device alone."""
        n, v, d = problem.n, problem.v, problem.d
        if not _by_hopper(problem):
            return Runs(1, n, -(-v // 8) * 8)
        columns = best_width(n, v, d, WIDEST, 1, (True, True), multiprocessors(problem.e.device), True)
        return Runs(-(-v // columns), -(-n // 128) * 128, columns)


def _by_hopper(problem: Problem) -> bool:
    return hopper_fits(problem.c, True) and problem.d % 8 == 0


def _room(problem: Problem, plan: Plan) -> int | None:
    """Bytes of the workspace; None where one pass does not compute this call in any."""
    variant = plan.variant
    plain = problem.bias is None and problem.softcap is None and problem.temperature == 1.0
    heads = plan.want_entropy or plan.want_smooth or plan.want_argmax
    exact = variant.label_apart and not variant.filtered and variant.operand is Operand.INPUT
    bf16 = problem.operand_dtype is torch.bfloat16
    fits = plain and exact and bf16 and not heads and problem.n > 0
    return plan.workspace_mb * 2**20 if fits and plan.workspace_mb is not None else None


def keeps_powers(problem: Problem, plan: Plan) -> bool:
    """Whether the powers of all tokens wait for the backward pass: dC is wanted, sums of it would take more memory or
    time, and the workspace holds the powers beside the gradients.
    """
    room, need_c = _room(problem, plan), plan.one_pass is not None and plan.one_pass[1]
    if room is None or not need_c or (problem.n >= 2 * problem.d and _by_library(problem)):
        return False
    n, v, d, runs = problem.n, problem.v, problem.d, Runs.of(problem)
    sums = 4 * d * min(v, WIDEST) if _by_library(problem) else 0
    backward = 6 * n * d + sums_size(n, d) + sums + 2 * (n + v) * d
    forward = 2 * n * d + 16 * n * (v // 256 + 1)
    return 2 * runs.count * runs.rows * runs.columns + max(forward, backward) <= room


def _by_library(problem: Problem) -> bool:
    return problem.d < _LIBRARY_BELOW or not _by_hopper(problem)


def tokens_a_chunk(problem: Problem, plan: Plan) -> int | None:
    """Tokens a chunk, or None where one pass by chunks does not fit the call or the workspace that it allows beside the
    gradients.
    """
    if (room := _room(problem, plan)) is None:
        return None
    n, v, d = problem.n, problem.v, problem.d
    fixed = 4 * v * d + 6 * n * d
    token = 2 * v + 8 * (v // 256 + 1) + 2 * d
    most = (room - fixed) // token // 128 * 128
    if most < min(n, _FEWEST_TOKENS):
        return None
    chunks = -(-n // most)
    return min(-(-n // (chunks * 128)) * 128, most)


def shapes(problem: Problem, plan: Plan) -> Unfinished | None:
    """What `forward_one_pass` leaves, as tensors without values; None where one pass does not fit."""
    if plan.one_pass is None:
        return None
    n, v, d = problem.n, problem.v, problem.d
    new = functools.partial(problem.e.new_empty, dtype=torch.float32)  # no two of an operator's outputs are one
    if keeps_powers(problem, plan):
        runs = Runs.of(problem)
        powers = new((runs.count * runs.rows, runs.columns), dtype=problem.c.dtype)
        return Unfinished(new(0), new(0), powers, new(n), new(n))
    if tokens_a_chunk(problem, plan) is None:
        return None
    sums_e, sums_c = (new((x, d) if wanted else 0) for x, wanted in zip((n, v), plan.one_pass))
    return Unfinished(sums_e, sums_c, new(0), new(0), new(0))


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


def _aligned(problem: Problem) -> Problem:
    """The same with a classifier that the bulk copy engine reads, where `Runs` counts on it."""
    if not _by_hopper(problem) or descriptor_fits(problem.c):
        return problem
    return dataclasses.replace(problem, c=problem.c.clone(memory_format=torch.contiguous_format))


def forward_one_pass(problem: Problem, plan: Plan) -> tuple[Heads, Unfinished]:
    """The heads, and what `finished` makes the gradients of that plan.one_pass asks for (of e, c; a bias never comes
    here).

    Requires `shapes` not None. No host synchronisation.
    """
    left = shapes(problem, plan)
    assert left is not None
    if left.powers.numel():
        rows = Rows.empty(problem.n, problem.e.device)
        powers = left.powers[:, : min(problem.v, left.powers.shape[1])]
        below = flushed_below(problem, plan)
        fill_powers(_aligned(problem), clean_rows(problem), problem.targets, powers, rows, below)
        left = left._replace(factor=rows.factor, label=rows.label)
    else:
        rows = _by_chunks(problem, plan, left)
    none = rows.nll.new_empty
    return Heads(rows.nll, rows.lse, none(0), none(0), none(0, dtype=torch.int64)), left


def _by_chunks(problem: Problem, plan: Plan, left: Unfinished) -> Rows:
    """Fills the sums, chunk after chunk of tokens."""
    tokens = tokens_a_chunk(problem, plan)
    assert tokens is not None
    n, v, d, c, targets = problem.n, problem.v, problem.d, problem.c, problem.targets
    e = clean_rows(problem)
    powers = torch.empty((tokens, -(-v // 8) * 8), dtype=c.dtype, device=c.device)[:, :v]
    rows = Rows.empty(n, c.device)
    for chunk in slices(n, tokens):
        own, some = powers[: chunk.stop - chunk.start], rows.of(chunk)
        fill_powers(problem, e[chunk], targets[chunk], own, some, flushed_below(problem, plan))
        if left.sums_e.numel():
            for run in slices(v, _COLUMNS_A_SUM):
                accumulate_product(left.sums_e[chunk], own[:, run], c[run], run.start == 0)
            finish_rows(problem, left.sums_e[chunk], chunk, some)
        if left.sums_c.numel():
            accumulate_product(left.sums_c, own.T, weighted_rows(e[chunk], some.factor), chunk.start == 0)
    if left.sums_c.numel():
        values, order = torch.sort(targets, stable=True)
        width = min(512, next_power_of_2(d))
        add_labels_kernel[(n, cdiv(d, width))](
            left.sums_c, e, values, order, rows.label, n, d, TOKENS=16, FEATURES=width
        )
    return rows


def finished(
    problem: Problem, left: Unfinished, factor: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dE, dC) in the dtypes of e and c: what `forward_one_pass` left times factor (0-dim fp32), each rounded once; 0
    where no token counts, whose mean has no finite factor.
    """
    factor = torch.where((problem.targets >= 0).any(), factor, 0.0)
    d_e, d_c = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
        for x, wanted in zip((problem.e, problem.c), need)
    )
    sums_e = left.sums_e
    if left.powers.numel():
        sums_e = _products(_aligned(problem), left, factor, d_e is not None, d_c)
    elif d_c is not None:
        scale_into(d_c, left.sums_c, factor)
    if d_e is not None:
        scale_into(d_e, sums_e, factor)
    return d_e, d_c


def _products(problem: Problem, left: Unfinished, factor: Tensor, need_e: bool, d_c: Tensor | None) -> Tensor:
    """Fills d_c from the powers of all tokens. Returns dE without the factor, (N, D) fp32, if needed."""
    n, v, d, c = problem.n, problem.v, problem.d, problem.c
    e, runs = clean_rows(problem), Runs.of(problem)
    rows = weighted_rows(e, left.factor)
    total = torch.zeros((n, d) if need_e else 0, dtype=torch.float32, device=e.device)
    segments = None if d_c is None else TokensByTarget.of(problem.targets, v)
    terms = plain_terms(problem.targets, left.label.expand(6, -1), left.label, factor)  # the labels' alone
    library = _by_library(problem)
    sums = torch.empty((min(v, WIDEST), d) if library and d_c is not None else 0, dtype=torch.float32, device=e.device)
    width = min(runs.columns, WIDEST)
    labels = None
    if segments is not None and not library:
        labels = Labels.of(e, problem.targets, left.label, segments)
    for run in slices(v, width):
        start = run.start
        powers = left.powers.view(runs.count, runs.rows, runs.columns)[start // runs.columns, :n]
        powers = powers[:, start % runs.columns :][:, : run.stop - start]
        if not library:
            from .hopper_product import Columns, add_products

            columns = None if d_c is None else Columns(d_c[run], factor, labels, start)
            add_products([powers], rows, c[run], columns, total if need_e else None)
            continue
        if need_e:
            accumulate_product(total, powers, c[run], False)
        if d_c is not None:
            accumulate_product(sums[: run.stop - start], powers.T, rows, True)
            finish_columns(d_c, sums[: run.stop - start], start, e, terms, segments, None, None, None)
    if need_e:
        finish_rows(problem, total, slice(0, n), Rows(left.label, left.label, left.label, left.factor))
    return total
