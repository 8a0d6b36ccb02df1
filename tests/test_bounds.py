"""The bounds themselves: each ingredient against arithmetic that is carried out, and how narrow they are."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cce_precision.analysis import tensor_core as tensor_core_model
from cce_precision.analysis.bounds import INFLATION, bound
from cce_precision.analysis.bounds_logits import flushed
from cce_precision.analysis.bounds_model import (
    AMPERE,
    CPU,
    HOPPER,
    INTERPRETER,
    Computed,
    Machine,
    Precision,
    half_ulp,
    inexact_additions,
    largest,
    significand_bits,
)
from cce_precision.analysis.bounds_tensor_core import running
from cce_precision.analysis.fuzz import judge
from cce_precision.analysis.fuzz_problems import Knobs, build, random_knobs
from cce_precision.analysis.references import Objective, truth
from cce_precision.analysis.tensor_core_tiles import CATEGORIES, GROUPS, operands, some_outputs
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL
from tests.strategies import EAGER, knobs

SINGLE = Precision(torch.float32)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# Roundings.


@given(st.sampled_from(DTYPES), st.floats(-1e30, 1e30, allow_nan=False), st.integers(-140, 0))
@settings(max_examples=200)
def test_half_ulp_covers_rounding(dtype: torch.dtype, x: float, exponent: int) -> None:
    exact = torch.tensor(x * 2.0**exponent, dtype=torch.float64)
    error = (exact.to(dtype).double() - exact).abs()
    allowed = half_ulp(exact.abs(), dtype)
    assert error <= allowed or allowed.isinf()
    assert allowed.isinf() or allowed <= max(
        torch.finfo(dtype).eps / 2 * exact.abs(), torch.finfo(dtype).smallest_normal
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_ulp_is_reached(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for x in (1 + info.eps / 2, 2 - info.eps / 2, info.smallest_normal * info.eps / 2):
        exact = torch.tensor(x, dtype=torch.float64)
        assert (exact.to(dtype).double() - exact).abs() == half_ulp(exact, dtype)
    assert half_ulp(torch.tensor(info.max, dtype=torch.float64) * 2, dtype).isinf()
    assert half_ulp(torch.zeros((), dtype=torch.float64), dtype) == 0


FUNCTIONS = {
    "exp": (torch.exp, -104.0, 88.0),
    "expm1": (torch.expm1, -104.0, 0.0),
    "log1p": (torch.log1p, 0.0, 1.0),
    "log": (torch.log, 2.0**-100, 2.0**40),
    "tanh": (torch.tanh, -12.0, 12.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("strided", [False, True])
def test_elementary_functions_keep_their_ulps(name: str, strided: bool) -> None:
    """On a dense sample of the floats that the passes meet (every 997th), vectorised and one by one."""
    function, low, high = FUNCTIONS[name]
    bits = torch.arange(0, 2**31 - 2**23, 997, dtype=torch.int64)
    for sign in (0, 1):
        x = (bits - sign * 2**31).to(torch.int32).view(torch.float32)
        x = x[(x >= low) & (x <= high)]
        if strided:
            x = x[: 2**18]
            x = x.repeat_interleave(2)[::2]
        exact = function(x.double())
        allowed = SINGLE.function * exact.abs() + SINGLE.tiny
        assert ((function(x).double() - exact).abs() <= allowed).all()


# Sums and products, in many orders.


def folded(terms: Tensor, order: random.Random, fused: bool, a: Tensor, b: Tensor) -> float:
    """fp32 sum of products by repeatedly adding two random partial sums, or a product to one by a fused operation."""
    products = [(float(x), float(y)) for x, y in zip(a, b)]
    order.shuffle(products)
    sums: list[float] = []
    single = lambda x: float(torch.tensor(x, dtype=torch.float64).float())  # noqa: E731
    for x, y in products:
        if sums and order.random() < 0.6:
            place = order.randrange(len(sums))
            exact = Fraction(sums[place]) + Fraction(x) * Fraction(y)
            sums[place] = single(float(exact)) if fused else single(sums[place] + single(x * y))
        else:
            sums.append(single(x * y))
    while len(sums) > 1:
        order.shuffle(sums)
        sums.append(single(sums.pop() + sums.pop()))
    return sums[0]


@given(st.integers(1, 60), st.sampled_from(DTYPES), st.integers(0, 2**16), st.sampled_from((0.0, 1.0)), st.booleans())
@settings(max_examples=150)
def test_products_in_any_order(terms: int, dtype: torch.dtype, seed: int, offset: float, fused: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp(2 * torch.randn(2, terms, generator=g))
    a, b = ((torch.randn(2, terms, generator=g) + offset) * spread).to(dtype).double()
    exact = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b)), Fraction(0))
    absolute, out = (a * b).abs().sum().view(1, 1), torch.tensor([[abs(float(exact))]], dtype=torch.float64)
    bits = significand_bits(dtype)
    no_rounding = 2 * bits <= 24
    count = None
    if no_rounding:
        largest = (absolute + out) / 2 * (1 + terms * SINGLE.u)
        count = inexact_additions(a[None], b[None], (bits, bits), largest, torch.float32)
    allowed = CPU.products(SINGLE, terms, absolute, out, dtype, no_rounding, count) * (1 + 2.0**-40)
    computed = folded(a * b, random.Random(seed), fused, a, b)
    assert abs(Fraction(computed) - exact) <= Fraction(float(allowed))


@given(st.integers(1, 40), st.integers(0, 2**16), st.integers(-140, -100), st.integers(-30, 10))
@settings(max_examples=100)
def test_products_that_take_subnormal_numbers_for_zero(terms: int, seed: int, first: int, second: int) -> None:
    """As some CPUs' instruction for bf16 does: operands, products and sums."""
    least = torch.finfo(torch.bfloat16).smallest_normal
    g = torch.Generator().manual_seed(seed)
    a, b = ((torch.randn(terms, generator=g) * 2.0**x).bfloat16().double() for x in (first, second))

    def normal(x: Tensor) -> Tensor:
        return torch.where(x.abs() < least, 0.0, x)

    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(normal(a), normal(b), strict=True):
        total = normal(total + normal(x * y))
    allowed = flushed(Computed.exact(a[None]), b[None], torch.bfloat16, CPU)
    assert (total - a @ b).abs() <= allowed * (1 + 2.0**-40)
    assert allowed <= ((a * b).abs()[(a.abs() < least) | (b.abs() < least)].sum() + terms * least) * 2
    assert flushed(Computed.exact(a[None]), b[None], torch.float16, CPU) == 0
    assert flushed(Computed.exact(a[None]), b[None], torch.bfloat16, HOPPER) == 0


