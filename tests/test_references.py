"""The truth: three arithmetics agree within their certificates, and the certificates are neither empty nor vacuous."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cce_precision.analysis.cases import CASES
from cce_precision.analysis.reference_enclosure import ULPS, Enclosure, U
from cce_precision.analysis.references import Objective, Quantities, Truth, magnitudes, truth
from cce_precision.problem import Problem, Upstream

flint = pytest.importorskip("flint", reason="python-flint is not installed (extra dev)")

NAMES = tuple(field.name for field in dataclasses.fields(Quantities))
HEADS = ("loss", "nll", "lse", "entropy", "smooth", "p_complement")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def problem_of(
    seed: int,
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 3.0,
    bias: str = "none",
    softcap: float | None = None,
    temperature: float = 1.0,
    ignored: float = 0.2,
) -> Problem:
    """Gaussian operands with logits of standard deviation `spread`."""
    random = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=random).mul_(math.sqrt(spread)).to(dtype)
    c = torch.randn(v, d, generator=random).mul_(math.sqrt(spread / d)).to(dtype)
    targets = torch.randint(v, (n,), generator=random)
    targets[torch.rand(n, generator=random) < ignored] = -1
    b = None
    if bias != "none":
        b = torch.randn(v, generator=random) * spread
        if bias == "masked" and v > 1:
            b[torch.rand(v, generator=random) < 0.3] = -math.inf
            b[0] = 0.0  # one column stays
    return Problem(e, c, targets, b, softcap=softcap, temperature=temperature)


def assert_agree(a: Truth, b: Truth, names: tuple[str, ...] = NAMES) -> None:
    """Each element of a within the sum of both certificates of b; NaN and infinities alike."""
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        doubt = getattr(a.radius, name) + getattr(b.radius, name)
        alike = (x == y) | (x.isnan() & y.isnan())
        wrong = ~alike & ~((x - y).abs() <= doubt)
        assert not wrong.any(), f"{name}: {x[wrong][:3]} and {y[wrong][:3]} differ by more than {doubt[wrong][:3]}"


@st.composite
def calls(draw: st.DrawFn, most: int = 9) -> tuple[Problem, Objective]:
    """A small problem and an objective; every option, a seed for the rest."""
    seed = draw(st.integers(0, 2**16))
    n, v, d = (draw(st.integers(1, most)) for _ in range(3))
    problem = problem_of(
        seed,
        n,
        v,
        d,
        dtype=draw(st.sampled_from(DTYPES)),
        spread=draw(st.sampled_from((0.0, 1e-6, 1.0, 10.0, 100.0, 1000.0))),
        bias=draw(st.sampled_from(("none", "finite", "masked"))),
        softcap=draw(st.sampled_from((None, 0.5, 30.0))),
        temperature=draw(st.sampled_from((1.0, 0.7, 3.0))),
        ignored=draw(st.sampled_from((0.0, 0.3, 1.0))),
    )
    random = torch.Generator().manual_seed(seed)
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    numbers = st.sampled_from((0.0, 0.25, -1.5))
    objective = Objective(
        reduction,
        grad_out=torch.randn(n, generator=random) if reduction == "none" else draw(st.sampled_from((1.0, -0.1))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1, 1.0))),
        class_weight=draw(st.sampled_from((None, torch.rand(v, generator=random) + 0.1))),
        z_loss=draw(numbers),
        entropy=draw(numbers),
        lse=torch.randn(n, generator=random) if draw(st.booleans()) else 0.0,
        smooth=draw(numbers),
        nll=draw(st.sampled_from((1.0, 0.0, -2.0))),
    )
    return problem, objective


@settings(max_examples=120)
@given(calls())
@example((problem_of(0, 6, 7, 5, spread=0.0), Objective()))
@example((problem_of(0, 6, 1, 5), Objective(label_smoothing=0.1, z_loss=0.25)))
def test_fp64_agrees_with_balls(call: tuple[Problem, Objective]) -> None:
    assert_agree(truth(*call), truth(*call, method="balls"))


@settings(max_examples=15)
@given(calls(most=6))
def test_mpmath_agrees_with_balls(call: tuple[Problem, Objective]) -> None:
    pytest.importorskip("mpmath", reason="mpmath is not installed (extra dev)")
    assert_agree(truth(*call, method="mpmath"), truth(*call, method="balls"))


@settings(max_examples=20)
@given(calls(most=33), st.integers(1, 7), st.integers(1, 12))
def test_blocks_do_not_matter(call: tuple[Problem, Objective], tokens: int, columns: int) -> None:
    assert_agree(truth(*call, chunk=(tokens, columns)), truth(*call))


def test_certificates_are_not_vacuous() -> None:
    problem = problem_of(0, 64, 64, 64)
    exact = truth(problem, Objective(label_smoothing=0.1, z_loss=0.1))
    for name in NAMES:
        size, doubt = getattr(exact, name).norm(), getattr(exact.radius, name).norm()
        assert 0 < doubt <= 64 * (problem.n + problem.v + problem.d) * U * size, name


def test_balls_are_the_nearest_doubles() -> None:
    exact = truth(problem_of(1, 8, 9, 10), method="balls")
    for name in NAMES:
        value, doubt = getattr(exact, name), getattr(exact.radius, name)
        assert value.abs().max() > 0 and (doubt <= 1.0001 * U * value.abs()).all(), name


MUTANTS = {
    "zero gradient": lambda t, p: dataclasses.replace(t, dE=torch.zeros_like(t.dE), dC=torch.zeros_like(t.dC)),
    "missing 1/N": lambda t, p: dataclasses.replace(t, dE=t.dE * p.n, dC=t.dC * p.n),
    "dropped target": lambda t, p: dataclasses.replace(t, dE=t.dE + p.c.double()[p.targets] / p.n),
    "one ulp of fp32": lambda t, p: dataclasses.replace(t, dE=t.dE * (1 + 2.0**-23), dC=t.dC * (1 + 2.0**-23)),
    "wrong loss": lambda t, p: dataclasses.replace(t, loss=t.loss + 2.0**-30, value=t.value + 2.0**-30),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    problem = problem_of(2, 16, 17, 18, ignored=0.0)
    with pytest.raises(AssertionError, match="differ by more"):
        assert_agree(MUTANTS[mutant](truth(problem), problem), truth(problem, method="balls"))


def test_confident_rows_keep_their_relative_accuracy() -> None:
    """1 - p_t down to 1e-8, and far below: to a count of roundings where the naive difference loses all digits."""
    problem = CASES["confident"](n=24, v=64, d=32, seed=3)
    problem = dataclasses.replace(problem, e=problem.e * torch.tensor([1.0, 4.0, 16.0]).repeat(8)[:, None])
    exact, balls = truth(problem), truth(problem, method="balls")
    assert balls.p_complement.min() < 1e-30
    naive = 1 - torch.softmax(problem.e.double() @ problem.c.double().T, 1).gather(1, problem.targets[:, None])[:, 0]
    counted = (
        64 * (problem.d + problem.e.double().norm(dim=1).square()) * U
    )  # products, and exp of a logit of that size
    sure = balls.p_complement < 1e-6
    assert sure.sum() >= 8
    for name in ("p_complement", "nll", "entropy"):
        x, y = getattr(exact, name), getattr(balls, name)
        assert ((x - y).abs() <= counted * y).all(), name
        assert (getattr(exact.radius, name) <= 64 * counted * y).all(), name
    assert ((naive - balls.p_complement).abs() > counted * balls.p_complement)[sure].all()
    row = exact.dE.norm(dim=1)
    assert (exact.radius.dE.norm(dim=1) <= 64 * 64 * counted * row).all()


def naive_loss(problem: Problem, objective: Objective, e: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """The value as a user of PyTorch writes it."""
    z = e @ c.T
    z = z if bias is None else z + bias
    z = z if problem.softcap is None else problem.softcap * torch.tanh(z / problem.softcap)
    z = z / problem.temperature
    weight = None if objective.class_weight is None else objective.class_weight.double()
    smoothing = objective.label_smoothing
    valid = problem.targets >= 0
    loss = F.cross_entropy(z, problem.targets, weight, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    log_p = z.log_softmax(1)
    lse = z.logsumexp(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = loss + (objective.z_loss * lse**2 + objective.entropy * entropy + objective.lse * lse) * valid
    if objective.reduction == "none":
        return loss
    counted = valid.double() if weight is None else weight[problem.targets.clamp(min=0)] * valid
    return loss.sum() / counted.sum() if objective.reduction == "mean" else loss.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 0.3, "entropy": -0.2, "lse": 0.5, "label_smoothing": 0.3}],
    ids=["plain", "smooth", "all"],
)
@pytest.mark.parametrize("head", [{}, {"bias": "finite", "softcap": 5.0, "temperature": 0.7}], ids=["bare", "capped"])
def test_autograd_of_the_plain_expression_agrees(
    reduction: str, weighted: bool, options: dict[str, float], head: dict[str, object]
) -> None:
    problem = problem_of(4, 13, 19, 11, spread=2.0, **head)  # type: ignore[arg-type]
    weight = torch.rand(19) + 0.5 if weighted else None
    grad_out = torch.randn(13) if reduction == "none" else 1.5
    objective = Objective(reduction, grad_out=grad_out, class_weight=weight, **options)
    leaves = [None if t is None else t.double().requires_grad_() for t in (problem.e, problem.c, problem.bias)]
    value = naive_loss(problem, objective, *leaves)  # type: ignore[arg-type]
    value.backward(torch.as_tensor(grad_out).double().expand_as(value))  # type: ignore[no-untyped-call]

    exact, sizes = truth(problem, objective), magnitudes(problem, objective)
    roundings = 64 * (problem.n + problem.v + problem.d) * U
    terms = exact.lse.abs().max() * (1 + exact.lse.abs().max()) + exact.loss.abs().sum()
    assert_close(value, exact.value, exact.radius.value, roundings * terms)
    for leaf, name in zip(leaves, ("dE", "dC", "dbias")):
        if leaf is not None:
            right, size = getattr(exact, name), getattr(sizes, name)
            allowed = roundings * size.norm()
            assert allowed < right.norm() / problem.n, "a zero gradient, or one without 1/N, would pass"
            assert leaf.grad is not None
            assert_close(leaf.grad, right, getattr(exact.radius, name), allowed)


def assert_close(out: Tensor, right: Tensor, radius: Tensor, allowed: Tensor) -> None:
    assert (out - right).norm() <= radius.norm() + allowed


def test_mean_divides_as_pytorch_does() -> None:
    """By the sum of the targets' weights, also for the smoothing part."""
    problem, weight = problem_of(5, 12, 7, 4), torch.rand(7) + 0.1
    z = problem.e.double() @ problem.c.double().T
    exact = truth(problem, Objective(class_weight=weight, label_smoothing=0.2), "balls")
    value = F.cross_entropy(z, problem.targets, weight.double(), ignore_index=-1, label_smoothing=0.2)
    assert (value - exact.value).abs() <= 64 * (problem.v + problem.d + problem.n) * U * exact.lse.abs().max()
    unweighted = exact.loss.sum() / (problem.targets >= 0).sum()
    assert (value - unweighted).abs() > 64 * 64 * U * exact.value


