"""The campaign: it resumes, it reports what it finds, and its problems are what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cce_precision.analysis import fuzz_campaign
from cce_precision.analysis.bounds import CPU, INTERPRETER, Machine, bound
from cce_precision.analysis.bounds_model import Computed
from cce_precision.analysis.fuzz import judge, judge_outputs, outputs, sparse_way
from cce_precision.analysis.fuzz_campaign import campaign, replay, shrink
from cce_precision.analysis.fuzz_problems import PATTERNS, Knobs, build, random_knobs
from cce_precision.analysis.fuzz_summary import holds
from cce_precision.analysis.isolation import Lost, isolated
from cce_precision.analysis.references import truth
from cce_precision.cli import app
from cce_precision.eager import adaptive
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
    (tmp_path / "summary.json").write_text(json.dumps(again | {"minutes": 5.0}))  # its time counts, another seed's not
    assert campaign(6, tmp_path, seed=3, impls=names)["minutes"] >= 5 > campaign(1, tmp_path, seed=4)["minutes"]


def test_campaign_reports_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient is a violation with its knobs, a crash too; both are stored, made small and replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(Backward, "target_term", lambda self, index: self.complement[index] * 0)
        found = campaign(4, tmp_path, seed=1, impls=("cce_exact",))
        assert found["violations"]
        first = found["violations"][0]
        small = Knobs(**first["small"])
        assert not judge(Knobs(**first["knobs"])).holds and not judge(small).holds
        assert small.n * small.v * small.d <= 2 and small.seed == 0
        again = replay(tmp_path)
        assert len(again) == 2 * len(found["violations"]) and not any(map(holds, again))
    assert all(map(holds, replay(tmp_path)))

    def broken(*arguments: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(Backward, "run", broken)
    found = campaign(2, tmp_path, seed=2, impls=("cce_exact",))
    assert len(found["violations"]) == 2 and "out of order" in found["violations"][0]["error"]


@pytest.mark.slow
def test_campaign_in_other_processes_and_in_the_interpreter(tmp_path: Path) -> None:
    """The same problems in another process as in this one; kernels interpreted in a process of their own."""
    names = ("cce_exact", "cce_split")
    here, there = (campaign(4, tmp_path / str(w), seed=5, impls=names, workers=w) for w in (0, 1))
    assert here["quantities"] == there["quantities"]
    found = campaign(2, tmp_path / "interpreter", seed=6, impls=names, backend="interpreter")
    assert found["problems"] == 2 and not found["violations"]
    assert "interpreter" in (tmp_path / "interpreter" / "index.md").read_text()
    with pytest.raises(ValueError, match="backend must be one of eager, interpreter, emulated, cuda, got 'gpu'"):
        campaign(1, tmp_path, backend="gpu")
    with pytest.raises(ValueError, match="none of the variants has a kernel"):
        campaign(1, tmp_path, backend="interpreter", impls=("baseline",))
    with pytest.raises(ValueError, match="minutes"):
        campaign(None, tmp_path)
    with pytest.raises(ValueError, match="holds no failure"):
        replay(tmp_path / "interpreter")


def test_the_fuzz_command(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["fuzz", "--problems", "2", "--variants", "cce_split", "--out", str(tmp_path)])
    assert run.exit_code == 0 and "2 random problems: no errors above the bound" in run.output
    run = CliRunner().invoke(app, ["fuzz", "--replay", str(tmp_path)])
    assert run.exit_code == 2 and "holds no failure" in " ".join(run.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        campaign(1, tmp_path / "none", backend="cuda")
    assert not (tmp_path / "none").exists()
    (tmp_path / "cuda-0.json").write_text(json.dumps({"backend": "cuda", "knobs": json.loads(Knobs().to_json())}))
    with pytest.raises(ValueError, match="sees no CUDA device"):
        replay(tmp_path)


def test_shrink_keeps_what_fails_and_asks_no_more_than_it_may() -> None:
    asked = []

    def fails(x: int) -> bool:
        asked.append(x)
        return x >= 13

    assert shrink(1000, fails, lambda x: (y for y in (x // 2, x - 1) if y >= 0)) == 13
    del asked[:]
    assert shrink(10**6, fails, lambda x: [x - 1], tries=20) == 10**6 - 20
    assert len(asked) == 20


def double(x: int) -> int:
    """2 x, from a process that dies on 3 and sleeps on 4."""
    if x == 3:
        os._exit(7)
    if x == 4:
        time.sleep(600)
    return 2 * x


@pytest.mark.slow
def test_a_process_that_dies_or_sleeps_costs_one_task() -> None:
    found = dict(isolated(double, (0, 1, 2, 4, 3, 5, 6), workers=1, seconds=2))
    assert found[3] == Lost("its process ended with code 7") and found[4] == Lost("no answer within 2 s")
    assert {x: y for x, y in found.items() if x not in (3, 4)} == {x: 2 * x for x in (0, 1, 2, 5, 6)}


def test_sets_of_features_are_spread_over_variants_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each variant has as many, and each dtype its share."""
    monkeypatch.setattr(fuzz_campaign, "_runs", lambda knobs, backend: knobs.e_dtype != "fp64")
    names = ("cce", "cce_exact", "cce_sparse", "cce_split", "cce_unbiased")
    drawn = [fuzz_campaign._draw(i, 5, names, "cuda") for i in range(len(names) * len(fuzz_campaign.OF_SETS))]
    found = Counter((k.impl, k.e_dtype) for k in drawn)
    assert found == {(name, dtype): 5 if dtype == "bf16" else 4 for name in names for dtype in ("bf16", "fp16", "fp32")}


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


