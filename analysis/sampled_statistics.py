"""Survey sampling for `sampled`: which rows to look at, and what they say of all, with confidence intervals.

Rows are drawn without replacement with unequal probabilities (`draw`): a mean of several sets of weights, so that no
row is left out because one of them is misleading. What is estimated are ratios of totals, sum a / sum b, and quantiles.

Sources: Horvitz and Thompson 1952 (totals); Hartley and Rao 1962 (systematic sampling in random order); Hajek 1964 (its
variance); Woodruff 1952 (quantiles); Särndal, Swensson and Wretman, Model Assisted Survey Sampling, 1992 (ratios).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

__all__ = ["Interval", "Sample", "draw", "prediction_interval", "t_quantile"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `high` is infinite where the sample cannot say."""

    value: float
    low: float
    high: float

    def widened(self, radius: float) -> Interval:
        """The same where every value may be off by `radius` more; not below 0."""
        return Interval(self.value, max(0.0, self.low - radius), self.high + radius)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def t_quantile(level: float, freedom: float) -> float:
    """Quantile of Student's t with `freedom` >= 1 degrees; within 5 % for 2 and 1 % from 3 on (Abramowitz and Stegun
    26.7.5), exact for 1."""
    if freedom <= 1:
        return math.tan(math.pi * (level - 0.5))
    z = NormalDist().inv_cdf(level)
    if freedom == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))


