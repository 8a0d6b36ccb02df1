"""Each variant does what its record says, and nothing else: roundings, filters, sums, memory, statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.bounds_certificate import certificate, dropped_mass
from cce_precision.analysis.fuzz import compare, judge, outputs
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import Objective, truth
from cce_precision.eager import backward, forward, statistics
from cce_precision.eager.accumulate import Accumulator
from cce_precision.eager.backward import Backward
from cce_precision.eager.filters import sampled
from cce_precision.eager.tiles import column_blocks, row_blocks, valid_rows, vocabulary_order
from cce_precision.numerics import Accumulation, FilterKind, Operand, Variant, unit_roundoff
from cce_precision.problem import Heads, Plan, Problem, Upstream
from cce_precision.variants import ALL
from tests.strategies import EAGER, FILTERED, TILED, knobs

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def problem_of(
    n: int = 40, v: int = 90, d: int = 6, dtype: torch.dtype = torch.bfloat16, seed: int = 0, scale: float = 3.0
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=g)
    c = torch.randn(v, d, generator=g) * scale / math.sqrt(d)
    return Problem(e.to(dtype), c.to(dtype), torch.randint(-1, v, (n,), generator=g))


def passes(
    problem: Problem, variant: Variant, seed: int = 0, upstream: Tensor | None = None
) -> tuple[Heads, Tensor, Tensor]:
    plan = Plan(variant, problem.softcap, problem.temperature)
    heads = forward(problem, plan)
    g = torch.ones(problem.n) if upstream is None else upstream
    d_e, d_c, _ = backward(problem, plan, heads, Upstream(g), (True, True, False), torch.tensor(seed))
    assert d_e is not None and d_c is not None
    return heads, d_e, d_c


# Sums, against exact rational arithmetic.


def rounded(x: Fraction, dtype: torch.dtype) -> Fraction:
    """x rounded to nearest, ties to even, to a normal number of `dtype`."""
    if x == 0:
        return x
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    unit = Fraction(2) ** (exponent - bits + 1)
    return round(x / unit) * unit


def fl(x: Fraction) -> Fraction:
    return rounded(x, torch.float32)


class Exact:
    """One element of an `Accumulator`, in rationals: every rounding is written out."""

    def __init__(self, mode: Accumulation, dtype: torch.dtype, scale: Fraction) -> None:
        self.mode, self.dtype, self.scale = mode, dtype, scale
        self.sum, self.compensation = Fraction(0), Fraction(0)

    def add(self, value: Fraction) -> None:
        if self.mode is Accumulation.FP32:
            self.sum = fl(self.sum + value)
            return
        addend = fl(fl(value * self.scale) - self.compensation)
        new = rounded(fl(self.sum + addend), self.dtype)
        if self.mode is Accumulation.KAHAN:
            self.compensation = rounded(fl(fl(new - self.sum) - addend), self.dtype)
        self.sum = new

    def result(self) -> Fraction:
        return rounded(fl(self.sum * self.scale), self.dtype) if self.mode is Accumulation.FP32 else self.sum


@given(
    st.sampled_from(list(Accumulation)),
    st.sampled_from((torch.bfloat16, torch.float32)),
    st.integers(-3, 3),
    st.lists(st.lists(st.integers(-(2**23), 2**23), min_size=3, max_size=3), min_size=1, max_size=12),
    st.lists(st.integers(-20, 4), min_size=12, max_size=12),
)
@settings(max_examples=60)
def test_sums_round_where_the_record_says(
    mode: Accumulation, dtype: torch.dtype, power: int, rows: list[list[int]], exponents: list[int]
) -> None:
    """The accumulator is an exact emulation of INPUT, KAHAN and FP32, bit for bit."""
    scale = Fraction(2) ** power
    accumulator = Accumulator((1, 3), mode, dtype, torch.tensor(float(scale)))
    exact = [Exact(mode, dtype, scale) for _ in range(3)]
    for row, exponent in zip(rows, exponents):
        values = [Fraction(x) * Fraction(2) ** (exponent - 20) for x in row]
        accumulator.add(slice(None), torch.tensor([[float(x) for x in values]]))
        for element, value in zip(exact, values):
            element.add(value)
    assert accumulator.result()[0].tolist() == [float(element.result()) for element in exact]


@given(st.integers(-(2**23), 2**23), st.integers(-(2**23), 2**23), st.integers(-30, 30))
@settings(max_examples=60)
def test_kahan_pair_is_a_two_sum(a: int, b: int, exponent: int) -> None:
    """In the compute dtype, with |a| >= |b|, sum and compensation hold a + b exactly: fast two-sum (Dekker)."""
    x, y = torch.tensor([[float(a)]]), torch.tensor([[float(b) * 2.0**exponent]])
    x, y = (x, y) if x.abs() >= y.abs() else (y, x)
    accumulator = Accumulator((1, 1), Accumulation.KAHAN, torch.float32, torch.ones(()))
    accumulator.add(slice(None), x)
    accumulator.add(slice(None), y)
    assert accumulator.compensation is not None
    total = Fraction(float(accumulator.sum)) - Fraction(float(accumulator.compensation))
    assert total == Fraction(float(x)) + Fraction(float(y))


# The operand of the second products.


@pytest.mark.parametrize("dtype", LOW)
def test_operands(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """INPUT is one rounding, SPLIT the sum of two, FP32 none, FP32_ABOVE one below eps alone."""
    problem, low = problem_of(dtype=LOW[dtype]), LOW[dtype]
    filt = dataclasses.replace(ALL["cce_subsampled"].filter_e, eps=2.0**-6)
    plan = Plan(ALL["cce_exact"])
    heads = forward(problem, plan)
    for operand in Operand:
        variant = dataclasses.replace(ALL["cce_exact"], operand=operand)
        pass_ = Backward(problem, Plan(variant), heads, Upstream(torch.ones(problem.n)), torch.tensor(0))
        index = next(iter(row_blocks(problem, pass_.rows, 16)))
        columns = next(iter(column_blocks(problem, None, 32)))
        block = pass_.block(problem.e[index].float(), problem.c[columns.index].float(), index, columns)
        x = torch.randn(block.p.shape, generator=torch.Generator().manual_seed(1))
        y = pass_.operand(x, block, filt)
        once = x.to(low).float()
        expected = {
            Operand.INPUT: once,
            Operand.SPLIT: once + (x - once).to(low).float(),
            Operand.FP32: x,
            Operand.FP32_ABOVE: torch.where(block.p < 2.0**-6, once, x),
        }[operand]
        assert torch.equal(y, expected)


# Filters.


@pytest.mark.parametrize(
    "impl", [name for name in FILTERED if ALL[name].filter_e.by_tile or ALL[name].filter_c.by_tile]
)
@pytest.mark.parametrize("eps", [2.0**-3, 2.0**-6, 2.0**-9])
def test_tile_filter_drops_exactly_the_small_tiles(impl: str, eps: float) -> None:
    """A tile filter equals no filter on classifiers and tokens cut to the tiles in which some |P - onehot| reaches
    eps.
    """
    problem = problem_of(n=30, v=70, scale=6.0)
    variant = dataclasses.replace(
        ALL[impl].with_eps(eps), tile=(8, 16), accum_e=Accumulation.FP32, accum_c=Accumulation.FP32
    )
    rows = valid_rows(problem)
    order = vocabulary_order(problem, variant, rows)
    assert order is not None
    z = problem.e.double() @ problem.c.double().T
    difference = torch.softmax(z, 1)
    difference[torch.arange(problem.n), problem.targets.clamp(min=0)] -= 1
    margin = (difference.abs() / eps).log().abs()
    expected_e, expected_c = torch.zeros(30, 6, dtype=torch.float64), torch.zeros(70, 6, dtype=torch.float64)
    dropped = 0
    for index in row_blocks(problem, rows, 8):
        for columns in column_blocks(problem, order, 16):
            block = difference[index][:, columns.index]
            assert margin[index][:, columns.index].min() > 0  # no entry sits on the threshold itself
            alive = bool((block.abs() >= eps).any())
            dropped += not alive
            e, c = problem.e[index].double(), problem.c[columns.index].double()
            if alive or not variant.filter_e:
                expected_e[index] += block @ c
            if alive or not variant.filter_c:
                expected_c[columns.index] += block.T @ e
    _, d_e, d_c = passes(problem, variant)
    allowed = bound(problem, Plan(variant.configure(None)), Objective("sum"))
    assert compare(d_e, expected_e, allowed.dE).holds and compare(d_c, expected_c, allowed.dC).holds
    assert dropped or eps < 2.0**-3


@pytest.mark.parametrize("impl", FILTERED)
def test_a_threshold_of_zero_filters_nothing(impl: str) -> None:
    problem = problem_of()
    filtered = passes(problem, ALL[impl].with_eps(0.0))
    whole = passes(problem, ALL[impl].configure(None))
    same_operand = ALL[impl].operand is not Operand.FP32_ABOVE  # without a filter its operand is rounded everywhere
    if same_operand:
        assert torch.equal(filtered[1], whole[1]) and torch.equal(filtered[2], whole[2])
    assert torch.equal(filtered[0].nll, whole[0].nll)


@pytest.mark.parametrize("impl", FILTERED)
def test_filters_spare_the_loss(impl: str) -> None:
    """The threshold changes gradients alone."""
    problem = problem_of()
    heads = [forward(problem, Plan(ALL[impl].with_eps(eps))) for eps in (0.0, 1.0)]
    assert torch.equal(heads[0].nll, heads[1].nll) and torch.equal(heads[0].lse, heads[1].lse)


@pytest.mark.parametrize(
    "impl", [name for name in FILTERED if not ALL[name].filter_e.by_tile and not ALL[name].filter_c.by_tile]
)
def test_element_filters_spare_the_target(impl: str) -> None:
    """With eps = 1 every other entry is small; the target's term still reaches dE and dC."""
    variant = ALL[impl].with_eps(1.0)
    drop = dataclasses.replace(variant.filter_e, kind=FilterKind.DROP)
    variant = dataclasses.replace(variant, filter_e=drop, filter_c=drop, centred=False)
    problem = problem_of()
    heads, d_e, _ = passes(problem, variant)
    complement = -torch.expm1(-heads.nll)
    expected = (-complement[:, None] * problem.c.float()[problem.targets.clamp(min=0)]).to(problem.e.dtype)
    assert torch.equal(d_e, torch.where(problem.targets[:, None] >= 0, expected, 0))


