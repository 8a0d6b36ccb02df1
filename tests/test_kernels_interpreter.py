"""The Triton kernels in Triton's interpreter, through the whole interface and under the same bounds as the eager
passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cce_precision import eager, kernels, variants
from cce_precision.analysis.bounds import INTERPRETER, bound
from cce_precision.analysis.fuzz import compare, judge, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Knobs, build
from cce_precision.analysis.references import truth
from cce_precision.numerics import power_of_two, unit_roundoff
from cce_precision.problem import Heads, Plan, Problem, Upstream
from tests.strategies import TILED, knobs

pytestmark = pytest.mark.interpreter

KERNELS = tuple(name for name in TILED if name not in ("cce_sparse", "cce_unbiased", "cce_subsampled"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXACT = variants.get("cce_exact")


def within_bounds(k: Knobs) -> None:
    """Runs on the kernels wherever they take the call (backend="auto"), elsewhere on the eager passes."""
    verdict = judge(k)
    assert verdict.holds, str(verdict)


@given(knobs(largest=33, impl=st.sampled_from(KERNELS), e_dtype=st.sampled_from(sorted(DTYPES))))
@settings(max_examples=16)
@example(Knobs(n=7, v=1, d=3))
@example(Knobs(n=1, v=1, d=1, impl="cce", e_dtype="fp16"))
@example(Knobs(n=5, v=300, d=3, impl="cce", scale=8.0))
@example(Knobs(n=6, v=5, d=2, ignored="all", nan_ignored=True))
@example(Knobs(n=17, v=33, d=24, ignored="some", nan_ignored=True, bias="same", softcap=5.0, temperature=0.7))
@example(Knobs(n=9, v=17, d=16, pattern="huge", impl="cce_split"))
@example(Knobs(n=2, v=12, d=1, seed=68285777, bias="fp32", pattern="masked", use_entropy=True))
@example(Knobs(n=1, v=27, d=1, impl="cce_kahan", margin=60.0))
@example(Knobs(n=1, v=1, d=1, pattern="subnormal"))
def test_every_output_is_within_its_bound(k: Knobs) -> None:
    within_bounds(k)


@pytest.mark.parametrize(
    ("dtype", "impl"),
    [("bf16", impl) for impl in KERNELS]
    + [(dtype, impl) for dtype in ("fp16", "fp32") for impl in ("cce", "cce_exact", "cce_split")],
)
def test_every_variant_and_dtype(impl: str, dtype: str) -> None:
    """Several tiles each way, every head and option at once; filtered variants without what has no kernel."""
    filtered = variants.get(impl).filtered
    k = Knobs(
        seed=3,
        n=40,
        v=150,
        d=6,
        impl=impl,
        e_dtype=dtype,
        bias="same",
        scale=3.0,
        softcap=None if filtered else 5.0,
        temperature=0.7,
        label_smoothing=0.1,
        class_weight=True,
        ignored="some",
        nan_ignored=True,
        use_lse=True,
        use_entropy=True,
        upstream="random",
        reduction="none",
    )
    call = build(k)
    assert kernels.supports(call.problem, call.plan) is None
    within_bounds(k)


def problem_of(n: int, v: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> Problem:
    e = (torch.randn(n, d) * scale).to(dtype)
    return Problem(e, torch.randn(v, d).to(dtype), torch.randint(0, v, (n,)))


SMALL_WORKSPACE = Knobs(
    seed=5, n=24, v=100, d=6, bias="fp32", scale=3.0, temperature=0.7, label_smoothing=0.1, class_weight=True,
    ignored="some", nan_ignored=True, use_lse=True, use_entropy=True, upstream="random", reduction="none",
)  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "need"),
    [
        ("cce_split", (True, True, True)),
        ("cce_no_filter", (True, True, True)),
        ("cce_exact", (True, False, False)),
        ("cce_exact", (True, False, True)),
        ("cce_exact", (True, True, False)),
    ],
)
def test_tokens_by_chunks_where_the_workspace_is_small(
    impl: str, need: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bounds, in several chunks of tokens and runs of columns, with and without room for a copy of e."""
    from cce_precision.kernels import by_tokens

    k, pieces = dataclasses.replace(SMALL_WORKSPACE, impl=impl), []
    call = build(k)
    monkeypatch.setattr(by_tokens, "goes_by_tokens", lambda problem, plan, need: need[0] and not plan.partial_e)
    room = 2**20 if need == (True, True, False) else 0  # for a copy of e, or none
    monkeypatch.setattr(by_tokens, "room_of", lambda problem, plan: room)
    monkeypatch.setattr(by_tokens, "piece", lambda *x: pieces.append(x) or (16, 64))
    if need == (True, True, True):
        verdict = judge_outputs(
            call, outputs(call), truth(call.problem, call.objective),
            bound(call.problem, call.plan, call.objective, seed=k.seed, machine=INTERPRETER),
        )  # fmt: skip
        assert verdict.holds and all(verdict.quantities[x].tells for x in ("dE", "dC", "dbias")), str(verdict)
    else:
        heads, _ = kernels.forward(call.problem, call.plan)
        upstream, seed = Upstream(torch.rand(k.n)), torch.zeros((), dtype=torch.int64)
        three = kernels.backward(call.problem, call.plan, heads, upstream, (True, True, True), seed)
        some = kernels.backward(call.problem, call.plan, heads, upstream, need, seed)
        for wanted, a, b in zip(need, three, some):
            assert (b is not None) == wanted
            assert not wanted or (a is not None and b is not None and b.any() and torch.equal(a, b))
    assert pieces


