"""Rows of the exact gradients of a linear cross-entropy, in fp64 and without the rest: what `sampled` compares with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cce_precision.problem import Problem

__all__ = ["fast_rest", "target_logits", "token_rows", "vocabulary_rows"]

CPU_BLOCK, GPU_BLOCK = (256, 4096), (4096, 32768)  # tokens and columns of a block of the fp32 pass
ROW_BUDGET = 2**27  # fp64 logits held at a time


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _finish(z: Tensor, problem: Problem, columns: slice | Tensor) -> Tensor:
    """Logits (B, k) from products of rows of e and of c[columns], in place."""
    if problem.bias is not None:
        z += problem.bias[columns].to(z.dtype)
    if problem.softcap is not None:
        z.div_(problem.softcap).tanh_().mul_(problem.softcap)
    return z if problem.temperature == 1 else z.div_(problem.temperature)


def _slope(z: Tensor, problem: Problem) -> Tensor | float:
    """d z / d (e c^T), from the logits."""
    scale = 1 / problem.temperature
    if problem.softcap is None:
        return scale
    return (1 - (z * (problem.temperature / problem.softcap)).square()) * scale


def target_logits(problem: Problem, rows: Tensor) -> Tensor:
    """(B,) fp64 logits of the targets of these tokens."""
    found = []
    for part in rows.split(4096):
        column = problem.targets[part]
        z = (problem.e[part].double() * problem.c[column].double()).sum(1)
        found.append(_finish(z, problem, column))
    return torch.cat(found)


def _rest(z: Tensor, column: Tensor, inside: Tensor | None = None) -> Tensor:
    """(B,) log sum exp of the logits (B, k) but the one in `column` (B,), where that lies `inside` (B,); -inf where
    nothing is left. z is restored."""
    place = column[:, None]
    kept = z.gather(1, place)
    hidden = torch.full_like(kept, -torch.inf)
    z.scatter_(1, place, hidden if inside is None else torch.where(inside[:, None], hidden, kept))
    rest = z.logsumexp(1)
    z.scatter_(1, place, kept)
    return rest


def fast_rest(problem: Problem, rows: Tensor) -> Tensor:
    """(B,) log sum exp over the columns but the target, in fp32 (fp64 for fp64 operands), by blocks."""
    dtype = problem.compute_dtype
    cuda = problem.e.is_cuda
    height, width = GPU_BLOCK if cuda else CPU_BLOCK
    narrow = cuda and problem.e.dtype is problem.c.dtype and problem.e.dtype.itemsize == 2
    found = []
    for part in rows.split(height):
        e, targets = problem.e[part], problem.targets[part]
        e = e if narrow else e.to(dtype)
        rest = torch.full(part.shape, -torch.inf, dtype=dtype, device=e.device)
        for cols in _slices(problem.v, width):
            c = problem.c[cols]
            z = torch.mm(e, c.T, out_dtype=dtype) if narrow else e @ c.to(dtype).T
            z = _finish(z, problem, cols)
            local = targets - cols.start
            inside = (local >= 0) & (local < z.shape[1])
            rest = torch.logaddexp(rest, _rest(z, local.clamp(0, z.shape[1] - 1), inside))
        found.append(rest.double())
    return torch.cat(found)


def token_rows(problem: Problem, rows: Tensor, g: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    """Exact log sum exp but the target's, (B,), and exact dE rows, (B, D), of these tokens; fp64. g (B,)."""
    rests, results = [], []
    columns = 16384 if problem.e.is_cuda else 4096
    for part, upstream in zip(*(x.split(max(1, ROW_BUDGET // problem.v)) for x in (rows, g)), strict=True):
        e, targets = problem.e[part].double(), problem.targets[part]
        z = torch.empty(len(part), problem.v, dtype=torch.float64, device=e.device)
        for cols in _slices(problem.v, columns):
            z[:, cols] = _finish(e @ problem.c[cols].double().T, problem, cols)
        rest = _rest(z, targets)
        rests.append(rest)
        if not gradients:
            continue
        de = torch.zeros_like(e)
        entry = _Entries(problem, z.gather(1, targets[:, None])[:, 0], rest, upstream)
        for cols in _slices(problem.v, columns):
            here = torch.arange(cols.start, cols.stop, device=e.device) == targets[:, None]
            de += entry(z[:, cols], here) @ problem.c[cols].double()
        results.append(de)
    d = problem.d if gradients else 0
    return torch.cat(rests), torch.cat(results or [problem.e.new_zeros(0, d, dtype=torch.float64)])


class _Entries:
    """Gradients with respect to entries of e c^T, of some tokens: with q = log sum exp but the target's, and odds =
    exp(q - z_t), 1 - P_t = odds / (1 + odds) and P_j = exp(z_j - q) (1 - P_t): an error delta of q is at most a factor
    exp(delta) of every entry, however confident the token is."""

    def __init__(self, problem: Problem, z_target: Tensor, rest: Tensor, g: Tensor) -> None:
        self.problem, self.g = problem, g[:, None]
        self.complement = torch.sigmoid(rest - z_target)[:, None]
        self.rest = torch.where(rest.isneginf(), 0.0, rest)[:, None]

    def __call__(self, z: Tensor, is_target: Tensor) -> Tensor:
        """x (B, k) for logits z (B, k)."""
        p = torch.exp(z - self.rest) * self.complement
        return torch.where(is_target, -self.complement, p) * self.g * _slope(z, self.problem)


def vocabulary_rows(
    problem: Problem, columns: Tensor, tokens: Tensor, rest: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """dC rows (k, D) and the sums of their terms' magnitudes, fp64, over all `tokens`; rest and g (M,)."""
    c = problem.c[columns].double()
    dc, size = torch.zeros_like(c), torch.zeros_like(c)
    step = max(1, min(8192, ROW_BUDGET // max(len(columns), problem.d)))
    for part, q, upstream in zip(*(x.split(step) for x in (tokens, rest, g)), strict=True):
        e = problem.e[part].double()
        z = _finish(e @ c.T, problem, columns)
        x = _Entries(problem, target_logits(problem, part), q, upstream)(z, problem.targets[part][:, None] == columns)
        dc += x.T @ e
        size += x.abs().T @ e.abs()
    return dc, size
