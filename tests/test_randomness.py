"""Random filters: what is drawn, that it is unbiased with the stated variance, and that a seed fixes it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.bounds_certificate import sampling
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.references import Objective, truth
from cce_precision.eager import backward, forward
from cce_precision.eager.filters import hash32, sampled, uniform
from cce_precision.eager.tiles import Columns, vocabulary_order
from cce_precision.numerics import Filter, FilterKind, Variant
from cce_precision.problem import Plan, Problem, Upstream
from cce_precision.variants import ALL
from tests.strategies import EAGER

DELTA = 1e-6  # probability that a fixed seed fails a test by chance
RANDOM = tuple(name for name in EAGER if ALL[name].random)
SEEDS = 400


def chi_square_quantile(degrees: int, delta: float = DELTA) -> float:
    """Bound of the 1 - delta quantile of chi-square (Laurent and Massart, doi 10.1214/aos/1015957395, lemma 1)."""
    x = math.log(1 / delta)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


def columns_of(width: int) -> Columns:
    return Columns(0, width, slice(0, width))


def draws(p: Tensor, filt: Filter, eps: float, seeds: int, over_columns: bool = True) -> Tensor:
    """(seeds, rows, columns) P^ for p (rows, columns)."""
    rows, ids = torch.arange(p.shape[0]), torch.arange(p.shape[1])
    return torch.stack(
        [sampled(p, filt, eps, torch.tensor(s), rows, columns_of(p.shape[1]), ids, over_columns) for s in range(seeds)]
    )


# The hash.


def test_hash_is_uniform_in_every_direction() -> None:
    """Chi-square of the hash's bytes over columns, rows and seeds, each with the others fixed."""
    place = torch.arange(2**14)
    zero = torch.zeros_like(place)
    words = {
        "columns": hash32(torch.tensor(1), zero, place),
        "rows": hash32(torch.tensor(1), place, zero),
        "seeds": torch.stack([hash32(torch.tensor(s), zero[:1], zero[:1]) for s in range(4096)]).flatten(),
        "high seeds": torch.stack([hash32(torch.tensor(s << 32), zero[:1], zero[:1]) for s in range(4096)]).flatten(),
    }
    for name, word in words.items():
        assert ((word >= 0) & (word < 2**32)).all()
        for byte in range(4):
            counts = torch.bincount((word >> (8 * byte)) & 255, minlength=256).double()
            expected = len(word) / 256
            assert float(((counts - expected) ** 2 / expected).sum()) <= chi_square_quantile(255), (name, byte)


def test_neighbours_are_independent() -> None:
    """Chi-square of pairs of top bits: of neighbouring columns, rows and seeds."""
    row, column = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    words = torch.stack([hash32(torch.tensor(s), row, column) >> 31 for s in range(8)])  # (seeds, rows, columns)
    for dim in range(3):
        first, second = words.narrow(dim, 0, words.shape[dim] - 1), words.narrow(dim, 1, words.shape[dim] - 1)
        counts = torch.bincount((2 * first + second).flatten(), minlength=4).double()
        expected = counts.sum() / 4
        # Overlapping pairs: their chi-square is at most twice that of independent ones.
        assert float(((counts - expected) ** 2 / expected).sum()) <= 2 * chi_square_quantile(3)


