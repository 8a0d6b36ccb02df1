"""The error budget: its passes are the passes, its stages add up, and the bound of the first stages holds."""

from __future__ import annotations

import math

import pytest
import torch

from cce_precision.analysis import budget_passes
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.budget import QUANTITIES, Steps, budget, effective_stages
from cce_precision.analysis.budget_stages import ALL_STAGES, STAGES, Stage
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL
from tests.strategies import EAGER

N, V, D = 140, 160, 8  # two rows and two columns of tiles
KINDS = {
    "bf16": (torch.bfloat16, None, 1.0),
    "fp16, softcap, bias, temperature": (torch.float16, 5.0, 0.7),
    "fp32": (torch.float32, None, 1.0),
}


def steps(kind: str) -> Steps:
    """A problem with an ignored token that holds NaN, upstream gradients, and the options of the kind."""
    dtype, softcap, temperature = KINDS[kind]
    e, c = torch.randn(N, D), torch.randn(V, D) * 4 / math.sqrt(D)
    targets = torch.randint(V, (N,))
    targets[5], e[5, 0] = -1, math.nan
    bias = torch.randn(V).to(dtype) if softcap else None
    problem = Problem(e.to(dtype), c.to(dtype), targets, bias, softcap=softcap, temperature=temperature)
    return Steps(problem, torch.linspace(0.25, 3, N), seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_are_the_passes_bit_for_bit(kind: str) -> None:
    of = steps(kind)
    for impl in EAGER:
        own, call = budget_passes.run(of.problem, of.plan(ALL[impl]), ALL_STAGES, of.g, of.seed), of.measured(ALL[impl])
        for name in QUANTITIES:
            assert getattr(call, name).any() and torch.equal(getattr(own, name), getattr(call, name)), (impl, name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_stage_is_the_truth(kind: str) -> None:
    """Up to the bound of a call in fp64, for problems given in it."""
    of = steps(kind)
    p = of.problem
    double = Problem(p.e.double(), p.c.double(), p.targets, None if p.bias is None else p.bias.double())
    double = Problem(double.e, double.c, p.targets, double.bias, softcap=p.softcap, temperature=p.temperature)
    for impl in ("baseline", "cce_exact", "cce_kahan"):
        found = budget_passes.run(p, of.plan(ALL[impl]), frozenset(), of.g, of.seed)
        plan = of.plan(ALL["baseline" if impl == "baseline" else "cce_exact"])
        allowed = bound(double, plan, of.objective)
        for name, q in (("loss", "nll"), ("dE", "dE"), ("dC", "dC")):
            exact, radius = getattr(of.exact, q), getattr(of.exact.radius, q)
            assert ((getattr(found, name) - exact).abs() <= getattr(allowed, q) + radius).all(), (impl, name)


@pytest.mark.parametrize("kind", list(KINDS)[:2])
def test_the_bound_of_the_first_stages_holds_for_their_error(kind: str) -> None:
    of = steps(kind)
    for impl in ("baseline", "cce_kahan_full_c", "cce_no_filter", "cce_exact", "cce_unbiased", "cce_subsampled"):
        results = of.results(ALL[impl])
        limits = of.bounds(ALL[impl])
        for stage, result, allowed in zip(effective_stages(ALL[impl]), results[1:], limits, strict=True):
            for name, q in (("loss", "nll"), ("dE", "dE"), ("dC", "dC")):
                error = (getattr(result, name) - getattr(results[0], name)).abs()
                limit = getattr(allowed, q) + getattr(of.exact.radius, q)
                assert (error <= limit).all(), (impl, stage.value, name, float((error / limit).nan_to_num().max()))
        whole = bound(of.problem, of.plan(ALL[impl]), of.objective, seed=of.seed)
        assert torch.equal(limits[-1].dE, whole.dE) and torch.equal(limits[-1].dC, whole.dC)


@pytest.mark.parametrize("impl", EAGER)
def test_a_budget_adds_up(impl: str) -> None:
    """The projections sum to the whole error, which is that of the call: nothing is left, to the rounding of fp64."""
    of = steps("bf16")
    rounding = 2.0**-53 * N * V
    for name, found in budget(of, ALL[impl], bounds=False).items():
        assert 0 < found.relative < 1 and found.residual == 0, name
        assert abs(sum(line.share for line in found.lines) - 1) <= rounding / found.relative**2
        assert max(line.relative for line in found.lines) <= found.relative * len(STAGES)
        assert math.isnan(found.bound) and all(math.isnan(line.bound) for line in found.lines)


def test_a_budget_names_the_culprit() -> None:
    """What each variant is known for is the largest line of its dE, and its bound is no smaller."""
    of = steps("bf16")
    culprits = {
        "baseline": Stage.LOGITS, "cce_no_filter": Stage.SUM, "cce_exact": Stage.OUTPUT, "cce_split": Stage.OUTPUT,
        "cce_sparse": Stage.FILTER, "cce_unbiased": Stage.FILTER,
    }  # fmt: skip
    for impl, stage in culprits.items():
        variant = ALL[impl].with_eps(2.0**-6) if ALL[impl].filtered else ALL[impl]
        found = budget(of, variant)["dE"]
        largest = max(found.lines, key=lambda line: line.share)
        assert largest.stage is stage, impl
        assert found.relative <= found.bound and largest.relative <= largest.bound


def test_a_stage_that_rounds_nothing_has_no_part() -> None:
    of = steps("fp32")
    lines = {line.stage: line for line in budget(of, ALL["cce_sparse"], bounds=False)["loss"].lines}
    assert lines[Stage.LOGITS].relative > 0 < lines[Stage.SOFTMAX].relative
    assert all(line.relative == 0 for stage, line in lines.items() if stage not in (Stage.LOGITS, Stage.SOFTMAX))


def test_a_compiled_variant_is_refused() -> None:
    of = steps("fp32")
    with pytest.raises(ValueError, match="compiled"):
        budget(of, ALL["torch_compile"])
    with pytest.raises(ValueError, match="compiled"):
        budget_passes.run(of.problem, Plan(ALL["torch_compile"]))
