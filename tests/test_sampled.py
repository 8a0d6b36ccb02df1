"""Sampled measurement: its rows are exact, its intervals cover, its radius holds, and wrong gradients do not pass."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from statistics import NormalDist
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cce_precision import linear_cross_entropy
from cce_precision.analysis import sampled, sampled_rows, sampled_statistics
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.metrics import errors, relative
from cce_precision.analysis.references import Objective, truth
from cce_precision.analysis.sampled import measure, measure_impl
from cce_precision.analysis.sampled_statistics import Sample, draw, prediction_interval, t_quantile
from cce_precision.cli import app
from cce_precision.problem import Plan, Problem
from cce_precision.variants import get

ALL_ROWS = {"rows": 10**6, "columns": 10**6}
KEPT = {"trained": {}, "confident": {}, "softcap": {"softcap": 5.0}, "temperature": {"temperature": 0.5}}


def problem_of(kind: str = "trained", n: int = 96, v: int = 300, d: int = 24) -> Problem:
    """A problem with some ignored tokens, whose rows hold NaN, and a bias with masked columns."""
    case = CASES["confident" if kind == "confident" else "trained"](n=n, v=v, d=d, dtype=torch.bfloat16)
    e, targets = case.e.clone(), case.targets.clone()
    targets[::7] = -1
    e[::7] = math.nan
    bias = torch.linspace(-1, 1, v)
    bias[torch.arange(v)[~torch.isin(torch.arange(v), targets)][:3]] = -math.inf
    return Problem(e, case.c, targets, None if kind == "confident" else bias, None, **KEPT[kind])


def gradients(problem: Problem, impl: str, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    e, c = problem.e.clone().requires_grad_(), problem.c.clone().requires_grad_()
    loss = linear_cross_entropy(
        e, c, problem.targets, problem.bias, -1, problem.softcap, "mean" if upstream is None else "none",
        impl=impl, temperature=problem.temperature, seed=0,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    value = loss if upstream is None else (loss * upstream).sum()
    value.backward()
    assert e.grad is not None and c.grad is not None
    return value.detach(), e.grad, c.grad


def options(problem: Problem) -> dict[str, Any]:
    return {"bias": problem.bias, "softcap": problem.softcap, "temperature": problem.temperature, "ignore_index": -1}


# -- the rows are exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEPT)
def test_rows_are_those_of_the_truth(kind: str) -> None:
    problem = problem_of(kind)
    valid = (problem.targets >= 0).nonzero()[:, 0]
    g = torch.linspace(-1, 2, len(valid), dtype=torch.float64)
    upstream = torch.zeros(problem.n, dtype=torch.float64).index_copy(0, valid, g)
    objective = Objective("sum", nll=upstream)
    exact = truth(problem, objective)
    wide = dataclasses.replace(problem, e=problem.e.double(), c=problem.c.double())
    own = bound(wide, Plan(get("cce_exact")), objective)  # the same formulas in fp64, in whatever order they are added
    rest, de = sampled_rows.token_rows(problem, valid, g, True)
    assert bool((errors(de, exact.dE[valid]) <= own.dE[valid] + exact.radius.dE[valid]).all())
    dc, size = sampled_rows.vocabulary_rows(problem, torch.arange(problem.v), valid, rest, g)
    assert bool((errors(dc, exact.dC) <= own.dC + exact.radius.dC).all())
    assert bool((size >= dc.abs()).all()) and float(dc.norm()) > 0 and float(de.norm()) > 0


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("lse", ["fp32", "fp64"])
def test_a_complete_sample_is_the_whole(kind: str, lse: str) -> None:
    problem = problem_of(kind)
    loss, de, dc = gradients(problem, "cce")
    exact = truth(problem)
    found = measure(
        problem.e, problem.c, problem.targets, dE=de, dC=dc, loss=loss, lse=lse, **ALL_ROWS, **options(problem)
    )
    assert found.dE and found.dC and found.loss
    for one, out, name in ((found.dE, de, "dE"), (found.dC, dc, "dC")):
        whole, radius = relative(out, getattr(exact, name)), relative_radius(exact, name)
        assert one.rows == one.population
        assert one.rel.low - radius <= whole <= one.rel.high + radius, name
        assert one.rel.high - one.rel.low <= 2 * one.radius * (1 + radius), (
            "a complete sample has no doubt but the lse's"
        )
    assert (found.delta > 0) == (lse == "fp32") and found.lse == lse
    assert abs(found.loss.exact - float(exact.value)) <= found.loss.radius + float(exact.radius.value) * 4
    assert found.ignored_nonzero == 0


def relative_radius(exact: Any, name: str) -> float:
    """What the truth's certificate, and as much again for the sampled rows' own fp64, can move a relative error by."""
    return 4 * float(getattr(exact.radius, name).norm() / getattr(exact, name).norm())


def test_upstream_gradients_and_shapes_beyond_two_dimensions() -> None:
    problem = problem_of()
    upstream = torch.linspace(-2, 2, problem.n)
    value, de, dc = gradients(problem, "cce_exact", upstream)
    shape = (2, problem.n // 2)
    found = measure(
        problem.e.view(*shape, -1), problem.c, problem.targets.view(shape), dE=de.view(*shape, -1), dC=dc, loss=value,
        upstream=upstream.view(shape), **ALL_ROWS, **options(problem),
    )  # fmt: skip
    flat = measure(
        problem.e, problem.c, problem.targets, dE=de, dC=dc, loss=value, upstream=upstream, **ALL_ROWS,
        **options(problem),
    )  # fmt: skip
    assert found.as_dict() | {"seconds": 0} == flat.as_dict() | {"seconds": 0}
    objective = Objective("sum", nll=torch.where(problem.targets >= 0, upstream, 0).double())
    limit = bound(problem, Plan(get("cce_exact")), objective)
    exact = truth(problem, objective)
    assert found.dE and found.dC and found.loss
    assert found.dE.rel.value <= float(limit.dE.norm() / exact.dE.norm())
    assert found.dC.rel.value <= float(limit.dC.norm() / exact.dC.norm())


# -- wrong gradients ---------------------------------------------------------------------------------------------------


def test_wrong_gradients_do_not_pass() -> None:
    problem = problem_of(n=200, v=1000)
    loss, de, dc = gradients(problem, "cce_exact")
    given = {**options(problem), "rows": 64, "columns": 64}

    def rel(de: Tensor, dc: Tensor) -> tuple[float, float]:
        found = measure(problem.e, problem.c, problem.targets, dE=de, dC=dc, **given)
        assert found.dE and found.dC
        return found.dE.rel.low, found.dC.rel.low

    n = int((problem.targets >= 0).sum())
    right = max(rel(de, dc))
    assert right < 2**-6 < min(rel(de * n, dc * n))
    zero = measure(problem.e, problem.c, problem.targets, dE=0 * de, dC=0 * dc, **given)
    assert zero.dE and zero.dE.rel.value == 1 and zero.dC and zero.dC.rel.value == 1
    broken = dc.clone()
    broken[17] = math.nan
    found = measure(problem.e, problem.c, problem.targets, dC=broken, **given)
    assert found.dC and found.dC.rel.value == math.inf and found.dC.nonfinite == 1
    leaking = de.clone()
    leaking[7] = 1  # an ignored token
    assert measure(problem.e, problem.c, problem.targets, dE=leaking, **given).ignored_nonzero == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dE": None, "dC": None}, "nothing to measure"),
        ({"dC": torch.zeros(3, 3)}, r"dC must have shape \(300, 24\), got \(3, 3\)"),
        ({"lse": "fp16"}, "lse must be one of 'auto', 'fp32', 'fp64', got 'fp16'"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        ({"rows": 0}, "at least 1, got 0"),
        ({"targets": torch.full((96,), -1)}, "targets ignore every token"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    problem = problem_of()
    arguments: dict[str, Any] = {
        "e": problem.e, "c": problem.c, "targets": problem.targets, "dE": torch.zeros(96, 24), "dC": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        measure(**(arguments | change))


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 100])
@pytest.mark.parametrize("level", [0.9, 0.975, 0.995])
def test_the_quantile_of_t(freedom: int, level: float) -> None:
    def density(x: Any) -> Any:
        return (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    scale = mpmath.gamma((freedom + 1) / 2) / (mpmath.sqrt(freedom * mpmath.pi) * mpmath.gamma(freedom / 2))
    exact = float(mpmath.findroot(lambda t: 0.5 + scale * mpmath.quad(density, [0, t]) - level, 2.0))
    promised = 0.05 if freedom == 3 else 0.01  # of the docstring; levels to 0.995
    assert abs(t_quantile(level, freedom) - exact) <= promised * exact


def test_a_prediction_interval_holds_one_more() -> None:
    """Sets of six and a seventh alike, lognormal: beyond either end in 2.5 % of the sets, by the binomial's own limit;
    the largest of the six is exceeded in 1 of 7."""
    sets, tail, chance = 40_000, 0.025, 1e-6
    draws, above, below, largest = random.Random(0), 0, 0, 0
    for _ in range(sets):
        *known, new = (draws.lognormvariate(-7, 0.3) for _ in range(7))
        low, high = prediction_interval(known)
        above, below, largest = above + (new > high), below + (new < low), largest + (new > max(known))
    most = sets * tail + NormalDist().inv_cdf(1 - chance) * math.sqrt(sets * tail * (1 - tail))
    assert 0 < above <= most and 0 < below <= most < largest


@pytest.mark.parametrize("values", [[2.0], [0.0, 1.0], [1.0, math.inf], [3.0, 3.0]])
def test_a_prediction_interval_without_a_spread(values: list[float]) -> None:
    low, high = prediction_interval(values)
    # e ulps of a logarithm's product with its size, where the logarithms are alike
    assert low == min(values) and min(values) <= high <= max(values) * (1 + 2.0**-50)


def test_the_draw_keeps_its_probabilities() -> None:
    weights = [torch.ones(200), torch.linspace(0, 1, 200) ** 4, (torch.arange(200) % 50 == 0).double()]
    seen, repeats = torch.zeros(200), 600
    for seed in range(repeats):
        one = draw(weights, 30, seed)
        assert len(one.index) == 30 == len(set(one.index.tolist())) and one.population == 200 and not one.complete
        seen[one.index] += 1
    full = sampled_statistics._inclusion(torch.stack([w / w.sum() for w in weights]).mean(0).double(), 30)
    assert float(full.sum()) == pytest.approx(30, abs=200 * 2**-50) and float(full.max()) == 1
    # a count of draws is binomial; 200 of them at once, each missed with probability 1e-6
    spread = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 1e-6)) * (full * (1 - full) * repeats).sqrt()
    assert bool(((seen - full * repeats).abs() <= spread + 1).all())
    assert bool((seen[full == 1] == repeats).all())
    assert draw(weights, 200, 0).complete and draw(weights, 1000, 0).index.tolist() == list(range(200))


@pytest.fixture(scope="module")
def populations() -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Squared errors, squared norms, weights by size and through the targets, of whole gradients."""
    found = {}
    for case, impl in (("trained", "cce_exact"), ("trained", "cce"), ("init", "cce_sparse"), ("confident", "baseline")):
        problem = CASES[case](n=512, v=2048, d=32, dtype=torch.bfloat16)
        exact = truth(problem)
        _, de, dc = gradients(problem, impl)
        counts = torch.bincount(problem.targets, minlength=problem.v)
        for name, out, right, through in (
            ("dE", de, exact.dE, 1 / counts[problem.targets].double()),
            ("dC", dc, exact.dC, counts.double()),
        ):
            wrong = (out.double() - right).square().sum(1)
            found[f"{case} {impl} {name}"] = (wrong, right.square().sum(1), sampled._sizes(out), through)
    return found


