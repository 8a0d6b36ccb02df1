"""The unfiltered backward pass in a workspace that does not hold the fp32 sums of dE: the tokens come by chunks, and
the logits are computed once more.

Where dC is wanted its memory is the workspace of dE, which is done first: a chunk of tokens over the whole vocabulary
at a time, in fp32 sums of that chunk alone. Then dC, by runs of columns: dZ of a run lies in the rows of dC that come
later, beside a copy of e in the workspace or in the last rows. The last runs, which have too few rows after them, go by
chunks of tokens in the workspace, in fp32 sums of the run's columns.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Heads, Plan, Problem, Upstream
from .dense import Room, accumulate_parts, is_split, of_columns, slices
from .dz import Run, low_of, write_dz
from .exact import room_for
from .row_terms import row_terms
from .schedule import WIDEST
from .terms import RowTerms, TokensByTarget, clean_rows, finish_bias, finish_columns, label_rows, weighted_sum

__all__ = ["backward_by_tokens", "goes_by_tokens"]

FEWEST_TOKENS = 256  # of a chunk
NARROWEST = 256  # columns of a run


def goes_by_tokens(problem: Problem, plan: Plan, need: tuple[bool, bool, bool]) -> bool:
    """Whether dE goes by chunks of tokens: the caller has set a workspace, and it does not hold the sums of all."""
    asked = plan.workspace_mb is not None and need[0] and not plan.partial_e and not plan.variant.filtered
    return problem.n > 0 and asked and not Room.of(problem, plan, need).fits


def room_of(problem: Problem, plan: Plan) -> int:
    """Bytes of the workspace beside dE."""
    return max((plan.workspace_mb or 0) * 2**20 - problem.n * problem.d * problem.e.element_size(), 0)


def piece(n: int, v: int, room: int, entry: int, token: int, column: int) -> tuple[int, int]:
    """(tokens, columns) of a piece of dZ that `room` bytes hold: `entry` bytes for each entry, `token` for each token
    and `column` for each column. Those with the fewest pieces; of equal ones the most tokens, which a device computes
    side by side. The smallest piece may need more.
    """

    def width(tokens: int) -> int:
        columns = (room - tokens * token) // (tokens * entry + column) // 256 * 256
        return min(max(columns, NARROWEST), -(-v // 8) * 8, WIDEST)

    def pieces(tokens: int) -> int:
        return -(-n // tokens) * -(-v // width(tokens))

    most = min(-(-n // 128) * 128, max((room - NARROWEST * column) // (token + NARROWEST * entry), FEWEST_TOKENS))
    tokens = min(range(most // 128 * 128, min(FEWEST_TOKENS, most) - 1, -128), key=pieces)
    return min(tokens, n), width(tokens)


class Place:
    """Bytes that are cut into tensors, each at a multiple of 16 bytes, where the bulk copy engine reads them."""

    SLACK = 16

    def __init__(self, room: Tensor) -> None:
        self._rest = room

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rest, size = self._rest[-self._rest.data_ptr() % 16 :], math.prod(shape) * dtype.itemsize
        self._rest = rest[size:]
        return rest[:size].view(dtype).view(shape)


def backward_by_tokens(
    problem: Problem, plan: Plan, heads: Heads, upstream: Upstream, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dE, dC, dbias) in the dtypes of e, c and bias, the last two where needed; see `goes_by_tokens`."""
    _, need_c, need_bias = need
    device = problem.e.device
    terms = row_terms(problem, plan, heads, upstream, problem.targets)
    room = room_of(problem, plan)
    d_bias = torch.zeros(problem.v, dtype=torch.float32, device=device) if need_bias else None
    d_c = torch.empty((problem.v, problem.d), dtype=problem.c.dtype, device=device) if need_c else None
    place = None if d_c is None else d_c.view(-1).view(torch.uint8)
    parts = 2 if is_split(problem, plan) else 1
    d_e = embeddings(problem, terms, parts, room, place, d_bias)
    if d_c is not None:
        segments = None if terms.label_inside else TokensByTarget.of(terms.targets, problem.v)
        shift = weighted_sum(problem.e, terms.sigma) if terms.smooth_apart else None
        Classifier(d_c, problem, terms, segments, shift, parts).fill(room)
    return d_e, d_c, finish_bias(problem, terms, d_bias)


