"""The whole interface against the truth, the derived bound as only tolerance; and what must hold between calls."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import currently_in_test_context, example, given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from cce_precision import LinearCrossEntropy, linear_cross_entropy
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.fuzz import compare, judge, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import Objective, Quantities, truth
from tests.strategies import EAGER, TILED, knobs


def within_bounds(k: Knobs) -> None:
    verdict = judge(k)
    if currently_in_test_context():
        worst = max(q.ratio for q in verdict.quantities.values())
        target(min(worst, 1e300), label="error / bound")
    assert verdict.holds, str(verdict)


@given(knobs(largest=129))
@settings(max_examples=150)
@example(Knobs(n=7, v=1, d=3))
@example(Knobs(n=1, v=1, d=1, impl="baseline", reduction="sum"))
@example(Knobs(n=5, v=300, d=3, impl="cce", scale=8.0))
@example(Knobs(n=130, v=130, d=2, impl="cce_kahan", e_dtype="fp16", pattern="same-sign"))
@example(Knobs(n=9, v=40, d=4, impl="cce_unbiased", e_dtype="fp32", pattern="straddle", filter_eps=2.0**-8))
@example(Knobs(n=9, v=40, d=4, impl="cce_sparse", pattern="straddle", bias="fp32", filter_eps=2.0**-8))
@example(Knobs(n=4, v=9, d=2, e_dtype="fp16", pattern="huge", softcap=0.5, bias="same"))
@example(Knobs(n=6, v=5, d=2, ignored="all", reduction="mean", nan_ignored=True))
@example(  # P below fp32's normal range times the entropy's factor of a hundred
    Knobs(
        seed=1748798990,
        n=3,
        v=21,
        d=2,
        e_dtype="fp32",
        margin=25.0,
        upstream="random",
        ignored="some",
        use_entropy=True,
        z_loss=True,
    )
)
def test_every_output_is_within_its_bound(k: Knobs) -> None:
    within_bounds(k)


@pytest.mark.slow
@given(knobs())
def test_every_output_is_within_its_bound_at_length(k: Knobs) -> None:
    within_bounds(k)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_every_variant_and_dtype(impl: str, dtype: str) -> None:
    """Several tiles each way, every head and option at once."""
    within_bounds(
        Knobs(
            seed=3, n=140, v=270, d=6, impl=impl, e_dtype=dtype, bias="same", scale=3.0, softcap=5.0, temperature=0.7,
            label_smoothing=0.1, class_weight=True, ignored="some", nan_ignored=True, use_lse=True, use_entropy=True,
            upstream="random", reduction="none", filter_eps="auto",
        )
    )  # fmt: skip


@given(knobs(family="plain", largest=33, e_dtype="fp64"))
@settings(max_examples=20)
def test_double_precision_against_balls(k: Knobs) -> None:
    """fp64 calls are judged by a truth of 128 bits."""
    k = dataclasses.replace(k, n=min(k.n, 8), v=min(k.v, 16), d=min(k.d, 16))
    assert judge(k, "balls").holds


def test_compiled_baseline() -> None:
    """`torch_compile` may round less often than the bound allows for."""
    for seed in (0, 1):
        within_bounds(Knobs(seed=seed, n=12, v=33, d=8, impl="torch_compile", e_dtype="bf16", bias="same", scale=3.0))


# Exact relations, bit for bit.


def gradients(call: Call, **changed: Tensor) -> dict[str, Tensor]:
    return outputs(dataclasses.replace(call, **changed))


SCALABLE = st.sampled_from(("bf16", "fp32", "fp64"))  # fp16 has no room for powers of two


@given(knobs(e_dtype=SCALABLE, c_dtype="same", strided=False, largest=129))
@settings(max_examples=25)
def test_both_operands_negated(k: Knobs) -> None:
    call = build(k)
    before, after = outputs(call), gradients(call, e=-call.e, c=-call.c)
    for name, sign in (("value", 1), ("lse", 1), ("dE", -1), ("dC", -1)):
        assert torch.equal(after[name].nan_to_num(), sign * before[name].nan_to_num()), name


@given(
    knobs(e_dtype=SCALABLE, c_dtype="same", strided=False, pattern=st.sampled_from(("gaussian", "hot", "duplicates"))),
    st.integers(-9, 9),
)
@settings(max_examples=25)
def test_power_of_two_moves_between_the_operands(k: Knobs, power: int) -> None:
    call, factor = build(k), 2.0**power
    before, after = outputs(call), gradients(call, e=call.e * factor, c=call.c / factor)
    for name, scale in (("value", 1), ("lse", 1), ("dE", 1 / factor), ("dC", factor)):
        assert torch.equal(after[name].nan_to_num(), scale * before[name].nan_to_num()), name


@given(
    knobs(e_dtype=SCALABLE, c_dtype="same", upstream=st.sampled_from(("one", "random")), pattern="gaussian"),
    st.integers(-20, 20),
    st.sampled_from((-1.0, 1.0)),
)
@settings(max_examples=25)
def test_upstream_gradient_scales_by_powers_of_two(k: Knobs, power: int, sign: float) -> None:
    call, factor = build(k), sign * 2.0**power
    scaled = {name: g * factor for name, g in call.grads.items()}
    before, after = outputs(call), outputs(dataclasses.replace(call, grads=scaled))
    for name in ("dE", "dC", *(["dbias"] if call.bias is not None else [])):
        assert torch.equal(after[name].nan_to_num(), factor * before[name].nan_to_num()), name


@pytest.mark.parametrize("impl", EAGER)
def test_one_class_costs_nothing(impl: str) -> None:
    found = outputs(build(Knobs(n=5, v=1, d=3, impl=impl, reduction="sum", bias="same")))
    assert found["value"] == 0
    assert all(not found[name].any() for name in ("dE", "dC", "dbias"))


@given(knobs(ignored="some", family="any", largest=129), st.sampled_from((math.nan, math.inf, -math.inf, 1e30)))
@settings(max_examples=40)
def test_ignored_tokens_count_nowhere(k: Knobs, poison: float) -> None:
    call = build(dataclasses.replace(k, nan_ignored=False))
    ignored = (call.problem.targets < 0).view(call.e.shape[:-1])
    poisoned = torch.where(ignored[..., None], torch.tensor(poison, dtype=call.e.dtype), call.e)
    before, after = outputs(call), gradients(call, e=poisoned)
    assert not before["dE"][ignored.reshape(-1)].any()
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(), after[name].nan_to_num()), name


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(impl: str, reduction: str) -> None:
    found = outputs(build(Knobs(n=6, v=5, d=3, impl=impl, ignored="all", reduction=reduction, bias="same")))
    assert found["value"].isnan() if reduction == "mean" else not found["value"].any()
    assert all(not found[name].any() for name in ("dE", "dC", "dbias"))


@given(
    knobs(
        family="exact", impl=st.sampled_from(TILED), e_dtype=st.sampled_from(("fp32", "bf16")), bias="same", largest=129
    )
)
@settings(max_examples=30)
def test_exact_logits_have_exact_heads(k: Knobs) -> None:
    """With logits free of rounding, equal tokens have equal heads wherever they stand."""
    call = build(dataclasses.replace(k, n=max(k.n, 2), batch=1, shift=0, strided=False, nan_ignored=False))
    call.e[-1], call.targets[-1] = call.e[0], call.targets[0]
    found = outputs(call)
    assert found["lse"][0] == found["lse"][-1]


# Relations between runs: to the sum of both runs' bounds.


def allowance(call: Call) -> Quantities:
    return bound(call.problem, call.plan, call.objective, seed=call.knobs.seed)


def close(call: Call, other: Call, name: str, mine: Tensor, theirs: Tensor, arrange: slice | Tensor) -> None:
    """mine and theirs[arrange] have one exact value, so they differ by at most both bounds."""
    allowed = getattr(allowance(call), name) + getattr(allowance(other), name)[arrange]
    comparison = compare(mine, theirs[arrange], allowed)
    assert comparison.holds, (name, comparison)


def simple(k: Knobs, **changes: object) -> Call:
    """A call whose tokens stand in one row, unreduced, so that tokens can be moved about."""
    return build(
        dataclasses.replace(k, batch=1, shift=0, reduction="sum", upstream="one", nan_ignored=False, **changes)
    )


def moved(call: Call, rows: Tensor | None = None, columns: Tensor | None = None) -> Call:
    """The same call with tokens and classes in another order."""
    rows = torch.arange(call.problem.n) if rows is None else rows
    columns = torch.arange(call.problem.v) if columns is None else columns
    place = torch.argsort(columns)
    e, c, targets = call.e[rows], call.c[columns], call.problem.targets[rows]
    targets = torch.where(targets >= 0, place[targets.clamp(min=0)], -1)
    bias = None if call.bias is None else call.bias[columns]
    weight = None if call.objective.class_weight is None else call.objective.class_weight[columns]
    problem = dataclasses.replace(
        call.problem, e=e, c=c, targets=targets, bias=bias,
        column_weight=None if call.problem.column_weight is None else weight,
    )  # fmt: skip
    take = lambda x: x[rows] if isinstance(x, Tensor) and x.numel() == call.problem.n else x  # noqa: E731
    o = call.objective
    objective = dataclasses.replace(o, class_weight=weight, lse=take(o.lse), entropy=take(o.entropy))
    grads = {name: g[rows] if name in ("lse", "entropy") else g for name, g in call.grads.items()}
    options = call.options | {"class_weight": weight, "ignore_index": -1}
    return dataclasses.replace(
        call, e=e, c=c, targets=targets, bias=bias, problem=problem, objective=objective, options=options, grads=grads,
        knobs=dataclasses.replace(call.knobs, ignore_index=-1), counted=torch.ones(len(rows), dtype=torch.bool),
    )  # fmt: skip


RELATED = knobs(
    pattern=st.sampled_from(("gaussian", "duplicates", "hot", "ties")), z_loss=False, largest=129, ignored="none"
)


@given(RELATED, st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_order_of_tokens(k: Knobs, shuffle: object) -> None:
    call = simple(k)
    order = torch.tensor(shuffle.sample(range(call.problem.n), call.problem.n))
    other = moved(call, rows=order)
    mine, theirs = outputs(call), outputs(other)
    close(call, other, "value", mine["value"], theirs["value"], ...)
    close(call, other, "dE", mine["dE"], theirs["dE"], torch.argsort(order))
    close(call, other, "dC", mine["dC"], theirs["dC"], slice(None))


@given(RELATED, st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_order_of_the_vocabulary(k: Knobs, shuffle: object) -> None:
    call = simple(k)
    order = torch.tensor(shuffle.sample(range(call.problem.v), call.problem.v))
    other = moved(call, columns=order)
    mine, theirs = outputs(call), outputs(other)
    close(call, other, "value", mine["value"], theirs["value"], ...)
    close(call, other, "dE", mine["dE"], theirs["dE"], slice(None))
    close(call, other, "dC", mine["dC"], theirs["dC"], torch.argsort(order))


@given(RELATED, st.integers(1, 128))
@settings(max_examples=25)
def test_batch_split(k: Knobs, cut: int) -> None:
    """The gradients of the halves of a batch add up to that of the whole."""
    call = simple(dataclasses.replace(k, n=max(k.n, 2)))
    n = call.problem.n
    rows = torch.arange(n)
    parts = [moved(call, rows=r) for r in (rows[: cut % n or 1], rows[cut % n or 1 :])]
    whole, found = outputs(call), [outputs(part) for part in parts]
    allowed, each = allowance(call), [allowance(part) for part in parts]
    for name in ("value", "dC"):
        together = sum(f[name].double() for f in found)
        comparison = compare(whole[name], together, getattr(allowed, name) + sum(getattr(b, name) for b in each))
        assert comparison.holds, (name, comparison)
    comparison = compare(whole["dE"], torch.cat([f["dE"] for f in found]), allowed.dE + torch.cat([b.dE for b in each]))
    assert comparison.holds, comparison


PLAIN = knobs(
    family="exact", e_dtype=st.sampled_from(("bf16", "fp16", "fp32")), c_dtype="same", label_smoothing=0.0,
    use_lse=False, use_entropy=False, z_loss=False, class_weight=False, ignored="none", bias="fp32", largest=65,
)  # fmt: skip


@given(PLAIN, st.integers(-64, 64))
@settings(max_examples=25)
def test_constant_shift_of_the_logits(k: Knobs, eighths: int) -> None:
    """A constant added to every bias raises lse by it and changes nothing else."""
    call = simple(k)
    assert call.bias is not None
    raised = call.bias + eighths / 8
    other = dataclasses.replace(call, bias=raised, problem=dataclasses.replace(call.problem, bias=raised))
    mine, theirs = outputs(call), outputs(other)
    close(call, other, "lse", mine["lse"].double() + eighths / 8, theirs["lse"], slice(None))
    for name in ("dE", "dC", "dbias"):
        close(call, other, name, mine[name], theirs[name], slice(None))


@given(PLAIN, st.integers(0, 2**31 - 1))
@settings(max_examples=25)
def test_one_vector_added_to_every_classifier_row(k: Knobs, seed: int) -> None:
    """C + 1 w^T shifts each token's logits by a constant, and the gradient's rows sum to 0: dE stays."""
    call = simple(k)
    w = torch.randint(-8, 9, (call.problem.d,), generator=torch.Generator().manual_seed(seed)) / 8
    c = (call.c.double() + w).to(call.c.dtype)
    assert torch.equal(c.double(), call.c.double() + w)
    other = dataclasses.replace(call, c=c, problem=dataclasses.replace(call.problem, c=c))
    mine, theirs = outputs(call), outputs(other)
    close(call, other, "value", mine["value"], theirs["value"], ...)
    close(call, other, "dE", mine["dE"], theirs["dE"], slice(None))


@given(RELATED)
@settings(max_examples=25)
def test_duplicate_tokens_and_classes(k: Knobs) -> None:
    k = dataclasses.replace(k, n=max(k.n, 2), v=max(k.v, 4), pattern="duplicates", strided=False, margin=0.0, bias=None)
    call = simple(dataclasses.replace(k, use_lse=False, use_entropy=False, class_weight=False))
    call.e[-1], call.targets[-1], call.problem.targets[-1] = call.e[0], call.targets[0], call.targets[0]
    found, allowed = outputs(call), allowance(call)
    assert compare(found["dE"][0], found["dE"][-1], allowed.dE[0] + allowed.dE[-1]).holds
    for j in range(0, call.problem.v - 1, 2):
        if not ((call.targets == j) | (call.targets == j + 1)).any():
            assert compare(found["dC"][j], found["dC"][j + 1], allowed.dC[j] + allowed.dC[j + 1]).holds


@given(
    knobs(
        label_smoothing=0.0,
        softcap=None,
        use_lse=False,
        use_entropy=True,
        z_loss=False,
        class_weight=False,
        bias="fp32",
        largest=129,
        upstream="one",
    )
)
@settings(max_examples=25)
def test_gradients_sum_to_zero_over_the_vocabulary(k: Knobs) -> None:
    """sum_j dC_j = 0 and sum_j dbias_j = 0 whatever the probabilities: a probe that needs no truth."""
    call = build(k)
    found, allowed = outputs(call), allowance(call)
    for name in ("dC", "dbias"):
        total = found[name].double().sum(0)
        assert compare(total, torch.zeros_like(total), getattr(allowed, name).sum(0)).holds, name


# Autograd.


@pytest.mark.parametrize("impl", EAGER)
def test_gradcheck(impl: str) -> None:
    call = build(
        Knobs(n=4, v=7, d=3, e_dtype="fp64", bias="same", softcap=5.0, temperature=0.7, label_smoothing=0.1, impl=impl,
              class_weight=True, filter_eps="auto")
    )  # fmt: skip
    options = call.options | {"return_entropy": True}
    if (
        options["impl"] in ("cce_unbiased", "cce_subsampled", "cce_sparse")
        or impl.startswith("cce_kahan")
        or impl == "cce"
    ):
        options["filter_eps"] = None

    def function(e: Tensor, c: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = linear_cross_entropy(e, c, call.targets, bias, **options)
        return result[0], result[1], result[2]

    leaves = [x.detach().requires_grad_() for x in (call.e, call.c, call.bias) if x is not None]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", TILED)
def test_second_derivatives_are_refused(impl: str) -> None:
    call = build(Knobs(n=4, v=7, d=3, e_dtype="fp64", impl=impl))
    e = call.e.detach().requires_grad_()
    loss = linear_cross_entropy(e, call.c, call.targets, impl=impl)
    (gradient,) = torch.autograd.grad(loss, e, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), e)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("wanted", ["e", "c", "bias"])
def test_only_one_gradient(impl: str, wanted: str) -> None:
    """A frozen head, a frozen body, a bias alone: the gradient asked for is the one of the full call, bit for bit."""
    call = build(Knobs(n=9, v=140, d=5, impl=impl, bias="same", label_smoothing=0.1))
    whole = outputs(call)
    tensors = {"e": call.e.detach(), "c": call.c.detach(), "bias": call.bias.detach()}
    tensors[wanted].requires_grad_()
    result = linear_cross_entropy(tensors["e"], tensors["c"], call.targets, tensors["bias"], **call.options)
    result[0].backward()
    for name, tensor in tensors.items():
        if name == wanted:
            assert torch.equal(tensor.grad, whole[{"e": "dE", "c": "dC", "bias": "dbias"}[name]])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("impl", EAGER)
def test_no_gradient_wanted(impl: str) -> None:
    call = build(Knobs(n=3, v=5, d=2, impl=impl))
    with torch.no_grad():
        loss, lse = linear_cross_entropy(call.e, call.c, call.targets, **call.options)
    assert not loss.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("impl", EAGER)
def test_tied_weights_get_both_gradients(impl: str) -> None:
    """e = h[tokens] W-wise: a weight that is embedding and classifier at once receives the sum."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 4, generator=g).requires_grad_()
    tokens, targets = torch.randint(0, 11, (6,), generator=g), torch.randint(0, 11, (6,), generator=g)
    linear_cross_entropy(weight[tokens], weight, targets, impl=impl, seed=0).backward()
    e, c = weight[tokens].detach().requires_grad_(), weight.detach().clone().requires_grad_()
    linear_cross_entropy(e, c, targets, impl=impl, seed=0).backward()
    through_e = torch.zeros_like(c).index_add(0, tokens, e.grad)
    size = c.grad.abs() + torch.zeros_like(c).index_add(0, tokens, e.grad.abs())
    rounding = len(tokens) * torch.finfo(torch.float32).eps * size.double()
    assert compare(weight.grad, c.grad + through_e, rounding).holds