def test_exact_products_are_known_to_be_exact() -> None:
    """Multiples of 1/8 of at most 4: the bound of a sum of 512 products is 0."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(-32, 33, (2, 5, 512), generator=g).double() / 8
    absolute = a.abs() @ b.abs().T
    fine = inexact_additions(a, b, (8, 8), absolute, torch.float32)
    assert not fine.any()
    assert not CPU.products(SINGLE, 512, absolute, (a @ b.T).abs(), torch.bfloat16, True, fine).any()


@given(st.integers(1, 5000), st.integers(0, 2**16), st.booleans())
@settings(max_examples=100)
def test_depth_of_sums(n: int, seed: int, inner: bool) -> None:
    """torch.sum errs by at most depth u sum |x|: the depth is that of PyTorch's cascade."""
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) + 0.5
    x = x.T.contiguous() if inner else x
    computed, exact = x.sum(1 if inner else 0).double(), x.double().sum(1 if inner else 0)
    depth = CPU.sum_depth(n, inner)
    assert ((computed - exact).abs() <= depth * SINGLE.u * (1 + depth * SINGLE.u) * exact).all()
    assert depth < n or n == 1


def tensor_core(a: list[Fraction], b: list[Fraction], machine: Machine) -> Fraction:
    """A dot product as the model of tensor cores has it: aligned to the largest exponent, cut, added, cut again."""
    exponent = lambda x: math.frexp(float(x))[1] - 1  # noqa: E731
    cut = lambda x, unit: Fraction(math.trunc(x / unit)) * unit  # noqa: E731
    total = Fraction(0)
    for start in range(0, len(a), machine.block):
        terms = [total, *(x * y for x, y in zip(a[start : start + machine.block], b[start : start + machine.block]))]
        live = [t for t in terms if t]
        if not live:
            continue
        unit = Fraction(2) ** (max(exponent(t) for t in live) - machine.fraction)
        total = sum((cut(t, unit) for t in live), Fraction(0))
        if total:
            total = cut(total, Fraction(2) ** (exponent(total) - 23))
    return total


@pytest.mark.parametrize("machine", [HOPPER, AMPERE])
@given(terms=st.integers(1, 200), seed=st.integers(0, 2**16), offset=st.sampled_from((0.0, 2.0)))
@settings(max_examples=40)
def test_tensor_cores(machine: Machine, terms: int, seed: int, offset: float) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (
        (torch.randn(2, terms, generator=g) * torch.exp(torch.randn(2, terms, generator=g)) + offset)
        .bfloat16()
        .double()
    )
    exact = [[Fraction(float(x)) for x in row] for row in (a, b)]
    total = sum((x * y for x, y in zip(*exact)), Fraction(0))
    absolute = (a * b).abs().sum()
    allowed = machine.products(SINGLE, terms, absolute, (a * b).sum().abs(), torch.bfloat16, True)
    assert abs(tensor_core(*exact, machine) - total) <= Fraction(float(allowed))