def embeddings(
    problem: Problem,
    terms: RowTerms,
    parts: int,  # of an entry of dZ
    room: int,  # bytes of the workspace
    place: Tensor | None,  # uint8, to be used instead where it holds a piece
    d_bias: Tensor | None,  # (V,) fp32: += the column sums of dZ
) -> Tensor:
    """dE, a chunk of tokens over the whole vocabulary at a time. Each chunk's clean rows wait in their rows of dE."""
    n, v, d, dtype = problem.n, problem.v, problem.d, problem.operand_dtype
    entry = parts * dtype.itemsize
    most = room if place is None else max(room, place.numel())
    tokens, width = piece(n, v, most - 2 * Place.SLACK, entry, 4 * d, 0)
    size = tokens * (4 * d + width * entry) + 2 * Place.SLACK
    if place is None or place.numel() < size:
        place = torch.empty(size, dtype=torch.uint8, device=problem.e.device)
    cut = Place(place)
    sums, dz = cut.take((tokens, d), torch.float32), cut.take((parts, tokens, width), dtype)
    shift = weighted_sum(problem.c, problem.column_weight) if terms.smooth_apart else None
    runs = [Run(s.start, problem.c[s], *of_columns(problem, s)) for s in slices(v, width)]
    d_e = torch.empty((n, d), dtype=problem.e.dtype, device=problem.e.device)
    for chunk in Chunk.of(problem, terms, tokens):
        some = chunk.problem
        e = clean_rows(some, d_e[chunk.place])
        total = label_rows(some, chunk.terms, shift, sums[: some.n])
        for run in runs:
            operands = list(dz[:, : some.n, : run.c.shape[0]])
            column_sums, _ = write_dz(some, e, run, chunk.terms, operands[0], low_of(operands), d_bias is not None)
            if d_bias is not None and column_sums is not None:
                d_bias[run.start : run.start + column_sums.numel()] += column_sums
            accumulate_parts(total, operands, run.c, False)
        torch.mul(total, terms.scale, out=e)
    return d_e


@dataclass(frozen=True)
class Chunk:
    """Some tokens."""

    place: slice
    problem: Problem
    terms: RowTerms

    @staticmethod
    def of(problem: Problem, terms: RowTerms, tokens: int) -> list[Chunk]:
        """All, `tokens` a chunk."""
        return [
            Chunk(x, dataclasses.replace(problem, e=problem.e[x], targets=problem.targets[x]), terms.of(x))
            for x in slices(problem.n, tokens)
        ]


@dataclass(frozen=True)
class Classifier:
    """dC (V, D), which is filled run after run of columns."""

    out: Tensor
    problem: Problem
    terms: RowTerms
    segments: TokensByTarget | None
    shift: Tensor | None  # (D,) fp32: what its rows lose, times the column weight
    parts: int  # of an entry of dZ

    def fill(self, room: int) -> None:
        """`room`: bytes of the workspace."""
        problem, out = self.problem, self.out
        n, v, d, size = problem.n, problem.v, problem.d, problem.operand_dtype.itemsize
        start, entry, copy = 0, size * self.parts, n * d * size
        last = v if copy <= room else max(v - n, 0)  # the rows of dC from there on hold the clean rows of e
        if last > 0:
            pool = torch.empty(room - copy if last == v else room, dtype=torch.uint8, device=out.device)
            e, whole = clean_rows(problem, None if last == v else out[last:]), Chunk.of(problem, self.terms, n)
            slack = -(-2 * Place.SLACK // NARROWEST)  # bytes for each column of a run
            while start < last:
                width, place = room_for(start, n * entry + 4 * d + slack, pool, out[:last], WIDEST)
                if width < min(NARROWEST, last - start):
                    break
                run = slice(start, min(start + width, last))
                self._fill(run, whole, e, place)
                start = run.stop
            del e, pool, place
        if start < v:
            room -= 3 * Place.SLACK + self.terms.terms.nbytes  # the chunks have copies of their terms
            tokens, width = piece(n, v - start, room, entry, d * size, 4 * d)
            chunks = Chunk.of(problem, self.terms, tokens)
            most = tokens * (d * size + width * entry) + 4 * d * width + 3 * Place.SLACK
            place = torch.empty(most, dtype=torch.uint8, device=out.device)
            for run in slices(v - start, width):
                self._fill(slice(start + run.start, start + run.stop), chunks, None, place)

    def _fill(self, run: slice, chunks: list[Chunk], e: Tensor | None, place: Tensor) -> None:
        """The rows of a run, in sums over the chunks. e: the clean rows of the only chunk; None: each chunk's are
        cleaned in `place` (uint8).
        """
        problem, width, cut = self.problem, run.stop - run.start, Place(place)
        d, dtype, tokens = problem.d, problem.operand_dtype, chunks[0].problem.n
        sums = cut.take((width, d), torch.float32)
        dz = cut.take((self.parts, tokens, -(-width // 8) * 8), dtype)
        clean = cut.take((tokens, d), dtype) if e is None else e
        of_run = Run(run.start, problem.c[run], *of_columns(problem, run))
        for chunk in chunks:
            rows = clean_rows(chunk.problem, clean[: chunk.problem.n]) if e is None else e
            operands = list(dz[:, : chunk.problem.n, :width])
            write_dz(chunk.problem, rows, of_run, chunk.terms, operands[0], low_of(operands), False)
            accumulate_parts(sums, [x.T for x in operands], rows, chunk.place.start == 0)
        all_rows = problem.e.contiguous() if e is None else e
        finish_columns(self.out, sums, run.start, all_rows, self.terms, self.segments, self.shift, of_run.weight, None)