def test_runs_lie_in_the_rows_of_dC_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bounds where the workspace holds no copy of e, which waits in the last rows of dC: some runs with all
    tokens, and the last ones, which have too few rows after them, by chunks. The rows of e do not lie one after the
    other."""
    from cce_precision.kernels import by_tokens

    k = dataclasses.replace(SMALL_WORKSPACE, impl="cce_exact", n=12, v=900, d=30, reduction="mean", use_lse=False)
    call, runs = build(k), []
    call = dataclasses.replace(call, e=torch.cat([call.e, call.e], -1)[..., : call.e.shape[-1]])
    fill, one = by_tokens.Classifier.fill, by_tokens.Classifier._fill
    monkeypatch.setattr(by_tokens, "goes_by_tokens", lambda problem, plan, need: True)
    monkeypatch.setattr(by_tokens, "piece", lambda *x: (16, 512))
    monkeypatch.setattr(by_tokens.Classifier, "fill", lambda self, room: fill(self, k.n * k.d))
    monkeypatch.setattr(by_tokens.Classifier, "_fill", lambda self, *x: runs.append(x) or one(self, *x))
    verdict = judge_outputs(
        call, outputs(call), truth(call.problem, call.objective),
        bound(call.problem, call.plan, call.objective, seed=k.seed, machine=INTERPRETER),
    )  # fmt: skip
    assert verdict.holds and all(verdict.quantities[x].tells for x in ("dE", "dC", "dbias")), str(verdict)
    whole = [e is not None for _, _, e, _ in runs]
    assert whole == sorted(whole, reverse=True) and True in whole and False in whole
    columns = [run for run, *_ in runs]
    assert [x.start for x in columns] == [0, *(x.stop for x in columns[:-1])] and columns[-1].stop == k.v


def test_what_a_small_workspace_holds() -> None:
    """Pieces fit wherever there is room for two row blocks and the narrowest run."""
    from cce_precision.kernels import by_tokens

    for n, v, d, megabytes in (
        (16384, 131072, 512, 30),
        (8192, 256000, 2304, 60),
        (70_000, 5000, 64, 20),
        (300, 9, 8, 1),
    ):
        shape = {"dtype": torch.bfloat16, "device": "meta"}
        problem = Problem(torch.empty(n, d, **shape), torch.empty(v, d, **shape), torch.empty(n, device="meta"))
        for variant in (EXACT, variants.get("cce_split")):
            plan = Plan(variant, workspace_mb=megabytes)
            entry, room = 2 * (2 if variant.name == "cce_split" else 1), megabytes * 2**20 - 2 * n * d
            for token, column in ((4 * d, 0), (2 * d, 4 * d)):
                tokens, width = by_tokens.piece(n, v, room, entry, token, column)
                assert 0 < tokens <= n and 0 < width <= -(-v // 8) * 8
                assert tokens * (token + width * entry) + width * column <= room
            assert by_tokens.goes_by_tokens(problem, plan, (True, True, False)) == (n > 300)
            assert not by_tokens.goes_by_tokens(problem, plan, (False, True, False))
            assert not by_tokens.goes_by_tokens(problem, Plan(variant), (True, True, False))


@pytest.mark.parametrize("impl", ["cce", "cce_kahan"])
def test_the_same_tiles_survive_as_in_the_eager_pass(impl: str) -> None:
    variant = dataclasses.replace(variants.get(impl).with_eps(0.02), tile=(16, 32))
    plan, seed = Plan(variant), torch.zeros((), dtype=torch.int64)
    exact = exact_products(problem_of(40, 150, 8, torch.float32))
    upstream = Upstream(torch.full((40,), 0.25))
    heads = eager.forward(exact, plan)
    ours = kernels.backward(exact, plan, heads, upstream, (True, True, False), seed)
    theirs = eager.backward(exact, plan, heads, upstream, (True, True, False), seed)
    for a, b in zip(ours[:2], theirs[:2]):
        assert a is not None and b is not None and b.count_nonzero() > 0
        assert bool(((a == 0) == (b == 0)).all())


@pytest.mark.parametrize("case", ["flat", "peaked", "ignored", "softcap"])
def test_the_record_of_the_forward_pass_loses_no_tile(case: str) -> None:
    """With the record the same bits as without, and fewer tiles to compute where most are dead."""
    from cce_precision.kernels import dense, record

    n, v, filtered = 40, 280, variants.get("cce").with_eps(0.3)
    variant = dataclasses.replace(filtered, tile=(16, 32), sort_vocabulary=case != "softcap")
    plan, seed = Plan(variant, want_record=True), torch.zeros((), dtype=torch.int64)
    problem = problem_of(n, v, 8, torch.bfloat16, 0.1 if case == "flat" else 2.0)
    if case == "peaked":
        problem = dataclasses.replace(problem, targets=(problem.e.float() @ problem.c.float().T).argmax(1))
    if case == "ignored":
        problem.targets[3:30:2] = -1
        problem.e[3:30:2] = torch.nan
        problem.e[36] = torch.nan
    if case == "softcap":
        problem = dataclasses.replace(problem, softcap=3.0, bias=torch.randn(v).bfloat16(), temperature=0.7)
    heads, bits = kernels.forward(problem, plan)
    assert bits.shape == record.record_shape(problem, plan) and bits.numel()
    upstream = Upstream(torch.rand(n))
    whole, told = (kernels.backward(problem, plan, heads, upstream, (True, True, False), seed, r) for r in (None, bits))
    for a, b in zip(whole[:2], told[:2]):
        assert a is not None and b is not None and b.count_nonzero() > 0
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if case in ("flat", "peaked"):
        order = dense.visiting_order(problem, plan, problem.e)
        place = problem.positions(order)
        tokens = torch.arange(n)
        (chosen,) = record.candidates(bits, problem, order, v, tokens, heads.lse, place, variant.tile)
        holds_target = torch.zeros_like(chosen)
        holds_target[tokens // 16, place // 32] = 1
        assert bool((chosen >= holds_target).all())
        assert chosen.sum() < chosen.numel() if case == "peaked" else torch.equal(chosen, holds_target)


def exact_products(problem: Problem) -> Problem:
    """Multiples of 1/8: every logit is exact, so the interpreter's own order of sums does not show."""
    e, c = ((x.float() * 8).round().clamp(-32, 32).div(8).to(x.dtype) for x in (problem.e, problem.c))
    return Problem(e, c, problem.targets)


