"""The tail in 8 bits: its rounding, its sums, and what of both reaches the gradients."""

from __future__ import annotations

import pytest
import torch

from cce_precision.analysis import cases
from cce_precision.analysis.fp8_tail import FP8, HOPPER_FP8, errors, rounded, summed, table

U = 2.0**-4  # unit round-off of e4m3
LEAST = torch.finfo(FP8).smallest_normal


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e4])
def test_rounding_is_to_nearest_after_a_power_of_two(size: float) -> None:
    x = numbers(1000) * size
    low, scale = rounded(x)
    assert torch.frexp(torch.tensor(scale))[0] == 0.5
    largest = float(low.float().abs().max())
    assert torch.finfo(FP8).max / 2 <= largest * (1 + U) and largest <= torch.finfo(FP8).max
    off = (low.double() / scale - x).abs()
    assert (off <= torch.maximum(U * x.abs(), torch.tensor(U * LEAST / scale))).all() and (off > U / 4 * x.abs()).any()


def test_sums_lose_what_13_bits_do_not_hold_unless_they_are_promoted() -> None:
    """One, and then 2^-14 many times: far below the last bit of a sum that holds the one."""
    a = torch.full((1, 2048), 2.0**-7).to(FP8)
    a[0, 0] = 1.0
    b = torch.full((2048, 1), 2.0**-7).to(FP8)
    b[0, 0] = 1.0
    rest = 2.0**-14
    assert float(summed(a, b, None)) == 1 + 2047 * rest
    assert float(summed(a, b, 2048)) == 1.0
    assert float(summed(a, b, HOPPER_FP8.block)) == 1 + (2048 - HOPPER_FP8.block) * rest


def test_small_integers_are_summed_exactly() -> None:
    a, b = (numbers(*shape).mul(2).round().clamp(-4, 4).to(FP8) for shape in ((5, 70), (70, 3)))
    for promoted in (32, 64, 70, None):
        assert torch.equal(summed(a, b, promoted), a.double() @ b.double())


@pytest.mark.parametrize("stage", ["initial", "trained"])
def test_the_errors_are_within_what_rounding_allows(stage: str) -> None:
    """Both factors of a product are rounded once: (2 + U) U of the sum of its magnitudes, and underflow. Without a tail
    there is no error, and dropping it errs more.
    """
    case, eps = cases.captured(n=64, stage=stage), 2.0**-12
    e, c = case.e.double(), case.c.double()
    p = torch.softmax(e @ c.T, 1).scatter(1, case.targets[:, None], 0.0)
    tail = torch.where(p < eps, p, 0.0)
    found = errors(case, eps, None)
    exact = p @ c - p.sum(1, keepdim=True) * c[case.targets]
    least = (U * LEAST / rounded(tail)[1]) * c.abs().sum(0) + (U * LEAST / rounded(c)[1]) * tail.sum(1, keepdim=True)
    allowed = (2 + U) * U * (tail @ c.abs()) + (1 + U) * least
    assert 0 < found["dE"] <= float(allowed.norm() / exact.norm())
    assert 20 * found["dE"] < found["dE_dropped"] and 20 * found["dC"] < found["dC_dropped"]
    assert errors(case, 0.0, None)["dE"] == 0 == errors(case, 0.0, None)["dC_dropped"]
    assert "2^-12" in table([{"head": stage, "k": 12, "promoted": None} | found])