@given(knobs(strided=True, largest=65))
@settings(max_examples=15)
def test_strides_change_no_more_than_the_order_of_sums(k: Knobs) -> None:
    call = build(k)
    dense = dataclasses.replace(call, e=call.e.contiguous(), c=call.c.contiguous())
    mine, theirs, allowed = outputs(call), outputs(dense), allowance(call)
    for name, tensor in mine.items():
        assert compare(tensor, theirs[name], 2 * getattr(allowed, name)).holds, name


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_cast_call(impl: str, dtype: torch.dtype) -> None:
    call = build(Knobs(n=9, v=30, d=5, e_dtype="fp32", impl=impl, bias="same"))
    leaves = [x.detach().requires_grad_() for x in (call.e, call.c, call.bias) if x is not None]
    with torch.autocast("cpu", dtype):
        inside = linear_cross_entropy(leaves[0], leaves[1], call.targets, leaves[2], impl=impl, seed=0)
    found = torch.autograd.grad(inside, leaves)
    cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
    outside = linear_cross_entropy(cast[0], cast[1], call.targets, cast[2], impl=impl, seed=0)
    expected = torch.autograd.grad(outside, cast)
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected))


def test_module_is_the_function() -> None:
    call = build(Knobs(n=6, v=9, d=4, softcap=5.0, label_smoothing=0.1))
    options = {name: value for name, value in call.options.items() if value is not None}
    module = LinearCrossEntropy(**options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            module(call.e, call.c, call.targets), linear_cross_entropy(call.e, call.c, call.targets, **options)
        )
    )


