"""Filters of single entries on a CUDA device: bounds, overflow, repeatability, graphs, unbiasedness, memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cce_precision import eager, kernels, variants
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.bounds_model import gpu_machine
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.references import Objective, truth
from cce_precision.kernels.answer import Answer
from cce_precision.problem import Plan, Problem, Upstream

pytestmark = pytest.mark.gpu

IMPLS = ("cce_sparse", "cce_unbiased", "cce_subsampled")
SEED = -(2**40) - 7
DELTA = 1e-6


def problem_of(n: int, v: int, d: int, dtype: torch.dtype = torch.bfloat16, ignored: bool = False) -> Problem:
    """A trained head: most of the softmax in few columns."""
    case = CASES["trained"](n=n, v=v, d=d, dtype=dtype, device="cuda")
    e, targets = case.e.clone(), case.targets.clone()
    if ignored:
        targets[::5], e[::5] = -1, torch.nan
    return Problem(e, case.c, targets)


def gradients(problem: Problem, plan: Plan, seed: int = SEED, record: bool = True) -> tuple[Tensor, Tensor]:
    draw = torch.full((), seed, dtype=torch.int64, device="cuda")
    heads, bits = kernels.forward(problem, dataclasses.replace(plan, want_record=record), draw)
    upstream = Upstream(torch.ones(problem.n, device="cuda"))
    d_e, d_c, _ = kernels.backward(problem, plan, heads, upstream, (True, True, False), draw, bits)
    assert d_e is not None and d_c is not None
    return d_e, d_c


def overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    from cce_precision.kernels import filtered

    monkeypatch.setattr(filtered, "capacities", lambda n, blocks, size: (64, 96))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["record", "found again", "overflow"])
def test_within_the_bounds(impl: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(200, 707, 136, dtype, ignored=True)
    plan = Plan(variants.get(impl).with_eps(2.0**-8))
    if way == "overflow":
        overflow(monkeypatch)
    host = Problem(problem.e.cpu(), problem.c.cpu(), problem.targets.cpu())
    machine = gpu_machine()
    objective = Objective("sum")
    definition = Plan(variants.get("cce_exact")) if way == "overflow" else plan
    exact, allowed = truth(host, objective), bound(host, definition, objective, seed=SEED, machine=machine)
    for name, got in zip(("dE", "dC"), gradients(problem, plan, record=way == "record")):
        comparison = compare(got.cpu(), getattr(exact, name), getattr(allowed, name) + getattr(exact.radius, name))
        assert comparison.holds and comparison.tells, (name, comparison)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("full", [False, True])
def test_agrees_with_the_eager_pass(impl: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws: what differs are roundings, where an unrelated draw would differ by the whole noise. With full
    lists, the exact gradient.
    """
    if full:
        overflow(monkeypatch)
    problem, plan = problem_of(1024, 16384, 512), Plan(variants.get(impl))
    draw = torch.full((), SEED, dtype=torch.int64, device="cuda")
    heads = eager.forward(problem, plan)
    upstream = Upstream(torch.ones(problem.n, device="cuda"))
    definition = Plan(variants.get("cce_exact")) if full else plan
    theirs = eager.backward(problem, definition, heads, upstream, (True, True, False), draw)
    for a, b in zip(gradients(problem, plan), theirs):
        assert b is not None
        # Both are rounded to bf16, now and then to neighbours.
        assert (a.float() - b.float()).norm() <= torch.finfo(torch.bfloat16).eps / 2 * b.float().norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("full", [False, True])