# The arithmetic of errors.


@given(st.floats(-4, 4), st.floats(-4, 4), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(-1, 1), st.floats(-1, 1))
@settings(max_examples=100)
def test_propagated_errors_enclose(x: float, y: float, dx: float, dy: float, s: float, t: float) -> None:
    """Any numbers within the errors give results within the propagated errors."""
    a, b = (
        Computed(torch.tensor(v, dtype=torch.float64), torch.tensor(d, dtype=torch.float64))
        for v, d in ((x, dx), (y, dy))
    )
    p, q = a.value + s * a.error, b.value + t * b.error
    slack = 2.0**-45
    for result, value in ((a + b, p + q), (a - b, p - q), (a * b, p * q), (a.exp(SINGLE), p.exp())):
        assert (value - result.value).abs() <= result.error + slack * (1 + value.abs())
    if abs(y) > dy + 0.1:
        assert (p / q - a.over(b).value).abs() <= a.over(b).error + slack * 100
    assert a.rounded(SINGLE).error >= a.error and a.stored(torch.bfloat16).error >= a.error


# The whole.


@given(knobs(largest=33))
@settings(max_examples=40)
def test_bounds_are_non_negative_and_zero_for_ignored_tokens(k: Knobs) -> None:
    call = build(k)
    allowed = bound(call.problem, call.plan, call.objective, seed=k.seed)
    ignored = call.problem.targets < 0
    for name in ("nll", "lse", "entropy", "smooth", "loss", "dE", "dC", "dbias", "value", "p_complement"):
        found = getattr(allowed, name)
        assert (found >= 0).all(), name
        if found.shape[:1] == ignored.shape and name not in ("dC", "dbias"):
            assert not found[ignored].any(), name


@pytest.mark.parametrize("machine", [HOPPER, AMPERE])
@pytest.mark.parametrize("impl", EAGER)
def test_other_machines_are_no_more_accurate(impl: str, machine: Machine) -> None:
    """The model of a tensor core only widens the bounds of 16-bit problems whose products are not exact, where nothing
    is known of the order in which it is used."""
    problem = problem_of_normals(torch.float16)
    here, there = (bound(problem, Plan(ALL[impl]), machine=m) for m in (CPU, machine.of_others))
    for name in ("nll", "lse", "dE", "dC"):
        assert getattr(there, name).norm() >= getattr(here, name).norm()


def problem_of_normals(dtype: torch.dtype, n: int = 24, v: int = 60, d: int = 33) -> Problem:
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * 3 / math.sqrt(d)
    return Problem(e.to(dtype), c.to(dtype), torch.randint(0, v, (n,), generator=g))


