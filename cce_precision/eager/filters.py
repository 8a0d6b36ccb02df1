"""What a filter makes of a block of the softmax: P^, and the counter-based hash that its draws come from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Filter, FilterKind
from .tiles import Columns

__all__ = ["hash32", "sampled", "tile_survives", "uniform"]

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective mixer of 32-bit words held in int64 (constants: C. Wellons, hash-prospector, lowbias32; public
    domain)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash32(seed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """A 32-bit word for each (seed, row, column), as int64; row and column broadcast. seed: 0-dim int64, all 64 bits
    count. The seed is mixed before it meets the row, or seed s + 1 would draw for a row what s draws for the next."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return _mix(_mix(_mix(row ^ _mix(low)) ^ high) ^ ((column * 0x9E3779B9) & _MASK))


def uniform(seed: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniform draws in (0, 1]: (hash + 1/2) 2^-32, the word and the sum each rounded to `dtype`."""
    return hash32(seed, row, column).to(dtype).add_(0.5).mul_(2.0**-32)


def tile_survives(p: Tensor, at_target: Tensor, inside: Tensor, eps: float) -> Tensor:
    """Whether some |P - onehot| in a tile reaches eps. p (rows, columns) is 0 at the targets; `at_target` (rows,) is
    their entry, where they are inside. NaN survives, so that it stays visible.
    """
    largest = torch.maximum(p.amax(), torch.where(inside, at_target, 0).amax())
    return ~(largest < eps)


def sampled(
    p: Tensor,  # (rows, columns) probabilities, 0 at the targets
    filt: Filter,
    eps: float,
    seed: Tensor,
    rows: Tensor,  # (rows,) token indices
    columns: Columns,
    ids: Tensor,  # (columns,) vocabulary ids, of the whole vocabulary where processes share it
    over_columns: bool,  # whether a subset filter samples columns (dE) or tokens (dC)
    first_column: int = 0,  # what positions in visiting order begin with
) -> Tensor:
    """P^ of one element filter, in expectation P unless the filter drops. Entries >= eps (and NaN) pass unchanged."""
    small = p < eps
    if filt.kind is FilterKind.DROP:
        return p.masked_fill(small, 0)
    if filt.kind is FilterKind.STOCHASTIC:
        kept = p >= eps * uniform(seed, rows[:, None], ids[None, :], p.dtype)
        return torch.where(small, kept * p.new_tensor(eps) * (p > 0), p)
    if over_columns:
        place = torch.arange(columns.start, columns.stop, device=p.device) + first_column
        chosen = _one_of_each_share(seed, place, filt.share, stream=1)[None, :]
    else:
        chosen = _one_of_each_share(seed, rows, filt.share, stream=2)[:, None]
    return torch.where(small, p * (chosen * float(filt.share)), p)


def _one_of_each_share(seed: Tensor, place: Tensor, share: int, stream: int) -> Tensor:
    """Whether each place is the member drawn of its group of `share` neighbours; probability 1/share each.

    The draw takes the hash's remainder, off from uniform by less than share 2^-32.
    """
    group = place // share
    drawn = hash32(seed, group, torch.full_like(group, -stream)) % share
    return place % share == drawn
