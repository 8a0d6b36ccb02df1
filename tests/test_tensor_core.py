"""Tensor cores: the model gives what an H200 gave, bit for bit, and no other model does."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from cce_precision.analysis import bounds_model, tensor_core_tiles
from cce_precision.analysis.tensor_core import AMPERE, HOPPER, Rounding, TensorCore, dot, main
from cce_precision.analysis.tensor_core_tiles import (
    BLOCKS,
    CATEGORIES,
    FILE,
    GROUPS,
    TILES,
    Recording,
    category_of,
    numbers_of,
    operands,
    replay,
    some_outputs,
)

WGMMA = [group for group in GROUPS if group.rows == 64 and group.depth == 32]
DATA = Path(tensor_core_tiles.__file__).parent / "data" / FILE


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load(DATA)


def test_every_recorded_tile_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(GROUPS) * BLOCKS * TILES > 100_000
    assert main(["replay", str(DATA)]) == 0
    assert "0 mismatches in 101,412 tiles recorded on NVIDIA H200" in capsys.readouterr().out


@pytest.mark.slow
def test_every_output_of_the_tiles_is_reproduced(recording: Recording) -> None:
    assert list(replay(recording, whole=True, blocks=range(len(CATEGORIES)))) == []


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(HOPPER, fraction=24),
        dataclasses.replace(HOPPER, fraction=26),
        dataclasses.replace(HOPPER, block=8),
        dataclasses.replace(HOPPER, block=32),
        dataclasses.replace(HOPPER, align=Rounding.DOWN),
        dataclasses.replace(HOPPER, align=Rounding.NEAREST),
        dataclasses.replace(HOPPER, result=Rounding.NEAREST),
        dataclasses.replace(HOPPER, normalised=True),
        AMPERE,
    ],
    ids=str,
)
def test_no_other_model_reproduces_them(recording: Recording, other: TensorCore) -> None:
    """In every category of bf16 numbers, but for that of vanishing ones, some tile tells each of them apart."""
    deep = [group for group in GROUPS if (group.format, group.depth) == ("bf16", 64)][:1]  # blocks of 16 and 32 differ
    found = {category_of(m.block) for m in replay(recording, other, deep, range(5))}
    assert found == set(CATEGORIES[:5])


@pytest.mark.parametrize("other", [{"least": None}, {"least": -126}, {"signed_zero": True}], ids=str)
def test_what_vanishes_tells_the_lowest_exponent_and_the_zero(recording: Recording, other: dict[str, object]) -> None:
    core, block = dataclasses.replace(HOPPER, **other), CATEGORIES.index("vanishing")  # type: ignore[arg-type]
    assert [m.group.format for m in replay(recording, core, WGMMA, [block])] == ["bf16", "tf32"]


def test_the_model_is_that_of_the_bounds() -> None:
    for core, machine in ((HOPPER, bounds_model.HOPPER), (AMPERE, bounds_model.AMPERE)):
        assert (core.block, core.fraction) == (machine.block, machine.fraction)


def exact_dot(a: list[Fraction], b: list[Fraction], acc: Fraction, core: TensorCore) -> Fraction:
    """The definition once more, in rational arithmetic and with the exponents of normalised products."""
    exponent = lambda x: math.frexp(float(x))[1] - 1  # noqa: E731
    cut = lambda x, unit: Fraction(math.trunc(x / unit)) * unit  # noqa: E731
    for start in range(0, len(a), core.block):
        terms = [acc, *(x * y for x, y in zip(a[start : start + core.block], b[start : start + core.block]))]
        if any(terms):
            unit = Fraction(2) ** (max(exponent(t) for t in terms if t) - core.fraction)
            acc = sum((cut(t, unit) for t in terms), Fraction(0))
            acc = cut(acc, Fraction(2) ** (exponent(acc) - 23)) if acc else acc
    return acc


@pytest.mark.parametrize("core", [HOPPER, AMPERE], ids=str)
def test_the_emulation_against_rational_arithmetic(core: TensorCore) -> None:
    core = dataclasses.replace(core, normalised=True)
    for depth in (1, 15, 16, 17, 64):
        a, b = (torch.randn(2, 8, depth) * torch.exp(3 * torch.randn(2, 8, depth))).bfloat16()
        acc = torch.randn(8)
        found = dot(a, b, acc, core)
        for i in range(8):
            left, right = ([Fraction(float(x)) for x in side[i]] for side in (a, b))
            assert Fraction(float(found[i])) == exact_dot(left, right, Fraction(float(acc[i])), core)


def test_exact_sums_are_exact_and_overflow_is_infinite() -> None:
    a = (torch.randint(-8, 9, (5, 32)) / 4).half()
    acc = torch.randint(-64, 65, (5,)).float()
    assert torch.equal(dot(a, a.flip(1), acc, HOPPER).double(), acc.double() + (a.double() * a.double().flip(1)).sum(1))
    huge = torch.full((16,), 2.0**63).bfloat16()
    assert float(dot(huge, huge, torch.zeros(()), HOPPER)) == math.inf
    assert float(dot(huge, -huge, torch.tensor(1.0), HOPPER)) == -math.inf


def test_operands_are_the_same_for_some_outputs_and_all(recording: Recording) -> None:
    """A tile's rows and columns do not depend on which are asked for; each category has numbers of its own."""
    for group in (GROUPS[0], GROUPS[-1]):
        for block in range(len(CATEGORIES)):
            tiles = numbers_of(group, block)[:3]
            rows, columns = some_outputs(group, tiles)
            some = operands(group, category_of(block), tiles, rows, columns)
            whole = operands(group, category_of(block), tiles, *tensor_core_tiles.all_outputs(group, tiles))
            t = torch.arange(3)[:, None]
            assert torch.equal(some.a, whole.a[t, rows]) and torch.equal(some.b, whole.b[t, columns])
            assert torch.equal(some.acc, whole.acc[t[:, :, None], rows[:, :, None], columns[:, None, :]])
            assert whole.a.any() and whole.a.isfinite().all() and whole.acc.isfinite().all()


def test_a_recording_comes_back_as_it_was_saved(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / FILE)
    again = Recording.load(tmp_path / FILE)
    assert again.meta == recording.meta and "H200" in recording.meta["device"]
    assert np.array_equal(again.some, recording.some) and np.array_equal(again.whole, recording.whole)


def test_a_changed_output_is_seen(recording: Recording) -> None:
    some, tiles = recording.some.copy(), tuple(tile.copy() for tile in recording.tiles)
    some[3, 1] ^= np.uint64(1)
    tiles[3][0, 5, 7] ^= 1
    changed = dataclasses.replace(recording, some=some, tiles=tiles)
    found = [(m.block, m.what) for m in replay(changed, groups=GROUPS[3:4], blocks=range(3))]
    assert found == [(0, "a whole tile"), (1, "some outputs")]