def test_an_upstream_is_an_objective() -> None:
    problem = problem_of(6, 9, 8, 7)
    g = torch.randn(4, 9, dtype=torch.float64)
    together = truth(problem, Objective.from_upstream(Upstream(g[0], g[1], g[2], g[3])), "balls")
    parts = [
        truth(problem, Objective("none", grad_out=g[k], **{"nll": 0.0, name: 1.0}), "balls")
        for k, name in enumerate(("nll", "lse", "entropy", "smooth"))
    ]
    for name in ("dE", "dC", "dbias"):
        total = sum(getattr(part, name) for part in parts)
        doubt = sum(getattr(part, name).abs() for part in parts) * 8 * U
        assert ((getattr(together, name) - total).abs() <= doubt).all() and total.any()


def test_one_column_leaves_nothing_to_learn() -> None:
    exact = truth(problem_of(7, 5, 1, 6))
    for name in ("loss", "entropy", "p_complement", "dE", "dC", "dbias"):
        assert not getattr(exact, name).any(), name


@pytest.mark.parametrize("method", ["fp64", "balls"])
def test_all_ignored(method: str) -> None:
    problem = problem_of(8, 5, 6, 7, ignored=1.1)
    assert truth(problem, Objective("mean"), method).value.isnan()
    exact = truth(problem, Objective("sum"), method)
    assert exact.value == 0
    for name in (*HEADS, "dE", "dC", "dbias"):
        assert not getattr(exact, name).any() and not getattr(exact.radius, name).any(), name