def test_loss_does_not_depend_on_the_batch() -> None:
    problem, plan = exact_products(problem_of(37, 90, 24, torch.bfloat16)), Plan(EXACT, want_entropy=True)
    whole, _ = kernels.forward(problem, plan)
    for rows in (slice(0, 1), slice(5, 29), slice(36, 37)):
        part, _ = kernels.forward(Problem(problem.e[rows], problem.c, problem.targets[rows]), plan)
        for a, b in zip(whole[:3], part[:3]):
            assert torch.equal(a[rows], b)


def test_strided_inputs_give_the_same_bits() -> None:
    """The pointer path and the descriptor path."""
    problem, plan = exact_products(problem_of(20, 50, 16, torch.bfloat16)), Plan(EXACT)
    strided = Problem(problem.e.T.contiguous().T, problem.c.T.contiguous().T, problem.targets)
    upstream, seed = Upstream(torch.rand(20)), torch.zeros((), dtype=torch.int64)
    for pair in zip(kernels.forward(problem, plan)[0], kernels.forward(strided, plan)[0]):
        assert torch.equal(*pair)
    heads, _ = kernels.forward(problem, plan)
    a, b = (kernels.backward(p, plan, heads, upstream, (True, True, False), seed) for p in (problem, strided))
    assert all(torch.equal(x, y) for x, y in zip(a[:2], b[:2]))  # type: ignore[arg-type]


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_is_computed(need: tuple[bool, bool, bool]) -> None:
    base = problem_of(9, 40, 8, torch.float32)
    problem = Problem(base.e, base.c, base.targets, bias=torch.randn(40))
    plan, seed, upstream = Plan(EXACT), torch.zeros((), dtype=torch.int64), Upstream(torch.ones(9))
    heads, _ = kernels.forward(problem, plan)
    whole = kernels.backward(problem, plan, heads, upstream, (True, True, True), seed)
    part = kernels.backward(problem, plan, heads, upstream, need, seed)
    for wanted, a, b in zip(need, part, whole):
        assert (a is not None) == wanted
        assert a is None or (b is not None and torch.equal(a, b))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("scale", "ignored"), [(1.0, True), (60.0, False)])
