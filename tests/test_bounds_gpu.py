"""The functions of this GPU against what the bounds assume of them."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from cce_precision.analysis.bounds_model import gpu_machine, half_ulp  # noqa: E402
from cce_precision.kernels.primitives import reciprocal  # noqa: E402

STEP = 2**24


@triton.jit
def apply(x, one, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(out + i, tl.exp2(v))
    tl.store(out + n + i, tl.log2(v))
    tl.store(out + 2 * n + i, tl.log(v))
    tl.store(out + 3 * n + i, reciprocal(v))
    tl.store(out + 4 * n + i, v / tl.load(one))


def test_sums_to_one_number_are_as_deep_as_the_bounds_assume() -> None:
    """One number, beside ones of 3/4 its half ulp, in each place: every rounding that it passes through adds a quarter
    of that, so the error counts them, less what the small ones have added up to before they meet it."""
    machine = gpu_machine()
    tiny = 0.75 * 2.0**-24
    for n in (*range(2, 300), 511, 512, 513, 1000, 2048, 5000):
        x = torch.full((n, n), tiny, device="cuda").fill_diagonal_(1.0)
        exact = 1 + (n - 1) * tiny
        for row in x[:: max(1, n // 16)]:
            error = abs(float(row.contiguous().sum().double()) - exact)
            assert error <= machine.total_depth(n) * 2.0**-24 * (1 + 2.0**-10) * exact, n


@pytest.mark.parametrize("sign", [0, 1])
def test_functions_err_no_more_than_the_bounds_assume(sign: int) -> None:
    """Over every fp32 number with a normal argument and result; division by 1 is exact."""
    kernels = gpu_machine().kernels
    assert kernels is not None
    ulps = {
        "exp2": kernels.exp2,
        "log2": kernels.log,
        "log": kernels.log,
        "reciprocal": kernels.reciprocal,
        "over": 0.0,
    }
    one = torch.ones(1, device="cuda")
    most = dict.fromkeys(ulps, 0.0)
    for start in range(2**23, 2**31 - 2**23, STEP):
        bits = torch.arange(start, min(start + STEP, 2**31 - 2**23), device="cuda") - sign * 2**31
        x = bits.to(torch.int32).view(torch.float32)
        out = torch.empty(5, x.numel(), device="cuda")
        apply[(x.numel() // 1024,)](x, one, out, x.numel(), BLOCK=1024)
        y = x.double()
        for name, got, exact in zip(ulps, out, (y.exp2(), y.log2(), y.log(), 1 / y, y), strict=True):
            usual = exact.isfinite() & (exact.abs() < 2.0**126) & (exact.abs() >= 2.0**-126)
            off = (got.double() - exact).abs() / (2 * half_ulp(exact.abs(), torch.float32))
            most[name] = max(most[name], float(torch.where(usual, off, 0.0).max()))
    print(most)
    assert all(most[name] <= ulps[name] for name in ulps), most