# What campaigns found, made small.
FOUND = {
    "the entropy's factor rounded with a subnormal probability": Knobs(
        seed=1748798990,
        n=3,
        v=21,
        d=2,
        impl="cce_kahan_full_e",
        e_dtype="fp32",
        margin=25.0,
        upstream="random",
        ignored="some",
        use_entropy=True,
        z_loss=True,
    ),
    "a target whose probability underflows: its logit's error is the nll's": Knobs(
        n=128, v=129, d=2, impl="baseline", scale=0.25, margin=60.0, reduction="none", shift=2
    ),
    "the z-loss of a lse near 0, of dropped entries": Knobs(
        seed=821443812,
        n=8,
        v=23,
        d=1,
        impl="cce_sparse",
        e_dtype="fp32",
        bias="fp32",
        pattern="straddle",
        temperature=0.5,
        class_weight=True,
        reduction="sum",
        z_loss=True,
    ),
    "a product of bf16 on a CPU that takes subnormal numbers for 0": Knobs(
        n=3, v=11, d=125, impl="baseline", pattern="subnormal"
    ),
}
FOUND_IN_KERNELS = {
    "masked classes in the entropy's gradient: 0 times an overflow": Knobs(
        seed=1117810289,
        n=2,
        v=10,
        d=128,
        impl="cce_kahan_full_e",
        bias="fp32",
        pattern="masked",
        use_entropy=True,
    ),
    "masked classes under a softcap, whose bounds were infinite": Knobs(
        seed=323089144,
        n=4,
        v=15,
        d=5,
        batch=2,
        impl="cce_kahan_full_e",
        bias="fp32",
        pattern="masked",
        scale=0.25,
        softcap=0.5,
        class_weight=True,
        ignore_index=0,
        use_entropy=True,
    ),
    "probabilities below the normal range": Knobs(n=1, v=27, d=1, impl="cce_kahan", margin=60.0),
    "one class far below 0: the entropy's reference": Knobs(
        seed=188194520, n=18, v=1, d=9, impl="cce_no_filter", scale=20.0, temperature=0.5, use_entropy=True
    ),
    "weighted rows that the interpreter truncated": Knobs(
        seed=432943086, n=7, v=129, d=12, scale=8.0, margin=60.0, upstream="large", nan_ignored=True, one_pass=True
    ),
    "a subnormal logit over the temperature": Knobs(
        seed=2062810337, n=1, v=1, d=2, impl="cce_split", pattern="subnormal", temperature=3.0
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_campaign_found_holds(name: str) -> None:
    for impl in (FOUND[name].impl, "cce_exact", "cce_split"):
        verdict = judge(dataclasses.replace(FOUND[name], impl=impl))
        assert verdict.holds, str(verdict)


@pytest.mark.parametrize("machine", [CPU, INTERPRETER], ids=["eager", "kernels"])
def test_masked_classes_under_a_softcap_have_a_bound(machine: Machine) -> None:
    """An infinite bound holds whatever the error, and its NaN was once taken for no error at all."""
    call = build(FOUND_IN_KERNELS["masked classes under a softcap, whose bounds were infinite"])
    assert call.problem.bias is not None and call.problem.bias.isinf().any()
    for allowed in vars(bound(call.problem, call.plan, call.objective, seed=1, machine=machine)).values():
        assert allowed.isfinite().all()
    nothing = Computed(torch.ones(1), torch.full((1,), torch.nan)).over(Computed.exact(torch.ones(1)))
    assert not nothing.error.isfinite().any()


@pytest.mark.parametrize("tolerance", [1e-9, 1e3])
@pytest.mark.parametrize("impl", ["cce_sparse", "cce_unbiased", "cce_subsampled"])
def test_a_tolerance_is_judged(impl: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either way, which differ; and a promise that is none is seen, though the filter's own bound holds."""
    k = Knobs(seed=3, n=24, v=60, d=6, impl=impl, scale=3.0, filter_eps=2.0**-4, e_dtype="fp32", tolerance=tolerance)
    assert judge(k, backend="eager").holds
    monkeypatch.setattr(adaptive, "filter_error", lambda *_: torch.zeros(()))
    assert judge(dataclasses.replace(k, tolerance=None), backend="eager").holds
    assert judge(k, backend="eager").holds == (tolerance > 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cce_sparse", "cce_unbiased", "cce_subsampled"])
@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-20])
def test_a_crowded_pass_is_judged_by_the_way_it_took(impl: str, eps: float) -> None:
    """Lists that are too short give the exact gradient, with dZ in 16 bits: its bound holds, and the filter's own,
    which has dZ in fp32, does not where that filter drops nothing.
    """
    k = Knobs(seed=3, n=12, v=40, d=4, impl=impl, e_dtype="fp16", c_dtype="same", filter_eps=eps, crowded=True)
    call = build(k, "triton")
    with sparse_way(call) as taken:
        computed = outputs(call)
    assert [int(x) for x in taken] == [1]
    verdict = judge(k, backend="triton")
    assert verdict.holds, str(verdict)
    allowed = bound(call.problem, call.plan, call.objective, seed=k.seed, machine=INTERPRETER)
    whole = judge_outputs(call, computed, truth(call.problem, call.objective), allowed)
    assert whole.holds == (eps == 2.0**-4), str(whole)
    for roomy in (dataclasses.replace(k, crowded=False), dataclasses.replace(k, n=1, v=16)):
        with sparse_way(build(roomy, "triton")) as taken:
            verdict = judge(roomy, backend="triton")
        assert verdict.holds and [int(x) for x in taken] == [0]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FOUND_IN_KERNELS)
def test_what_a_campaign_found_in_the_kernels_holds(name: str) -> None:
    verdict = judge(FOUND_IN_KERNELS[name], backend="triton")
    assert verdict.holds, str(verdict)
