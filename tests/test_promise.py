"""What a tolerance promises: the filter's error, bounded from what the pass saw, and the exact gradient elsewhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cce_precision import eager, kernels, linear_cross_entropy, variants
from cce_precision.analysis.cases import CASES
from cce_precision.eager.backward import Backward
from cce_precision.eager.statistics import seen_of
from cce_precision.problem import Heads, Plan, Problem, Upstream
from cce_precision.promise import filter_error

IMPLS = ("cce_sparse", "cce_unbiased", "cce_subsampled")
SEEDS = 12
Pair = tuple[Tensor, Tensor]


def problem_of(case: str, dtype: torch.dtype = torch.float32) -> Problem:
    made = CASES[case](n=48, v=768, d=32, dtype=dtype, device="cpu")
    targets = made.targets.clone()
    targets[::7] = -1
    return Problem(made.e, made.c, targets)


def gradients(problem: Problem, plan: Plan, seed: int = 3, heads: Heads | None = None) -> Pair:
    heads = eager.forward(problem, plan) if heads is None else heads
    upstream = Upstream(torch.linspace(0.5, 2, problem.n, dtype=heads.nll.dtype))
    d_e, d_c, _ = eager.backward(problem, plan, heads, upstream, (True, True, False), torch.tensor(seed))
    assert d_e is not None and d_c is not None
    return d_e, d_c


def promised(problem: Problem, plan: Plan, found: Pair, seed: int = 3) -> float:
    heads = eager.forward(problem, plan)
    upstream = Upstream(torch.linspace(0.5, 2, problem.n, dtype=heads.nll.dtype))
    pass_ = Backward(problem, plan, heads, upstream, torch.tensor(seed))
    return float(filter_error(problem, plan.variant.filter_e, seen_of(pass_), pass_.scale, found))


def relative(found: Pair, exact: Pair) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["init", "trained", "confident"])
@pytest.mark.parametrize("eps", [2.0**-6, 2.0**-9, 2.0**-13])
def test_the_promise_is_never_broken(impl: str, case: str, eps: float) -> None:
    """In fp64 the filter's error is all there is; of one that draws, the root of the mean square over seeds."""
    problem = problem_of(case, torch.float64)
    plan = Plan(variants.get(impl).with_eps(eps))
    exact = gradients(problem, Plan(variants.get("cce_exact")))
    errors, promises = [], []
    for seed in range(SEEDS if plan.variant.random else 1):
        found = gradients(problem, plan, seed)
        errors.append(relative(found, exact) ** 2)
        promises.append(promised(problem, plan, found, seed))
    error = math.sqrt(sum(errors) / len(errors))
    assert error <= min(promises) + (problem.n + problem.v + problem.d) * 2.0**-50  # the sums' own error in fp64


@pytest.mark.parametrize("impl", IMPLS)
def test_where_it_cannot_be_kept_the_gradient_is_exact(impl: str) -> None:
    problem = problem_of("trained")
    plan = Plan(variants.get(impl).with_eps(2.0**-8))
    filtered, exact = gradients(problem, plan), gradients(problem, Plan(variants.get("cce_exact")))
    promise = promised(problem, plan, filtered)
    assert 0 < promise < math.inf
    for tolerance, wanted in ((promise * 1.001, filtered), (promise * 0.999, exact)):
        for a, b in zip(gradients(problem, dataclasses.replace(plan, tolerance=tolerance)), wanted):
            assert torch.equal(a, b) and a.any()


def test_nan_is_no_promise() -> None:
    problem = problem_of("trained")
    problem.e[1, 0] = torch.nan
    plan = Plan(variants.get("cce_unbiased"), tolerance=1.0)
    d_e, d_c = gradients(problem, plan)
    assert d_e.isnan().any(1).nonzero().tolist() == [[1]] and bool(d_c.isnan().any(1).all())


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("impl", "eps"), [("cce_sparse", 2.0**-5), ("cce_unbiased", 2.0**-5), ("cce_subsampled", 2.0**-9)]
)
def test_the_kernels_decide_alike(impl: str, eps: float) -> None:
    """The exact gradient below the promise, the filtered one above it, as the eager pass does."""
    pytest.importorskip("triton")
    made = CASES["trained"](n=9, v=48, d=16, dtype=torch.float32, device="cpu")
    problem = Problem(made.e, made.c, made.targets)
    plan = Plan(variants.get(impl).with_eps(eps), want_record=True)
    upstream = Upstream(torch.ones(9))
    heads, bits = kernels.forward(problem, plan, torch.tensor(3))
    exact_plan = Plan(variants.get("cce_exact"))
    exact = eager.backward(problem, exact_plan, heads, upstream, (True, True, False), torch.tensor(3))
    eager_plan = dataclasses.replace(plan, want_record=False)
    filtered = eager.backward(problem, eager_plan, heads, upstream, (True, True, False), torch.tensor(3))
    assert filtered[0] is not None and filtered[1] is not None
    pass_ = Backward(problem, eager_plan, heads, upstream, torch.tensor(3))
    seen = seen_of(pass_)
    promise = float(filter_error(problem, plan.variant.filter_e, seen, pass_.scale, (filtered[0], filtered[1])))
    assert 0 < promise < math.inf
    for tolerance, wanted, other in ((promise * 1.01, filtered, exact), (promise * 0.99, exact, filtered)):
        adaptive = dataclasses.replace(plan, tolerance=tolerance)
        found = kernels.backward(problem, adaptive, heads, upstream, (True, True, False), torch.tensor(3), bits)
        for a, b, c in zip(found[:2], wanted[:2], other[:2]):
            assert a is not None and b is not None and c is not None
            assert (a - b).norm() < 1e-3 * (c - b).norm()


def test_through_the_interface() -> None:
    problem = problem_of("trained", torch.bfloat16)
    e, c = problem.e.clone().requires_grad_(), problem.c.clone().requires_grad_()
    options = {"ignore_index": -1, "seed": 3, "backend": "eager"}
    grads = {}
    for key, more in {"tight": {"tolerance": 1e-6}, "loose": {"tolerance": 1e6}, "none": {}}.items():
        loss = linear_cross_entropy(e, c, problem.targets, impl="cce_unbiased", **options, **more)  # type: ignore[arg-type]
        assert isinstance(loss, Tensor)
        grads[key] = torch.autograd.grad(loss, (e, c))
    exact = torch.autograd.grad(linear_cross_entropy(e, c, problem.targets, impl="cce_exact", **options), (e, c))  # type: ignore[arg-type]
    for i in (0, 1):
        assert torch.equal(grads["tight"][i], exact[i]) and torch.equal(grads["loose"][i], grads["none"][i])
        assert not torch.equal(grads["loose"][i], exact[i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "cce_exact"}, "cce_unbiased"),
        ({"impl": "cce"}, "cce_unbiased"),
        ({"impl": "cce_sparse", "filter_c_grad": False}, "both gradients"),
        ({"impl": "cce_sparse", "return_entropy": True}, "return_entropy"),
    ],
)
def test_what_keeps_no_tolerance_says_so(options: dict[str, object], message: str) -> None:
    problem = problem_of("trained")
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(problem.e, problem.c, problem.targets, ignore_index=-1, tolerance=1e-2, **options)  # type: ignore[arg-type]