@pytest.mark.parametrize("impl", EAGER)
def test_bounds_of_blocks_of_rows_agree(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem too large to keep its softmax is bounded block by block: the same up to the order of fp64 sums."""
    from cce_precision.analysis import bounds

    problem = dataclasses.replace(problem_of_normals(torch.bfloat16, n=40, v=50, d=4), bias=torch.zeros(50))
    plan, objective = Plan(ALL[impl]), Objective("sum", label_smoothing=0.1, entropy=0.5)
    whole = bound(problem, plan, objective)
    monkeypatch.setattr(bounds, "KEPT", 500)
    pieces = bound(problem, plan, objective)
    for name in ("nll", "dE", "dC", "dbias"):
        a, b = getattr(whole, name), getattr(pieces, name)
        # a magnitude that crosses a power of two by a rounding of the bound doubles one ulp
        assert ((a - b).abs() <= (2.0**-40) * a + (a - b).abs() * ((a / b).log2().abs() < 1)).all(), name


def test_infinite_where_nothing_can_be_said() -> None:
    """Logits whose rounding exceeds the softmax: the bound says so rather than something wrong."""
    problem = Problem(torch.full((2, 300), 6e4), torch.randn(5, 300).mul(1e4), torch.tensor([0, 1]))
    allowed = bound(problem, Plan(ALL["cce_exact"]))
    assert allowed.dE.isinf().all() and allowed.dC.isinf().all()


@pytest.mark.parametrize("machine", [CPU, INTERPRETER])
def test_a_target_whose_probability_underflows(machine: Machine) -> None:
    """An error of its logit moves the nll, though it moves no probability. The other class's logit is exact; here the
    target's is summed in the order of its features, of which the second half takes away what the first has added up.
    """
    g = torch.Generator().manual_seed(0)
    e = torch.randn(64, 48, generator=g).abs().repeat(1, 2) * 8
    c = torch.randn(48, generator=g).abs() * 64
    e = torch.cat([torch.full((64, 1), 64.0), e], 1).bfloat16()
    c = torch.stack([torch.cat([torch.tensor([64.0]), torch.zeros(96)]), torch.cat([torch.zeros(1), c, -c])]).bfloat16()
    problem = Problem(e, c, torch.ones(64, dtype=torch.int64))
    logit = torch.zeros(64)
    for product in (e.float() * c[1].float()).T:
        logit += product
    assert (truth(problem).nll > 745).all()
    assert (logit.abs() <= bound(problem, Plan(ALL["cce_exact"]), machine=machine, gradients=False).nll).all()


def test_bounds_are_narrow() -> None:
    """The median of bound / error, over quantities and problems of the campaign's distribution, is at most 50."""
    rng = random.Random(5)
    ratios = []
    for impl in 8 * EAGER:
        verdict = judge(random_knobs(rng, (impl,)))
        assert verdict.holds, str(verdict)
        ratios += [q.bound / q.error for q in verdict.quantities.values() if q.error > 0 and q.bound < math.inf]
    assert statistics.median(ratios) <= 50


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_the_recorded_arithmetic_of_tensor_cores(kind: str, category: str) -> None:
    """The emulation that gives an H200's outputs bit for bit errs by no more than the bound, subnormals included."""
    group, tiles = next(g for g in GROUPS if g.format == kind and g.depth == 64), torch.arange(200)
    call = operands(group, category, tiles, *some_outputs(group, tiles))
    found = call.expected(tensor_core_model.HOPPER, False).double()
    a, b, acc = call.a.double()[:, :, None, :], call.b.double()[:, None, :, :], call.acc.double()
    absolute, out = (a * b).abs().sum(-1) + acc.abs(), ((a * b).sum(-1) + acc).abs()
    most = largest(a, b)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    allowed = HOPPER.products(SINGLE, 65, absolute, out, dtype, True, largest=most) * INFLATION
    error = (found - ((a * b).sum(-1) + acc)).abs()
    finite = found.isfinite()
    assert (error <= allowed)[finite].all() and finite.double().mean() > 0.5


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_running_bounds_of_tensor_cores(kind: str, category: str) -> None:
    """They hold, and are narrower than the bound for every order."""
    group, tiles = next(g for g in GROUPS if g.format == kind and g.depth == 64), torch.arange(200)
    call = operands(group, category, tiles, *some_outputs(group, tiles))
    a, b = call.a[:, :, None, :], call.b[:, None, :, :]
    allowed = running(a, b, call.acc, HOPPER)
    exact = (a.double() * b.double()).sum(-1) + call.acc.double()
    found = call.expected(tensor_core_model.HOPPER, False).double()
    assert ((found - exact).abs() <= allowed * INFLATION)[found.isfinite()].all()
    absolute = (a.double() * b.double()).abs().sum(-1) + call.acc.double().abs()
    most = largest(a.double(), b.double())
    every_order = HOPPER.products(SINGLE, 80, absolute, exact.abs(), a.dtype, True, largest=most)
    assert (allowed <= every_order * INFLATION).all()
    assert category != "plain" or allowed.median() < every_order.median() / 2


def test_running_bounds_need_tensor_cores_and_their_operands() -> None:
    x = torch.ones(16)
    with pytest.raises(ValueError, match="'cpu' has no tensor cores"):
        running(x.half(), x.half(), x[0], CPU)
    with pytest.raises(ValueError, match="float32"):
        running(x, x.half(), x[0], HOPPER)


def test_a_subnormal_factor_coarsens_its_block() -> None:
    """Why the bound looks at the largest factors: 2^-24 counts with the exponent of 2^-14 when terms are aligned."""
    a = torch.tensor([2.0**-24, *[1791 * 2.0**-24] * 15]).half()
    b = torch.tensor([1.0, *[1365 * 2.0**-23] * 15]).half()
    found = tensor_core_model.dot(a, b, torch.zeros(()), tensor_core_model.HOPPER).double()
    exact = (a.double() * b.double()).sum()
    bound_of = lambda most: HOPPER.products(SINGLE, 16, exact, exact, torch.float16, True, largest=most)  # noqa: E731
    assert bound_of(0.0) < (found - exact).abs() <= bound_of(largest(a.double(), b.double()))
