"""How the tiles of an unfiltered backward pass on Hopper are dealt out, and how wide its runs are.

A persistent launch is as slow as its last program: with few rounds of tiles a round that is not full costs much.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["DZ_ROWS", "WIDEST", "Deal", "Schedule", "best_width", "dealt", "schedule"]

WIDEST = 16384  # columns a run: tensor cores truncate, and the error of a longer sum would show beside dZ's rounding
DZ_ROWS = 128  # of a tile of dZ
# Rows of a tile of the products: time a row, which grows with the copies that it takes.
_PRODUCT_ROWS = {192: 1.0, 128: 1.03}
_BETWEEN = 128 * 1024  # depth times rows that a tile would have in the time of two launches' starts and ends


@dataclass(frozen=True)
class Schedule:
    """The order of the tiles of one launch: the long ones first, see `unit_of`."""

    rows_first: bool  # dE's tiles, W deep, are the long ones, not dC's, N deep
    ahead: int
    time: int  # depth of the tiles of the program that ends last


@functools.cache
def schedule(n: int, width: int, units_c: int, units_e: int, multiprocessors: int) -> Schedule:
    """How `units_c` tiles of dC and `units_e` of dE are dealt out, the best of three counts of early rounds."""
    programs = min(units_c + units_e, multiprocessors)
    rows_first = width > n
    kinds = (units_c, n), (units_e, width)
    (many, length), (few, less) = reversed(kinds) if rows_first else kinds
    rounds, remainder = divmod(many, programs)

    def time(ahead: int) -> int:
        rest = few - ahead * (programs - remainder)
        free = rounds * length + (ahead + -(-max(0, rest - remainder) // programs)) * less
        return max(free, (rounds + 1) * length + -(-rest // programs) * less) if remainder else free

    most = few // (programs - remainder)
    ahead = min((0, min(most, length // less), min(most, -(-length // less))), key=time)
    return Schedule(rows_first, ahead, time(ahead))


@dataclass(frozen=True)
class Deal:
    """The tiles of one launch of the products."""

    rows: int  # of a tile
    units_c: int  # tiles of dC
    units_e: int  # tiles of dE
    schedule: Schedule

    @property
    def cost(self) -> float:
        """Time of the program that ends last, in depth times rows of a tile."""
        return self.rows * self.schedule.time * _PRODUCT_ROWS[self.rows]


@functools.cache
def dealt(n: int, width: int, d: int, wanted: tuple[bool, bool], multiprocessors: int) -> Deal:
    """The products `wanted` (of e, of c) of a run, by tiles of the height with which they end soonest."""
    across = -(-d // 256)

    def deal(rows: int) -> Deal:
        units_e, units_c = (-(-size // rows) * across if asked else 0 for size, asked in zip((n, width), wanted))
        plan = schedule(n, width, units_c, units_e, multiprocessors)
        return Deal(rows, units_c, units_e, plan)

    return min((deal(rows) for rows in _PRODUCT_ROWS), key=lambda deal: deal.cost)


@functools.cache
def best_width(
    n: int, v: int, d: int, most: int, parts: int, wanted: tuple[bool, bool], multiprocessors: int, tight: bool = False
) -> int:
    """Columns a run, at most `most` and a multiple of 256: those with which dZ and the products `wanted` (of e, of c)
    end soonest. `tight`: of those widths whose last run is so full that all runs together have few columns more than v.

    Time is the depth of the tiles that one multiprocessor computes after another, times their rows: `_BETWEEN`
    stands for the gaps between launches. Of equal times the widest run.
    """
    blocks = -(-n // DZ_ROWS)

    def run(width: int) -> float:
        products = dealt(n, width, d, wanted, multiprocessors).cost if any(wanted) else 0
        rounds = -(-blocks * -(-width // 256) // multiprocessors)
        return DZ_ROWS * rounds * d + parts * products + _BETWEEN

    def total(width: int) -> float:
        full, rest = divmod(v, width)
        return full * run(width) + (run(rest) if rest else 0)

    widths = [w for w in range(256, most + 1, 256) if not tight or -(-v // w) * w <= v + v // 32 + 256]
    return min(widths, key=lambda width: (total(width), -width))