@given(
    knobs(
        family="plain",
        largest=33,
        e_dtype="fp64",
        impl="cce_exact",
        bias="same",
        label_smoothing=st.sampled_from((0.0, 0.3)),
        class_weight=st.booleans(),
    )
)
@settings(max_examples=15)
def test_value_is_that_of_pytorch(k: Knobs) -> None:
    """The truth itself means what F.cross_entropy means."""
    call = build(k)
    logits = call.problem.e @ call.c.T + call.bias
    expected = F.cross_entropy(
        logits, call.problem.targets, call.objective.class_weight, ignore_index=-1, reduction=k.reduction,
        label_smoothing=k.label_smoothing,
    )  # fmt: skip
    exact, allowed = truth(call.problem, call.objective), bound(call.problem, call.plan, call.objective)
    v = call.problem.v
    rounding = torch.finfo(torch.float64).eps * v * (1 + logits.abs().max()) * (1 + exact.value.abs())
    assert compare(expected, exact.value, v * (allowed.value + exact.radius.value) + rounding).holds
    assert judge_outputs(call, outputs(call), exact, allowed).holds


# Masked classes.


@pytest.mark.parametrize("impl", EAGER)
def test_a_masked_target_costs_infinity_and_spares_the_other_heads(impl: str) -> None:
    """The entropy's gradient was once NaN, 0 times an infinite nll, where the target has a bias of -inf."""
    call = build(Knobs(n=6, v=9, d=3, impl=impl, e_dtype="fp32", bias="same", ignored="none", filter_eps="auto"))
    assert call.bias is not None
    call.bias[call.targets[0]] = -math.inf
    options = call.options | {"reduction": "none", "return_entropy": True}
    e = call.e.detach().requires_grad_()
    result = linear_cross_entropy(e, call.c, call.targets, call.bias, **options)
    masked = call.targets == call.targets[0]
    assert result.loss[masked].isinf().all() and result.loss[~masked].isfinite().all()
    r = torch.randn(6, generator=torch.Generator().manual_seed(0))
    objective = Objective("sum", nll=0.0, lse=r.double(), entropy=r.double())
    problem = dataclasses.replace(call.problem, bias=call.bias)
    exact, allowed = truth(problem, objective), bound(problem, call.plan, objective, seed=call.knobs.seed)
    (d_e,) = torch.autograd.grad([result.lse, result.entropy], e, [r, r])
    assert allowed.dE.isfinite().all()
    assert compare(d_e, exact.dE, allowed.dE + exact.radius.dE).holds
