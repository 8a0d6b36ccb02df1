"""`cce-precision capture --train` in miniature: what it measures, what it writes, and that a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from cce_precision.analysis import capture_training as training
from cce_precision.analysis import pretrain, sweep
from cce_precision.analysis.capture import load_capture
from cce_precision.analysis.choose import SEEDS, Run
from cce_precision.analysis.heads import head_statistics
from cce_precision.analysis.metrics import relative
from cce_precision.analysis.references import Objective, truth
from cce_precision.cli import app
from cce_precision.problem import Problem

pd = pytest.importorskip("pandas")
pytest.importorskip("tokenizers")

IMPLS = ("baseline", "cce_exact", "cce", "cce_unbiased")
STEPS = 10


@pytest.fixture(autouse=True)
def _miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `tiny`, smaller still."""
    shape = pretrain.Preset(300, 16, 32, 1, 32, 4, 1e-2, False, 64, 32, "compact", head_dim=16, warmup=4)
    monkeypatch.setitem(pretrain.ON_CPU, "tiny", shape)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"word{i * i % 211}{'.' if i % 7 else chr(10)}" for i in range(6000)))
    return path


def command(text: Path, out: Path, *more: str) -> Result:
    given = ["--train", "--preset", "tiny", "--text", str(text), "--steps", str(STEPS), "--device", "cpu"]
    given += ["--impl", ",".join(IMPLS), "--rows", "32", "--out", str(out)]
    return CliRunner().invoke(app, ["capture", *given, *more])


def words(done: Result) -> str:
    """What was printed, without its frame and line breaks."""
    return " ".join(done.output.replace("│", "").split())


@pytest.fixture
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory, cache: dict[str, Path] = {}) -> Path:  # noqa: B006
    """An uninterrupted run."""
    if "out" not in cache:
        out = tmp_path_factory.mktemp("whole")
        done = command(text, out)
        assert done.exit_code == 0, done.output
        cache["out"] = out
    return cache["out"]


def facts(out: Path) -> Any:
    """What two runs must share to the last bit: all but the times."""
    return sweep.identity(pd.read_parquet(out / "results.parquet"))


