"""The study of filters with and without bias: its estimators, its measuring, its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cce_precision.analysis import filter_study, metrics
from cce_precision.analysis.bench_job import PRODUCT
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.filter_estimators import EPS, ESTIMATORS, Softmax, errors
from cce_precision.analysis.filter_study import ROOM_MB, Study, Subject, contender, read, run, subjects
from cce_precision.analysis.filter_study_answers import (
    cheapest,
    crowded,
    family,
    fit,
    groups_of,
    pair,
    sentences,
    tried_of,
)
from cce_precision.analysis.filter_study_page import BEGIN, END, build, update_readme
from cce_precision.analysis.sampled_statistics import t_quantile
from cce_precision.analysis.shapes import Shape

CPU = torch.device("cpu")
SMALL = Subject("trained", shape=Shape("tiny", 48, 600, 16))
CHANCE = 1e-6  # of a false alarm, for each estimator and gradient


@pytest.fixture(scope="module")
def softmax() -> Softmax:
    return Softmax.of(SMALL.load(CPU), 4)


def t_scores(softmax: Softmax, name: str, draws: int = 64) -> list[float]:
    """How many standard errors the mean estimate is from P, along a direction for dE and one for dC."""
    random = torch.Generator().manual_seed(7)
    direction = torch.rand(softmax.p.shape, generator=random, dtype=torch.float64)
    found = []
    for s in range(draws):
        estimate = ESTIMATORS[name].draw(softmax, torch.Generator().manual_seed(s))
        found.append([float(((part - softmax.p) * direction).sum()) for part in estimate])
    mean, std = torch.tensor(found).mean(0), torch.tensor(found).std(0)
    return [float(x) for x in mean.abs() / std * math.sqrt(draws)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_unbiased_exactly_where_it_says_so(softmax: Softmax, name: str) -> None:
    limit = t_quantile(1 - CHANCE / 2, 63)
    assert all((score < limit) == ESTIMATORS[name].unbiased for score in t_scores(softmax, name))


def test_estimators_of_one_group_cost_the_same(softmax: Softmax) -> None:
    rest = softmax.rest[1].abs()
    for size, eps in ((softmax.p, softmax.eps), (rest, softmax.rest[2]), softmax.counted):
        kept = (size / torch.tensor([eps, eps * (1 - 2.0**-20)], dtype=torch.float64)[:, None, None]).clamp(max=1)
        fewer, more = kept.sum((1, 2)) / len(size)
        assert fewer <= softmax.entries <= more
    above = int((softmax.p >= softmax.dropping).sum())
    assert abs(above - softmax.entries * len(softmax.p)) <= 1
    n, v = softmax.p.shape
    assert softmax.entries == float((softmax.p >= EPS).sum()) / n + v / 4


@pytest.mark.parametrize("name", ["one draw for 16", "one draw a row"])
def test_systematic_draws_keep_the_mass_of_their_run(softmax: Softmax, name: str) -> None:
    estimate, _ = ESTIMATORS[name].draw(softmax, torch.Generator().manual_seed(3))
    miss = (estimate - softmax.p).sum(1).abs() / softmax.eps
    runs = math.ceil(softmax.p.shape[1] / 16) if name == "one draw for 16" else 1
    assert float(miss.max()) < runs
    assert float(miss.max()) > 0


def test_estimates_of_everything_have_no_error(softmax: Softmax) -> None:
    whole = Softmax.of(SMALL.load(CPU), 1)
    for name in ("subsets", "subsets, not stratified", "subsets, mean tail"):
        e, c = errors(whole, ESTIMATORS[name].draw(whole, torch.Generator()))
        assert max(e, c) < metrics.unit_roundoff(torch.float32)
    nothing = torch.zeros_like(softmax.p)
    assert min(errors(softmax, (nothing, nothing))) > 0


def test_estimators_refuse_what_they_leave_out() -> None:
    case = CASES["trained"](n=8, v=64, d=4)
    case.targets[0] = -1
    with pytest.raises(ValueError, match="ignored"):
        Softmax.of(case, 4)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(SMALL, CPU)


def order(x: Tensor) -> float:
    """By how much two norms of x may differ that sum in different orders, relatively."""
    return x.numel() * metrics.unit_roundoff(torch.float64)


def test_errors_are_those_of_the_metrics(study: Study) -> None:
    found = study.gradients(contender("cce_sparse@2^-6").call(0))
    told = study.errors(found)
    for side, x, exact in zip(("dE", "dC"), found, study.exact, strict=True):
        assert told[side] == pytest.approx(metrics.relative(x, exact), rel=order(x))
        assert told[side] > metrics.floor_error(exact, torch.bfloat16)


def test_a_drop_is_the_same_for_every_seed_and_a_sample_is_not(study: Study) -> None:
    for name, same in (("cce@2^-6", True), ("cce_sparse@2^-6", True), ("cce_unbiased@2^-6", False)):
        one, other = (study.gradients(contender(name).call(seed)) for seed in (1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) == same


def test_averages_are_means_of_draws_in_groups(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_study, "DRAWS", 8)
    monkeypatch.setattr(filter_study, "GROUPS", 3)
    name = "cce_unbiased@2^-6"
    [row] = study.average(name)
    assert row["draws"] == [1, 2, 4, 8] and row["groups"] == [3, 3, 2, 1]
    draws = [[x.double() for x in study.gradients(contender(name).call(seed))] for seed in range(1, 9)]
    for count, groups, rms in zip(row["draws"], row["groups"], row["dC"], strict=True):
        means = [sum(d[1] for d in draws[i * count : (i + 1) * count]) / count for i in range(groups)]
        wanted = math.sqrt(sum(metrics.relative(m, study.exact[1]) ** 2 for m in means) / groups)
        assert rms == pytest.approx(wanted, rel=2 * metrics.unit_roundoff(torch.float32) * 8 / wanted)
    assert row["dE"][-1] < row["dE"][0]


def test_rows_of_the_classifier_by_how_often_they_are_a_target(study: Study) -> None:
    [row] = study.step("cce_sparse@2^-6")
    found = row["strata"]
    assert sum(s["rows"] for s in found.values()) == study.case.v
    assert found["0"]["empty"] > 0 and found["1"]["empty"] == 0  # a target's own term is never dropped
    _, d_c = study.gradients(contender("cce_sparse@2^-6").call(0))
    absent = torch.bincount(study.case.targets, minlength=study.case.v) == 0
    assert found["0"]["empty"] == float((d_c[absent] == 0).all(1).double().mean())
    wanted = metrics.relative(d_c[absent], study.exact[1][absent])
    assert found["0"]["error"] == pytest.approx(wanted, rel=order(d_c))
    assert row["entries"] < study.case.v and row["kept_mass"] < 1


def test_a_run_stops_resumes_and_tries_again_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_study, "METHODS", ("cce_exact", "cce_sparse@2^-8"))
    monkeypatch.setattr(filter_study, "AVERAGED", ())
    monkeypatch.setattr(filter_study, "ESTIMATED", ())
    assert not run([SMALL], CPU, tmp_path, seconds=0)
    assert read(tmp_path) == []

    def broken(self: Study, name: str) -> list[filter_study.Row]:
        raise RuntimeError(name)

    with monkeypatch.context() as patched:
        patched.setattr(Study, "step", broken)
        assert not run([SMALL], CPU, tmp_path)
    assert [row.get("failed") for row in read(tmp_path)] == [
        None,
        "RuntimeError: cce_exact",
        "RuntimeError: cce_sparse@2^-8",
    ]
    assert run([SMALL], CPU, tmp_path)
    rows = read(tmp_path)
    assert [row["what"] for row in rows] == ["head", "step", "step"] and not any("failed" in row for row in rows)
    lines = (tmp_path / "rows.jsonl").read_text()
    assert run([SMALL], CPU, tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == lines
    assert all(json.loads(line)["commit"] for line in lines.splitlines())


def test_names_of_methods_and_folders_of_heads(tmp_path: Path) -> None:
    assert contender("cce_exact@64MB").workspace_mb == 64
    roomy = contender("cce_subsampled@2^-12/4@64MB")
    assert roomy.variant.filter_c.share == 4 and roomy.workspace_mb == 64
    for wrong in ("fp32", "nothing@2^-3"):
        with pytest.raises(ValueError, match=wrong.partition("@")[0]):
            contender(wrong)
    assert all(contender(name) for name in filter_study.METHODS)
    assert set(filter_study.AVERAGED) <= set(filter_study.METHODS)
    with pytest.raises(ValueError, match="captured-STAGE"):
        subjects(CPU, tmp_path)
    for stage in ("early", "trained", "initial", "middle"):
        (tmp_path / f"captured-{stage}.safetensors").touch()
    assert [s.stage for s in subjects(torch.device("cuda"), tmp_path)] == [
        "trained",
        "",
        "initial",
        "",
        "early",
        "middle",
    ]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_fit_finds_noise_and_what_stays() -> None:
    draws = [2**k for k in range(7)]
    for noise, stays in ((3.0, 0.5), (3.0, 0.0), (0.0, 2.0)):
        found = fit(draws, [math.sqrt(noise**2 / k + stays**2) for k in draws])
        assert found.noise**2 == pytest.approx(noise**2, abs=order(torch.zeros(99)))
        assert found.stays**2 == pytest.approx(stays**2, abs=order(torch.zeros(99)))
    assert fit(draws, [1 / math.sqrt(k) for k in draws]).slope == pytest.approx(-0.5)
    assert fit(draws, [1.0] * 7).slope == 0


def made_up(what: str, method: str, **more: object) -> filter_study.Row:
    about = {"case": "real", "stage": "trained", "n": 8, "v": 100, "d": 4, "dtype": "bf16", "device": "GPU"}
    strata = {"0": {"rows": 90, "error": 0.5, "empty": 0.25}, "1": {"rows": 10, "error": 0.1, "empty": 0.0}}
    stamp = {"command": "python -m study", "versions": "torch", "commit": "abc", "measured_at": "now"}
    return about | {"what": what, "unit": method, "method": method, "strata": strata} | stamp | more


def timed(method: str, cost: float, error: float, status: str = "ok") -> list[filter_study.Row]:
    time = {"status": status, "reason": "dC is off", "rounds": 2 * (status == "ok"), "time_ms": cost, "peak_mib": 1.0}
    errors_of_it = {"dE_error": error, "dC_error": error, "times_product": cost, "spread_ms": 0.0}
    step = made_up("step", method, dE=error, dC=error, entries=10.0 * cost, kept_mass=1.0)
    return [step, made_up("time", method, **time, **errors_of_it)]


def rows_of_a_study() -> list[filter_study.Row]:
    rows = [made_up("head", "", floor_dE=1e-3, floor_dC=1e-3, statistics={})]
    rows += (
        timed("cce_sparse@2^-12", 1.0, 4e-2) + timed("cce_unbiased@2^-12", 1.5, 4e-3) + timed("cce_exact", 5.0, 2e-3)
    )
    rows += timed("cce@2^-12", 2.0, 5e-2) + timed("cce@2^-10", 0.5, 0.9, "failed")
    rows += [made_up("average", "cce_unbiased@2^-12", draws=[1, 2], groups=[2, 1], dE=[4e-3, 3e-3], dC=[4e-3, 3e-3])]
    for name, error in (("by entry", 2e-3), ("one draw a row", 1e-3), ("by entry and norms", 3e-3)):
        of = "cce_unbiased" if name == "by entry" else ""
        rows.append(
            made_up("estimator", name, group="entries", unbiased=True, of_variant=of, share=8, entries=5.0)
            | {"dE": error, "dC": error}
        )
    return rows


def test_what_the_page_says_follows_from_the_rows() -> None:
    [group] = groups_of(rows_of_a_study())
    assert group.timed and group.front("dE") == {"cce_sparse@2^-12", "cce_unbiased@2^-12", "cce_exact"}
    assert [getattr(cheapest(group, limit), "method", None) for limit in (1e-1, 1e-2, 3e-3, 1e-3)] == [
        "cce_sparse@2^-12", "cce_unbiased@2^-12", "cce_exact", None,
    ]  # fmt: skip
    assert group.failures == ["cce@2^-10: no time, failed, dC is off"]
    said = "\n".join(sentences([group], tried_of(rows_of_a_study())))
    assert "10.0 times less" in said and "1.50 instead of 1.00 times the logits product" in said
    assert "Fastest with both gradients within 0.005: real head, trained: cce_unbiased@2^-12, 1.50 G" in said
    assert (
        "better somewhere: one draw a row (dE 0.50 to 0.50" in said and "no better anywhere: by entry and norms" in said
    )
    assert "25% of their rows empty" in said


def test_where_entries_did_not_fit_the_larger_workspace_speaks() -> None:
    rows = rows_of_a_study()
    for row in rows:
        if row["what"] == "step" and row["method"] in ("cce_sparse@2^-12", "cce_unbiased@2^-12"):
            row |= {"dE": 2e-3, "dC": 2e-3}
    [group] = groups_of(rows)
    assert crowded(group, "cce_sparse@2^-12") and pair(group) is None
    assert "does not fit the lists" in "\n".join(sentences([group], []))
    drop, sample = (f"{name}@2^-12@{ROOM_MB}MB" for name in ("cce_sparse", "cce_unbiased"))
    [group] = groups_of([*rows, *timed(drop, 1.2, 4e-2), *timed(sample, 1.8, 1e-2)])
    assert pair(group) == (drop, sample)
    assert f"with {ROOM_MB} MB of workspace" in "\n".join(sentences([group], []))
    assert family(sample) == f"cce_unbiased@{ROOM_MB}MB"


def test_the_page_and_the_readme_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_a_study()))
    (tmp_path / "README.md").write_text(f"# Study\n{BEGIN}\nold\n{END}\nrest\n")
    convergence = Path(__file__).parents[1] / "reports" / "convergence"
    page = build(tmp_path, convergence).read_text()
    assert "real head, trained" in page and "What it does to learning" in page and "http-equiv" in page
    assert "no time, failed" in page
    update_readme(tmp_path, convergence)
    readme = (tmp_path / "README.md").read_text()
    assert (
        "old" not in readme and readme.endswith(f"{END}\nrest\n") and "| 0.01 | cce_unbiased@2^-12, 1.50 G |" in readme
    )
    for picture in re.findall(r"\((figures/[^)]*)\)", readme):
        assert (tmp_path / picture).exists()
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        update_readme(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no row"):
        build(tmp_path)


def test_times_come_with_the_errors_of_the_same_calls(study: Study) -> None:
    rows = study.times(("cce_exact", "cce_sparse@2^-2"), lambda what: None)
    assert [row["method"] for row in rows] == [PRODUCT, "cce_exact", "cce_sparse@2^-2"]
    assert rows[1]["time_ms"] > 0 and rows[1]["times_product"] > 0
    assert rows[1]["dC_error"] == pytest.approx(study.step("cce_exact")[0]["dC"], rel=order(study.case.c))