# Statistics and certificates.


@given(
    st.sampled_from(FILTERED),
    st.sampled_from((2.0**-4, 2.0**-8, 2.0**-12)),
    st.integers(0, 2**16),
    st.sampled_from((0.5, 3.0, 8.0)),
)
@settings(max_examples=40)
def test_certificate_covers_what_was_dropped(impl: str, eps: float, seed: int, scale: float) -> None:
    """From the kernel's statistics alone: at least the true dropped mass, and at least the true error that the filter
    causes.
    """
    problem = problem_of(seed=seed, scale=scale)
    variant = dataclasses.replace(ALL[impl].with_eps(eps), tile=(8, 16))
    plan = Plan(variant)
    heads = forward(problem, plan)
    found = statistics(problem, plan, heads, torch.tensor(seed))
    _, d_e, d_c = passes(problem, variant, seed)
    objective = Objective("sum")
    exact, rounding = truth(problem, objective), bound(problem, Plan(variant.configure(None)), objective)
    valid = problem.targets >= 0

    # The statistics' own bound of the L1 deviation of P^ from P covers dE whatever the filter.
    longest = problem.c.double().square().sum(1).amax().sqrt() * (2 if variant.centred else 1)
    error = (d_e.double() - exact.dE).square().sum(1).sqrt()
    slack = rounding.dE.square().sum(1).sqrt()
    assert (error[valid] <= (found.deviation.double() * longest + slack)[valid]).all()

    if variant.filter_e.kind is FilterKind.DROP:
        pi = found.deviation.double() - (1 - found.kept_mass.double()).clamp(
            min=0
        )  # no less than the error of the kept mass
        mass = dropped_mass(found.kept_mass, pi.clamp(min=0))
        certified = certificate(problem, mass, eps)
        assert (error[valid] <= (certified.rows + slack)[valid]).all()
        if variant.filter_c == variant.filter_e:
            total = (d_c.double() - exact.dC).norm()
            assert total <= certified.d_c + rounding.dC.norm()


