"""The campaign: it resumes, it reports what it finds, and its problems are what they say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cce_precision.analysis.fuzz import campaign, judge
from cce_precision.analysis.fuzz_problems import PATTERNS, Knobs, build, random_knobs
from cce_precision.eager.backward import Backward
from tests.strategies import EAGER


def test_campaign_goes_on_where_it_stopped(tmp_path: Path) -> None:
    names = ("baseline", "cce_exact")
    first = campaign(4, tmp_path, seed=3, impls=names)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    again = campaign(6, tmp_path, seed=3, impls=names)
    assert first["problems"] == 4 and again["problems"] == 6 and not again["violations"]
    assert "6 random problems" in (tmp_path / "index.md").read_text()


def test_campaign_reports_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient is a violation with its knobs, a crash too."""
    monkeypatch.setattr(Backward, "target_term", lambda self, index: self.complement[index] * 0)
    found = campaign(4, tmp_path, seed=1, impls=("cce_exact",))
    assert found["violations"]
    assert not judge(Knobs(**found["violations"][0]["knobs"])).holds

    def broken(*arguments: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(Backward, "run", broken)
    found = campaign(2, tmp_path, seed=2, impls=("cce_exact",))
    assert len(found["violations"]) == 2 and "out of order" in found["violations"][0]["error"]


def test_knobs_are_one_line_of_json() -> None:
    rng = random.Random(0)
    for _ in range(50):
        k = random_knobs(rng, EAGER)
        assert Knobs.from_json(k.to_json()) == k and "\n" not in k.to_json()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_knobs_build_the_same_call(pattern: str) -> None:
    k = Knobs(seed=5, n=12, v=9, d=4, e_dtype="fp16", pattern=pattern, bias="fp32", ignored="some", class_weight=True)
    first, second = build(k), build(k)
    assert torch.equal(first.e.nan_to_num(), second.e.nan_to_num()) and torch.equal(first.c, second.c)
    assert torch.equal(first.problem.targets, second.problem.targets)
    assert first.problem.e.isfinite().all() and first.c.isfinite().all()


def test_straddling_probabilities_surround_the_threshold() -> None:
    """Some computed P lie on either side of eps, within few ulp of it."""
    k = Knobs(seed=1, n=8, v=60, d=3, e_dtype="fp32", impl="cce_sparse", pattern="straddle", filter_eps=2.0**-10)
    call = build(k)
    assert call.bias is not None
    p = torch.softmax(call.problem.e.double() @ call.c.double().T + call.bias.double(), 1)[:, 1:] * 2.0**10
    assert (p < 1).any() and (p >= 1).any()
    near = (p - 1).abs() < 2.0**-20
    assert near.any()
    assert judge(k).holds