def binomial_floor(count: int, chance: float, delta: float) -> int:
    """Largest k that a binomial count falls below with probability at most delta."""
    total = 0.0
    for k in range(count + 1):
        total += math.exp(
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            + k * math.log(chance) + (count - k) * math.log1p(-chance)
        )  # fmt: skip
        if total > delta:
            return k
    return count


def test_intervals_cover(populations: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Nominal 95 %, at fixed seeds: the normwise error, its strata's share and the quantiles."""
    repeats, confidence = 200, 0.95
    least = binomial_floor(repeats, confidence, 1e-4)
    for name, (wrong, right, size, through) in populations.items():
        whole = float(wrong.sum() / right.sum())
        own = (wrong / right).sqrt()
        medians = {level: float(own.quantile(level, interpolation="lower")) for level in (0.5, 0.9)}
        hits, below, above = 0, dict.fromkeys(medians, 0), 0
        for seed in range(repeats):
            one = draw([torch.ones_like(size), size, through], 96, seed)
            found = one.ratio(wrong[one.index], right[one.index], confidence)
            hits += found.low <= whole <= found.high
            above += found.low > whole
            for level, value in medians.items():
                x = own[one.index]
                q = one.quantile(x, level, confidence, x, x)
                below[level] += q.low <= value <= q.high
        print(name, hits, above, below)
        assert hits >= least, (name, hits)
        assert min(below.values()) >= least, (name, below)


def test_an_interval_is_not_wider_than_it_must_be(
    populations: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]],
) -> None:
    """Rounding errors, which are in proportion to a row's size, are known to a few percent from 96 rows."""
    for side in ("dE", "dC"):
        wrong, right, size, through = populations[f"trained cce_exact {side}"]
        one = draw([torch.ones_like(size), size, through], 96, 0)
        found = one.ratio(wrong[one.index], right[one.index], 0.95)
        assert found.high / found.low < 2