@pytest.mark.parametrize("impl", TILED)
def test_statistics_count_what_is_kept(impl: str) -> None:
    problem = problem_of(scale=3.0)
    variant = dataclasses.replace(ALL[impl], tile=(8, 16))
    variant = variant.with_eps(2.0**-6)
    plan = Plan(variant)
    heads = forward(problem, plan)
    found = statistics(problem, plan, heads, torch.tensor(7))
    valid = problem.targets >= 0
    assert not found.kept_mass[~valid].any() and not found.hits[~valid].any() and not found.deviation[~valid].any()
    if not variant.filter_e:
        assert (found.hits[valid] == problem.v).all()
        allowed = bound(problem, plan, Objective("sum"))
        u = torch.finfo(torch.float32).eps
        assert ((found.kept_mass[valid] - 1).abs() <= 2 * allowed.lse[valid] + problem.v * u).all()
    elif variant.filter_e.kind is FilterKind.DROP and not variant.filter_e.by_tile:
        p = torch.softmax(problem.e.double() @ problem.c.double().T, 1)
        p[torch.arange(problem.n), problem.targets.clamp(min=0)] = 1.0
        assert torch.equal(found.hits[valid], (p >= 2.0**-6).sum(1)[valid])


@pytest.mark.parametrize("impl", EAGER)
def test_statistics_of_the_interface(impl: str) -> None:
    problem = problem_of()
    result = linear_cross_entropy(
        problem.e, problem.c, problem.targets, ignore_index=-1, impl=impl, seed=0, return_stats=True
    )
    assert result.stats.kept_mass.shape == problem.targets.shape
    if not ALL[impl].filtered:
        assert not result.stats.certificate.any()