def prediction_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Ends between which one more value lies, normal in the logarithm, widened to the values themselves; those alone
    where there is one, or one that has no logarithm. Source: Hahn and Meeker, Statistical Intervals, 1991."""
    low, high = min(values), max(values)
    if len(values) == 1 or not all(0 < x < math.inf for x in values):
        return low, high
    logs = [math.log(x) for x in values]
    reach = t_quantile((1 + confidence) / 2, len(logs) - 1) * stdev(logs) * math.sqrt(1 + 1 / len(logs))
    return min(low, math.exp(fmean(logs) - reach)), max(high, math.exp(fmean(logs) + reach))


def _order_statistics(size: int, level: float, tail: float) -> tuple[int, int]:
    """Ranks between which a quantile lies, missed with probability `tail` at most on either side: of `size` values the
    number below it is binomial. 0: below the smallest; size + 1: above the largest."""
    first, last, below = 0, size + 1, 0.0
    for k in range(size + 1):  # below: P(fewer than k values lie under the quantile)
        if below <= tail:
            first = k
        if 1 - below <= tail:
            last = min(last, k)
        choose = math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
        below += math.exp(choose + k * math.log(level) + (size - k) * math.log1p(-level))
    return first, last


def _inclusion(weight: Tensor, size: int) -> Tensor:
    """(M,) probabilities that sum to `size`, proportional to `weight` and at most 1."""
    chosen = torch.zeros_like(weight, dtype=torch.bool)  # rows that are taken for certain
    while True:
        left = size - int(chosen.sum())
        rest = torch.where(chosen, 0.0, weight)
        probability = torch.where(chosen, 1.0, rest * (left / rest.sum()))
        more = (probability >= 1) & ~chosen
        if not bool(more.any()):
            return probability
        chosen |= more


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows drawn from a population, each with the probability that it was; fp64 on the CPU."""

    index: Tensor  # (B,) int64, ascending
    probability: Tensor  # (B,) in (0, 1]
    population: int
    complete: bool = False  # whether it holds every row

    def total(self, x: Tensor) -> float:
        """Estimate of the sum of x (B,) over the population."""
        return float((x / self.probability).sum())

    def ratio(self, a: Tensor, b: Tensor, confidence: float) -> Interval:
        """sum a / sum b over the population, a and b (B,) non-negative; 0 for 0/0. The interval is symmetric in the
        logarithm."""
        above, below = self.total(a), self.total(b)
        if above == 0:
            return Interval(0.0, 0.0, 0.0 if self.complete else math.inf if below == 0 else self.unseen(confidence))
        if below == 0 or not math.isfinite(above):
            return Interval(math.inf, math.inf, math.inf)
        value = above / below
        variance, freedom = self._variance((a - value * b) / self.probability)
        if variance == 0:
            return Interval(value, value, value)
        level = (1 + confidence) / 2
        factor = math.exp(min(700.0, t_quantile(level, freedom) * math.sqrt(variance) / above))
        return Interval(value, value / factor, value * factor)

    def unseen(self, confidence: float) -> float:
        """Largest share of the rows that can differ from all those drawn: (1 - share)^draws = 1 - confidence, where a
        row counts as drawn as often as the least likely one."""
        if self.complete:
            return 0.0
        draws = float(self.probability.min()) * self.population
        return 1 - (1 - confidence) ** (1 / max(draws, 1.0))

    def _variance(self, expanded: Tensor) -> tuple[float, float]:
        """(variance of an estimated total, degrees of freedom) from the summands d / probability: Hajek's estimator."""
        chance = 1 - self.probability
        n, spread = int((chance > 0).sum()), float(chance.sum())
        if n == 0:
            return 0.0, math.inf
        if n == 1:
            return float((chance * expanded.square()).sum()), 1.0
        centred = expanded - (chance * expanded).sum() / spread
        squares = chance * centred.square()
        total = float(squares.sum())
        # Satterthwaite: few rows that carry the variance are few degrees of freedom
        freedom = total**2 / float(squares.square().sum()) - 1 if total > 0 else n - 1
        return n / (n - 1) * total, max(1.0, freedom)

    def quantile(self, x: Tensor, level: float, confidence: float, low: Tensor, high: Tensor) -> Interval:
        """Quantile of x over the population, x (B,) between `low` and `high`.

        The interval is that of order statistics, exact for equal probabilities: the number of values below the
        quantile is binomial. Unequal ones count as the size that gives the same variance (Woodruff; Kish for the
        size). `high` of the interval is infinite where the sample is too small to say.
        """
        weight = 1 / self.probability
        total = float(weight.sum())

        def at(values: Tensor, place: float) -> float:
            ordered, order = values.sort()
            share = weight[order].cumsum(0) / total
            return float(ordered[min(int(torch.searchsorted(share, place - 1e-12)), len(ordered) - 1)])

        value = at(x, level)
        doubt = float(((1 - self.probability) * weight.square()).sum()) / total**2  # 1 / effective size
        if doubt == 0:
            return Interval(value, at(low, level), at(high, level))
        # Rows beyond the quantile may be those with the large weights: what the sample shows of that counts too.
        shown, _ = self._variance(((x <= value).double() - level) * weight)
        size = max(1, int(1 / max(doubt, shown / total**2 / (level * (1 - level)))))
        first, last = _order_statistics(size, level, (1 - confidence) / 2)
        return Interval(
            value,
            at(low, (first - 1) / size) if first else 0.0,
            at(high, last / size) if last <= size else math.inf,
        )

    def where(self, kept: Tensor) -> Sample:
        """The part of the sample that lies in a domain; `kept` (B,) bool. The population's size is estimated."""
        part = self.probability[kept]
        return Sample(self.index[kept], part, round(float((1 / part).sum())), self.complete)


def draw(weights: Sequence[Tensor], size: int, seed: int) -> Sample:
    """`size` rows of a population without replacement, or all where it is no larger.

    A row's probability is the mean of those that each of `weights`, (M,) non-negative, gives it, at most 1: rows that
    one set of weights favours are drawn without leaving the others out. A set whose sum is 0 takes no part.

    Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"the number of sampled rows must be at least 1, got {size!r}")
    count = len(weights[0])
    if size >= count:
        return Sample(torch.arange(count), torch.ones(count, dtype=torch.float64), count, complete=True)
    parts = [w.double() / w.double().sum() for w in weights if float(w.sum()) > 0]
    probability = _inclusion(torch.stack(parts).mean(0), size)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=random)
    edges = probability[order].cumsum(0)
    edges[-1] = size  # against the rounding of the sum
    marks = torch.arange(size) + torch.rand((), generator=random, dtype=torch.float64)
    place = torch.searchsorted(edges, marks, right=True).clamp(max=count - 1)
    index = order[place].unique()  # a probability of 1 that rounding made larger would come twice
    return Sample(index, probability[index], count)