def test_a_run_writes_a_table_a_page_a_card_and_its_heads(whole: Path) -> None:
    table = pd.read_parquet(whole / "results.parquet")
    assert tuple(table.columns) == sweep.COLUMNS and not table.duplicated(list(sweep.KEY)).any()
    stages = json.loads((whole / "card.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages.values()] == [0, 1, 5, STEPS]
    assert tuple(stages) == tuple(pretrain.MOMENTS) == tuple(training.means(table, "dE", "rel"))
    for name in pretrain.MOMENTS:
        head = load_capture(whole / f"captured-{name}.safetensors")
        own = table[(table["stage"] == name) & (table["quantity"] == "softmax")].set_index("metric")["value"]
        found = head_statistics(head.e, head.c, head.targets)
        assert own["entropy"] == found.entropy and own["mass_below:2^-12"] == found.mass_below["2^-12"]
    draws = table[(table["quantity"] == "dE") & (table["metric"] == "rel")].groupby(["stage", "variant"]).size()
    assert set(draws) == {1, SEEDS} and set(draws.index.get_level_values("variant")) == set(IMPLS)
    page = (whole / "index.html").read_text()
    assert all(f"{name}<br>" in page for name in IMPLS) and "mass below" in page
    assert not (whole / "checkpoint.pt").exists()


def test_the_errors_are_those_of_the_captured_head(whole: Path) -> None:
    """The interval of a sample holds the error against the whole truth, which a zero gradient's would be far from."""
    table = pd.read_parquet(whole / "results.parquet")
    head = load_capture(whole / "captured-trained.safetensors")
    problem = Problem(head.e, head.c, head.targets)
    exact = truth(problem, Objective())
    for name in ("baseline", "cce_exact", "cce"):
        _, d_e, d_c = Run(name)(problem)
        for side, out in (("dE", d_e), ("dC", d_c)):
            low, high = (training.means(table, side, m).loc[name, "trained"] for m in ("rel_low", "rel_high"))
            assert low <= relative(out, getattr(exact, side)) <= high < 1


def test_a_stopped_run_goes_on_to_the_same_numbers(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, call = pretrain.Trainer.train_step, Run.__call__

    def stop_in_training(run: pretrain.Trainer, *arguments: Any) -> torch.Tensor:
        if run.step == 7:
            raise KeyboardInterrupt
        return step(run, *arguments)

    def stop_in_measuring(run: Run, problem: Problem, seed: int = 0) -> Any:
        if run.impl == "cce" and len(training.load(tmp_path)) > 10:
            raise KeyboardInterrupt
        return call(run, problem, seed)

    for thing, name, broken in (
        (pretrain.Trainer, "train_step", stop_in_training),
        (Run, "__call__", stop_in_measuring),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(thing, name, broken)
            done = command(text, tmp_path)
            assert done.exit_code == 130 and "the same command goes on" in done.output, done.output
        assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "card.json").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"stage": "trai')  # a line may be cut off
    lines = len(training.load(tmp_path))
    assert lines > 10
    done = command(text, tmp_path)
    assert done.exit_code == 0, done.output
    assert facts(tmp_path).equals(facts(whole))
    for name in pretrain.MOMENTS:
        one, other = (load_capture(folder / f"captured-{name}.safetensors") for folder in (whole, tmp_path))
        assert torch.equal(one.e, other.e) and torch.equal(one.c, other.c)


def test_a_finished_run_is_drawn_and_not_made_again(whole: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "pretrain", None)
    page = whole / "index.html"
    page.unlink()
    assert command(text, whole).exit_code == 0 and page.exists()
    page.unlink()
    done = CliRunner().invoke(app, ["capture", "--page-only", "--out", str(whole)])
    assert done.exit_code == 0 and page.exists()


def test_a_variant_that_fails_is_named_and_stops_no_other(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Run.__call__

    def broken(run: Run, problem: Problem, seed: int = 0) -> Any:
        if run.impl == "cce":
            raise RuntimeError("no such luck")
        return call(run, problem, seed)

    monkeypatch.setattr(Run, "__call__", broken)
    done = command(text, tmp_path)
    assert done.exit_code == 1 and "cce failed: RuntimeError: no such luck" in done.output
    assert "cce: RuntimeError: no such luck" in (tmp_path / "index.html").read_text()
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert set(IMPLS) - set(table["variant"]) == {"cce"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--preset", "huge"], "preset is 'huge', known are shipped, large, tiny"),
        (["--text", "none.txt"], "none.txt does not exist"),
        (["--heldout", "none.txt"], "none.txt does not exist"),
        (["--minutes", "1"], "minutes or steps"),
        (["--steps", "-3"], "must be positive, got -3"),
        (["--steps", "9"], "steps is 9, at least 10 are needed"),
        (["--impl", "cces"], "cces"),
        (["--save", "all"], "save is 'all', known are none, compact, full"),
        (["--device", "tpu"], "device must be auto, cpu or cuda"),
        (["--page-only"], "no finished run"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_and_leaves_nothing_behind(
    more: list[str], said: str, text: Path, tmp_path: Path
) -> None:
    done = command(text, tmp_path / "out", *more)
    assert done.exit_code == 2 and said in words(done), done.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_without_train_the_message_names_the_way(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["capture", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "--train" in done.output and "analysis.capture" in done.output


def test_a_text_that_is_too_short_for_the_vocabulary(text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    done = command(short, tmp_path / "out")
    assert done.exit_code == 2 and "give more" in done.output


def test_a_full_disk_is_said_before_anything_is_trained(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    done = command(text, tmp_path)
    assert done.exit_code == 2 and "MB free, the checkpoints of this run need" in words(done)


def test_another_run_in_the_folder_is_refused_until_it_is_cleared(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    done = command(text, tmp_path / "out", "--seed", "3")
    said = words(done)
    assert done.exit_code == 2 and "holds another run (seed is 0 there, 3 here)" in said
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert command(text, tmp_path / "out", "--seed", "3", "--fresh").exit_code == 0
    assert (tmp_path / "out" / "mine.txt").exists() and not facts(tmp_path / "out").equals(facts(whole))