def test_ignored_rows_may_hold_anything() -> None:
    problem = problem_of(9, 12, 6, 7)
    ignored = problem.targets < 0
    assert ignored.any()
    e = problem.e.masked_fill(ignored[:, None], math.nan)
    with_nan, without = truth(dataclasses.replace(problem, e=e)), truth(problem)
    for name in NAMES:
        assert torch.equal(getattr(with_nan, name), getattr(without, name)), name
    assert not with_nan.dE[ignored].any()


@pytest.mark.parametrize("method", ["fp64", "balls"])
def test_masked_columns_are_absent_columns(method: str) -> None:
    problem = problem_of(10, 8, 9, 5, bias="masked", ignored=0.0)
    assert problem.bias is not None
    masked = problem.bias == -math.inf
    assert 0 < masked.sum() < 8
    problem.targets[:] = (~masked).nonzero()[:, 0][torch.arange(8) % int((~masked).sum())]
    problem.targets[0] = masked.nonzero()[0, 0]
    exact = truth(problem, Objective("sum"), method)
    assert exact.loss[0] == math.inf and exact.value == math.inf and exact.p_complement[0] == 1
    rest = dataclasses.replace(problem, targets=problem.targets.clone().index_fill_(0, torch.tensor([0]), -1))
    full = truth(rest, Objective("sum"), method)
    position = torch.cumsum(~masked, 0) - 1
    kept = Problem(rest.e, rest.c[~masked], torch.where(rest.targets < 0, -1, position[rest.targets]))
    small = truth(dataclasses.replace(kept, bias=problem.bias[~masked]), Objective("sum"), method)
    assert not full.dC[masked].any() and not full.dbias[masked].any()
    assert ((full.dC[~masked] - small.dC).abs() <= full.radius.dC[~masked] + small.radius.dC).all()
    assert_agree(
        dataclasses.replace(full, dC=small.dC, dbias=small.dbias, smooth=small.smooth, radius=full.radius),
        small,
        ("loss", "value", "nll", "lse", "entropy", "p_complement", "dE"),
    )