def test_statistics_of_what_is_flushed() -> None:
    """At most a sixteenth of what rounding the operand may lose, in 16 bits."""
    problem = problem_of()
    plan = Plan(ALL["cce_exact"])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = dataclasses.replace(problem, e=problem.e.to(dtype), c=problem.c.to(dtype))
        heads, valid = forward(low, plan), low.targets >= 0
        found = statistics(low, plan, heads, torch.tensor(0)).deviation
        assert not found[~valid].any() and (found[valid] > 0).all() == (dtype != torch.float32)
        if dtype != torch.float32:
            most = unit_roundoff(dtype) / 16 * -torch.expm1(-heads.nll[valid])
            assert ((found[valid] / most - 1).abs() < 2.0**-8).all()


# Memory: never more than one tile row of logits.


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = (x for x in tree_leaves(result) if isinstance(x, Tensor) and x._base is None)
        self.numel = max([self.numel, *(x.numel() for x in fresh)])
        return result


@contextmanager
def largest_tensor() -> Iterator[Largest]:
    mode = Largest()
    with mode:
        yield mode


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("workspace_mb", [None, 1])
def test_no_tensor_is_larger_than_one_tile_row(impl: str, workspace_mb: int | None) -> None:
    """Neither pass makes a tensor of more than 128 x V elements, nor larger than its share of the workspace,
    gradients apart.
    """
    problem = dataclasses.replace(problem_of(n=300, v=5000, d=4), bias=torch.zeros(5000), softcap=5.0)
    plan = Plan(ALL[impl], softcap=5.0, want_entropy=True, want_smooth=True, workspace_mb=workspace_mb)
    ones = torch.ones(problem.n)
    with largest_tensor() as seen:
        heads = forward(problem, plan)
        backward(problem, plan, heads, Upstream(ones, ones, ones, ones), (True, True, True), torch.tensor(0))
    assert problem.v * problem.d <= seen.numel <= 128 * problem.v
    if workspace_mb is not None:
        smallest_block = 128 * 128
        assert seen.numel <= max(problem.v * problem.d, smallest_block, workspace_mb * 2**20 // 4)


@given(knobs(impl=st.sampled_from(TILED), pattern="gaussian", largest=257), st.sampled_from((1, 2)))
@settings(max_examples=10)
def test_blocks_change_no_more_than_the_order_of_sums(k: Knobs, workspace: int) -> None:
    """Results in blocks of another size agree to both bounds."""
    k = dataclasses.replace(k, n=max(k.n, 140), v=max(k.v, 257), d=min(k.d, 3))
    call = build(k)
    small = dataclasses.replace(call, options=call.options | {"workspace_mb": workspace})
    allowed = bound(call.problem, call.plan, call.objective, seed=call.knobs.seed)
    other = bound(
        call.problem, dataclasses.replace(call.plan, workspace_mb=workspace), call.objective, seed=call.knobs.seed
    )
    mine, theirs = outputs(call), outputs(small)
    for name, tensor in mine.items():
        assert compare(tensor, theirs[name], getattr(allowed, name) + getattr(other, name)).holds, name


# Determinism.


@pytest.mark.parametrize("impl", EAGER)
def test_bitwise_reproducible(impl: str) -> None:
    call = build(Knobs(n=40, v=200, d=6, impl=impl, scale=3.0))
    first, second = (_twice(call) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def _twice(call: Call) -> tuple[Tensor, ...]:
    e, c = call.e.detach().requires_grad_(), call.c.detach().requires_grad_()
    loss = linear_cross_entropy(e, c, call.targets, **call.options)[0]
    return (loss.detach(), *torch.autograd.grad(loss, (e, c)))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Heads of a token are the same, bit for bit, in batches of one shape of block; dropped tiles alone depend on
    neighbours.
    """
    problem = problem_of(n=64)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    shuffled = dataclasses.replace(problem, e=problem.e[rows], targets=problem.targets[rows])
    plan = Plan(ALL["cce_exact"])
    mine, theirs = forward(problem, plan), forward(shuffled, plan)
    allowed = bound(problem, plan, Objective("sum"), gradients=False)
    assert compare(mine.nll[rows], theirs.nll, 2 * allowed.nll[rows]).holds


@pytest.mark.parametrize("impl", TILED)
def test_every_record_can_change_its_tile(impl: str) -> None:
    """A variant is a record: tiles of any shape hold the bound too."""
    problem = problem_of(n=23, v=50, scale=4.0)
    for tile in ((1, 1), (3, 7), (16, 64)):
        variant = dataclasses.replace(ALL[impl].with_eps(2.0**-5), tile=tile)
        objective = Objective("sum")
        exact, allowed = truth(problem, objective), bound(problem, Plan(variant), objective, seed=3)
        _, d_e, d_c = passes(problem, variant, seed=3)
        assert compare(d_e, exact.dE, allowed.dE + exact.radius.dE).holds
        assert compare(d_c, exact.dC, allowed.dC + exact.radius.dC).holds


def test_sampled_passes_large_entries_unchanged() -> None:
    p = torch.tensor([[0.5, 0.25, 1e-3, 0.0, math.nan]])
    columns = next(iter(column_blocks(problem_of(v=5), None, 5)))
    for impl in ("cce_sparse", "cce_unbiased", "cce_subsampled"):
        filt = ALL[impl].filter_e
        out = sampled(p, filt, 0.2, torch.tensor(0), torch.tensor([0]), columns, torch.arange(5), True)
        assert torch.equal(out[0, :2], p[0, :2]) and out[0, 3] == 0 and out[0, 4].isnan()


def test_the_fuzzed_default_call_is_judged() -> None:
    assert judge(Knobs()).holds