def test_one_pass_gives_the_gradients_of_the_sum(
    monkeypatch: pytest.MonkeyPatch, scale: float, ignored: bool, kept: bool
) -> None:
    """Scale 60 overflows the powers of most rows, which are then computed again from the row maximum."""
    from cce_precision.kernels import one_pass

    monkeypatch.setattr(one_pass, "keeps_powers", lambda problem, plan: kept)
    monkeypatch.setattr(one_pass, "tokens_a_chunk", lambda problem, plan: 16)
    problem = problem_of(40, 100, 24, torch.bfloat16, scale)
    if ignored:
        problem.targets[::3] = -1
        problem.e[::3] = torch.nan
    plan = Plan(EXACT, workspace_mb=1024, one_pass=(True, True, False))
    heads, left = kernels.forward_one_pass(problem, plan)
    gradients = kernels.finished(problem, left, torch.tensor(1.0), (True, True))
    again = kernels.finished(problem, left, torch.tensor(0.5), (True, True))
    k = Knobs(n=40, v=100, d=24, reduction="sum")
    call = build(k)
    objective = call.objective
    exact = truth(problem, objective)
    allowed = bound(problem, plan, objective, machine=INTERPRETER)
    tiny = torch.finfo(problem.e.dtype).tiny
    for name, got, half in zip(("dE", "dC"), gradients, again):
        assert got is not None and half is not None
        normal = got.abs() >= 2 * tiny
        assert torch.equal(got[normal] * 0.5, half[normal])
        comparison = compare(got, getattr(exact, name), getattr(allowed, name))
        assert comparison.holds and comparison.tells, (name, comparison)
    reference, _ = kernels.forward(problem, plan)
    two = compare(heads.nll, reference.nll, 2 * bound_of_nll(problem, plan))
    assert two.holds, two


@pytest.mark.parametrize(
    "k",
    [
        Knobs(seed=2126855098, n=9, v=14, scale=3.0, margin=4.0, ignored="all", one_pass=True),  # the mean of nothing
        Knobs(seed=1, n=17, v=33, d=5, scale=8.0, ignored="some", nan_ignored=True, reduction="sum", one_pass=True),
        Knobs(seed=2, n=6, v=40, d=12, batch=2, shift=1, pattern="ties", upstream="large", one_pass=True),
    ],
    ids=lambda k: k.to_json(),
)
def test_one_pass_is_within_its_bounds(k: Knobs) -> None:
    assert build(k).options["workspace_mb"] is not None
    verdict = judge(k)
    assert verdict.holds, str(verdict)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("frozen", ["", "e", "c"])