def test_ratios_at_the_edges() -> None:
    all_of_two = Sample(torch.arange(2), torch.ones(2, dtype=torch.float64), 2, complete=True)
    some = Sample(torch.arange(2), torch.full((2,), 0.5, dtype=torch.float64), 4)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert all_of_two.ratio(zero, zero, 0.95) == all_of_two.ratio(zero, one, 0.95)
    assert all_of_two.ratio(one, one, 0.95).high == 1.0
    assert some.ratio(one, zero, 0.95).value == math.inf
    unseen = some.ratio(zero, one, 0.95)
    assert (unseen.value, unseen.low) == (0, 0) and 0 < unseen.high < 1
    assert some.quantile(one, 0.99, 0.95, one, one).high == math.inf


# -- the command -------------------------------------------------------------------------------------------------------


def test_measure_impl_takes_every_option() -> None:
    problem = problem_of("softcap")
    found = measure_impl(problem, "cce_split", rows=32, columns=32, lse="fp64")
    assert found.dE and found.dE.rel.value < 2**-6 and found.lse == "fp64" and found.delta == 0 and found.beyond == 0


def test_the_command_prints_a_table_and_json(tmp_path: Any) -> None:
    arguments = [
        "measure",
        "captured",
        "--tokens",
        "64",
        "--impl",
        "cce_exact,baseline",
        "--rows",
        "16",
        "--columns",
        "16",
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "cce_exact" in shown.output and "baseline" in shown.output and "confidence" in shown.output
    plain = CliRunner().invoke(app, [*arguments, "--json"])
    read = json.loads(plain.output)
    assert read["cce_exact"]["dE"]["rel"]["value"] < read["baseline"]["dE"]["rel"]["value"]
    assert CliRunner().invoke(app, ["measure", str(tmp_path / "none.safetensors")]).exit_code == 2
    assert CliRunner().invoke(app, ["measure", "captured", "--impl", "nobody"]).exit_code == 2
