"""Filters of single entries as kernels, in Triton's interpreter: the bounds of the definition, its very decisions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from cce_precision import eager, kernels, linear_cross_entropy, variants
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.bounds_model import INTERPRETER
from cce_precision.analysis.fuzz import compare, explained, judge, judge_outputs, outputs
from cce_precision.analysis.fuzz_problems import Knobs, build
from cce_precision.analysis.references import Objective, truth
from cce_precision.eager.filters import hash32, sampled
from cce_precision.eager.tiles import Columns
from cce_precision.interface import LinearCrossEntropyOutput
from cce_precision.problem import ELSEWHERE, Plan, Problem, Upstream

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from cce_precision.kernels import dense, exact, filtered, hits  # noqa: E402
from cce_precision.kernels.answer import Answer  # noqa: E402
from cce_precision.kernels.elements import members_drawn, seed_words  # noqa: E402
from cce_precision.kernels.entries import Buffers  # noqa: E402
from cce_precision.kernels.primitives import hash32 as kernel_hash32  # noqa: E402
from cce_precision.kernels.subsets import Tail  # noqa: E402
from cce_precision.kernels.terms import clean_rows  # noqa: E402

pytestmark = pytest.mark.interpreter

IMPLS = ("cce_sparse", "cce_unbiased", "cce_subsampled")
EPS = 0.02
Gradients = tuple[Tensor | None, ...]


def exact_problem(n: int = 12, v: int = 40, d: int = 4) -> Problem:
    """Multiples of 1/4: logits without a rounding, so that the kernels' probabilities are nearly the eager ones."""
    draw = lambda *shape: (torch.randn(shape) * 4).round().clamp(-16, 16).div(4)  # noqa: E731
    targets = torch.randint(0, v, (n,))
    targets[3] = -1
    e = draw(n, d).bfloat16()
    e[3] = torch.nan
    return Problem(e, draw(v, d).bfloat16(), targets, draw(v).bfloat16())


def overflow(monkeypatch: pytest.MonkeyPatch, hits: int = 3, entries: int = 4) -> list[Tensor]:
    """Makes the lists too short for any problem. The list returned collects what the device then decides."""
    seen: list[Tensor] = []
    original = filtered.entries_of

    def watched(*arguments: Any) -> Any:
        entries = original(*arguments)
        seen.append(entries.dense)
        return entries

    monkeypatch.setattr(filtered, "capacities", lambda n, blocks, size: (hits, entries))
    monkeypatch.setattr(filtered, "entries_of", watched)
    return seen


def gradients(
    problem: Problem,
    impl: str,
    record: bool = True,
    need: tuple[bool, bool, bool] = (True, True, True),
    upstream: float = 0.5,
) -> Gradients:
    plan, seed = Plan(variants.get(impl).with_eps(EPS), want_record=record), torch.tensor(-(2**40) - 7)
    heads, bits = kernels.forward(problem, plan, seed)
    assert (bits.numel() > 0) == record
    return kernels.backward(problem, plan, heads, Upstream(torch.full((problem.n,), upstream)), need, seed, bits)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("full", [False, True])