def test_one_pass_of_the_interface(monkeypatch: pytest.MonkeyPatch, kept: bool, frozen: str) -> None:
    """Gradients of a mean, with a frozen side, and the same ones of a graph that is kept; next to two passes."""
    from cce_precision import linear_cross_entropy
    from cce_precision.kernels import one_pass

    monkeypatch.setattr(
        one_pass, "keeps_powers", lambda problem, plan: kept and bool(plan.one_pass and plan.one_pass[1])
    )
    monkeypatch.setattr(one_pass, "tokens_a_chunk", lambda problem, plan: 16)
    base = problem_of(24, 40, 16, torch.bfloat16)
    found = []
    for workspace_mb in (1024, None):
        e, c = (x.clone().requires_grad_(name != frozen) for name, x in (("e", base.e), ("c", base.c)))
        loss: Any = linear_cross_entropy(
            e, c, base.targets, impl="cce_exact", backend="triton", workspace_mb=workspace_mb
        )
        wanted = [x for x in (e, c) if x.requires_grad]
        gradients = torch.autograd.grad(3 * loss, wanted, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(gradients, torch.autograd.grad(3 * loss, wanted)))
        found.append((loss.detach(), *gradients))
    for one, two in zip(*found):
        assert two.any() and (one.float() - two.float()).norm() < 4 * unit_roundoff(torch.bfloat16) * two.float().norm()


def bound_of_nll(problem: Problem, plan: Plan) -> torch.Tensor:
    """A bound of each token's loss."""
    call = build(Knobs(n=problem.n, v=problem.v, d=problem.d, reduction="none"))
    return bound(problem, dataclasses.replace(plan, one_pass=None), call.objective).value


def test_a_zero_gradient_is_rejected() -> None:
    k = Knobs(n=20, v=40, d=8)
    call = build(k)
    computed: dict[str, Any] = outputs(call)
    exact, allowed = truth(call.problem, call.objective), bound(call.problem, call.plan, call.objective)
    assert judge_outputs(call, computed, exact, allowed).holds
    for name in ("dE", "dC"):
        mutant = computed | {name: torch.zeros_like(computed[name])}
        assert not judge_outputs(call, mutant, exact, allowed).holds


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("names", ["nll", "nll lse", "nll smooth", "nll lse entropy smooth", "lse"])
def test_row_terms(names: str, temperature: float) -> None:
    """Upstream gradients of any stride, divided by one power of two; a NaN in its row, an ignored token in none."""
    from cce_precision.kernels.row_terms import row_terms

    n, v = 700, 9
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::7] = -1
    weight = torch.rand(v, generator=generator)
    problem = Problem(torch.zeros(n, 4), torch.zeros(v, 4), targets, temperature=temperature, column_weight=weight)
    nll = torch.rand(n, generator=generator) * 9
    nll[3], nll[5] = torch.inf, 0
    heads = Heads(nll, torch.rand(n, generator=generator), torch.rand(n, generator=generator), nll, targets)
    values = {name: torch.randn(n, 2, generator=generator)[:, 0] * 300 for name in names.split()}
    if names == "nll":
        values["nll"] = torch.full((), 3e-20).expand(n)
    else:
        next(iter(values.values()))[11] = torch.nan
    upstream = Upstream(*(values.get(name) for name in ("nll", "lse", "entropy", "smooth")))
    found = row_terms(problem, Plan(EXACT, want_entropy=True), heads, upstream, targets)

    counts, zero = targets >= 0, torch.zeros(n)
    beta, lse, kappa, sigma = (torch.where(counts, values.get(name, zero), 0) for name in Upstream._fields)
    alpha = beta + lse + (weight.sum() * sigma if "smooth" in values else 0)
    power = power_of_two(torch.stack([alpha, beta, kappa, sigma]))

    def equal(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())

    equal(found.scale, power / temperature)
    equal(found.terms[0], torch.where(counts, heads.lse, torch.inf))
    for row, expected in ((1, alpha), (2, kappa), (4, sigma)):
        equal(found.terms[row], expected / power)
    equal(found.label[3], -(beta / power)[3])  # P_t = 0
    equal(found.label[5], (alpha / power - beta / power - kappa / power * heads.entropy)[5])  # P_t = 1
    assert not found.label[~counts].any() and found.label[counts].any()
    assert torch.equal(found.label.isnan().nonzero(), (counts & (torch.arange(n) == 11) & (names != "nll")).nonzero())


