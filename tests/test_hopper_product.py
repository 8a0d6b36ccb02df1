"""The unfiltered products on Hopper: every tile dealt out once, and the gradients of the library's products."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cce_precision import kernels, variants
from cce_precision.problem import Plan, Problem, Upstream

pytest.importorskip("triton")
from cce_precision.kernels import dense
from cce_precision.kernels import schedule as schedules
from cce_precision.kernels.labels import sums_size
from cce_precision.kernels.schedule import best_width, dealt, schedule

H200 = 132  # multiprocessors


def walk(n: int, width: int, units_c: int, units_e: int) -> list[tuple[list[int], list[int]]]:
    """The tiles (of dC, of dE) of each program: rounds dealt out in turn, where the kernel computes places."""
    plan = schedule(n, width, units_c, units_e, H200)
    programs = min(units_c + units_e, H200)
    long, short = (units_e, units_c) if plan.rows_first else (units_c, units_e)
    first: list[list[int]] = [[] for _ in range(programs)]
    then: list[list[int]] = [[] for _ in range(programs)]
    for unit in range(long):
        first[unit % programs].append(unit)
    free = range(long % programs, programs)
    tiles = iter(range(short))
    for _ in range(plan.ahead):
        for program in free:
            then[program].append(next(tiles))
    for place, unit in enumerate(tiles):
        then[place % programs].append(unit)
    return [(b, a) if plan.rows_first else (a, b) for a, b in zip(first, then)]


@given(st.integers(1, 20_000), st.integers(8, 20_000), st.integers(0, 1500), st.integers(0, 1500))
def test_schedule(n: int, width: int, units_c: int, units_e: int) -> None:
    """Every tile once; the time is that of the last program, and no worse than without early rounds."""
    if units_c + units_e == 0:
        return
    dealt = walk(n, width, units_c, units_e)
    assert sorted(unit for c, _ in dealt for unit in c) == list(range(units_c))
    assert sorted(unit for _, e in dealt for unit in e) == list(range(units_e))
    time = schedule(n, width, units_c, units_e, H200).time
    assert time == max(len(c) * n + len(e) * width for c, e in dealt)
    assert time >= (units_c * n + units_e * width) / H200


def test_widths_fill_the_multiprocessors() -> None:
    """Gemma's head in 256 MB: 16 full waves of dZ, and products within a fiftieth of an even share."""
    width = best_width(8192, 256_000, 2304, 9472, 1, (True, True), H200)
    deal = dealt(8192, width, 2304, (True, True), H200)
    assert (width // 256 * 64) % H200 == 0
    even = (deal.units_c * 8192 + deal.units_e * width) / H200
    assert deal.rows == 192 and deal.schedule.time <= 1.02 * even


def test_lower_tiles_where_they_fill_the_multiprocessors() -> None:
    """16,384 tokens of 512 features and a short run: 172 tiles of 192 rows would take two rounds of 132, and so do 256
    of 128 rows, in two thirds of the time.
    """
    deal = dealt(16_384, 256, 512, (True, False), H200)
    assert (deal.rows, deal.units_e, deal.units_c) == (128, 256, 0)
    assert deal.cost == 128 * 2 * 256 * 1.03 < 192 * 2 * 256


def problem_of(n: int, v: int, d: int, dtype: torch.dtype, hot: bool) -> Problem:
    """Ignored tokens full of NaN; `hot`: half of the tokens have one target, 20 the last column."""
    generator = torch.Generator("cuda").manual_seed(n + v + d)
    e = (torch.randn(n, d, device="cuda", generator=generator) * 4 / d**0.5).to(dtype)
    c = torch.randn(v, d, device="cuda", generator=generator).to(dtype)
    targets = torch.randint(0, v, (n,), device="cuda", generator=generator)
    if hot:
        targets[: n // 2], targets[n // 2 : n // 2 + 20] = v // 3, v - 1
    if n > 1:
        targets[::5], e[::5] = -1, torch.nan
    return Problem(e, c, targets)


def gradients(problem: Problem, impl: str, workspace_mb: int, need: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """By `kernels`, because the interface takes one pass where these small problems fit the workspace."""
    plan = Plan(variants.get(impl), workspace_mb=workspace_mb)
    heads, _ = kernels.forward(problem, plan)
    upstream = Upstream(torch.full((problem.n,), 1 / problem.n, device="cuda"))
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    found = kernels.backward(problem, plan, heads, upstream, (*need, False), seed)
    return [x for x in found if x is not None]


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a Hopper matter")


def use_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "finished_by_hopper", lambda *_: False)


SHAPES = ((200, 700, 136), (1000, 5003, 520), (130, 20_000, 264), (1, 300, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce_exact", "cce_split", "cce_no_filter"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "hot"), [(torch.bfloat16, True), (torch.float16, False)])
def test_library_agrees(
    impl: str, shape: tuple[int, int, int], dtype: torch.dtype, hot: bool, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fp32 sums of the same terms in another order, rounded once: no element further apart than the rounding and
    the sums' own error, n 2^-23 of the terms' magnitude (AGENTS.md's tensor cores truncate). Most are equal: two sums
    that are 2^-24 apart for each 16 terms round apart with that probability over an ulp's.
    """
    problem = problem_of(*shape, dtype, hot)
    assert dense.finished_by_hopper(problem, Plan(variants.get(impl)))
    n, _, d = shape
    size = 6 * n * d + sums_size(n, d) + 1024 * n  # a copy of e, the sums of dE and of labels, 256 columns of a pair
    least = -(-size // 2**20)
    ours = gradients(problem, impl, least)
    again = gradients(problem, impl, least)
    halves = gradients(problem, impl, least, (True, False)) + gradients(problem, impl, least, (False, True))
    use_library(monkeypatch)
    terms = max(shape[:2])
    for name, got, repeated, alone, library in zip(("dE", "dC"), ours, again, halves, gradients(problem, impl, least)):
        assert torch.equal(got, repeated), name
        if name == "dC":  # dE's runs may have another width where dC is not asked for
            assert torch.equal(got, alone), name
        assert library.any(), name
        ulp = torch.finfo(dtype).eps * library.float().abs() + torch.finfo(dtype).smallest_normal
        apart = (got.float() - library.float()).abs()
        assert bool((apart <= ulp + terms * 2.0**-23 * library.float().abs().amax()).all()), name
        assert (apart > 0).float().mean() < 0.01 + terms / 16 * 2.0**-24 / torch.finfo(dtype).eps, name
        if name == "dE":
            assert not got[problem.targets < 0].any()


@pytest.mark.gpu
def test_strides(hopper: None) -> None:
    """A padded c, whose rows the bulk copy engine reads with their stride; and one that it cannot read."""
    problem = problem_of(300, 3000, 264, torch.bfloat16, True)
    padded = torch.zeros(3000, 272, device="cuda", dtype=torch.bfloat16)[:, :264].copy_(problem.c)
    strided = dataclasses.replace(problem, c=padded)
    assert dense.finished_by_hopper(strided, Plan(variants.get("cce_exact")))
    for a, b in zip(gradients(problem, "cce_exact", 8), gradients(strided, "cce_exact", 8)):
        assert torch.equal(a, b) and a.any()
    odd = dataclasses.replace(problem, c=padded[:, 1:], e=problem.e[:, 1:].contiguous())
    assert not dense.finished_by_hopper(odd, Plan(variants.get("cce_exact")))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cce_exact", "cce_split"])
@pytest.mark.parametrize("shape", [(200, 700, 136), (1000, 5003, 520), (2048, 20_000, 264)])
def test_the_height_of_the_tiles_changes_no_bit(
    impl: str, shape: tuple[int, int, int], hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two consumers compute what three do. dE's runs may have another width."""
    problem = problem_of(*shape, torch.bfloat16, True)
    found = []
    for rows in (192, 128):
        monkeypatch.setattr(schedules, "_PRODUCT_ROWS", {rows: 1.0})
        for cached in (schedules.dealt, best_width):
            cached.cache_clear()
        found.append(gradients(problem, impl, 64))
    for name, one, two in zip(("dE", "dC"), *found):
        assert two.any(), name
        if name == "dE":
            assert (one - two).float().norm() <= 2.0**-8 * one.float().norm()
        else:
            assert torch.equal(one, two), name
    for cached in (schedules.dealt, best_width):
        cached.cache_clear()
