"""The benchmark on tiny shapes: what it measures, what it refuses to time, what it writes. No time is asserted."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import Tensor

from cce_precision.analysis import bench, bench_job, bench_page
from cce_precision.analysis.bench_job import FLOOR, KINDS, PRODUCT, Job, allocated, check, measure, relative_error
from cce_precision.analysis.bench_methods import DEFAULT, METHODS, Call, Method, Unavailable, method
from cce_precision.analysis.shapes import Shape
from cce_precision.variants import ALL

CPU = torch.device("cpu")
TINY = Job(Shape("tiny", 24, 96, 16), "fp32", "trained")
EXACT = method("cce_exact")


def broken(change: str) -> Method:
    """cce_exact with one fault."""
    call = EXACT.bind(None)

    def bind(softcap: float | None) -> Call:
        if change == "missing":
            raise Unavailable("no such package")

        def wrong(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
            if change == "raises":
                raise RuntimeError("no kernel\nfor this")
            loss = call(e, c, t)
            if change == "zero gradient":
                return loss.detach() + 0 * (e.sum() + c.sum())
            if change == "no gradient of c":
                return call(e, c.detach(), t) + 0 * c.sum()
            if change == "missing 1/N":
                return loss * len(t) - loss.detach() * (len(t) - 1)
            if change == "dropped target":
                return loss + (e * c[t]).sum(1).mean() - (e * c[t]).sum(1).mean().detach()
            if change == "nan":
                return loss * float("nan")
            assert change == "loss off"
            return loss + loss.detach() / 16

        return wrong

    return Method(change, "test", bind)


def by_kind(rows: list[bench.Row], name: str) -> dict[str, bench.Row]:
    return {row["kind"]: row for row in rows if row["method"] == name}


@pytest.fixture(scope="module")
def rows() -> list[bench.Row]:
    faults = (
        "missing",
        "raises",
        "zero gradient",
        "no gradient of c",
        "missing 1/N",
        "dropped target",
        "nan",
        "loss off",
    )
    methods = [method("baseline"), EXACT, method("cce_exact@1MB"), *map(broken, faults)]
    return measure(TINY, methods, CPU, repeat=2, say=lambda _: None)


def test_a_method_has_a_row_a_kind(rows: list[bench.Row]) -> None:
    for name in ("baseline", "cce_exact", "cce_exact@1MB"):
        kinds = by_kind(rows, name)
        assert tuple(kinds) == KINDS
        for row in kinds.values():
            assert row["status"] == "ok" and row["rounds"] == 2
            assert row["time_ms"] > 0 and row["times_product"] > 0 and row["fastest_ms"] <= row["time_ms"]
        assert kinds["loss-fw-bw"]["peak_mib"] == max(kinds["loss-fw"]["peak_mib"], kinds["loss-bw"]["peak_mib"])
    assert by_kind(rows, PRODUCT)["product"]["times_product"] == 1


def test_errors_are_those_of_the_arithmetic(rows: list[bench.Row]) -> None:
    """Not zero, and within the bound of a full rank-one error of every product: (V + D) unit round-offs."""
    floor = by_kind(rows, FLOOR)["loss-fw-bw"]
    for name in ("baseline", "cce_exact"):
        row = by_kind(rows, name)["loss-fw-bw"]
        for what in ("dE_error", "dC_error"):
            assert floor[what] < row[what] < (TINY.shape.v + TINY.shape.d) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("missing", "skipped", "no such package"),
        ("raises", "skipped", "RuntimeError: no kernel for this"),
        ("zero gradient", "failed", "dE is off by 100"),
        ("no gradient of c", "failed", "dC is off by 100"),
        ("missing 1/N", "failed", "dE is off by 2300"),
        ("dropped target", "failed", "dE is off by"),
        ("nan", "failed", "loss is not finite"),
        ("loss off", "failed", "the loss is off by 6.25%"),
    ],
)
def test_what_fails_its_check_gets_no_time(rows: list[bench.Row], name: str, status: str, reason: str) -> None:
    for row in by_kind(rows, name).values():
        assert row["status"] == status
        assert reason in row["reason"]
        assert row["rounds"] == 0 and math.isnan(row["time_ms"]) and math.isnan(row["fastest_ms"])


def test_a_method_that_breaks_after_its_check_loses_its_times() -> None:
    calls = []
    honest = EXACT.bind(None)

    def fickle(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        loss = honest(e, c, t)
        return loss.detach() + 0 * (e.sum() + c.sum()) if len(calls) == 4 else loss  # warm-up, check, two rounds

    rows = measure(TINY, [Method("fickle", "test", lambda softcap: fickle)], CPU, repeat=2, say=lambda _: None)
    row = by_kind(rows, "fickle")["loss-fw-bw"]
    assert len(calls) == 4
    assert row["status"] == "failed" and row["rounds"] == 0


def test_a_first_call_that_takes_too_long_is_skipped() -> None:
    """The others go on; a method within its time is measured."""

    def bind(softcap: float | None) -> Call:
        def endless(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
            while True:
                time.sleep(0.001)

        return endless

    rows = measure(TINY, [Method("endless", "test", bind), EXACT], CPU, repeat=1, say=lambda _: None, limit=2)
    assert {row["status"] for row in rows if row["method"] == "endless"} == {"skipped"}
    assert all("more than 2 s" in row["reason"] for row in rows if row["method"] == "endless")
    assert by_kind(rows, "cce_exact")["loss-fw-bw"]["rounds"] == 1


def test_auto_takes_a_variant_by_tolerance_and_workspace() -> None:
    one = method("auto@5e-3/64MB")
    assert (one.name, one.family) == ("auto@5e-3/64MB", "ours")
    rows = measure(TINY, [one, method("auto@1e-9")], CPU, repeat=1, say=lambda _: None)
    assert max(by_kind(rows, one.name)["loss-fw-bw"][f"{side}_error"] for side in ("dE", "dC")) <= 5e-3
    hopeless = by_kind(rows, "auto@1e-9")["loss-fw-bw"]
    assert hopeless["status"] == "skipped" and "finds no variant" in hopeless["reason"]


def test_the_check_itself() -> None:
    fine = {"loss": 1e-3, "dE": 1e-2, "dC": 0.4}
    assert check(fine, 2.0) is None
    assert "dC" in str(check(fine | {"dC": 0.6}, 2.0))
    assert "not finite" in str(check(fine | {"dE": math.nan}, 2.0))
    assert "loss" in str(check(fine | {"loss": 2.0**-5}, 2.0))
    assert check(fine | {"loss": 0.5}, 1e-8) is None  # a loss near 0 may be off by 2^-6 nat


def test_memory_is_counted_by_the_allocator() -> None:
    def work() -> Tensor:
        a = torch.zeros(256, 1024)  # 1 MiB
        b = torch.zeros(512, 1024)  # 2 MiB
        del a
        return b

    result, peak, left = allocated(work, CPU)
    assert result.shape == (512, 1024)
    assert (peak, left) == (3, 2)
    _, peak, left = allocated(lambda: None, CPU)
    assert (peak, left) == (0, 0)


def test_memory_of_the_baseline_holds_the_logits_and_ours_does_not() -> None:
    job = Job(Shape("tall", 256, 8192, 16), "fp32", "init")
    rows = measure(job, [method("baseline"), method("cce_exact@1MB")], CPU, repeat=1, say=lambda _: None)
    logits = 256 * 8192 * 4 / 2**20
    gradients = by_kind(rows, FLOOR)["loss-fw-bw"]["peak_mib"]
    assert gradients == (256 + 8192) * 16 * 4 / 2**20
    assert by_kind(rows, "baseline")["loss-fw"]["peak_mib"] > logits
    assert gradients < by_kind(rows, "cce_exact@1MB")["loss-fw-bw"]["peak_mib"] < logits


def test_relative_error() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert relative_error(exact.float(), exact, rows=1) == 0
    assert relative_error(torch.zeros(2, 2), exact, rows=1) == 1
    assert relative_error(exact + torch.tensor([[0.0, 0.0], [0.0, 5.0]]), exact, rows=1) == 1
    assert math.isnan(relative_error(exact * math.nan, exact))
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)) == 0


def test_ctrl_c_keeps_what_was_measured() -> None:
    def interrupt(what: str) -> None:
        if what.startswith("round 3"):
            raise KeyboardInterrupt

    with pytest.raises(bench_job.Interrupted) as stopped:
        measure(TINY, [EXACT], CPU, repeat=5, say=interrupt)
    assert by_kind(stopped.value.rows, "cce_exact")["loss-fw-bw"]["rounds"] == 2


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C raises, also where a shell has started this in the background, with that signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_a_capture(heard: None) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), bench_job.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        done.append("to its end")
    assert done
    with pytest.raises(KeyboardInterrupt):  # as before
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def planned(out: Path, **options: object) -> bench.Plan:
    small = {"device": "cpu", "shapes": ["16x64x8"], "methods": ["baseline", "cce_exact", "liger"], "dtypes": ["fp32"]}
    return bench.plan(**(small | {"repeat": 2, "out": out} | options))  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "import_seconds", lambda: (1.25, 1.0))


def test_a_run_writes_rows_table_and_page(tmp_path: Path, quick: None) -> None:
    console = Console(record=True, width=220)
    assert bench.run(planned(tmp_path), console) == 0
    said = console.export_text()
    for piece in ("baseline", "cce_exact", PRODUCT, FLOOR, "cce_exact / baseline", "1.25 s with it (+0.25 s", "peak"):
        assert piece in said
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert set(table["method"]) == {PRODUCT, "baseline", "cce_exact", "liger", FLOOR}
    assert {"commit", "versions", "command", "measured_at", "device", "kind", "time_ms", "peak_mib"} <= set(
        table.columns
    )
    page = (tmp_path / "index.html").read_text()
    assert 'src="data:image/svg+xml' in page and "Plotly.react(div" in page and "cce_exact" in page
    assert "default-src 'none'" in page
    outside_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside_scripts)
    assert "<script src" not in page


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path, quick: None) -> None:
    console = Console(record=True, width=220)
    bench.run(planned(tmp_path), console)
    lines = (tmp_path / "rows.jsonl").read_text()
    bench.run(planned(tmp_path), console)
    assert (tmp_path / "rows.jsonl").read_text() == lines
    bench.run(planned(tmp_path, shapes=["16x64x8", "8x64x8"]), console)
    assert len(bench.read(tmp_path)) == 2 * len(lines.splitlines())
    bench.run(planned(tmp_path, fresh=True, repeat=1), console)
    again = [row for row in bench.read(tmp_path) if row["n"] == 16 and row["method"] == "cce_exact"]
    assert {row["rounds"] for row in again} <= {1, 2} and len(again) == len(KINDS)
    assert json.loads(lines.splitlines()[0])["n"] == 16


def test_the_page_is_drawn_again_from_rows(tmp_path: Path, quick: None) -> None:
    bench.run(planned(tmp_path), Console(quiet=True))
    (tmp_path / "index.html").unlink()
    bench.draw(tmp_path, Console(quiet=True))
    assert (tmp_path / "index.html").exists()
    empty = Console(record=True, width=200)
    bench.draw(tmp_path / "empty", empty)
    assert "no rows" in empty.export_text()


def test_growth_is_drawn_where_sizes_vary(rows: list[bench.Row]) -> None:
    grown = [row | {"n": n} for n in (8, 16, 32) for row in rows]
    names = [figure.name for figure in bench_page._growth(grown)]
    assert names == ["growth-n"]


def test_auto_plans_suit_the_device(tmp_path: Path) -> None:
    plan = bench.plan(device="cpu", out=tmp_path)
    assert [str(m.name) for m in plan.methods] == DEFAULT["cpu"]
    assert {job.shape.name for job in plan.jobs} == {"cpu"} and {job.dtype for job in plan.jobs} == {"fp32", "bf16"}
    grown = bench.plan(device="cpu", scale=True, dtypes=["fp32"], out=tmp_path)
    assert len({job.shape.n for job in grown.jobs}) >= 5 and len({job.shape.v for job in grown.jobs}) >= 5
    captured = bench.plan(device="cpu", case="captured", out=tmp_path).jobs[0].shape
    assert captured.v > 0


COMPILED = {"torch_compile", "cut:torch_compile"}  # a compiler's minute buys nothing here


@pytest.mark.parametrize("name", sorted({*METHODS, "cce_exact@64MB"} - COMPILED))
def test_every_method_runs_or_says_why_not(name: str) -> None:
    chosen = method(name)
    rows = measure(TINY, [chosen], CPU, repeat=1, say=lambda _: None)
    row = by_kind(rows, chosen.name)["loss-fw-bw"]
    assert row["status"] in ("ok", "skipped"), row["reason"]
    assert (row["status"] == "skipped") == bool(row["reason"])
    if name in ALL or "@" in name:
        assert row["status"] == "ok", row["reason"]


def test_what_has_no_softcap_says_so() -> None:
    for name in ("torch", "liger:sm90", "quack"):
        with pytest.raises(Unavailable, match="softcap|no F.linear"):
            method(name).bind(30.0)
    job = Job(Shape("capped", 24, 96, 16, softcap=5.0), "fp32", "trained")
    rows = measure(job, [method("baseline"), EXACT], CPU, repeat=1, say=lambda _: None)
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.gpu
def test_a_step_is_timed_as_a_cuda_graph_too() -> None:
    job = Job(Shape("small", 256, 4096, 64), "bf16", "init")
    rows = measure(job, [EXACT], torch.device("cuda"), repeat=1, say=lambda _: None)
    ours = by_kind(rows, "cce_exact")["loss-fw-bw"]
    assert ours["graph_ms"] > 0 and ours["uncaptured"] == ""


def test_what_was_measured_again_replaces_what_was_there(tmp_path: Path) -> None:
    """But for a method that did not run then."""
    first = {**dict.fromkeys(bench.JOB_KEY, 1), "kind": "loss-fw-bw", "measured_at": "1", "status": "ok"}
    rows = [first | {"method": name, "time_ms": 1.0} for name in "abc"]
    rows += [first | {"method": "a", "time_ms": 2.0, "measured_at": "2"}]
    rows += [first | {"method": "b", "time_ms": math.nan, "measured_at": "2", "status": "skipped"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert {row["method"]: row["time_ms"] for row in bench.read(tmp_path)} == {"a": 2.0, "b": 1.0, "c": 1.0}