def test_no_seed_draws_what_its_neighbour_draws_for_other_rows() -> None:
    """Nor for other columns: sums over tokens would not average out over seeds 0, 1, 2, ..."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None, :]
    words = torch.stack([hash32(torch.tensor(seed), row, column) for seed in range(8)])
    assert len(words.unique()) > words.numel() - 64  # of 2^15 words out of 2^32 one pair is alike in one case of eight


def test_uniform_lies_in_the_unit_interval() -> None:
    u = uniform(torch.tensor(3), torch.arange(1000)[:, None], torch.arange(1000)[None, :], torch.float32)
    assert (u > 0).all() and (u <= 1).all()
    assert u.dtype == torch.float32


# Expectation and variance of P^.


def test_stochastic_filter_has_the_stated_moments() -> None:
    """Kept counts are binomial with probability P / eps: mean P, variance P (eps - P). Chi-square over all entries."""
    eps = 2.0**-4
    p = torch.rand(16, 40, generator=torch.Generator().manual_seed(0)) * eps * 0.98 + eps * 0.01
    kept = draws(p, Filter(FilterKind.STOCHASTIC), eps, SEEDS)
    assert set(kept.unique().tolist()) == {0.0, eps}
    probability = p.double() / eps
    count = (kept > 0).double().sum(0)
    chi = ((count - SEEDS * probability) ** 2 / (SEEDS * probability * (1 - probability))).sum()
    assert float(chi) <= chi_square_quantile(p.numel())
    # The mean square deviation, summed over entries, is within its own Bernstein bound of the sum of the variances.
    deviation = (kept.double() - p.double()).square().sum((1, 2))
    variance = float((p.double() * (eps - p.double())).sum())
    spread = math.sqrt(2 * p.numel() * eps**4 * math.log(2 / DELTA) / SEEDS)
    assert abs(float(deviation.mean()) - variance) <= spread


@pytest.mark.parametrize("over_columns", [True, False])
@pytest.mark.parametrize("share", [2, 8])
def test_subsets_keep_one_of_each_share(share: int, over_columns: bool) -> None:
    """Exactly one of every `share` neighbours, with weight `share`, each equally often."""
    eps, p = 1.0, torch.full((4 * share, 4 * share), 2.0**-6)
    kept = draws(p, Filter(FilterKind.SUBSET, share=share), eps, SEEDS, over_columns)
    assert set(kept.unique().tolist()) == {0.0, share * 2.0**-6}
    chosen = (kept > 0)[:, 0, :] if over_columns else (kept > 0)[:, :, 0]  # (seeds, places)
    assert torch.equal(
        (kept > 0), chosen[:, None, :].expand_as(kept) if over_columns else chosen[:, :, None].expand_as(kept)
    )
    assert (chosen.view(SEEDS, 4, share).sum(2) == 1).all()
    counts = chosen.double().sum(0)
    chi = ((counts - SEEDS / share) ** 2 / (SEEDS / share)).sum()
    assert float(chi) <= chi_square_quantile(4 * share)


def test_large_entries_are_never_drawn() -> None:
    p = torch.tensor([[0.5, 0.1, 0.0625, 0.06]])
    for kind in (FilterKind.STOCHASTIC, FilterKind.SUBSET, FilterKind.DROP):
        kept = draws(p, Filter(kind, share=8), 0.0625, 50)
        assert (kept[:, 0, :3] == p[0, :3]).all()


# Gradients.


def flat_problem(dtype: torch.dtype = torch.float32) -> Problem:
    g = torch.Generator().manual_seed(4)
    e, c = torch.randn(12, 5, generator=g), torch.randn(96, 5, generator=g) * 0.5 + 1.0
    return Problem(e.to(dtype), c.to(dtype), torch.randint(0, 96, (12,), generator=g))


def gradients(problem: Problem, variant: Variant, seed: int) -> tuple[Tensor, Tensor]:
    plan = Plan(variant)
    heads = forward(problem, plan)
    d_e, d_c, _ = backward(
        problem, plan, heads, Upstream(torch.ones(problem.n)), (True, True, False), torch.tensor(seed)
    )
    assert d_e is not None and d_c is not None
    return d_e, d_c


@pytest.mark.parametrize("impl", RANDOM)
@pytest.mark.parametrize("eps", [2.0**-5, 2.0**-7])
def test_gradients_are_unbiased_with_the_stated_variance(impl: str, eps: float) -> None:
    """The filters' effect on dE and dC, roundings apart, obeys Bernstein's bound in each run and in their mean."""
    problem, variant = flat_problem(), dataclasses.replace(ALL[impl].with_eps(eps), centred=False)
    spread = sampling(problem, Plan(variant), Objective("sum"), delta=DELTA)
    e, c = problem.e.double(), problem.c.double()
    p = torch.softmax(e @ c.T, 1)
    p[torch.arange(problem.n), problem.targets] = 0.0  # the target's entry is never filtered
    order = vocabulary_order(problem, variant, torch.arange(problem.n))
    if order is not None:
        p, c = p[:, order], c[order]
    d_e = (draws(p, variant.filter_e, eps, SEEDS, True) - p) @ c
    d_c = (draws(p, variant.filter_c, eps, SEEDS, False) - p).transpose(1, 2) @ e
    undo = slice(None) if order is None else torch.argsort(order)
    for found, allowed in ((d_e, spread.d_e), (d_c[:, undo], spread.d_c)):
        for run in found:
            assert compare(run, torch.zeros_like(run), allowed).holds
            assert run.any()
        # Bernstein for the mean of SEEDS runs: variance and largest term divided by SEEDS.
        mean = found.mean(0)
        assert compare(mean, torch.zeros_like(mean), allowed / math.sqrt(SEEDS)).holds


@pytest.mark.parametrize("impl", RANDOM)
@pytest.mark.parametrize("eps", [2.0**-5, 2.0**-7])
def test_passes_make_these_draws(impl: str, eps: float) -> None:
    problem, variant, objective = flat_problem(), ALL[impl].with_eps(eps), Objective("sum")
    exact = truth(problem, objective)
    for seed in range(10):
        allowed = bound(problem, Plan(variant), objective, seed=seed)
        for name, found in zip(("dE", "dC"), gradients(problem, variant, seed)):
            assert compare(found, getattr(exact, name), getattr(allowed, name) + getattr(exact.radius, name)).holds


def test_a_centred_gradient_is_unbiased_over_every_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, three classes, eps = 1: the mean over all 16 outcomes of the draws, each with its probability, is the
    exact gradient, though every outcome has a centre of its own.
    """
    g = torch.Generator().manual_seed(3)
    e, c = (torch.randn(n, 2, generator=g, dtype=torch.float64) for n in (2, 3))
    problem, variant, objective = Problem(e, c + 1, torch.tensor([0, 2])), ALL["cce_unbiased"], Objective("sum")
    p = torch.softmax(problem.e @ problem.c.T, 1)
    places = [(0, 1), (0, 2), (1, 0), (1, 1)]  # all but the targets
    found, weights, module = [], [], sys.modules["cce_precision.eager.backward"]
    for outcome in itertools.product((0.0, 1.0), repeat=4):
        kept = torch.zeros(2, 3, dtype=torch.float64)
        for place, keep in zip(places, outcome):
            kept[place] = keep
        monkeypatch.setattr(module, "sampled", lambda *x, kept=kept: kept)
        found.append(gradients(problem, variant.with_eps(1.0), 0)[0])
        weights.append(math.prod(float(p[x] if keep else 1 - p[x]) for x, keep in zip(places, outcome)))
    values, chances = torch.stack(found), torch.tensor(weights, dtype=torch.float64)
    mean = (chances[:, None, None] * values).sum(0)
    roundings = len(places) * problem.v + len(found)
    allowed = roundings * torch.finfo(torch.float64).eps * values.abs().amax(0)
    exact = truth(problem, objective)
    assert compare(mean, exact.dE, allowed + exact.radius.dE).holds
    assert len({tuple(x.flatten().tolist()) for x in found}) == len(found)


