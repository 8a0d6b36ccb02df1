"""Metrics: exact on numbers that doubles hold, with the rules for NaN, zero, undetermined rows, and the mutants."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cce_precision.analysis import metrics
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.references import magnitudes, truth
from cce_precision.numerics import unit_roundoff

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
inf, nan = math.inf, math.nan


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(*args: object, **options: object) -> dict[str, float]:
    found = list(metrics.rows("dE", *args, **options))  # type: ignore[arg-type]
    assert {row.quantity for row in found} == {"dE"}
    assert len({row.metric for row in found}) == len(found), "a metric comes twice"
    return {row.metric: row.value for row in found}


def test_errors_of_special_values() -> None:
    out, exact = tensor(nan, nan, 1, inf, inf, -inf, 2.5), tensor(nan, 1, nan, inf, -inf, 0, 2)
    assert metrics.errors(out, exact).tolist() == [0, inf, inf, 0, inf, inf, 0.5]


@pytest.mark.parametrize(
    ("out", "exact", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 9.0], [3.0, 4.0], 1.0),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], inf),
        ([nan, 4.0], [3.0, 4.0], inf),
        ([nan, 4.0], [nan, 4.0], 0.0),
        ([nan, 5.0], [nan, 4.0], 0.25),
    ],
)
def test_relative(out: list[float], exact: list[float], expected: float) -> None:
    assert metrics.relative(tensor(*out), tensor(*exact)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_is_one_rounding(dtype: torch.dtype) -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    floor = metrics.floor_error(exact, dtype)
    assert unit_roundoff(dtype) / 8 < floor <= unit_roundoff(dtype)
    assert metrics.floor_error(exact.to(dtype).double(), dtype) == 0
    assert metrics.relative(exact.to(dtype), exact) == floor


def test_the_floor_of_an_overflow_is_infinite() -> None:
    assert metrics.floor_error(tensor(1e6, 1), torch.float16) == inf


@pytest.mark.parametrize(
    ("relative", "dtype", "bits"),
    [
        (0.0, torch.bfloat16, 8),
        (2.0**-40, torch.bfloat16, 8),
        (2.0**-40, torch.float64, 40),
        (2.0**-5, torch.float16, 5),
        (1.0, torch.float16, 0),
        (8.0, torch.float16, 0),
        (inf, torch.float16, 0),
        (nan, torch.float16, 0),
    ],
)
def test_effective_bits(relative: float, dtype: torch.dtype, bits: float) -> None:
    assert metrics.effective_bits(relative, dtype) == bits


def test_significant_bits() -> None:
    assert [metrics.significant_bits(t) for t in (*DTYPES, torch.float64)] == [8, 11, 24, 53]


def test_cosine_deficit_does_not_cancel() -> None:
    """An angle of 2^-30: 1 - cos is 2^-61, which a difference from 1 loses."""
    a, b = tensor(1, 0), tensor(1, 2.0**-30)
    assert metrics.cosine_deficit(a, b) == pytest.approx(2.0**-61, rel=2.0**-29)
    assert metrics.cosine_deficit(tensor(2, 0), tensor(3, 0)) == 0
    assert metrics.cosine_deficit(tensor(-2, 0), tensor(3, 0)) == 2
    assert math.isnan(metrics.cosine_deficit(tensor(0, 0), tensor(3, 0)))


def test_bias_tells_shrinking_from_noise() -> None:
    exact = torch.randn(128 * 64, 4, dtype=torch.float64)
    shrunk, z = metrics.bias(exact * 0.75, exact)
    assert shrunk == pytest.approx(-0.25, rel=64 * 2.0**-53) and z < -8
    noise, z = metrics.bias(exact + torch.randn_like(exact) / 4, exact)
    assert abs(z) < 5 and abs(noise) < 1 / 64
    assert metrics.bias(exact, exact) == (0, 0)
    assert metrics.bias(torch.zeros_like(exact), exact)[0] == -1
    assert metrics.bias(torch.ones(2), torch.zeros(2, dtype=torch.float64)) == (0, 0)  # no sign to err towards


def test_bias_counts_a_tile_once() -> None:
    """Errors alike within a tile of 128 rows but independent between tiles are no bias, however many rows there are."""
    exact = torch.ones(128 * 16, 1, dtype=torch.float64)
    error = torch.randn(16, 1).repeat_interleave(128, 0) / 8
    _, clustered = metrics.bias(exact + error, exact)
    _, rows_alone = metrics.bias(exact + error, exact, tile=1)
    assert abs(rows_alone) > 8 * abs(clustered)
    assert math.isnan(metrics.bias(tensor(2.0), tensor(1.0))[1])


def test_ulps() -> None:
    exact, out = tensor(1, 1, 2, -3, 0), tensor(1, 1 + 2.0**-7, 2 + 2.0**-7, -3.5, 0)
    assert metrics.ulps(out, exact, dtype=torch.bfloat16).tolist() == [0, 1, 0.5, 32, 0]
    assert metrics.ulps(tensor(3 * 2.0**-25), tensor(2.0**-25), dtype=torch.float16).tolist() == [1]  # subnormal: 2^-24
    with_scale = metrics.ulps(tensor(2.0**-8), tensor(0), tensor(256.0), torch.bfloat16)  # u scale = 1
    assert with_scale.tolist() == [0.5]
    assert metrics.ulps(tensor(nan), tensor(1), dtype=torch.float16).tolist() == [inf]


def test_worst_has_its_index() -> None:
    exact = torch.ones(5, 7, dtype=torch.float64)
    out = exact.clone()
    out[3, 4] = 1.5
    assert metrics.worst(out, exact, dtype=torch.bfloat16) == ((3, 4), 1.5, 1.0, 64.0)
    with pytest.raises(ValueError, match="empty"):
        metrics.worst(out[:0], exact[:0])


def test_row_errors_leave_out_what_says_nothing() -> None:
    exact = tensor([3, 4], [0, 0], [0, 0], [1e-20, 0], [1, 0], [2, 0])
    out = tensor([3, 9], [0, 0], [1, 0], [1, 0], [1, 0], [nan, 0])
    radius = tensor([1e-9, 0], [0, 0], [0, 0], [1e-19, 0], [1e-9, 0], [1e-9, 0])
    errors = metrics.row_errors(out, exact, radius)
    assert torch.where(errors.isnan(), -1, errors).tolist() == [1, -1, inf, -1, 0, inf]
    found = table(out, exact, radius=radius)
    assert found["row_undetermined"] == 1 / 6
    assert (found["row_q50"], found["row_max"]) == (1, inf)
    assert found["certificate"] > 0


def test_quantiles_are_values() -> None:
    exact = torch.ones(100, 1, dtype=torch.float64)
    found = table(exact + torch.arange(1, 101)[torch.randperm(100), None] / 128, exact)
    assert [found[f"row_{q}"] * 128 for q in ("q50", "q90", "q99", "max")] == [50, 90, 99, 100]


def test_strata_of_the_complement() -> None:
    p = tensor(0, 1e-7, 1e-6, 1e-3, 0.05, 0.5, 1.0)
    masks = metrics.by_complement(p, torch.tensor([False] + [True] * 6))
    assert list(masks) == ["1-p<1e-06", "1e-06<=1-p<0.0001", "0.0001<=1-p<0.01", "0.01<=1-p<0.1", "1-p>=0.1"]
    assert [mask.nonzero()[:, 0].tolist() for mask in masks.values()] == [[1], [2], [3], [4], [5, 6]]


def test_strata_of_the_count() -> None:
    targets = torch.tensor([3, -1, 1, 1] + [2] * 10 + [4] * 9)
    masks = metrics.by_count(targets, 6)
    assert list(masks) == ["targets=0", "targets=1", "targets=2-9", "targets=10+"]
    assert [mask.nonzero()[:, 0].tolist() for mask in masks.values()] == [[0, 5], [3], [1, 4], [2]]


def test_strata_take_their_rows_alone() -> None:
    exact = torch.ones(4, 3, dtype=torch.float64)
    out = exact * tensor([1], [1.5], [1], [1.25])
    found = table(out, exact, strata={"a": torch.tensor([True, True, False, False]), "none": torch.zeros(4).bool()})
    assert (found["rows:a"], found["row_max:a"], found["row_q50:a"]) == (2, 0.5, 0)
    assert found["rel:a"] == metrics.relative(out[:2], exact[:2]) < 0.5
    assert found["rows:none"] == 0 and "rel:none" not in found


def test_ulp_shares_are_a_histogram() -> None:
    exact = torch.rand(500, dtype=torch.float64) + 1
    found = table(exact.bfloat16(), exact)
    shares = {name: value for name, value in found.items() if name.startswith("ulp_share")}
    assert sum(shares.values()) == pytest.approx(1, abs=64 * 2.0**-53)
    assert shares["ulp_share:0.5"] > 0 and found["ulp_max"] <= 0.5
    assert found["worst_column"] == 0 and found["worst_row"] == metrics.ulps(exact.bfloat16(), exact).argmax()


@pytest.mark.parametrize("quantity", ["dE", "dC"])
def test_a_real_gradient(quantity: str) -> None:
    """Rounding the truth is the floor; zero, half, missing 1/N and a dropped row are far from it."""
    case = CASES["trained"](n=48, v=256, d=16)
    exact, scale = truth(case), getattr(magnitudes(case), quantity)
    right, radius = getattr(exact, quantity), getattr(exact.radius, quantity)
    options = {"radius": radius, "scale": scale, "dtype": torch.bfloat16}
    rounded = table(right.bfloat16(), right, **options)
    assert rounded["rel"] == rounded["floor"] <= unit_roundoff(torch.bfloat16)
    assert 0 < rounded["scaled"] <= rounded["rel"] and rounded["scaled_max"] <= unit_roundoff(torch.bfloat16)
    assert rounded["ulp_max"] <= 0.5 and rounded["bits"] >= 8 - rounded["floor"]
    assert rounded["certificate"] < unit_roundoff(torch.float32) ** 1.5
    zero = table(torch.zeros_like(right), right, **options)
    assert (zero["rel"], zero["bias"], zero["norm_ratio"], zero["bits"]) == (1, -1, 0, 0)
    scaled = table(right * 48, right, **options)
    assert scaled["rel"] == pytest.approx(47, rel=64 * 2.0**-53) and scaled["cosine_deficit"] < unit_roundoff(
        torch.float32
    )
    dropped = right.clone()
    row = int(right.norm(dim=1).argmax())
    dropped[row] = 0
    found = table(dropped, right, **options)
    assert found["row_max"] == 1 and found["worst_row"] == row


def test_inputs_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        list(metrics.rows("loss", torch.ones(3), torch.ones(4)))
    assert list(metrics.rows("loss", torch.ones(0), torch.ones(0))) == []
    assert table(torch.tensor(2.0, requires_grad=True), tensor(1.0).sum())["rel"] == 1


def test_import_brings_no_pandas() -> None:
    code = "import sys, cce_precision.analysis.metrics; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_agrees_with_the_functions_alone() -> None:
    """What `rows` computes once for all metrics is what each function computes for itself, to the last bit."""
    exact = torch.randn(300, 7, dtype=torch.float64)
    exact[5], exact[7, 2] = 0, inf
    out = (exact * (1 + torch.randn_like(exact) / 100)).bfloat16()
    out[9, 1] = nan
    radius, scale = torch.full_like(exact, 1e-12), exact.abs().nan_to_num() + 1
    mask = torch.arange(300) % 3 == 0
    found = table(out, exact, radius=radius, scale=scale, strata={"third": mask})
    assert found["rel"] == metrics.relative(out, exact) == inf
    assert found["rel:third"] == metrics.relative(out[mask], exact[mask]) == inf
    assert (found["bias"], found["bias_z"]) == pytest.approx(metrics.bias(out, exact), nan_ok=True, rel=0)
    assert found["ulp_max"] == metrics.worst(out, exact, scale).ulps == metrics.ulps(out, exact, scale).max() == inf
    by_row = metrics.row_errors(out, exact, radius)
    known = by_row[~by_row.isnan()].sort().values
    assert found["row_q50"] == known[math.ceil(len(known) / 2) - 1]


def test_growth_is_what_chance_alone_does_not_reach() -> None:
    """The ratio of two errors with independent rows stays below it; a third more does not."""
    exact = torch.randn(256, 16, dtype=torch.float64)
    noise = lambda: exact + torch.randn_like(exact) / 512  # noqa: E731
    for _ in range(100):
        before, after = table(noise(), exact), table(noise(), exact)
        assert after["rel"] <= before["rel"] * before["growth"]
        assert 1 < before["growth"] < 4 / 3
    assert table(exact, exact)["growth"] == 1 == table(exact + inf, exact)["growth"]