def test_same_bits_over_poisoned_memory(impl: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if full:
        overflow(monkeypatch)
    problem, plan = problem_of(700, 6000, 512, ignored=True), Plan(variants.get(impl))
    first = gradients(problem, plan)
    torch.full((2**28,), torch.nan, device="cuda")  # freed at once: the next allocations find NaN
    for a, b in zip(first, gradients(problem, plan)):
        assert bool(a.any()) and bool(a.isfinite().all()) and torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("full", [False, True])
def test_same_bits_whatever_the_host_knows_of_the_way(impl: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, plan = problem_of(300, 3003, 64), Plan(variants.get(impl).with_eps(2.0**-8), workspace_mb=1)
    if full:
        overflow(monkeypatch)
    found = []
    for knows in (lambda answer: None, lambda answer: bool(answer.flag), Answer.known):
        monkeypatch.setattr(Answer, "known", knows)
        found.append(gradients(problem, plan))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    assert all(bool(x.any()) for x in found[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("room", [1, 1 << 30])
def test_warp_specialised_walk_is_the_portable_one(
    impl: str, softcap: float | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits of the heads, and the same record; with more hits than room, only that there are more."""
    from cce_precision.kernels import hits

    problem = dataclasses.replace(problem_of(300, 9001, 192, ignored=True), softcap=softcap)
    problem = dataclasses.replace(problem, bias=torch.linspace(-1, 1, 9001, device="cuda").bfloat16())
    plan = Plan(variants.get(impl).with_eps(2.0**-9), want_record=True)
    draw = torch.full((), SEED, dtype=torch.int64, device="cuda")
    heads, record = hits.forward(problem, plan, draw, room)
    monkeypatch.setattr(hits, "hopper_fits", lambda x, fits: False)
    portable, reference = hits.forward(problem, plan, draw, room)
    assert torch.equal(heads.nll, portable.nll) and torch.equal(heads.lse, portable.lse)
    found, expected = (hits.words_of(problem, x).to(torch.int32) & 0xFFFF for x in (record, reference))
    assert expected.count_nonzero() > 1000
    if room == 1:
        assert found.count_nonzero() > 1000
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_graph_replay_follows_the_data(impl: str) -> None:
    """A captured step, replayed on other tensors and another seed, takes what it needs of the lists; then a flat
    softmax, whose hits need the dense way: the decision is the device's."""
    problem, plan = problem_of(500, 3008, 256), Plan(variants.get(impl), workspace_mb=4, want_record=True)
    seed = torch.full((), SEED, dtype=torch.int64, device="cuda")
    upstream = Upstream(torch.rand(500, device="cuda"))

    def step() -> tuple[Tensor | None, ...]:
        heads, bits = kernels.forward(problem, plan, seed)
        return kernels.backward(problem, plan, heads, upstream, (True, True, False), seed, bits)[:2]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, 0.5, 0.01):
        problem.e.mul_(scale)
        seed += 1
        for x in captured:
            assert x is not None
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step()):
            assert a is not None and b is not None and bool(b.any()) and torch.equal(a, b)


def test_sampling_is_unbiased_with_the_stated_variance() -> None:
    """The deviation of dbias from its expectation, a sum of independent draws in each column, over many seeds."""
    seeds, eps = 200, 2.0**-8
    problem = problem_of(256, 1024, 64, torch.float32)
    problem = dataclasses.replace(problem, bias=torch.zeros(1024, device="cuda"))
    plan = Plan(variants.get("cce_unbiased").with_eps(eps))
    heads, _ = kernels.forward(problem, plan)
    upstream = Upstream(torch.ones(problem.n, device="cuda"))
    z = problem.e.double() @ problem.c.double().T
    p = torch.softmax(z, 1).scatter_(1, problem.targets[:, None], 0.0)
    label = torch.zeros(1024, dtype=torch.float64, device="cuda")
    label.index_add_(0, problem.targets, torch.expm1(-heads.nll.double()))
    below = p < eps
    variance = torch.where(below, p * (eps - p), 0.0).sum(0)
    total = torch.zeros_like(variance)
    for seed in range(seeds):
        draw = torch.full((), seed, dtype=torch.int64, device="cuda")
        d_bias = kernels.backward(problem, plan, heads, upstream, (False, False, True), draw)[2]
        assert d_bias is not None
        total += d_bias.double()
    deviation = total / seeds - (p.sum(0) + label)
    log = math.log(2 * problem.v / DELTA)
    allowed = eps / seeds * log / 3 + (2 * variance / seeds * log).sqrt()  # Bernstein, for all columns at once
    # Beside the noise: the error of probabilities (2^-18 of logits of magnitude 16) and of fp32 sums.
    rounding = 2.0**-16 * (p.sum(0) + label.abs())
    assert bool((deviation.abs() <= allowed + rounding).all())
    assert bool((deviation.abs() > rounding).any())
    often = seeds * variance > 50 * eps**2  # drawn often enough to be nearly normal
    chi_square, freedom, log = (
        (deviation.square() * seeds / variance)[often].sum(),
        int(often.sum()),
        math.log(1 / DELTA),
    )
    assert freedom > 100
    # Laurent and Massart's bound of the quantile, a tenth wider for what is not normal.
    assert float(chi_square) <= 1.1 * (freedom + 2 * math.sqrt(freedom * log) + 2 * log)


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_of_a_step(impl: str) -> None:
    """Beside the gradients: the record, the workspace, and vectors; for subsets the drawn tokens and their columns."""
    problem, plan = problem_of(8192, 64_000, 256), Plan(variants.get(impl), workspace_mb=64)
    gradients(problem, plan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(problem, plan)
    size = problem.e.nbytes + problem.c.nbytes
    record = problem.n * problem.v // 256 * 2 * (256 // 128)  # 16 bits a token and at least 128 columns
    drawn = problem.e.nbytes // 8 + 4096 * 256 * 2 if impl == "cce_subsampled" else 0
    assert torch.cuda.max_memory_allocated() - before <= size + record + (64 + 8) * 2**20 + drawn
