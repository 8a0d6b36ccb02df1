"""The kernels on a CUDA device: the interface against fp64, poisoned memory, repeatability, graphs, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cce_precision import eager, kernels, linear_cross_entropy, variants
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.bounds_model import gpu_machine
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.fuzz_problems import Knobs, build
from cce_precision.analysis.references import truth
from cce_precision.kernels import by_tokens
from cce_precision.problem import Plan, Problem, Upstream

pytestmark = pytest.mark.gpu

IMPLS = ("cce_exact", "cce_split", "cce_no_filter", "cce", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e")
SHAPES = ((200, 700, 136), (77, 515, 37))


def problem_of(n: int, v: int, d: int, dtype: torch.dtype, scale: float = 3.0, ignored: bool = False) -> Problem:
    generator = torch.Generator("cuda").manual_seed(n + v + d)
    e = (torch.randn(n, d, device="cuda", generator=generator) * scale / d**0.5).to(dtype)
    c = torch.randn(v, d, device="cuda", generator=generator).to(dtype)
    targets = torch.randint(0, v, (n,), device="cuda", generator=generator)
    if ignored:
        targets[::5], e[::5] = -1, torch.nan
    return Problem(e, c, targets)


def run(problem: Problem, impl: str, workspace_mb: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    e, c = problem.e.detach().requires_grad_(), problem.c.detach().requires_grad_()
    loss = linear_cross_entropy(
        e,
        c,
        problem.targets,
        problem.bias,
        ignore_index=-1,
        softcap=problem.softcap,
        impl=impl,
        backend="triton",
        workspace_mb=workspace_mb,
    )
    loss.backward()
    assert e.grad is not None and c.grad is not None
    return loss.detach(), e.grad, c.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_within_the_bounds(impl: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    within_the_bounds(impl, shape, dtype)


@pytest.mark.parametrize("impl", ["cce_exact", "cce_split", "cce_no_filter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1000, 5003, 520), (1500, 20_000, 264), (900, 3001, 403)])
def test_tokens_by_chunks_are_within_the_bounds(impl: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, v, d = shape
    e, c = torch.empty(n, d, device="cuda", dtype=dtype), torch.empty(v, d, device="cuda", dtype=dtype)
    problem = Problem(e, c, torch.zeros(n, dtype=torch.int64))
    plan = Plan(variants.get(impl), workspace_mb=1 + 2 * n * d // 2**20)
    assert by_tokens.goes_by_tokens(problem, plan, (True, True, False))
    within_the_bounds(impl, shape, dtype, plan.workspace_mb)


def within_the_bounds(
    impl: str, shape: tuple[int, int, int], dtype: torch.dtype, workspace_mb: int | None = None
) -> None:
    problem = problem_of(*shape, dtype, ignored=True)
    host = Problem(problem.e.cpu(), problem.c.cpu(), problem.targets.cpu())
    objective = build(Knobs(n=shape[0], v=shape[1], d=shape[2])).objective
    plan = Plan(variants.get(impl))
    machine = gpu_machine()
    exact, allowed = truth(host, objective), bound(host, plan, objective, machine=machine)
    loss, d_e, d_c = (x.cpu() for x in run(problem, impl, workspace_mb))
    for name, got in (("value", loss.reshape(())), ("dE", d_e), ("dC", d_c)):
        comparison = compare(got, getattr(exact, name), getattr(allowed, name) + getattr(exact.radius, name))
        assert comparison.holds and comparison.tells, (name, comparison)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_from_run_to_run_over_poisoned_memory(impl: str) -> None:
    problem = problem_of(700, 6000, 512, torch.bfloat16, ignored=True)
    first = run(problem, impl)
    torch.full((2**28,), torch.nan, device="cuda")  # freed at once: the next allocations find NaN
    for a, b in zip(first, run(problem, impl)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("impl", ["cce", "cce_kahan", "cce_kahan_full_c", "cce_exact", "cce_split", "cce_no_filter"])
def test_warp_specialised_and_portable_kernels_agree(
    impl: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products in the same order: bit by bit, but for the roundings of a bias and a softcap, fused or not, and
    for the products that are the library's elsewhere (tests/test_hopper_product.py)."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a Hopper matter")
    from cce_precision.kernels import launch

    problem = problem_of(1000, 5003, 520, torch.bfloat16, scale=8.0, ignored=True)
    if softcap is not None:
        bias = torch.randn(5003, device="cuda").bfloat16()
        problem = dataclasses.replace(problem, softcap=softcap, bias=bias)
    fast = run(problem, impl)
    monkeypatch.setattr(launch, "_runs_gluon", lambda device: False)
    for name, a, b in zip(("loss", "dE", "dC"), fast, run(problem, impl)):
        difference = (a.float() - b.float()).norm() / b.float().norm()
        # Now and then a logit on the other side of a rounding: of dZ, or of one addition in 16 bits.
        same = softcap is None and (variants.get(impl).filtered or name == "loss")
        assert difference <= (0 if same else torch.finfo(torch.bfloat16).eps), (name, difference)


def test_loss_does_not_depend_on_the_batch() -> None:
    problem, plan = problem_of(1000, 5000, 256, torch.bfloat16), Plan(variants.get("cce_exact"))
    whole, _ = kernels.forward(problem, plan)
    for rows in (slice(0, 1), slice(130, 700)):
        part, _ = kernels.forward(Problem(problem.e[rows].clone(), problem.c, problem.targets[rows]), plan)
        assert torch.equal(whole.nll[rows], part.nll) and torch.equal(whole.lse[rows], part.lse)


@pytest.mark.parametrize(("kept", "d"), [(False, 256), (True, 256), (True, 2048)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_one_pass(monkeypatch: pytest.MonkeyPatch, scale: float, kept: bool, d: int) -> None:
    """Scale 300: logits of hundreds, powers that overflow, row blocks computed again. By chunks, and with powers that
    wait for the products of the library or, of 2048 features, our own; a second backward pass gives the same."""
    from cce_precision.kernels import one_pass

    monkeypatch.setattr(one_pass, "keeps_powers", lambda problem, plan: kept)
    monkeypatch.setattr(one_pass, "tokens_a_chunk", lambda problem, plan: 512)
    monkeypatch.setattr(one_pass, "WIDEST", 1024)
    problem = problem_of(900, 4000, d, torch.bfloat16, scale * (256 / d) ** 0.5, ignored=True)
    plan = Plan(variants.get("cce_exact"), workspace_mb=64, one_pass=(True, True, False))
    heads, left = kernels.forward_one_pass(problem, plan)
    factor = torch.tensor(0.25, device="cuda")
    d_e, d_c = kernels.finished(problem, left, factor, (True, True))
    again = kernels.finished(problem, left, factor, (True, True))
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip((d_e, d_c), again))
    alone = kernels.finished(problem, left, factor, (False, True))
    assert alone[0] is None and alone[1] is not None and torch.equal(alone[1], again[1])
    exact = Problem(problem.e.double(), problem.c.double(), problem.targets)
    plain = Plan(variants.get("cce_exact"))
    reference = eager.forward(exact, plain)
    ones, seed = Upstream(torch.ones_like(reference.nll)), torch.zeros((), dtype=torch.int64, device="cuda")
    true_e, true_c, _ = eager.backward(exact, plain, reference, ones, (True, True, False), seed)
    assert d_e is not None and d_c is not None and true_e is not None and true_c is not None
    unit = torch.finfo(torch.bfloat16).eps / 2
    for got, true in ((d_e, true_e), (d_c, true_c)):
        # the mean of three roundings, of the powers, the rows and the result, lies below one's largest
        assert (got / 0.25 - true).norm() < unit * true.norm()
    spread = (problem.e.nan_to_num().double().abs() @ problem.c.double().abs().T).amax(1)
    assert bool(
        ((heads.nll - reference.nll).abs() <= 2.0**-20 * spread).all()
    )  # 5.25 2^-23 D/16 of |E||C|, bounds_logits


def test_graph_replay() -> None:
    problem, plan = problem_of(500, 3000, 256, torch.bfloat16), Plan(variants.get("cce_exact"))
    seed, upstream = torch.zeros((), dtype=torch.int64, device="cuda"), Upstream(torch.rand(500, device="cuda"))

    def step() -> tuple[Tensor | None, ...]:
        heads, _ = kernels.forward(problem, plan)
        return heads.nll, *kernels.backward(problem, plan, heads, upstream, (True, True, False), seed)[:2]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        assert x is not None
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(expected, captured):
        assert a is not None and b is not None and torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """V x D > 2^31: the last columns of the vocabulary are read and written where they stand."""
    n, v, d = 64, 140_000, 16_384
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB")
    e = torch.randn(n, d, device="cuda").mul_(d**-0.5).bfloat16().requires_grad_()
    c = torch.zeros(v, d, device="cuda", dtype=torch.bfloat16)
    c[-64:] = torch.randn(64, d, device="cuda").bfloat16()
    c.requires_grad_()
    targets = torch.arange(v - n, v, device="cuda")
    loss = linear_cross_entropy(e, c, targets, backend="triton")
    loss.backward()
    z = torch.cat(
        [e.detach().double() @ c.detach()[-64:].double().T, torch.zeros(n, 1, dtype=torch.float64, device="cuda")], 1
    )
    z[:, -1] = torch.log(torch.tensor(v - 64.0, dtype=torch.float64))
    true = (torch.logsumexp(z, 1) - z[:, :64].diagonal()).mean()
    assert (loss - true).abs() < 2.0**-20 * z.abs().amax()
    assert c.grad is not None
    x = (torch.softmax(z, 1)[:, :64] - torch.eye(n, device="cuda")) / n
    expected = x.T @ e.detach().double()
    assert (c.grad[-64:].double() - expected).norm() < torch.finfo(torch.bfloat16).eps * expected.norm()


def test_memory_of_the_forward_pass() -> None:
    problem = problem_of(8192, 64_000, 256, torch.bfloat16)
    plan = Plan(variants.get("cce_exact"))
    kernels.forward(problem, plan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.forward(problem, plan)
    assert torch.cuda.max_memory_allocated() - before <= 2**20


@pytest.mark.parametrize("impl", ["cce_exact", "cce_split"])
def test_memory_of_the_backward_pass_in_a_small_workspace(impl: str) -> None:
    """Beside dC the workspace, which dE counts to, and vectors: 256 bytes a token and 16 a column
    are more than all of them. The allocator may leave up to 1 MiB unused in each block beyond that."""
    n, v, d, megabytes = 8192, 64_000, 256, 12
    problem, upstream = problem_of(n, v, d, torch.bfloat16), Upstream(torch.rand(n, device="cuda"))
    plan, seed = Plan(variants.get(impl), workspace_mb=megabytes), torch.zeros((), dtype=torch.int64, device="cuda")
    assert by_tokens.goes_by_tokens(problem, plan, (True, True, False))
    heads, _ = kernels.forward(problem, plan)
    kernels.backward(problem, plan, heads, upstream, (True, True, False), seed)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = kernels.backward(problem, plan, heads, upstream, (True, True, False), seed)
    most = 2 * v * d + megabytes * 2**20 + 256 * n + 16 * v + 4 * 2**20
    assert torch.cuda.max_memory_allocated() - before <= most
    assert all(x is not None and x.any() for x in found[:2])
