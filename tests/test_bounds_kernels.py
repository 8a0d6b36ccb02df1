"""The bounds of the kernels' heads: against a walk whose functions err by all they may; what they assume of code."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cce_precision.analysis.bounds import INFLATION, bound
from cce_precision.analysis.bounds_kernels import LN2, LOG2E, Arithmetic, _tanh, kernel_softmax
from cce_precision.analysis.bounds_model import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    INTERPRETER,
    Computed,
    Machine,
    Precision,
    half_ulp,
)
from cce_precision.analysis.bounds_softmax import Exact
from cce_precision.analysis.bounds_tensor_core import fused
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL

SINGLE = Precision(torch.float32, 2.0, 1, True)
KERNELS = HOPPER.kernels
assert KERNELS is not None
Errors = Callable[[Tensor], Tensor]  # of a function's value, in -1 to 1


def wrong(value: Tensor, ulps: float, errors: Errors) -> Tensor:
    """An fp32 number within `ulps` ulp of an fp64 value, as far away as `errors` says; 0 below the normal range."""
    room = (ulps - 0.5) * 2 * half_ulp(value.abs(), torch.float32)
    moved = torch.where(value.isinf(), value, value + errors(value) * room)
    return torch.where(value.abs() < 2.0**-126, 0.0, moved).float()


def fma(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    return (x.double() * y + z.double()).float()


@dataclasses.dataclass
class Walk:
    """heads.forward_kernel and heads.combine_kernel in fp32, their functions as wrong as they may be."""

    z: Tensor  # (N, V) fp32 logits before the temperature
    targets: Tensor
    temperature: float
    errors: Errors

    def exp2(self, x: Tensor) -> Tensor:
        return wrong(torch.exp2(x.double()), KERNELS.exp2, self.errors)

    def log(self, x: Tensor, base: float) -> Tensor:
        return wrong(x.double().log() / base, KERNELS.log, self.errors)

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        return x / y if bool((y == 1).all()) else wrong(x.double() / y.double(), KERNELS.divide, self.errors)

    @staticmethod
    def reference(m: Tensor, scale: Tensor) -> Tensor:
        return torch.where(m == -math.inf, 0, m * scale)

    def decay(self, m: Tensor, top: Tensor, scale: Tensor) -> Tensor:
        return torch.where(m == top, 1.0, self.exp2((m - top) * scale))

    def merged(self, one: list[Tensor], other: list[Tensor], scale: Tensor) -> list[Tensor]:
        """Two of (m, s, a) as the second kernel merges them."""
        (m, s, a), (m1, s1, a1) = one, other
        top = torch.maximum(m, m1)
        r, r0, r1 = (self.reference(x, scale) for x in (top, m, m1))
        decay, decay1 = self.decay(m, top, scale), self.decay(m1, top, scale)
        a = fma(fma(s, r - r0, a), decay, decay1 * fma(s1, r - r1, a1))
        return [top, fma(s, decay, decay1 * s1), a]

    def heads(self, tile: int, splits: int) -> dict[str, Tensor]:
        n, v = self.z.shape
        scale = torch.tensor(LOG2E / self.temperature).float()
        t = torch.tensor(self.temperature).float()
        own = self.z.gather(1, self.targets[:, None])[:, 0]
        others = self.z.scatter(1, self.targets[:, None], -math.inf)
        state = [torch.full((n,), -math.inf), torch.zeros(n), torch.zeros(n)]
        tiles = others.split(tile, 1)
        for start in range(0, len(tiles), -(-len(tiles) // splits)):
            part = [torch.full((n,), -math.inf), torch.zeros(n), torch.zeros(n)]
            for z in tiles[start : start + -(-len(tiles) // splits)]:
                m, s, a = part
                top = torch.maximum(m, z.amax(1))
                reference = self.reference(top, scale)
                below = fma(z, scale, -reference[:, None])
                p, decay = self.exp2(below), self.decay(m, top, scale)
                a = fma(decay, fma(s, reference - self.reference(m, scale), a), -in_order(p * below.clamp(min=-2048)))
                part = [top, fma(decay, s, in_order(p)), a]
            state = self.merged(state, part, scale)
        m, s, a = state
        reference = self.reference(m, scale)
        y_t, rest = fma(own, scale, -reference), self.log(s, LN2)
        gap = (rest - y_t) * torch.tensor(LN2).float()
        tail = self.log1p(self.exp2(-gap.abs() * torch.tensor(LOG2E).float()))
        finite = torch.where(m == -math.inf, 0, m)
        by_rest = fma(rest - fma(finite, scale, -reference), torch.tensor(LN2).float(), self.divide(finite, t))
        up = y_t.clamp(min=0)
        p_t, decay = self.exp2(y_t - up), self.exp2(-up)
        total = fma(decay, s, p_t)
        below = fma(decay, fma(s, up, a), p_t * torch.where(p_t > 0, up - y_t, 0))
        return {
            "nll": gap.clamp(min=0) + tail,
            "lse": torch.where(gap > 0, by_rest, self.divide(own, t)) + tail,
            "entropy": (self.log(total, LN2) + self.divide(below, total)) * torch.tensor(LN2).float(),
        }

    def log1p(self, x: Tensor) -> Tensor:
        u = 1 + x
        step = u - 1
        return torch.where(step == 0, x, self.log(u, 1.0) * self.divide(x, torch.where(step == 0, 1.0, step)))

    def p(self, lse: Tensor) -> Tensor:
        """(N, V) probabilities of dz.dz_kernel."""
        one, t = torch.ones(()), torch.tensor(self.temperature).float()
        log_p = fma(self.z, self.divide(one, t), -lse[:, None])
        return self.exp2(log_p * torch.tensor(LOG2E).float())


def in_order(x: Tensor) -> Tensor:
    """(N,) fp32 row sums as four threads form them, each with pairs of columns."""
    lanes = torch.nn.functional.pad(x, (0, -x.shape[1] % 8)).view(len(x), -1, 4, 2)
    sums = lanes[:, 0, :, 0]
    for k in range(1, 2 * lanes.shape[1]):
        sums = sums + lanes[:, k // 2, :, k % 2]
    return (sums[:, 0] + sums[:, 2]) + (sums[:, 1] + sums[:, 3])


def logits(n: int, v: int, scale: float, margin: float, offset: float, seed: int) -> tuple[Problem, Tensor]:
    """A problem whose logits are exact in fp32, and they."""
    g = torch.Generator().manual_seed(seed)
    e, c = torch.eye(n).bfloat16(), (torch.randn(v, n, generator=g) * scale + offset).bfloat16()
    targets = torch.randint(0, v, (n,), generator=g)
    c[targets, torch.arange(n)] += margin
    return Problem(e, c, targets), c.T.float().contiguous()


ERRORS: dict[str, Errors] = {
    "all up": torch.ones_like,
    "all down": lambda x: -torch.ones_like(x),
    "small ones up": lambda x: torch.where(x.abs() < 0.5, 1.0, -1.0),
    "random": lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 2 - 1,
}


@pytest.mark.parametrize("errors", ERRORS)
@given(
    v=st.sampled_from((1, 2, 3, 17, 128, 129, 400)),
    scale=st.sampled_from((0.25, 1.0, 4.0, 20.0)),
    margin=st.sampled_from((0.0, 5.0, 25.0)),
    offset=st.sampled_from((0.0, 300.0, -1000.0)),
    temperature=st.sampled_from((1.0, 0.7, 3.0)),
    splits=st.sampled_from((1, 2, 3)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_walk_that_errs_as_it_may_stays_within(
    errors: str, v: int, scale: float, margin: float, offset: float, temperature: float, splits: int, seed: int
) -> None:
    problem, z = logits(12, v, scale, margin, offset, seed)
    problem = dataclasses.replace(problem, temperature=temperature)
    assert KERNELS is not None
    tile = 256 if splits == 1 else KERNELS.columns[0]
    walk = Walk(z, problem.targets, temperature, ERRORS[errors])
    heads = walk.heads(tile, splits)
    ones = torch.ones(v, dtype=torch.float64)
    found = kernel_softmax(problem, problem.e.double(), problem.c.double(), None, problem.targets, ones, HOPPER)
    assert not found.z.error.any()
    for name, got in heads.items():
        if v == 1 and name == "entropy":  # 0 / 0 where the only logit is far below 0
            continue
        held(name, got, getattr(found, name).value, getattr(found, name).error)
    held("p", walk.p(heads["lse"]), found.p.value, found.p.error)


def held(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    error = (got.double() - exact).abs()
    assert (error <= allowed * INFLATION).all(), (name, float((error / allowed).nan_to_num().max()))


def test_they_are_narrow() -> None:
    """Functions that are all wrong one way come within a third of the bounds of lse and P: little is counted twice."""
    problem, z = logits(64, 24, 2.0, 0.0, 0.0, 0)
    walk = Walk(z, problem.targets, 1.0, ERRORS["all up"])
    ones = torch.ones(24, dtype=torch.float64)
    found = kernel_softmax(problem, problem.e.double(), problem.c.double(), None, problem.targets, ones, HOPPER)
    heads = walk.heads(256, 1)
    for got, x in ((heads["lse"], found.lse), (walk.p(heads["lse"]), found.p)):
        assert float(((got.double() - x.value).abs() / x.error).max()) > 1 / 3


@given(
    v=st.integers(1, 9),
    scale=st.sampled_from((0.5, 4.0, 40.0)),
    size=st.sampled_from((1e-9, 1e-3, 2.0)),
    seed=st.integers(),
)
@settings(max_examples=60)
def test_errors_of_logits_move_log_p_by_no_more_and_by_as_much(v: int, scale: float, size: float, seed: int) -> None:
    """Of all errors with some magnitudes; those of one column against all others move it by just that."""
    g = torch.Generator().manual_seed(seed % 2**31)
    z = torch.randn(v, generator=g, dtype=torch.float64) * scale
    delta = torch.rand(v, generator=g, dtype=torch.float64) * size
    allowed = Exact.of(Computed(z[None], delta[None]), torch.tensor([seed % v])).log_p_moved()[0]
    # one column a row falls, the others rise; then any signs and sizes
    signs = torch.cat([1 - 2 * torch.eye(v, dtype=torch.float64), torch.rand(40, v, generator=g).double() * 2 - 1])
    moved = (torch.log_softmax(z + torch.cat([signs, -signs]) * delta, 1) - torch.log_softmax(z, 0)).abs()
    # of the fp64 here: some v operations on numbers of these sizes, and the 2^-50 that the bound adds
    rounding = (v + 5) * 2.0**-50 * (1 + z.abs().amax() + torch.log_softmax(z, 0).abs()) * torch.exp(2 * delta.amax())
    assert (moved <= allowed + rounding).all()
    assert (moved[:v].diagonal() >= allowed - rounding).all()


@pytest.mark.parametrize("machine", [AMPERE, HOPPER, BLACKWELL, INTERPRETER], ids=lambda m: m.name)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_depth_of_a_row(machine: Machine, itemsize: int) -> None:
    """No term goes through more additions to what is not 0, counted where the columns lie as `Kernels.rows` says."""
    assert machine.kernels is not None
    side, threads, levels = machine.kernels.rows[itemsize > 2]
    width = machine.kernels.columns[1] if itemsize > 2 else machine.kernels.widest
    across = threads.bit_length() - 1
    for v in range(2, width + 1):
        terms = torch.bincount(torch.arange(v) // side % threads, minlength=threads)  # the target's is one of them
        deepest = 0
        for thread in range(threads):
            if not terms[thread]:
                continue
            partners = [range(threads)[(thread >> k ^ 1) << k :][: 2**k] for k in range(across)]
            met = sum(any(int(terms[t]) for t in group) for group in partners)
            deepest = max(deepest, int(terms[thread]) - 1 + met + levels - across)
        found = machine.kernels.row_depth(v, itemsize)
        assert found <= v - 2 or v == 2 and found == 0
        assert found >= min(deepest, v - 2)


@given(st.floats(-12, 12), st.sampled_from((-1.0, 0.0, 1.0)), st.sampled_from((-1.0, 0.0, 1.0)))
@settings(max_examples=300)
def test_tanh(x: float, exp_error: float, reciprocal_error: float) -> None:
    """primitives.tanh in fp32, its exp2 and its reciprocal wrong by all they may be."""
    y = torch.tensor([x]).float()
    a, y2 = y.abs(), y * y
    series = fma(y2, 0.017241460416, torch.tensor([-0.053045479973]).float())
    series = fma(y2, fma(y2, series, torch.tensor([0.133258787567]).float()), torch.tensor([-0.33333143888]).float())
    q = wrong(torch.exp2((a * torch.tensor(-2 * LOG2E).float()).double()), 2.0, lambda v: torch.full_like(v, exp_error))
    inverse = wrong(1 / (1 + q).double(), 1.0, lambda v: torch.full_like(v, reciprocal_error))
    large = fma(-2 * q, inverse.double(), torch.ones(1))
    got = torch.where(a < 0.5, fma(y, (y2 * series).double(), y), torch.where(y < 0, -large, large))
    assert KERNELS is not None
    allowed = _tanh(y.double(), torch.zeros(1, dtype=torch.float64), Arithmetic(KERNELS, SINGLE, 1.0))
    held("tanh", got, allowed.value, allowed.error)


@given(st.integers(1, 60), st.integers(0, 2**16), st.sampled_from((0.0, 1.0)))
@settings(max_examples=60)
def test_fused_sums_in_order(terms: int, seed: int, offset: float) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, terms, generator=g) + offset) * torch.exp(2 * torch.randn(2, terms, generator=g))
    total = torch.zeros(())
    for x, y in zip(a, b, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(total))
        total = torch.tensor(float(exact), dtype=torch.float64).float()
    exact = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)), Fraction(0))
    allowed = float(fused(a.double(), b.double())) * (1 + 2.0**-40)
    assert abs(Fraction(float(total)) - exact) <= Fraction(allowed)


@pytest.mark.parametrize("machine", [HOPPER, AMPERE, BLACKWELL, INTERPRETER])
def test_nothing_is_claimed_of_others_kernels(machine: Machine) -> None:
    """Without what is known of the kernels the bounds are wider."""
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(20, 33, generator=g).half(), torch.randn(60, 33, generator=g).half()
    problem, plan = Problem(e, c, torch.randint(0, 60, (20,), generator=g)), Plan(ALL["cce_exact"].configure(None))
    ours, theirs = (bound(problem, plan, machine=m) for m in (machine, machine.of_others))
    for name in ("nll", "lse", "dE", "dC"):
        assert (getattr(ours, name) <= getattr(theirs, name)).all()
    assert ours.lse.norm() < theirs.lse.norm() / (2 if machine.block else 1)


# What is assumed of the code.


def test_tiles_are_those_of_the_launches() -> None:
    pytest.importorskip("triton")
    from cce_precision.kernels.launch import _CONFIGS

    for arch, machines in {"sm_80": (AMPERE,), "sm_90": (HOPPER,), "sm_100": (BLACKWELL,)}.items():
        for machine in machines:
            assert machine.kernels is not None
            for size, least in zip((2, 4), machine.kernels.columns, strict=True):
                config = _CONFIGS["forward"][arch][size]
                assert least <= config.n <= (machine.kernels.widest if size == 2 else least)


def compiled(kernel: Any, arguments: dict[str, Any], arch: str, **options: int) -> dict[str, str]:
    """A kernel compiled for an architecture; arguments as tests/test_kernels_compile.py writes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        parts = value if isinstance(value, tuple) else (value,)
        kinds = tuple(x if isinstance(x, str) else "constexpr" for x in parts)
        signature[name] = kinds if isinstance(value, tuple) else kinds[0]
        for j, x in enumerate(parts):
            place = (i, j) if isinstance(value, tuple) else (i,)
            if not isinstance(x, str):
                constants[place] = x.value
            elif x.startswith("*"):
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return dict(triton.compile(source, target=target, options=options).asm)


