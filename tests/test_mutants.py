"""Wrong implementations that the oracle must reject: a test that cannot fail proves nothing.

Each mutant is a defect seen in the field, put into the passes or into their outputs. The problems are such that the
defect matters; the bound must be narrow enough to see it, for every variant that the defect can reach.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cce_precision.analysis.bounds import bound
from cce_precision.analysis.fuzz import Verdict, judge, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import truth
from cce_precision.eager.backward import Backward
from cce_precision.eager.forward import OnlineSoftmax
from cce_precision.numerics import Accumulation, FilterKind
from cce_precision.variants import ALL
from tests.strategies import EAGER, FILTERED, TILED

Outputs = dict[str, Tensor]
eager_backward = importlib.import_module("cce_precision.eager.backward")
TYPICAL = Knobs(
    seed=1, n=20, v=150, d=6, bias="same", scale=2.0, softcap=20.0, temperature=0.7, label_smoothing=0.1,
    class_weight=True, ignored="some", upstream="random", filter_eps=2.0**-12,
)  # fmt: skip


def verdict_on(k: Knobs, change: Callable[[Call, Outputs], Outputs]) -> Verdict:
    call = build(k)
    allowed = bound(call.problem, call.plan, call.objective, seed=call.knobs.seed)
    return judge_outputs(call, change(call, outputs(call)), truth(call.problem, call.objective), allowed)


def typical(impl: str, **changes: object) -> Knobs:
    return dataclasses.replace(TYPICAL, impl=impl, **changes)


# Defects of the outputs.


@pytest.mark.parametrize("name", ["dE", "dC", "dbias"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("impl", EAGER)
def test_zero_gradient(impl: str, dtype: str, name: str) -> None:
    verdict = verdict_on(typical(impl, e_dtype=dtype), lambda call, out: out | {name: torch.zeros_like(out[name])})
    assert not verdict.quantities[name].holds
    assert verdict.quantities[name].tells


def count(call: Call) -> float:
    weight, targets = call.objective.class_weight, call.problem.targets
    valid = targets[targets >= 0]
    return float(len(valid) if weight is None else weight[valid].sum())


OUTPUT_MUTANTS: dict[str, Callable[[Call, Outputs], Outputs]] = {
    "missing 1/N": lambda call, out: {name: x * count(call) for name, x in out.items()},
    "mean over all tokens": lambda call, out: {n: x * count(call) / call.problem.n for n, x in out.items()},
    "no upstream gradient": lambda call, out: (
        out | {n: out[n] / float(call.grads["loss"]) for n in ("dE", "dC", "dbias")}
    ),
    "sign": lambda call, out: out | {"dE": -out["dE"]},
    "one row off": lambda call, out: out | {"dE": out["dE"].roll(1, 0)},
    "one class off": lambda call, out: out | {"dC": out["dC"].roll(1, 0)},
    "twice": lambda call, out: out | {"dC": out["dC"] * 2},
    "one part in 16 off": lambda call, out: out | {"dE": out["dE"] * 1.0625},
    "one element off by 8 ulp": lambda call, out: out | {"dE": off_by_ulps(out["dE"], 8)},
    "last row never written": lambda call, out: out | {"dC": torch.cat([out["dC"][:-1], out["dC"][-1:] * torch.nan])},
}


def off_by_ulps(x: Tensor, ulps: int) -> Tensor:
    """The largest element moved by some units in the last place."""
    flat = x.flatten().clone()
    place = flat.abs().argmax()
    flat[place] += ulps * torch.finfo(x.dtype).eps * flat[place]
    return flat.view_as(x)


@pytest.mark.parametrize("mutant", OUTPUT_MUTANTS)
@pytest.mark.parametrize("impl", ["baseline", "cce_kahan_full_c", "cce_exact", "cce_split", "cce_unbiased"])
def test_wrong_outputs(impl: str, mutant: str) -> None:
    k = typical(impl, label_smoothing=0.0, filter_eps="auto" if impl == "cce_unbiased" else TYPICAL.filter_eps)
    if mutant == "one element off by 8 ulp":
        k = dataclasses.replace(k, scale=0.5, softcap=None, filter_eps=None)
        if impl == "baseline":
            pytest.skip("stored logits cost more than 8 ulp")
    assert not verdict_on(k, OUTPUT_MUTANTS[mutant]).holds


# Defects of the passes.

Patch = Callable[[pytest.MonkeyPatch], None]


def replaced(owner: object, name: str, make: Callable[[Callable[..., object]], Callable[..., object]]) -> Patch:
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def rounded_difference(original: Callable[..., object]) -> Callable[..., object]:
    """P_t - 1 by subtraction from a rounded P_t."""

    def naive(self: Backward, index: slice | Tensor) -> Tensor:
        f, p_t = self.factors, torch.exp(-self.heads.nll[index])
        return (f.alpha[index] - f.beta[index]) * p_t + f.beta[index] * (p_t - 1)

    return naive


def naive_update(original: Callable[..., object]) -> Callable[..., object]:
    """Forgets to rescale the sum when the maximum grows."""

    def update(self: OnlineSoftmax, z: Tensor) -> None:
        m = torch.maximum(self.m, z.amax(1))
        self.s = self.s + torch.exp(z - m[:, None]).sum(1)
        self.m = m

    return update


PASS_MUTANTS: dict[str, tuple[Patch, dict[str, object], tuple[str, ...]]] = {
    "dropped target": (
        replaced(Backward, "target_term", lambda f: lambda self, index: torch.zeros_like(f(self, index))),
        {},
        TILED,
    ),
    "target not in complement form": (
        replaced(Backward, "target_term", rounded_difference),
        {"margin": 25.0, "scale": 3.0, "softcap": None, "temperature": 1.0, "label_smoothing": 0.0, "class_weight":
        False,
         "bias": None, "ignored": "none", "e_dtype": "fp32", "d": 32},
        ("cce_exact", "cce_split"),
    ),
    "no softcap slope at the target": (
        replaced(Backward, "target_slope", lambda f: lambda self, index: 1.0),
        {"softcap": 3.0},
        tuple(name for name in TILED if ALL[name].label_apart),
    ),
    "no smoothing in the gradient": (
        replaced(Backward, "weight", lambda f: lambda self, columns: f(self, columns) * 0),
        {},
        TILED,
    ),
    "running sum not rescaled": (replaced(OnlineSoftmax, "update", naive_update), {"v": 1500, "n": 12}, TILED),
    "no late scaling": (
        replaced(eager_backward, "power_of_two", lambda f: lambda x: torch.ones((), dtype=x.dtype)),
        {"e_dtype": "fp16", "upstream": "tiny", "pattern": "huge", "filter_eps": None, "reduction": "sum"},
        ("cce_no_filter", "cce_exact"),
    ),
    "wrong eps": (
        replaced(type(ALL["cce"].filter_e), "threshold", lambda f: lambda self, dtype: 4 * f(self, dtype)),
        {"filter_eps": 2.0**-8, "scale": 0.5, "e_dtype": "fp32"},
        ("cce_sparse", "cce_unbiased", "cce_subsampled"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mutant", "impl"), [(name, impl) for name, (_, _, impls) in PASS_MUTANTS.items() for impl in impls]
)
def test_wrong_passes(mutant: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, changes, _ = PASS_MUTANTS[mutant]
    k = typical(impl, **changes)
    if not ALL[impl].filtered:
        k = dataclasses.replace(k, filter_eps="auto")
    call = build(k)
    allowed = bound(call.problem, call.plan, call.objective, seed=call.knobs.seed)
    exact = truth(call.problem, call.objective)
    assert judge_outputs(call, outputs(call), exact, allowed).holds
    apply(monkeypatch)
    assert not judge_outputs(call, outputs(call), exact, allowed).holds


@pytest.mark.parametrize("impl", ["cce_unbiased", "cce_subsampled"])
def test_another_seed(impl: str) -> None:
    """The bound of a random filter is that of its own draws."""
    k = typical(impl, filter_eps=2.0**-4, e_dtype="fp32")
    other = dataclasses.replace(build(k), options=build(k).options | {"seed": k.seed + 1})
    assert not verdict_on(k, lambda call, out: outputs(other)).holds


# A variant in place of another: the bound of the better one must reject the worse one.

WORSE = [
    ("cce_exact", "baseline", {"scale": 8.0}),  # logits in 16 bits
    ("cce_exact", "cce", {"filter_eps": 2.0**-4, "scale": 0.5, "v": 300}),  # dropped tiles
    ("cce_split", "cce_exact", {}),  # dZ in 16 bits
    ("cce_kahan", "cce", {"pattern": "same-sign", "n": 3, "v": 2000, "scale": 0.5}),  # 16-bit sums
    ("cce_no_filter", "cce_sparse", {"filter_eps": 2.0**-4, "scale": 0.5}),  # dropped entries
]


@pytest.mark.parametrize(("better", "worse", "changes"), WORSE)
def test_a_worse_variant_is_no_substitute(better: str, worse: str, changes: dict[str, object]) -> None:
    k = typical(better, **({"filter_eps": None} | changes))
    filtered = ALL[better].filtered
    call = build(dataclasses.replace(k, filter_eps=None if filtered else "auto"))
    allowed = bound(call.problem, call.plan, call.objective, seed=call.knobs.seed)
    exact = truth(call.problem, call.objective)
    assert judge_outputs(call, outputs(call), exact, allowed).holds
    eps = (changes.get("filter_eps") or None) if ALL[worse].filtered else "auto"
    other = dataclasses.replace(call, options=call.options | {"impl": worse, "filter_eps": eps})
    assert not judge_outputs(call, outputs(other), exact, allowed).holds


def test_every_filter_and_sum_is_covered() -> None:
    """The variants above exercise every kind of filter and of accumulation."""
    assert {ALL[name].filter_e.kind for name in EAGER} == set(FilterKind)
    assert {ALL[name].accum_c for name in EAGER} == set(Accumulation)
    assert {"cce_sparse", "cce_unbiased", "cce_subsampled"} <= set(FILTERED)
    assert judge(TYPICAL).holds
