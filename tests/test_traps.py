"""The traps of low-precision cross-entropy, as properties: each states what goes wrong, shows that the oracle sees it
going wrong, and that the library does not (or that `baseline`, whose record it is to show the trap, does)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.fuzz import compare, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Knobs, build
from cce_precision.analysis.references import Objective, Quantities, Truth, truth
from cce_precision.eager import backward, forward
from cce_precision.numerics import Variant
from cce_precision.problem import Plan, Problem, Upstream
from cce_precision.variants import ALL
from tests.strategies import TILED

SEED = torch.zeros((), dtype=torch.int64)
DENSE = ("cce_no_filter", "cce_exact", "cce_split")


def run(problem: Problem, variant: Variant, upstream: Tensor) -> tuple[Tensor, ...]:
    """nll, dE, dC of the passes themselves."""
    plan = Plan(variant, problem.softcap, problem.temperature)
    heads = forward(problem, plan)
    d_e, d_c, _ = backward(problem, plan, heads, Upstream(upstream), (True, True, False), SEED)
    assert d_e is not None and d_c is not None
    return heads.nll, d_e, d_c


def oracle(problem: Problem, variant: Variant, upstream: Tensor) -> tuple[Truth, Quantities]:
    objective = Objective("sum", nll=upstream)
    plan = Plan(variant, problem.softcap, problem.temperature)
    return truth(problem, objective), bound(problem, plan, objective)


def holds(name: str, computed: Tensor, exact: Truth, allowed: Quantities) -> bool:
    return compare(computed, getattr(exact, name), getattr(allowed, name) + getattr(exact.radius, name)).holds


def confident(complement: float, dtype: torch.dtype, n: int = 6, v: int = 40, d: int = 8) -> Problem:
    """Tokens whose target has probability 1 - complement, all else alike and small."""
    g = torch.Generator().manual_seed(1)
    e = torch.zeros(n, d)
    e[:, 0] = 1.0
    e[:, 1:] = torch.randn(n, d - 1, generator=g) / 8
    c = torch.randn(v, d, generator=g) / 4
    c[:, 0] = 0.0
    c[0, 0] = math.log((v - 1) / complement)
    return Problem(e.to(dtype), c.to(dtype), torch.zeros(n, dtype=torch.int64))


# 1. p_t - 1 cancels for confident tokens.


@pytest.mark.parametrize("impl", TILED)
@pytest.mark.parametrize("complement", [1e-4, 1e-6, 1e-8, 1e-12, 1e-30])
def test_confident_tokens_keep_their_relative_accuracy(complement: float, impl: str) -> None:
    """1 - P_t, the loss and the gradient hold their bounds, and these bounds are relative: they reject p_t - 1 in
    fp32.
    """
    variant = ALL[impl].configure(None)
    problem = confident(complement, torch.float32)
    upstream = torch.ones(problem.n)
    exact, allowed = oracle(problem, variant, upstream)
    nll, d_e, d_c = run(problem, variant, upstream)
    assert holds("nll", nll, exact, allowed) and holds("dE", d_e, exact, allowed) and holds("dC", d_c, exact, allowed)
    assert holds("p_complement", -torch.expm1(-nll), exact, allowed)

    z = problem.e @ problem.c.T
    p_t = torch.softmax(z, 1)[:, 0]
    assert not holds("p_complement", 1 - p_t, exact, allowed)
    assert not holds("nll", -torch.log(p_t), exact, allowed)
    naive = torch.softmax(z, 1)
    naive[:, 0] -= 1
    assert not holds("dE", naive @ problem.c, exact, allowed)


def test_the_target_term_stays_out_of_the_operand() -> None:
    """Adding the target's term in fp32 takes its rounding out of the error: `cce_exact` against the same with it
    inside.
    """
    problem = confident(0.4, torch.bfloat16, n=64, v=200, d=16)
    upstream = torch.ones(problem.n)
    apart, inside = ALL["cce_exact"], dataclasses.replace(ALL["cce_exact"], label_apart=False)
    exact, allowed = oracle(problem, apart, upstream)
    errors = []
    for variant in (apart, inside):
        _, d_e, d_c = run(problem, variant, upstream)
        errors.append(float((d_e.double() - exact.dE).norm()) + float((d_c.double() - exact.dC).norm()))
        _, own = oracle(problem, variant, upstream)
        assert holds("dE", d_e, exact, own) and holds("dC", d_c, exact, own)
    assert errors[0] < errors[1]
    assert not holds("dE", d_e, exact, allowed)


# 2. A factor 1/N before a cast flushes fp16 gradients.


@given(st.sampled_from(DENSE), st.integers(8, 40), st.integers(0, 2**16))
@settings(max_examples=30)
def test_a_small_upstream_gradient_does_not_flush_the_operand(impl: str, power: int, seed: int) -> None:
    """e is large enough for dC to be representable, so nothing may be lost on the way: dZ must not be cast times
    2^-power.
    """
    g = torch.Generator().manual_seed(seed)
    e = (torch.randn(12, 6, generator=g) * 2.0 ** min(power - 4, 12)).to(torch.float16)
    c = (torch.randn(50, 6, generator=g) * 2.0 ** -min(power - 4, 12)).to(torch.float16)
    problem = Problem(e, c, torch.randint(0, 50, (12,), generator=g))
    upstream = torch.full((12,), 2.0**-power)
    exact, allowed = oracle(problem, ALL[impl], upstream)
    _, d_e, d_c = run(problem, ALL[impl], upstream)
    assert holds("dE", d_e, exact, allowed) and holds("dC", d_c, exact, allowed)
    if 26 <= power <= 30:  # fp16 ends at 2^-24: the cast leaves nothing, and dC is far from its own underflow
        z = problem.e.float() @ problem.c.float().T
        dz = torch.softmax(z, 1) - torch.nn.functional.one_hot(problem.targets, 50)
        flushed = ((dz * 2.0**-power).to(torch.float16).float().T @ problem.e.float()).to(torch.float16)
        assert not holds("dC", flushed, exact, allowed)


# 3. A loss that is summed in 16 bits.


@given(st.sampled_from(TILED), st.integers(0, 2**16), st.sampled_from((torch.bfloat16, torch.float16)))
@settings(max_examples=20)
def test_losses_are_summed_in_fp32(impl: str, seed: int, dtype: torch.dtype) -> None:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    knobs = Knobs(seed=seed, n=257, v=17, d=4, impl=impl, e_dtype=names[dtype])
    call = build(knobs)
    exact, allowed = truth(call.problem, call.objective), bound(call.problem, call.plan, call.objective)
    found = outputs(call)
    assert judge_outputs(call, found, exact, allowed).holds
    nll = forward(call.problem, call.plan).nll
    chunked = torch.zeros((), dtype=dtype)
    for part in nll.split(16):
        chunked += part.sum().to(dtype)
    assert not holds("value", chunked.float() / len(nll), exact, allowed)


# 4. Gradients that are accumulated in 16 bits.


def same_sign(tiles: int, width: int = 2) -> Problem:
    """A gradient of equal terms of one sign: one token a tile, all alike."""
    e = torch.ones(tiles * width, 3, dtype=torch.bfloat16)
    c = torch.zeros(7, 3, dtype=torch.bfloat16)
    return Problem(e, c, torch.zeros(tiles * width, dtype=torch.int64))


def test_sums_in_the_input_dtype_stagnate_and_the_others_do_not() -> None:
    problem = same_sign(tiles=300)
    upstream = torch.ones(problem.n)
    relative = {}
    found = {}
    for impl in ("cce_no_filter", "cce_kahan", "cce_exact"):
        variant = dataclasses.replace(ALL[impl].configure(None), tile=(2, 7))
        exact, allowed = oracle(problem, variant, upstream)
        _, _, found[impl] = run(problem, variant, upstream)
        assert holds("dC", found[impl], exact, allowed)
        relative[impl] = float((found[impl].double() - exact.dC).norm() / exact.dC.norm())
        if impl != "cce_no_filter":
            assert not holds("dC", found["cce_no_filter"], exact, allowed)
    assert relative["cce_kahan"] < relative["cce_no_filter"] and relative["cce_exact"] < relative["cce_no_filter"]


# 5. Logits in 16 bits.


@given(st.integers(0, 2**16), st.sampled_from((8.0, 20.0)))
@settings(max_examples=20)
def test_rounded_logits_are_a_trap_of_the_baseline_alone(seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    e, c = torch.randn(16, 8, generator=g), torch.randn(60, 8, generator=g) * scale / math.sqrt(8)
    targets = torch.multinomial(torch.softmax(e @ c.T, 1), 1, generator=g)[:, 0]
    problem = Problem(e.bfloat16(), c.bfloat16(), targets)
    upstream = torch.ones(16)
    exact, allowed = oracle(problem, ALL["cce_exact"], upstream)
    nll, d_e, _ = run(problem, ALL["cce_exact"], upstream)
    assert holds("nll", nll, exact, allowed) and holds("dE", d_e, exact, allowed)
    z = (problem.e @ problem.c.T).float()
    assert not holds("nll", torch.nn.functional.cross_entropy(z, targets, reduction="none"), exact, allowed)
    _, own = oracle(problem, ALL["baseline"], upstream)
    assert holds("nll", torch.nn.functional.cross_entropy(z, targets, reduction="none"), exact, own)


# 6. Random logits hide 1, 2 and 4.


@pytest.mark.parametrize("impl", DENSE)
def test_on_flat_softmaxes_the_naive_target_passes(impl: str) -> None:
    """The reason for `confident` cases: on N(0, 1) logits p_t - 1 in fp32 is within the 16-bit bound, on confident
    ones not.
    """
    variant = ALL[impl]
    seen = {}
    for name, problem in (("flat", confident(0.9, torch.bfloat16)), ("confident", confident(1e-9, torch.bfloat16))):
        upstream = torch.ones(problem.n)
        exact, allowed = oracle(problem, variant, upstream)
        p = torch.softmax(problem.e.float() @ problem.c.float().T, 1)
        seen[name] = holds("nll", -torch.log(p[:, 0]), exact, allowed)
    assert seen == {"flat": True, "confident": False}


# 7. Tolerances that a zero gradient passes: see test_mutants.


@pytest.mark.parametrize("head", ["lse", "smoothing"])
def test_a_tile_filter_keeps_what_confident_rows_pass_to_other_heads(head: str) -> None:
    """Where 1 - P_t < eps in a whole tile, it may go for nll, not for heads whose gradient at the target is P_t."""
    torch.manual_seed(0)
    c = 8 * torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    targets = torch.randint(0, 256, (128,))
    e = 8 * c[targets]
    gradients = {}
    for impl in ("cce", "cce_exact"):
        leaf = e.clone().requires_grad_()
        smoothing = 0.1 if head == "smoothing" else 0.0
        loss, lse = linear_cross_entropy(
            leaf, c, targets, impl=impl, return_lse=True, filter_eps=2.0**-4 if impl == "cce" else "auto",
            label_smoothing=smoothing,
        )  # fmt: skip
        (loss if head == "smoothing" else lse.sum()).backward()
        gradients[impl] = leaf.grad
    exact = gradients["cce_exact"]
    assert exact.norm() > 0
    # What remains filtered is below eps an entry: less than half of a dropped gradient.
    assert (gradients["cce"] - exact).norm() < exact.norm() / 2
