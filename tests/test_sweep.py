"""The sweep: from a file to a table, resumed after an interrupt, past a cell that raises, alike from each engine."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from cce_precision import linear_cross_entropy
from cce_precision.analysis import engines, report, sweep
from cce_precision.analysis.capture import Capture
from cce_precision.analysis.references import Objective, truth
from cce_precision.analysis.sweep import Cell, Sweep
from cce_precision.numerics import auto_eps
from cce_precision.problem import Problem
from cce_precision.variants import ALL

ROOT = Path(__file__).parent.parent
N, V, D = 24, 40, 8
VARIANTS = ("baseline", "cce", "cce_exact", "cce_unbiased")
EPS = (2.0**-4, 2.0**-8)
CELLS = 1 + 2 + 2 * len(EPS)  # the softmax, variants without a threshold, and with


@pytest.fixture()
def head(tmp_path: Path) -> Path:
    """A file with a small head, one token of it ignored."""
    e, c, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    targets[3] = -100
    Capture(e, c, targets, torch.randn(V), softcap=10.0).save(tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def small(head: Path, **options: object) -> Sweep:
    chosen: dict[str, object] = {"variants": VARIANTS, "eps": EPS, "dtypes": ("bf16",), "threads": 1, "budget": False}
    return sweep.plan(data=[head], **(chosen | options))  # type: ignore[arg-type]


def value(table: pd.DataFrame, variant: str, quantity: str, metric: str, eps: float = math.nan) -> float:
    rows = table[(table["variant"] == variant) & (table["quantity"] == quantity) & (table["metric"] == metric)]
    rows = rows[rows["eps"].isna()] if math.isnan(eps) else rows[rows["eps"] == eps]
    (found,) = rows["value"]
    return float(found)


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2^-12", (2.0**-12,)),
        ("0.5", (0.5,)),
        ("2^-4..2^-10", (2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10)),
        ("2^-10..2^-4", (2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10)),
        ("2^-4..2^-7", (2.0**-4, 2.0**-6)),
        ("2^-4, 2^-12", (2.0**-4, 2.0**-12)),
        ("2^-4..2^-24", sweep.GRID),
    ],
)
def test_thresholds_are_read(text: str, found: tuple[float, ...]) -> None:
    assert sweep.parse_eps(text) == found


@pytest.mark.parametrize("text", ["", "x", "2^x", "2", "0", "-1", "nan", "2^-4..", "2^-4..2^-6..2^-8", "0^-1"])
def test_what_is_no_threshold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="threshold|range"):
        sweep.parse_eps(text)


@pytest.mark.parametrize(("n", "tokens"), [(1024, 512), (1000, 900), (260, 259), (40, 3), (129, 128), (300, 1)])
def test_a_share_of_the_tokens_is_spread_in_runs(n: int, tokens: int) -> None:
    rows = sweep.some_rows(n, tokens)
    assert len(rows) == tokens == len(set(rows)) and rows == sorted(rows) and rows[0] >= 0 and rows[-1] < n
    runs = 1 + sum(b - a > 1 for a, b in itertools.pairwise(rows))
    assert runs <= -(-tokens // sweep.RUN)


def test_half_of_the_captured_head_has_a_run_of_each_source() -> None:
    assert {row // 256 for row in sweep.some_rows(1024, 512)} == {0, 1, 2, 3}


def test_variants_without_a_filter_run_once(head: Path) -> None:
    cells = small(head).cells
    assert len(cells) == CELLS == len(set(cells))
    assert sorted(c.eps for c in cells if c.variant == "cce" and c.eps) == sorted(EPS)
    assert [c.eps for c in cells if c.variant == "cce_exact"] == [None]


def test_the_default_thresholds_are_on_the_grid(head: Path) -> None:
    cells = small(head, eps=None, dtypes=("fp16",)).cells
    assert {c.eps for c in cells if c.variant == "cce"} == {*sweep.GRID, auto_eps(torch.float16)}


@pytest.mark.parametrize(
    "options",
    [{"variants": ("cce_exat",)}, {"dtypes": ("int8",)}, {"cases": ("capturd",)}],
    ids=lambda o: next(iter(o)),
)
def test_unknown_names_are_refused_with_the_known_ones(head: Path, options: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ValueError, match="known"):
        small(head, **options)


def test_the_key_of_a_cell_changes_with_all_it_depends_on(head: Path) -> None:
    plan = small(head)
    cell = plan.cells[-1]
    other = replace(ALL["cce_unbiased"], tile=(64, 64))
    first = plan.subjects[0]
    keys = {
        plan.key(cell),
        plan.key(replace(cell, seed=1)),
        plan.key(replace(cell, eps=2.0**-5)),
        plan.key(replace(cell, budget=True)),
        replace(plan, threads=2).key(cell),
        replace(plan, variants=(other,)).key(cell),
        replace(plan, subjects=(replace(first, e=first.e + 1),)).key(cell),
    }
    assert len(keys) == 7 and plan.key(cell) == small(head).key(cell)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_a_direct_call_gives(head: Path, tmp_path: Path) -> None:
    plan = small(head)
    outcome = sweep.run(plan, tmp_path / "out", engines.local, "the command")
    table = outcome.table
    assert outcome.failures == () and list(table.columns) == list(sweep.COLUMNS)
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "out" / "results.parquet"))
    assert not (tmp_path / "out" / "parts").exists()
    assert set(table["command"]) == {"the command"} and set(table["case"]) == {"head"}
    assert (set(table["n"]), set(table["v"]), set(table["d"])) == ({N}, {V}, {D})

    case = plan.subjects[0]
    assert case.bias is not None
    e, c, bias = (x.bfloat16().requires_grad_() for x in (case.e, case.c, case.bias))
    variant = ALL["cce"].with_eps(EPS[0])
    loss = linear_cross_entropy(
        e, c, case.targets, bias, ignore_index=-1, softcap=case.softcap, reduction="sum", impl=variant
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    problem = Problem(e.detach(), c.detach(), case.targets, bias.detach(), softcap=case.softcap)
    exact = truth(problem, Objective(reduction="sum"))
    for name, gradient, right in (
        ("dE", e.grad, exact.dE),
        ("dC", c.grad, exact.dC),
        ("dbias", bias.grad, exact.dbias),
    ):
        assert gradient is not None
        error = float((gradient.double() - right).norm() / right.norm())
        assert value(table, "cce", name, "rel", EPS[0]) == error > 0
        assert value(table, "cce", name, "floor", EPS[0]) == float((right.bfloat16() - right).norm() / right.norm())


def test_budgets_stand_in_the_table(head: Path, tmp_path: Path) -> None:
    """One budget a variant, at the threshold nearest the default; shares sum to one, and the bound holds."""
    plan = small(head, budget=True)
    assert {(c.variant, c.eps) for c in plan.cells if c.budget} == {
        ("baseline", None), ("cce", EPS[1]), ("cce_exact", None), ("cce_unbiased", EPS[1])
    }  # fmt: skip
    assert [c.variant for c in small(head, variants=("torch_compile",), budget=True).cells if c.budget] == []
    table = sweep.run(plan, tmp_path / "out", engines.local).table
    pd.testing.assert_frame_equal(
        sweep.identity(table[~table["metric"].str.startswith("budget") & (table["quantity"] != "budget")]),
        sweep.identity(sweep.run(small(head), tmp_path / "without", engines.local).table),
    )
    for variant, eps in (("cce", EPS[1]), ("cce_exact", math.nan)):
        rows = table[(table["variant"] == variant) & (table["quantity"] == "dE")]
        shares = rows[rows["metric"].str.startswith("budget_share:")]["value"]
        error, bound = (value(table, variant, "dE", f"budget_{name}", eps) for name in ("relative", "bound"))
        assert abs(shares.sum() - 1) <= N * V * 2.0**-53 / error**2 and len(shares) >= 6
        assert error == pytest.approx(value(table, variant, "dE", "rel", eps), rel=2.0**-40)  # all tokens are in it
        assert 0 < error <= bound and value(table, variant, "dE", "budget_residual", eps) == 0


def test_a_zero_gradient_would_be_seen(head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_at_all(e: torch.Tensor, c: torch.Tensor, *_: object, **options: object) -> object:
        honest = linear_cross_entropy(e, c, *_, **options)  # type: ignore[arg-type]
        if not isinstance(honest, torch.Tensor):
            return honest
        return honest.detach() + 0 * (e.sum() + c.sum())

    monkeypatch.setattr(sweep, "linear_cross_entropy", none_at_all)
    table = sweep.run(small(head, variants=("cce_exact",)), tmp_path / "out", engines.local).table
    assert value(table, "cce_exact", "dE", "rel") == 1 == value(table, "cce_exact", "dC", "rel")
    assert value(table, "cce_exact", "dC", "empty_rows") == 1


def test_what_a_filter_drops_is_counted(head: Path, tmp_path: Path) -> None:
    table = sweep.run(small(head, variants=("cce_exact", "cce_sparse")), tmp_path / "out", engines.local).table
    coarse, fine = (value(table, "cce_sparse", "filter", "hits", eps) for eps in EPS)
    assert coarse < fine < value(table, "cce_exact", "filter", "hits") == V
    assert 1 > value(table, "cce_sparse", "filter", "dropped_mass", EPS[0]) > 0
    assert value(table, "cce_sparse", "dC", "empty_rows", EPS[0]) > value(table, "cce_exact", "dC", "empty_rows") == 0


def test_rank_probabilities_fall_and_end_at_the_vocabulary(head: Path, tmp_path: Path) -> None:
    table = sweep.run(small(head, variants=("baseline",)), tmp_path / "out", engines.local).table
    ranks = table[table["metric"].str.startswith("rank:")]
    curve = sorted((int(m.split(":")[1]), p) for m, p in zip(ranks["metric"], ranks["value"], strict=True))
    assert [p for _, p in curve] == sorted((p for _, p in curve), reverse=True)
    assert curve[0][0] == 1 and curve[-1][0] == V


# -- interrupts and failures -------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_resumes_to_the_same_table(head: Path, tmp_path: Path) -> None:
    plan = small(head)
    whole = sweep.run(plan, tmp_path / "whole", engines.local).table
    asked: list[Cell] = []

    def stops_after_three(sweep_: Sweep, cells: Sequence[Cell]) -> Iterator[engines.Result]:
        for i, result in enumerate(engines.local(sweep_, cells)):
            if i == 3:
                raise KeyboardInterrupt
            yield result

    def counts(sweep_: Sweep, cells: Sequence[Cell]) -> Iterator[engines.Result]:
        asked.extend(cells)
        yield from engines.local(sweep_, cells)

    out = tmp_path / "out"
    assert report.run(plan, out, stops_after_three, "", Console(quiet=True)) == 130
    assert len(list((out / "parts").iterdir())) == 3 and not (out / "results.parquet").exists()
    resumed = sweep.run(plan, out, counts).table
    assert asked == list(plan.cells[3:])
    pd.testing.assert_frame_equal(sweep.identity(resumed), sweep.identity(whole))


@pytest.mark.slow
def test_ctrl_c_leaves_whole_parts_and_the_command_resumes(head: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cce_precision", "report", "--data", str(head)]
    command += ["--variants", "cce_sparse,baseline"]
    command += ["--dtype", "bf16", "--out", str(out), "--no-budget"]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    while process.poll() is None and not list(out.glob("parts/*.json")):
        time.sleep(0.01)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate()
    if process.returncode != 0:  # else it was done before it heard
        assert process.returncode == 130 and "the same command resumes" in said, said
        for part in out.glob("parts/*.json"):
            assert pd.read_json(part).shape[0] > 0
    again = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stdout + again.stderr
    table = pd.read_parquet(out / "results.parquet")
    plan = small(head, variants=("cce_sparse", "baseline"), eps=None)
    here = sweep.run(plan, tmp_path / "here", engines.local).table
    pd.testing.assert_frame_equal(sweep.identity(table), sweep.identity(here), check_exact=True)
    assert (out / "index.html").exists() and (out / "figures" / "error-head-bf16.svg").exists()


def test_a_cell_that_raises_is_named_and_the_rest_goes_on(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = small(head), tmp_path / "out"
    whole = sweep.run(plan, tmp_path / "whole", engines.local).table

    def breaks(*args: object, **options: object) -> object:
        if options["impl"].name == "cce_exact":  # type: ignore[attr-defined]
            raise RuntimeError("no such\nluck")
        return linear_cross_entropy(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "linear_cross_entropy", breaks)
        assert report.run(plan, out, engines.local, "", Console(width=200)) == 1
    assert "head bf16 cce_exact: RuntimeError: no such luck" in capsys.readouterr().out
    table = pd.read_parquet(out / "results.parquet")
    assert set(table["variant"]) == {"", *VARIANTS} - {"cce_exact"}
    assert "cce_exact: RuntimeError: no such luck" in (out / "index.html").read_text()
    again = sweep.run(plan, out, engines.local)  # only the failed cell runs
    assert again.failures == ()
    pd.testing.assert_frame_equal(sweep.identity(again.table), sweep.identity(whole))


# -- engines -----------------------------------------------------------------------------------------------------------


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ValueError, match="known: local, ray"):
        engines.engine("dask")


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"cce-precision\[ray\]"):
        engines.engine("ray")


def test_the_local_engine_leaves_the_number_of_threads_as_it_was(head: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    sweep.run(small(head, threads=before + 1, variants=("baseline",)), tmp_path / "out", engines.local)
    assert torch.get_num_threads() == before


@pytest.mark.slow  # half a minute, most of it Ray's own start
def test_two_ray_workers_give_the_identical_table(head: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cce-precision[ray]'")
    plan = small(head)
    here = sweep.run(plan, tmp_path / "here", engines.local).table
    spread = sweep.run(plan, tmp_path / "spread", engines.engine("ray", 2))
    assert spread.failures == ()
    pd.testing.assert_frame_equal(sweep.identity(spread.table), sweep.identity(here), check_exact=True)