@pytest.mark.parametrize("impl", RANDOM)
def test_a_row_that_all_classes_share_moves_no_centred_gradient(impl: str) -> None:
    """C + 1 w^T has C's softmax and dE. Under one seed a centred filter keeps it so; one that is not adds w times the
    mass that its draws have too much.
    """
    problem, variant = flat_problem(torch.float64), ALL[impl].with_eps(2.0**-5)
    moved = dataclasses.replace(problem, c=problem.c + torch.linspace(1, 3, problem.d, dtype=torch.float64))
    apart = {}
    for centred in (True, False):
        which = dataclasses.replace(variant, centred=centred)
        (first, _), (second, _) = gradients(problem, which, 1), gradients(moved, which, 1)
        allowed = [bound(x, Plan(which.configure(None)), Objective("sum")).dE for x in (problem, moved)]
        apart[centred] = compare(first, second, allowed[0] + allowed[1]).holds
        assert bool(first.any())
    assert apart == {True: True, False: False}


def test_dropping_is_biased_where_sampling_is_not() -> None:
    """The same threshold dropped instead of drawn lies outside what the mean of the draws may be off by."""
    problem, eps, objective = flat_problem(), 2.0**-5, Objective("sum")
    exact = truth(problem, objective)
    mean = (
        torch.stack([gradients(problem, ALL["cce_unbiased"].with_eps(eps), s)[0] for s in range(SEEDS)])
        .double()
        .mean(0)
    )
    dropped, _ = gradients(problem, ALL["cce_sparse"].with_eps(eps), 0)
    assert (mean - exact.dE).norm() < (dropped.double() - exact.dE).norm()