def forward_of(arch: str, dtype: str) -> tuple[dict[str, str], Any]:
    """The plain forward pass compiled for an architecture, and its launch."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels do not compile")
    from cce_precision.kernels import heads, launch
    from tests.test_kernels_compile import PLAIN, logits_arguments

    config = launch._CONFIGS["forward"][arch][2 if dtype == "bf16" else 4]
    arguments = logits_arguments("forward", config, dtype, arch != "sm_80", PLAIN["forward"])
    return compiled(heads.forward_kernel, arguments, arch, num_warps=config.warps, num_stages=config.stages), config


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_exponents_are_fused(arch: str) -> None:
    """In the PTX of the plain forward pass every exp2 of an entry takes a fused product; the others are rescalings."""
    stages, config = forward_of(arch, "bf16")
    ptx = stages["ptx"]
    made = {m[2]: m[1] for m in re.finditer(r"^\s*([a-z0-9.]+)\s+(%[rf]\d+),", ptx, re.M)}
    taken = re.findall(r"ex2\.approx\.ftz\.f32\s+%[rf]\d+, (%[rf]\d+)", ptx)
    entries = config.m * config.n // (32 * config.warps)
    rescalings = sum(not made[x].startswith("fma.rn") for x in taken)
    assert len(taken) - rescalings == entries and 0 < rescalings <= config.m // 4
    assert "ex2.approx.f32" not in ptx


@pytest.mark.parametrize("machine", [AMPERE, HOPPER, BLACKWELL], ids=lambda m: m.name)
def test_rows_lie_in_the_threads_as_assumed(machine: Machine) -> None:
    """fp32: 4 columns side by side, 16 threads a row, one warp. 16-bit on Hopper: pairs, 4 threads, one warp."""
    arch = {"ampere": "sm_80", "hopper": "sm_90", "blackwell": "sm_100"}[machine.name]
    assert machine.kernels is not None
    side, threads, levels = machine.kernels.rows[1]
    layout = f"sizePerThread = [4, {side}], threadsPerWarp = [{32 // threads}, {threads}], warpsPerCTA = [8, 1]"
    assert layout in forward_of(arch, "fp32")[0]["ttgir"] and 2**levels == threads
    if machine is HOPPER:
        assert "versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1]" in forward_of(arch, "bf16")[0]["ttgir"]
        assert machine.kernels.rows[0] == (2, 4, 2)