def test_within_the_bounds(impl: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softcap, bias, class weights, z-loss, an unreduced loss, ignored rows at once; also where the lists are full, and
    the gradient is the exact one.
    """
    k = Knobs(
        seed=5,
        n=12,
        v=40,
        d=4,
        impl=impl,
        bias="same",
        scale=3.0,
        softcap=5.0,
        temperature=0.7,
        class_weight=True,
        reduction="none",
        upstream="random",
        ignored="some",
        nan_ignored=True,
        filter_eps=EPS,
        use_lse=True,
        z_loss=True,
    )
    call = build(k)
    assert kernels.supports(call.problem, call.plan) is None
    seen = overflow(monkeypatch) if full else []
    verdict = judge(k)
    assert verdict.holds, str(verdict)
    assert [int(x) for x in seen] == [1] * full


@pytest.mark.parametrize(
    ("impl", "need"),
    [(impl, (True, True, True)) for impl in IMPLS]
    + [("cce_sparse", (True, False, False)), ("cce_unbiased", (False, True, True))],
)
@pytest.mark.parametrize("lists", [(3, 4), (150, 4)], ids=["hits", "entries"])
def test_with_full_lists_the_gradient_is_exact(
    impl: str, need: tuple[bool, bool, bool], lists: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many hits or kept entries. Several runs, whose dZ lies in later rows of dC while there are enough."""
    problem, seen = exact_problem(4, 800, 16), overflow(monkeypatch, *lists)
    monkeypatch.setattr(filtered, "DEFAULT_WORKSPACE_MB", 0)
    exact = truth(problem, Objective("sum"))
    allowed = bound(problem, Plan(variants.get("cce_exact")), Objective("sum"), machine=INTERPRETER)
    for wanted, name, got in zip(need, ("dE", "dC", "dbias"), gradients(problem, impl, need=need, upstream=1.0)):
        assert (got is not None) == wanted
        if got is not None:
            comparison = compare(got, getattr(exact, name), getattr(allowed, name) + getattr(exact.radius, name))
            assert comparison.holds and comparison.tells, (name, comparison)
    assert [int(x) for x in seen] == [1]


@pytest.mark.parametrize("full", [False, True])
def test_what_the_host_knows_not_to_count_is_left_out_and_nothing_changes(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = exact_problem(4, 300, 16)
    monkeypatch.setattr(filtered, "DEFAULT_WORKSPACE_MB", 0)
    seen = overflow(monkeypatch, *((3, 4) if full else (60, 110)))
    launched: dict[str, int] = {"exact": 0, "tail": 0}
    write_dz, columns = exact.write_dz, Tail.columns

    def counted(name: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            launched[name] += 1
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(exact, "write_dz", counted("exact", write_dz))
    monkeypatch.setattr(Tail, "columns", counted("tail", columns))
    both_ways = gradients(problem, "cce_subsampled")
    assert launched["exact"] > 1 and launched["tail"] > 0
    launched.update(exact=0, tail=0)
    monkeypatch.setattr(Answer, "known", lambda self: bool(self.flag))
    one_way = gradients(problem, "cce_subsampled")
    assert (launched["exact"] > 1, launched["tail"] > 0) == (full, not full)
    assert [int(x) for x in seen] == [full] * 2
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(both_ways, one_way))


@pytest.mark.parametrize("tolerance", [None, 0.5])
def test_the_first_call_of_a_kind_launches_both_ways(tolerance: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no kernel compiles in the middle of a training run."""
    problem, told = exact_problem(16, 160, 16), []
    monkeypatch.setattr("cce_precision.kernels.answer._met", set())
    monkeypatch.setattr(filtered, "DEFAULT_WORKSPACE_MB", 0)
    monkeypatch.setattr(filtered, "Answer", lambda flag, asked: told.append(asked) or Answer(flag, asked))
    overflow(monkeypatch)
    for rows in (slice(0, 4), slice(0, 4), slice(0, 3), slice(0, 16)):  # sixteen are of another kind
        part = dataclasses.replace(problem, e=problem.e[rows], targets=problem.targets[rows])
        plan = Plan(variants.get("cce_unbiased").with_eps(EPS), tolerance=tolerance)
        heads, _ = kernels.forward(part, plan)
        upstream = Upstream(torch.ones(part.n))
        kernels.backward(part, plan, heads, upstream, (True, True, False), torch.tensor(3))
    answers = 1 if tolerance is None else 2
    assert told == [False] * answers + [True] * 2 * answers + [False] * answers


@pytest.mark.parametrize("impl", IMPLS)
def test_a_record_of_too_many_hits_still_has_every_one(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass looks for no more hits than there is room for, and records the rest of its walk as hit."""
    problem = exact_problem(12, 400, 8)
    plan, seed = Plan(variants.get(impl).with_eps(EPS), want_record=True), torch.tensor(5)
    heads, record = kernels.forward(problem, plan, seed)
    every = hits.words_of(problem, record).to(torch.int32)
    monkeypatch.setattr(filtered, "capacities", lambda n, blocks, size: (20, 30))
    again, record = kernels.forward(problem, plan, seed)
    words = hits.words_of(problem, record).to(torch.int32)
    assert torch.equal(words & every, every) and not torch.equal(words, every)
    assert all(torch.equal(a, b) for a, b in zip(heads, again))
    assert not words[:, 3].any()  # an ignored token has none
    last = 400 // 16 % (hits.config_for("forward", problem.c).n // 16)
    assert not last or int(words[-1].max()) < 1 << last  # no block beyond the vocabulary
    assert int(kernels.occupancy(problem, plan, heads.lse, seed, record)) == 21


@pytest.mark.parametrize("lists", [(3, 4), (150, 4)], ids=["hits", "entries"])
def test_a_promise_reads_no_list_that_is_full(lists: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to lists that are full; what then stands there as columns would be far outside."""
    problem, plan = exact_problem(4, 160, 16), Plan(variants.get("cce_unbiased").with_eps(EPS), tolerance=1e-3)
    monkeypatch.setattr(filtered, "DEFAULT_WORKSPACE_MB", 0)
    seen, original = overflow(monkeypatch, *lists), filtered.entries_of

    def poisoned(*arguments: Any) -> Any:
        entries = original(*arguments)
        entries.buffers.columns.fill_(2**31 - 1)
        return entries

    monkeypatch.setattr(filtered, "entries_of", poisoned)
    heads, _ = kernels.forward(problem, plan)
    upstream, seed = Upstream(torch.full((4,), 0.5)), torch.tensor(3)
    found = kernels.backward(problem, plan, heads, upstream, (True, True, True), seed)
    assert [int(x) for x in seen] == [1]
    theirs = gradients(problem, "cce_unbiased", record=False)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, theirs))


def test_the_lists_lie_in_the_workspace_and_hold_everything_where_it_fits() -> None:
    for n, blocks, size in ((5, 7, 79), (5, 7, 5000), (5, 7, 10**6), (8192, 16_000, 80 * 2**20)):
        hits, entries = filtered.capacities(n, blocks, size)
        pool = torch.zeros(size // 4)
        buffers = Buffers.of(pool, hits, entries)
        lists = [getattr(buffers, field.name) for field in dataclasses.fields(buffers)]
        assert [x.numel() for x in lists] == [hits, hits, entries, hits, hits, entries, entries]
        ends = [x.data_ptr() + x.nbytes - pool.data_ptr() for x in lists]
        assert (
            max(ends[:4]) <= Buffers.by_token(hits, entries) <= min(e - x.nbytes for e, x in zip(ends[4:], lists[4:]))
        )
        places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in lists)
        assert places[0][0] >= pool.data_ptr() and places[-1][1] <= pool.data_ptr() + pool.nbytes
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
        assert 0 < hits <= n * blocks
    assert filtered.capacities(5, 7, 10**6) == (35, 35 * 16)


def test_the_lists_hold_no_more_than_is_worth_its_while() -> None:
    """One hit in 16 blocks, and what the default workspace holds; less where the workspace holds less."""
    n, blocks = 8192, 8192
    default, _ = filtered.capacities(n, blocks, filtered.DEFAULT_WORKSPACE_MB * 2**20)
    held = [filtered.capacities(n, blocks, megabytes * 2**20)[0] for megabytes in (20, 80, 120, 1024, 4096)]
    assert held[0] < default == held[1] < held[2] < held[3] == held[4] == n * blocks // 16
    assert filtered.capacities(512, 100, 2**20)[0] > 512 * 100 // 16  # few: the default would hold them all


def test_dz_of_a_run_lies_beside_what_the_run_writes() -> None:
    n, v, d = 3, 5000, 20
    pool, d_c = torch.zeros(n * 300 * 4, dtype=torch.uint8), torch.zeros(v, d)
    start, where = 0, []
    while start < v:
        width, room = exact.room_for(start, n * 4, pool, d_c, 1024)
        dz = room.view(torch.float32).view(n, width)
        assert width % 256 == 0 and 0 < width <= 1024
        d_c[start : start + width] = 1.0
        dz.fill_(2.0)
        assert bool((d_c[start : start + width] == 1.0).all()) and bool((d_c[:start] == 1.0).all())
        where.append(dz.data_ptr() == pool.data_ptr())
        start += width
    assert not where[0] and where[-1] and sorted(where) == where


@pytest.mark.parametrize(
    "k",
    [
        Knobs(n=9, v=40, d=5, impl="cce_unbiased", label_smoothing=0.1, class_weight=True, use_entropy=True),
        Knobs(n=9, v=40, d=5, impl="cce_subsampled", label_smoothing=0.1, e_dtype="fp16", bias="same"),
        Knobs(n=7, v=33, d=8, impl="cce_sparse", filter_c_grad=False, e_dtype="fp32", strided=True),
        Knobs(n=7, v=33, d=8, impl="cce_subsampled", filter_e_grad=False),
        Knobs(n=5, v=1, d=1, impl="cce_unbiased"),
        Knobs(n=6, v=20, d=3, impl="cce_sparse", filter_eps=None),
        Knobs(n=6, v=20, d=3, impl="cce_sparse", filter_eps=None, softcap=3.0, label_smoothing=0.2),
        Knobs(n=6, v=20, d=3, impl="cce_sparse", ignored="all", nan_ignored=True),
    ],
    ids=lambda k: k.to_json(),
)
def test_other_calls_are_within_the_bounds(k: Knobs) -> None:
    k = dataclasses.replace(k, filter_eps=k.filter_eps and EPS, scale=2.0)
    verdict = judge(k)
    assert verdict.holds, str(verdict)


@pytest.mark.parametrize(
    ("seed", "n", "v", "d", "more"),
    [(3, 20, 10, 10, {"scale": 3.0}), (1067533204, 20, 10, 10, {"scale": 3.0, "nan_ignored": True, "strided": True}),
     (146974464, 14, 18, 11, {"margin": 12.0, "ignored": "some", "nan_ignored": True, "strided": True})],
)  # fmt: skip
def test_equal_mean_logits_may_stand_either_way(seed: int, n: int, v: int, d: int, more: dict[str, Any]) -> None:
    """Found on a GPU: of columns whose mean logits are equal but for rounding, a kernel may draw another."""
    verdict = judge(Knobs(seed=seed, n=n, v=v, d=d, impl="cce_subsampled", pattern="ties", filter_eps=2.0**-4, **more))
    assert verdict.holds, str(verdict)


def test_an_order_that_rounding_does_not_explain_is_not_taken() -> None:
    problem = exact_problem(6, 50, 8)
    order = dense.visiting_order(problem, Plan(variants.get("cce_subsampled")), clean_rows(problem))
    assert order is not None and explained(problem, [order]) is not None
    swapped, twice = order.clone(), order.clone()
    swapped[[0, -1]], twice[0] = swapped[[-1, 0]], twice[1]
    assert explained(problem, [swapped]) is None and explained(problem, [twice]) is None
    assert explained(problem, []) is None


def test_the_target_of_a_confident_token_survives_fp16() -> None:
    """1 - P_t of 1e-6: its parts in fp16 would lie below the smallest subnormal."""
    k = Knobs(seed=186532, n=1, v=15, d=8, impl="cce_unbiased", e_dtype="fp16", pattern="same-sign", scale=0.25)
    verdict = judge(dataclasses.replace(k, margin=40.0, temperature=0.7, class_weight=True, filter_eps=1.0))
    assert verdict.holds, str(verdict)


@pytest.mark.parametrize("impl", ["cce_sparse", "cce_unbiased"])
def test_the_entries_are_those_of_the_definition(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, kept = exact_problem(), []
    original = filtered.entries_of
    monkeypatch.setattr(filtered, "entries_of", lambda *a: kept.append(original(*a)) or kept[-1])
    for record in (True, False):
        gradients(problem, impl, record)
    plan, seed = Plan(variants.get(impl).with_eps(EPS)), torch.tensor(-(2**40) - 7)
    heads = eager.forward(problem, plan)
    rows, columns = torch.arange(problem.n), torch.arange(problem.v)
    assert problem.bias is not None
    z = torch.where((problem.targets >= 0)[:, None], problem.e.float(), 0) @ problem.c.float().T + problem.bias.float()
    p = torch.exp(z - heads.lse[:, None])
    p[rows, problem.targets.clamp(min=0)] = 0
    p[problem.targets < 0] = 0
    run = Columns(0, problem.v, slice(0, problem.v))
    wanted = sampled(p, plan.variant.filter_e, EPS, seed, rows, run, columns, True)
    assert int((wanted > 0).sum()) > problem.n
    for entries in kept:
        assert int(entries.dense) == 0
        for i in range(problem.n):
            found = entries.buffers.columns[entries.starts[i] : entries.starts[i + 1]]
            assert found.tolist() == wanted[i].nonzero().flatten().tolist()


@pytest.mark.parametrize("impl", ["cce_unbiased", "cce_subsampled"])
def test_a_frozen_input_changes_nothing(impl: str) -> None:
    problem = exact_problem(6, 32, 4)
    whole = gradients(problem, impl)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        for wanted, a, b in zip(need, gradients(problem, impl, need=need), whole):
            assert (a is not None) == wanted
            assert a is None or (b is not None and bool(b.any()) and torch.equal(a, b))


@pytest.mark.parametrize("full", [False, True])
def test_nan_stays_in_its_token(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = exact_problem(8, 40, 4)
    problem.e[5, 0] = torch.nan
    if full:
        overflow(monkeypatch)
    d_e, d_c, _ = gradients(problem, "cce_unbiased")
    assert d_e is not None and d_c is not None
    assert d_e.isnan().any(1).tolist() == [i == 5 for i in range(8)]
    assert bool(d_c.isnan().any(1).all())


@triton.jit
def words_kernel(seed, out, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    low, high = seed_words(seed)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    word = kernel_hash32(low, high, row.to(tl.uint32)[:, None], column.to(tl.uint32)[None, :])
    tl.store(out + row[:, None] * COLUMNS + column[None, :], word.to(tl.int64))


def test_the_hash_is_that_of_the_definition() -> None:
    for seed in (0, 1, -1, 2**40 + 3, -(2**63)):
        out = torch.empty(16, 32, dtype=torch.int64)
        words_kernel[(1,)](torch.tensor(seed), out, COLUMNS=32, ROWS=16)
        assert torch.equal(out, hash32(torch.tensor(seed), torch.arange(16)[:, None], torch.arange(32)[None, :]))
        for share, first in ((1, 0), (3, 0), (8, 20)):
            places = torch.arange(first, first + 45)
            filt = dataclasses.replace(variants.get("cce_subsampled").filter_e, share=share)
            run = Columns(0, 45, slice(0, 45))
            tail = torch.full((1, 45), 0.5)
            p = sampled(tail, filt, 1.0, torch.tensor(seed), places[:1], run, places, True, first)
            drawn = members_drawn(torch.tensor(seed), 45, share, first, True)
            assert drawn[drawn >= 0].tolist() == p[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("impl", ["cce_unbiased", "cce_subsampled"])
def test_centres_are_made_of_some_tokens(impl: str, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and definition count the same pairs of tokens, all of few and one in so many of many: what other centres
    give is another gradient. Busy: rows of dZ do not sum to 0.
    """
    more: dict[str, Any] = {"z_loss": True, "label_smoothing": 0.1, "class_weight": True} if busy else {}
    k = Knobs(seed=3, n=24, v=48, d=8, impl=impl, filter_eps=EPS, ignored="some", **more)
    call = build(k)
    exact, found, allowed = truth(call.problem, call.objective), [], []
    for witnesses in (512, 4):
        monkeypatch.setattr("cce_precision.problem.WITNESSES", witnesses)
        found.append(outputs(call))
        allowed.append(bound(call.problem, call.plan, call.objective, seed=k.seed, machine=INTERPRETER))
        assert judge_outputs(call, found[-1], exact, allowed[-1]).holds
    assert not judge_outputs(call, found[0], exact, allowed[1]).holds
    assert not judge_outputs(call, found[1], exact, allowed[0]).holds


def test_a_zero_gradient_is_rejected() -> None:
    k = Knobs(n=12, v=40, d=6, impl="cce_unbiased", filter_eps=EPS, scale=2.0)
    call = build(k)
    computed: dict[str, Any] = outputs(call)
    exact = truth(call.problem, call.objective)
    allowed = bound(call.problem, call.plan, call.objective, seed=k.seed, machine=INTERPRETER)
    assert judge_outputs(call, computed, exact, allowed).holds
    for name in ("dE", "dC"):
        mutant = computed | {name: torch.zeros_like(computed[name])}
        assert not judge_outputs(call, mutant, exact, allowed).holds


def test_part_of_a_vocabulary_draws_what_the_whole_does() -> None:
    """Two shares of the columns, each with the whole's lse and its targets elsewhere, add up to the whole's dE."""
    problem = exact_problem(8, 48, 4)
    variant = dataclasses.replace(variants.get("cce_unbiased").with_eps(EPS), centred=False)  # as shares are
    plan, seed = Plan(variant), torch.tensor(11)
    heads, _ = kernels.forward(problem, plan)
    upstream, need = Upstream(torch.ones(8)), (True, True, True)
    whole = kernels.backward(problem, plan, heads, upstream, need, seed)
    parts = []
    for start, stop in ((0, 32), (32, 48)):
        inside = (problem.targets >= start) & (problem.targets < stop)
        local = torch.where(inside, problem.targets - start, ELSEWHERE)
        share = Problem(
            problem.e,
            problem.c[start:stop],
            torch.where(problem.targets < 0, -1, local),
            None if problem.bias is None else problem.bias[start:stop],
            first_column=start,
        )
        part = dataclasses.replace(plan, partial_e=True, first_column=start)
        parts.append(kernels.backward(share, part, heads, upstream, need, seed))
    allowed = bound(problem, plan, Objective("sum"), seed=11, machine=INTERPRETER)
    assert whole[0] is not None and whole[1] is not None and bool(whole[1].any())
    total = parts[0][0] + parts[1][0]  # type: ignore[operator]
    assert total.dtype is torch.float32
    assert compare(total, whole[0], 2 * allowed.dE).holds
    for i in (1, 2):
        assert torch.equal(torch.cat([parts[0][i], parts[1][i]]), whole[i])  # type: ignore[list-item, arg-type]


def test_statistics_say_which_way_the_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = exact_problem(8, 40, 4)
    options = {"impl": "cce_sparse", "filter_eps": EPS, "ignore_index": -1, "return_stats": True}
    for full in (False, True):
        seen = overflow(monkeypatch) if full else []
        e = problem.e.clone().requires_grad_()
        found = linear_cross_entropy(e, problem.c, problem.targets, problem.bias, **options)  # type: ignore[arg-type]
        assert isinstance(found, LinearCrossEntropyOutput) and found.stats is not None
        stats = found.stats
        assert stats.path == "triton" and stats.blocks is not None and stats.capacity is not None
        needed = min(int(stats.hits.sum()) / 16, stats.capacity + 1)
        assert needed <= int(stats.blocks) <= min(8 * 3, stats.capacity + 1)
        assert (int(stats.blocks) > stats.capacity) == full
        found.loss.backward()
        assert e.grad is not None and bool(e.grad[0].any())
        assert [int(x) for x in seen] == [1] * full