@pytest.mark.parametrize("function", ["exp", "expm1", "log1p", "tanh"])
def test_elementary_functions_are_within_their_ulps(function: str) -> None:
    """The one assumption of the fp64 certificate that depends on the machine."""
    x = torch.randn(3000, dtype=torch.float64) * torch.logspace(-12, 1.5, 3000, dtype=torch.float64)
    x = {"exp": -x.abs(), "expm1": -x.abs(), "log1p": x.abs().exp2(), "tanh": x}[function]
    computed = getattr(torch, function)(x)
    with flint.ctx.workprec(128):
        for argument, value in zip(x.tolist(), computed.tolist()):
            error = abs(getattr(flint.arb(argument), function)() - flint.arb(value))
            assert float(error.upper()) <= ULPS * math.ulp(value)


def test_enclosures_enclose() -> None:
    """A handful of operations against balls of the same radii: the enclosure holds the ball's value for both ends."""
    x, r = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64), torch.tensor([1e-3, 1e-9, 0.0], dtype=torch.float64)
    a = Enclosure(x, r)
    for name in ("exp", "expm1", "log1p", "tanh", "sech2"):
        got = getattr(a, name)().inflated()
        for end in (x - r, x, x + r):
            right = [
                1 / (flint.arb(t).cosh() ** 2) if name == "sech2" else getattr(flint.arb(t), name)()
                for t in end.tolist()
            ]
            off = [abs(float(flint.arb(v) - b)) for v, b in zip(got.value.tolist(), right)]
            assert (torch.tensor(off, dtype=torch.float64) <= got.radius).all(), name
        assert (got.radius <= 8 * (r + U * (1 + x)) * (1 + got.value.abs())).all(), name


@pytest.mark.parametrize("method", ["fp65", "", "Balls"])
def test_an_unknown_method_lists_the_known(method: str) -> None:
    with pytest.raises(ValueError, match="fp64, balls, mpmath"):
        truth(problem_of(0, 2, 2, 2), method=method)


def test_bad_objectives() -> None:
    with pytest.raises(ValueError, match="mean, sum, none"):
        Objective("average")
    with pytest.raises(ValueError, match="scalar"):
        Objective("mean", grad_out=torch.ones(3))


def test_magnitudes_are_sums_of_absolute_terms() -> None:
    problem = problem_of(11, 12, 13, 14)
    sizes, exact = magnitudes(problem, Objective("sum")), truth(problem, Objective("sum"))
    x = torch.softmax(problem.e.double() @ problem.c.double().T, 1)
    x[torch.arange(12), problem.targets] -= 1
    x = x.abs() * (problem.targets >= 0)[:, None]
    for size, right, name in (
        (sizes.dE, x @ problem.c.double().abs(), "dE"),
        (sizes.dC, x.T @ problem.e.double().abs(), "dC"),
        (sizes.dbias, x.sum(0), "dbias"),
    ):
        assert (size - right).norm() <= 64 * (12 + 13 + 14) * U * right.norm()
        assert (size >= getattr(exact, name).abs() * (1 - 64 * U)).all()