@pytest.mark.parametrize("n", [1, 8, 300])
def test_label_sums(n: int) -> None:
    """The sum over a frequent target's tokens, in the slot of its first place; within the rounding of an fp32 sum."""
    from cce_precision.kernels.labels import SHORT, Labels, sums_size
    from cce_precision.kernels.terms import TokensByTarget

    v, d = 11, 37
    generator = torch.Generator().manual_seed(n)
    e = torch.randn(n, d, generator=generator).to(torch.bfloat16)
    targets = torch.randint(-1, v + 2, (n,), generator=generator)  # ignored ones, and some of another process
    targets[: n // 2] = 3
    label = torch.rand(n, generator=generator) - 1
    segments = TokensByTarget.of(targets, v)
    room = torch.full((sums_size(n, d),), 255, dtype=torch.uint8)  # NaN in fp32
    found = Labels.of(e, targets, label, segments, room)
    long = 0
    for j in range(v):
        own = targets == j
        if own.sum() > SHORT:
            long += 1
            row = found.sums[int(segments.starts[j]) // SHORT]
            terms = label[own, None].double() * e[own].double()
            assert bool(((row - terms.sum(0)).abs() <= int(own.sum()) * 2.0**-24 * terms.abs().sum(0)).all())
            assert row.any()
    assert long >= (n > 2 * SHORT) and int(found.sums[:, 0].isfinite().sum()) == long


def spread_out(n: int, v: int) -> tuple[Problem, torch.Tensor]:
    """Logits of a standard deviation of about 6, and P (N, V) without the target's."""
    problem = problem_of(n, v, 16, torch.bfloat16, 1.25)
    p = torch.softmax(problem.e.double() @ problem.c.double().T, 1)
    return problem, p.scatter(1, problem.targets[:, None], 0.0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_what_weighs_nothing_is_flushed(softcap: float | None) -> None:
    """Entries of dZ below auto_eps (1 - P_t) / V are 0 and no others (before or after the softcap's slope), and with
    filter_eps=None none is.
    """
    from cce_precision.kernels.dz import Run, write_dz
    from cce_precision.kernels.row_terms import row_terms

    problem, p = spread_out(20, 300)
    problem, slope = dataclasses.replace(problem, softcap=softcap), torch.ones_like(p)
    if softcap is not None:
        z = softcap * torch.tanh(problem.e.double() @ problem.c.double().T / softcap)
        p, slope = torch.softmax(z, 1).scatter(1, problem.targets[:, None], 0.0), 1 - (z / softcap) ** 2
    ratio = p / (torch.finfo(torch.bfloat16).eps / 32 * p.sum(1, keepdim=True) / problem.v)
    for variant in (EXACT, EXACT.configure(None)):
        plan = Plan(variant)
        heads, _ = kernels.forward(problem, plan)
        terms = row_terms(problem, plan, heads, Upstream(torch.ones(problem.n)), problem.targets)
        dz = torch.full((problem.n, problem.v), torch.nan, dtype=torch.bfloat16)
        write_dz(problem, problem.e, Run(0, problem.c, None, None), terms, dz, None, False)
        others = torch.ones_like(p, dtype=torch.bool).scatter_(1, problem.targets[:, None], False)
        zero, slack = (dz == 0) & others, 2.0**-6
        assert not dz.isnan().any()
        if variant.flushed:
            assert zero[(ratio < 1 - slack) & others].all() and not zero[(ratio * slope > 1 + slack)].any()
            assert 0.1 < zero.float().mean() < 0.9
        else:
            assert not zero.any()


def test_powers_are_flushed_by_what_a_sample_of_the_odds_says() -> None:
    """Never more than the definition allows, and nothing in a row that begins again from its maximum."""
    from cce_precision.kernels.one_pass_rows import Rows, fill_powers
    from cce_precision.problem import flushed_below

    problem, _ = spread_out(10, 4096)
    problem.e[0] = 10 * problem.c[5]  # far above its target's logit
    p = torch.softmax(problem.e.double() @ problem.c.double().T, 1).scatter(1, problem.targets[:, None], 0.0)
    powers = torch.full((problem.n, problem.v), torch.nan, dtype=torch.bfloat16)
    below = flushed_below(problem, Plan(EXACT))
    fill_powers(problem, problem.e, problem.targets, powers, Rows.empty(problem.n, problem.e.device), below)
    others = torch.ones_like(p, dtype=torch.bool).scatter_(1, problem.targets[:, None], False)
    zero = (powers == 0) & others & (p > 2.0**-100)  # no underflow
    assert not powers.isnan().any() and not zero[0].any() and zero[1:].any(1).all()
    assert (p < (1 + 2.0**-6) * below * p.sum(1, keepdim=True))[zero].all()
    told = p[:, :256].sum(1, keepdim=True)
    assert zero[1:][(p < (1 - 2.0**-6) * below * told)[1:] & others[1:] & (p > 2.0**-100)[1:]].all()
