"""Other ways to estimate what a filter leaves out, tried beside those that the variants have: a reference in fp64.

The softmax P lies in memory as a matrix; an estimator gives two of its size, one that dE = P^ C is made of and one for
dC = P^T E, from the same number of entries a row. The target's term is apart, as in the variants, and nothing is
rounded: what is left is the estimator's own error. Two groups, each beside what the variants do:

    entries   single entries. All of them keep as many, in expectation, as the subsets compute
    subsets   exact above 2^-12; below it one column (dE) or token (dC) in `share`, which costs V / share entries a row

Several use the mean tail: b_ij = s_i q_j, s_i the row's mass below the threshold, which a forward pass knows, and q its
profile over the columns. q is taken from 1/32 of the tokens, and that cost is not counted, which favours them.

Sources: systematic sampling (Madow 1944), sampling in proportion to size (Horvitz and Thompson 1952; Hartley and Rao
1962), difference estimators (Cochran, Sampling Techniques, 1977), thresholds (Duffield, Lund and Thorup 2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cce_precision.problem import Problem

__all__ = ["ESTIMATORS", "Estimator", "Softmax", "errors"]

EPS = 2.0**-12  # of the subsets
PILOT = 32  # one token in so many gives the mean tail
BLOCK = 16  # columns that share a draw
EVEN = 0.5  # the part of an importance that is the same for all: no weight exceeds share / EVEN
HALVINGS = 60
LEAST = 1e-300


@dataclass(frozen=True)
class Softmax:
    """A problem's softmax in memory, for estimates at the cost of one column or token in `share`."""

    e: Tensor  # (N, D) fp64
    c: Tensor  # (V, D)
    p: Tensor  # (N, V), 0 at the targets
    order: Tensor  # (V,) columns by falling mean logit
    sizes: tuple[float, float]  # norms of the exact dE and dC of the summed loss
    share: int

    @staticmethod
    def of(problem: Problem, share: int) -> Softmax:
        """The softmax of a problem without bias and softcap, whose tokens all count. Raises ValueError for others."""
        if problem.bias is not None or problem.softcap is not None or bool((problem.targets < 0).any()):
            raise ValueError("estimators are tried on heads without bias, softcap and ignored tokens")
        e, c = problem.e.double(), problem.c.double()
        p = torch.softmax(e @ c.T / problem.temperature, 1)
        at = torch.arange(len(e), device=e.device), problem.targets
        complement = p[at] - 1
        p[at] = complement
        sizes = float((p @ c).norm()), float((p.T @ e).norm())
        p[at] = 0
        return Softmax(e, c, p, (c @ e.mean(0)).argsort(descending=True), sizes, share)

    @cached_property
    def entries(self) -> float:
        """Entries a row that every estimate may cost, in expectation."""
        return float((self.p >= EPS).sum()) / len(self.p) + self.p.shape[1] / self.share

    @cached_property
    def tail(self) -> Tensor:
        """(N, V): P below the threshold of the subsets."""
        return self.p.masked_fill(self.p >= EPS, 0)

    @cached_property
    def profile(self) -> Tensor:
        """(V,): q, the mean tail of every 32nd token, with sum 1."""
        some = self.tail[PILOT // 2 :: PILOT].sum(0)
        return some / some.sum()

    def mean_tail(self, eps: float) -> Tensor:
        """(N, V): s_i q_j over the entries below eps, which has each row's mass below eps; 0 above."""
        below = self.p < eps
        room = (self.profile * below).sum(1, keepdim=True)
        return (self.p * below).sum(1, keepdim=True) / room * self.profile * below

    def threshold(self, size: Tensor) -> float:
        """eps for which keeping with probability min(1, size / eps) keeps `entries` a row in expectation."""
        low, high = 2.0**-40, 1.0
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            kept = float((size / middle).clamp_(max=1).sum()) / len(size)
            low, high = (middle, high) if kept > self.entries else (low, middle)
        return high

    @cached_property
    def eps(self) -> float:
        """Threshold of the stochastic filter."""
        return self.threshold(self.p)

    @cached_property
    def dropping(self) -> float:
        """Threshold above which there are `entries` a row."""
        rank = self.p.numel() - int(self.entries * len(self.p))
        return float(self.p.flatten().kthvalue(max(1, rank)).values)

    @cached_property
    def rest(self) -> tuple[Tensor, Tensor, float]:
        """s q on all columns, what it leaves of P, and the threshold at which that is sampled by its size."""
        mean = self.tail.sum(1, keepdim=True) * self.profile
        rest = self.p - mean
        return mean, rest, self.threshold(rest.abs())

    @cached_property
    def counted(self) -> tuple[Tensor, float]:
        """P times what an entry's variance counts for: |c_j|^2 in dE, |e_i|^2 in dC, each relative to the gradient."""
        weight = self.c.square().sum(1) / self.sizes[0] ** 2 + (self.e.square().sum(1) / self.sizes[1] ** 2)[:, None]
        size = self.p * weight.sqrt()
        size *= float(self.p.sum() / size.sum())  # so that the threshold lies where that of P does
        return size, self.threshold(size)


Draw = Callable[[Softmax, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimator:
    """A way to estimate P. `of_variant`: the variant that does so; "" for one tried here alone."""

    name: str
    group: str  # "entries" or "subsets"
    unbiased: bool
    what: str
    draw: Draw
    of_variant: str = ""


def errors(softmax: Softmax, estimate: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Normwise relative errors of dE and dC."""
    for_e, for_c = ((part - softmax.p) for part in estimate)
    return float((for_e @ softmax.c).norm()) / softmax.sizes[0], float((for_c.T @ softmax.e).norm()) / softmax.sizes[1]


def _uniform(like: Tensor, random: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape or like.shape, generator=random, dtype=like.dtype, device=random.device).to(like.device)


# -- single entries ----------------------------------------------------------------------------------------------------


def _drop(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    kept = s.p.masked_fill(s.p < s.dropping, 0)
    return kept, kept


def _drop_with_mean(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    estimate = s.p.masked_fill(s.p < s.dropping, 0) + s.mean_tail(s.dropping)
    return estimate, estimate


def _signed(x: Tensor, size: Tensor, eps: float, random: torch.Generator) -> Tensor:
    """x, each entry kept with probability min(1, size / eps) and divided by it."""
    chance = (size / eps).clamp_(max=1)
    return torch.where(_uniform(x, random) < chance, x / chance.clamp(min=LEAST), 0)


def _by_entry(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    estimate = _signed(s.p, s.p, s.eps, random)
    return estimate, estimate


def _systematic(s: Softmax, order: Tensor, columns: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """One draw for so many columns of a row in `order`: kept are the entries in which the sum of P / eps, from the draw
    on, passes a whole number. The chances are those of single draws, and a run's kept mass is within eps of its own.
    """
    n, v = s.p.shape
    runs = torch.nn.functional.pad((s.p / s.eps)[:, order], (0, -v % columns)).view(n, -1, columns)
    small = runs.masked_fill(runs >= 1, 0)
    reached = small.cumsum(2) + _uniform(s.p, random, n, runs.shape[1], 1)
    kept = reached.floor() - (reached - small).floor()
    estimate = torch.empty_like(s.p)
    estimate[:, order] = (torch.where(runs >= 1, runs, kept.clamp_(0, 1)) * s.eps).view(n, -1)[:, :v]
    return estimate, estimate


def _by_run(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    return _systematic(s, torch.arange(s.p.shape[1], device=s.p.device), BLOCK, random)


def _by_row(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    return _systematic(s, s.order, s.p.shape[1], random)


def _with_mass(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The row's mass is known: what the draws miss of it, or have too much, goes to the mean tail."""
    estimate, _ = _by_entry(s, random)
    estimate = estimate + (s.p.sum(1) - estimate.sum(1))[:, None] * s.profile
    return estimate, estimate


def _centred(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same, to the mean row of the entries that the other half of the tokens keeps; dC as it is."""
    estimate, _ = _by_entry(s, random)
    return _from_centres(s, estimate, estimate != 0), estimate


def _from_centres(s: Softmax, estimate: Tensor, kept: Tensor) -> Tensor:
    """The estimate (N, V), what it lacks of a row's mass spread over what is kept for the other half of the rows."""
    excess, centred = s.p.sum(1) - estimate.sum(1), estimate.clone()
    for own in range(2):
        count = kept[1 - own :: 2].to(estimate.dtype).sum(0)
        centred[own::2] += excess[own::2, None] * count / count.sum().clamp(min=1)
    return centred


def _residual(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    mean, rest, eps = s.rest
    estimate = mean + _signed(rest, rest.abs(), eps, random)
    return estimate, estimate


def _by_norms(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    estimate = _signed(s.p, *s.counted, random)
    return estimate, estimate


# -- subsets of columns and tokens -------------------------------------------------------------------------------------


def _weights(chance: Tensor, order: Tensor, random: torch.Generator) -> Tensor:
    """1 / chance for places drawn systematically along `order`, each with its chance (sum: how many), else 0."""
    reached = chance[order].cumsum(0) + _uniform(chance, random, 1)
    drawn = (reached.floor() - (reached - chance[order]).floor()).clamp_(0, 1)
    weights = torch.empty_like(chance)
    weights[order] = drawn / chance[order]
    return weights


def _in_groups(size: int, share: int, order: Tensor, random: torch.Generator) -> Tensor:
    """(size,) `share` for one of every `share` neighbours in `order`, drawn in each group apart, else 0."""
    groups = -(-size // share)
    drawn = torch.randint(share, (groups,), generator=random, device=random.device).to(order.device)
    place = torch.arange(size, device=order.device)
    weights = torch.empty(size, dtype=torch.float64, device=order.device)
    weights[order] = (place % share == drawn[place // share]).double() * share
    return weights


def _with_weights(s: Softmax, columns: Tensor, tokens: Tensor, mean: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """P above the threshold; below it `mean` and the weighted rest of the drawn columns (dE), tokens (dC)."""
    above, rest = s.p - s.tail, s.tail - mean
    return above + mean + rest * columns, above + mean + rest * tokens[:, None]


def _tokens(s: Softmax) -> Tensor:
    return torch.arange(len(s.p), device=s.p.device)


def _stratified(s: Softmax, random: torch.Generator, mean: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    n, v = s.p.shape
    columns = _in_groups(v, s.share, s.order, random)
    return _with_weights(s, columns, _in_groups(n, s.share, _tokens(s), random), mean)


def _stratified_and_centred(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    for_e, for_c = _stratified(s, random)
    return _from_centres(s, for_e, s.p >= EPS), for_c


def _anywhere(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens, columns = (
        _in_groups(size, s.share, torch.randperm(size, generator=random).to(s.p.device), random) for size in s.p.shape
    )
    return _with_weights(s, columns, tokens)


def _with_mean(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    return _stratified(s, random, s.mean_tail(EPS))


def _chances(importance: Tensor, share: int) -> Tensor:
    """Chances that sum to size / share, half of each the same for all, none above 1."""
    count = len(importance) / share
    mixed = (1 - EVEN) * importance / importance.mean() + EVEN
    low, high = 0.0, 2.0 * share
    for _ in range(HALVINGS):  # the factor that makes them sum so
        middle = (low + high) / 2
        low, high = (middle, high) if float((mixed * middle / share).clamp(max=1).sum()) < count else (low, middle)
    return (mixed * high / share).clamp_(max=1)


def _by_importance(s: Softmax, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A column's importance is |c_j| times the root mean square of its tail over the pilot's tokens; a token's is |e_i|
    times the root of its tail's square sum."""
    columns = s.tail[PILOT // 2 :: PILOT].square().sum(0).sqrt() * s.c.norm(dim=1)
    tokens = s.tail.square().sum(1).sqrt() * s.e.norm(dim=1)
    return _with_weights(
        s,
        _weights(_chances(columns, s.share), s.order, random),
        _weights(_chances(tokens, s.share), _tokens(s), random),
    )


def _all() -> Iterator[Estimator]:
    one, many = "entries", "subsets"
    yield Estimator("drop", one, False, "dropped below a threshold", _drop, "cce_sparse")
    yield Estimator("drop, with the mean tail", one, False, "what is dropped comes back as s q", _drop_with_mean)
    yield Estimator("by entry", one, True, "kept with probability P / eps, counted as eps", _by_entry)
    what = "what is missing of a row's mass goes to the mean row that other tokens keep"
    yield Estimator("by entry, centred", one, True, what, _centred, "cce_unbiased")
    yield Estimator("one draw for 16", one, True, "a draw for 16 columns of a row, systematically", _by_run)
    yield Estimator("one draw a row", one, True, "a draw for a row, in the order of mean logits", _by_row)
    yield Estimator("by entry, mass kept", one, True, "the row's missing mass goes to the mean tail", _with_mass)
    yield Estimator("rest of the mean tail", one, True, "P - s q sampled by its size, s q exact", _residual)
    yield Estimator("by entry and norms", one, True, "kept by P times what it counts for", _by_norms)
    yield Estimator("subsets", many, True, "one of so many neighbours in the order of mean logits", _stratified)
    what = "what is missing of a row's mass goes to the mean row that other tokens have above 2^-12"
    yield Estimator("subsets, centred", many, True, what, _stratified_and_centred, "cce_subsampled")
    yield Estimator("subsets, not stratified", many, True, "groups of so many in random order", _anywhere)
    yield Estimator("subsets, mean tail", many, True, "s q exact, the rest by subsets", _with_mean)
    yield Estimator("subsets by importance", many, True, "chances by what a column or token counts for", _by_importance)


ESTIMATORS = {e.name: e for e in _all()}
