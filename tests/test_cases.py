"""Cases: shapes, seeds, exact dtypes, and the statistics for which each exists."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cce_precision.analysis.cases import CASES, Case, describe, find, from_file
from cce_precision.analysis.references import truth
from cce_precision.problem import Problem

SYNTHETIC = ("init", "trained", "confident", "ties", "offset")
SHAPES = ((1, 1, 1), (3, 2, 1), (17, 5, 2), (16, 257, 15), (33, 130, 64))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def test_the_registry() -> None:
    assert set(CASES) == {*SYNTHETIC, "captured"}
    assert find("trained") is CASES["trained"]
    with pytest.raises(
        ValueError, match="'flat' is not known; known: init, trained, confident, ties, offset, captured"
    ):
        find("flat")


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    n, v, d = shape
    for dtype in DTYPES:
        case = CASES[name](n=n, v=v, d=d, dtype=dtype)
        assert isinstance(case, Case) and isinstance(case, Problem)
        assert (case.e.shape, case.c.shape, case.targets.shape) == ((n, d), (v, d), (n,))
        assert case.e.dtype == case.c.dtype == dtype and case.targets.dtype == torch.int64
        assert case.e.isfinite().all() and case.c.isfinite().all()
        assert case.targets.min() >= 0 and case.targets.max() < v
        assert case.name == name and case.description


@pytest.mark.parametrize("name", SYNTHETIC)
def test_no_tokens(name: str) -> None:
    assert CASES[name](n=0, v=5, d=4).targets.shape == (0,)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_seed_is_a_case(name: str) -> None:
    first, again, other = (CASES[name](n=32, v=64, d=16, seed=seed) for seed in (1, 1, 2))
    for field in ("e", "c", "targets"):
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))


def test_a_case_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for name in SYNTHETIC:
        CASES[name](n=8, v=16, d=4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def trained() -> Case:
    return CASES["trained"](n=512)


def test_trained_looks_trained(trained: Case) -> None:
    """What shared statistics of a trained head quote, at V = 32,768: see `cases.trained`."""
    stats = describe(trained)
    assert 2 < stats.entropy < 4 and 2 < stats.loss < 3
    assert 60 < stats.entries["2^-12"] < 130
    assert 0.015 < stats.mass_below["2^-12"] < 0.04
    assert 0.2 < stats.p_target < 0.5


def test_trained_targets_come_from_the_model(trained: Case) -> None:
    """The mean loss is the mean entropy, to five standard errors; shuffled targets are far from it."""
    z = trained.e.double() @ trained.c.double().T
    log_p = z.log_softmax(1)
    surprise = -log_p.gather(1, trained.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    error = float((surprise - entropy).std()) / math.sqrt(trained.n)
    assert abs(float((surprise - entropy).mean())) < 5 * error
    shuffled = -log_p.gather(1, trained.targets.flip(0)[:, None])[:, 0]
    assert float((shuffled - entropy).mean()) > 5 * error


def test_trained_is_stable_over_the_vocabulary() -> None:
    small, large = (describe(CASES["trained"](n=256, v=v, d=64)) for v in (4096, 32768))
    assert abs(small.entropy - large.entropy) < 0.75
    assert 0.5 < small.entries["2^-12"] / large.entries["2^-12"] < 2


def test_init_is_flat() -> None:
    case = CASES["init"](n=64)
    stats = describe(case)
    assert stats.entropy > 0.99 * math.log(case.v)
    assert stats.entries["2^-12"] == 0
    assert len(case.targets.unique()) < case.n, "Zipf targets repeat"


def test_confident_reaches_1e_8() -> None:
    complement = truth(CASES["confident"](n=256, v=1024, d=64)).p_complement.log10()
    assert complement.min() < -7.5 and complement.max() > -1
    for low in (-8.5, -6, -4, -2):
        share = ((complement >= low) & (complement < low + 2)).double().mean()
        assert share > 0.1, f"1 - p_t between 1e{low} and 1e{low + 2}"


def test_ties_are_exact() -> None:
    case = CASES["ties"](n=64, v=128, d=32)
    z = case.e.double() @ case.c.double().T
    assert torch.equal(z, (case.e.float() @ case.c.float().T).double()), "logits are exact in fp32"
    assert torch.equal(z[:, :32], z[:, 32:64]) and (z[::8] == 0).all()
    assert ((z == z.amax(1, keepdim=True)).sum(1) >= 4).all()
    assert len(z[1].unique()) > 4


def test_offset_is_an_offset() -> None:
    case = CASES["offset"](n=64, v=512, d=32)
    z = case.e.double() @ case.c.double().T
    assert 1000 < z.mean() < 1050
    without = dataclasses.replace(case, e=case.e[:, :-1], c=case.c[:, :-1])
    one, other = truth(case), truth(without)
    assert ((one.loss - other.loss).abs() <= one.radius.loss + other.radius.loss).all()
    assert one.loss.mean() > 1


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, **more: torch.Tensor) -> Path:
    tensors = {
        "e": torch.randn(6, 4).bfloat16(),
        "c": torch.randn(9, 4).bfloat16(),
        "targets": torch.tensor([0, 8, -100, 3, 3, 1]),
    }
    save_file(tensors | more, path)
    return path


def test_from_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.safetensors", bias=torch.randn(9), softcap=torch.tensor(30.0))
    case = from_file(path)
    assert case.name == "mine" and case.softcap == 30 and case.bias is not None
    assert case.targets.tolist() == [0, 8, -1, 3, 3, 1]
    few = from_file(path, n=3, dtype=torch.float16)
    assert few.n == 3 and few.e.dtype == few.c.dtype == torch.float16
    assert torch.equal(few.e, case.e[:3].half())
    with pytest.raises(ValueError, match="6 tokens, asked for n=7"):
        from_file(path, n=7)
    with pytest.raises(FileNotFoundError):
        from_file(tmp_path / "other.safetensors")


def test_captured() -> None:
    cases = [CASES["captured"](stage=stage) for stage in ("initial", "early", "trained")]
    assert [(case.name, case.stage) for case in cases] == [("captured", s) for s in ("initial", "early", "trained")]
    assert len({case.e.double().norm().item() for case in cases}) == 3
    assert all(case.targets.min() >= -1 and case.targets.max() < case.v for case in cases)
    last = cases[-1]
    assert CASES["captured"](n=2, v=last.v, d=last.d, dtype=torch.float16).e.dtype == torch.float16
    with pytest.raises(ValueError, match=f"v={last.v} and d={last.d}, asked for v=10 and d=None"):
        CASES["captured"](v=10)
    with pytest.raises(ValueError, match="initial, early, trained"):
        CASES["captured"](stage="late")


def test_describe_counts_by_hand() -> None:
    """Four equal columns: p = 1/4 each."""
    case = Problem(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 1, -1]))
    stats = describe(case)
    assert stats.tokens == 2 and stats.entries["2^-12"] == 4 and stats.mass_below["2^-12"] == 0
    assert stats.p_target == 0.25 and abs(stats.entropy - math.log(4)) <= 4 * 2.0**-24 * math.log(4)