# Seeds.


@pytest.mark.parametrize("impl", RANDOM)
def test_a_seed_fixes_the_draws(impl: str) -> None:
    problem = flat_problem()
    variant = ALL[impl].with_eps(2.0**-5)
    first, again, other = gradients(problem, variant, 1), gradients(problem, variant, 1), gradients(problem, variant, 2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("impl", RANDOM)
def test_manual_seed_reproduces_a_call_without_a_seed(impl: str) -> None:
    problem = flat_problem()

    def run() -> Tensor:
        e = problem.e.clone().requires_grad_()
        linear_cross_entropy(e, problem.c, problem.targets, impl=impl, filter_eps=2.0**-5).backward()
        assert e.grad is not None
        return e.grad

    torch.manual_seed(11)
    first, second = run(), run()
    torch.manual_seed(11)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", [name for name in EAGER if not ALL[name].random])
def test_other_variants_leave_the_generator_alone(impl: str) -> None:
    problem = flat_problem()
    state = torch.get_rng_state()
    linear_cross_entropy(problem.e, problem.c, problem.targets, impl=impl)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("impl", RANDOM)
def test_draws_do_not_depend_on_blocks(impl: str) -> None:
    """A token and a class draw the same number in blocks of any size."""
    g = torch.Generator().manual_seed(4)
    problem = Problem(
        torch.randn(300, 2, generator=g), torch.randn(400, 2, generator=g), torch.zeros(300, dtype=torch.int64)
    )
    variant, objective = ALL[impl].with_eps(2.0**-9), Objective("sum")
    plans = [Plan(variant), Plan(variant, workspace_mb=1)]
    allowed = bound(problem, plans[0], objective, seed=5)
    found = []
    for plan in plans:
        heads = forward(problem, plan)
        found.append(backward(problem, plan, heads, Upstream(torch.ones(300)), (True, True, False), torch.tensor(5)))
    exact = truth(problem, objective)
    for d_e, d_c, _ in found:
        assert compare(d_e, exact.dE, allowed.dE + exact.radius.dE).holds
        assert compare(d_c, exact.dC, allowed.dC + exact.radius.dC).holds


def test_ignored_tokens_do_not_shift_the_draws() -> None:
    """Draws are a function of the token's place in e: ignoring one leaves the others' gradients alone."""
    problem = flat_problem()
    targets = problem.targets.clone()
    targets[3] = -1
    fewer = dataclasses.replace(problem, targets=targets)
    variant = dataclasses.replace(ALL["cce_unbiased"].with_eps(2.0**-5), centred=False)  # a centre is made of others
    whole, part = gradients(problem, variant, 9)[0], gradients(fewer, variant, 9)[0]
    allowed = bound(problem, Plan(variant), Objective("sum"), seed=9)
    rest = torch.arange(12) != 3
    assert compare(whole[rest], part[rest], 2 * allowed.dE[rest]).holds
    assert not part[3].any()
