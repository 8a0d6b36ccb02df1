"""Comparisons: which runs are made, what is subtracted from what, and the page."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from cce_precision.analysis import convergence, convergence_page, pages
from cce_precision.analysis.convergence import Comparison, Difference, compare, differences, gather, read, smoothed
from cce_precision.analysis.train import Recipe, read_curve
from cce_precision.analysis.train_text import SHIPPED, Tokens, tokenise
from cce_precision.cli import app

SMALL = Recipe(
    context=32, batch=4, steps=6, warmup=1, heldout_every=3, heldout_windows=2, gradient_every=3, checkpoint_every=0
)
CONTROL = convergence_page.CONTROL


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return tokenise([SHIPPED], None, context=SMALL.context, vocabulary=300, megabytes=0.05)


@pytest.fixture(scope="module")
def made(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A comparison that was stopped after its first two runs and then went on."""
    out = tmp_path_factory.mktemp("made")
    todo = Comparison(SMALL, ("fp32", CONTROL, "cce@2^-6"), (0, 1))
    seen: list[tuple[str, int]] = []

    def stop(recipe: Recipe, row: dict[str, Any]) -> None:
        if row["kind"] == "train" and (recipe.method, recipe.seed) not in seen:
            seen.append((recipe.method, recipe.seed))
            if len(seen) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(todo, tokens, out, device="cpu", on_row=stop)
    assert gather(todo, out) == 2
    assert compare(todo, tokens, out, device="cpu")
    assert gather(todo, out) == 6
    return todo, out


def line(method: str, seed: int, loss: float, gradient: float | None = 1e-3) -> str:
    """A made-up run of runs.jsonl whose held-out loss ends at `loss`."""
    steps = range(48)
    recipe = asdict(replace(SMALL, method=method, seed=seed, steps=48))
    sides = {} if gradient is None else {f"{s}{e}": gradient for s in ("dE", "dC") for e in ("", "_low", "_high")}
    return json.dumps(
        {
            "method": method,
            "seed": seed,
            "train": [9 - 5 * i / 48 + loss - 4 for i in steps],
            "heldout": [[0, 9.0], [48, loss]],
            "gradient": [{"step": s, **sides} for s in (0, 48)] if sides else [],
            "tokens_per_second": 1000,
            "peak_mib": 500.0,
            "recipe": recipe,
            "tokens": {"training": 10_000, "heldout": 500, "vocabulary": 300, "digest": "x"},
            "device": "a device",
            "commit": "c0ffee",
            "versions": "v",
            "command": "cce-precision train --compare <all>",
            "measured_at": "now",
        }
    )


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Three seeds: a control off by up to 0.002, one method off by noise, one by 0.1 always."""
    lines = []
    for seed in range(3):
        lines += [
            line("fp32", seed, 4.0),
            line(CONTROL, seed, 4.0 + (-0.002, 0.001, 0.0015)[seed]),
            line("cce_exact", seed, 4.0 + (0.003, -0.004, 0.001)[seed]),
            line("cce", seed, 4.1 + (0.003, -0.004, 0.001)[seed], gradient=0.2),
            line("cce_unbiased@2^-10", seed, 4.001 + 1e-5 * seed),
        ]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_comparisons_that_make_no_sense_are_refused() -> None:
    for methods, seeds, said in (
        (("cce",), (0,), "at least two methods"),
        (("cce", "cce"), (0,), "each once"),
        (("cce", "nobody"), (0,), "nobody"),
        (("cce", "fp32"), (), "there must be one"),
    ):
        with pytest.raises(ValueError, match=said):
            Comparison(SMALL, methods, seeds)


def test_runs_are_made_seed_by_seed_and_what_is_there_stays(made: tuple[Comparison, Path], tokens: Tokens) -> None:
    todo, out = made
    assert [(r.seed, r.method) for r in todo.recipes()] == [(s, m) for s in (0, 1) for m in todo.methods]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.json*")}
    assert compare(todo, tokens, out, device="cpu")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.json*")} == times
    assert not list(out.rglob("checkpoint-*"))


def test_runs_of_a_seed_begin_alike_and_see_the_same_windows(made: tuple[Comparison, Path]) -> None:
    _, out = made
    by = {(r.method, r.seed): r for r in read(out)}
    seeds_differ = abs(by["fp32", 0].heldout[0] - by["fp32", 1].heldout[0])
    assert seeds_differ > 0
    for seed in (0, 1):  # the same weights, whose losses two codes round differently
        assert abs(by["fp32", seed].heldout[0] - by["cce@2^-6", seed].heldout[0]) < seeds_differ / 1000
        assert by["fp32", seed].train != by["cce@2^-6", seed].train
    curve = [row["loss"] for row in read_curve(out / "fp32-seed0") if row["kind"] == "train"]
    assert list(by["fp32", 0].train.values()) == [float(f"{x:.8g}") for x in curve]
    assert set(by["cce@2^-6", 1].gradient) == {0, 3, 6}
    assert by["cce@2^-6", 1].gradient[6]["dE"] > by["fp32", 1].gradient[6]["dE"] > 0


def test_the_time_budget_stops_the_runs_and_says_so(tokens: Tokens, tmp_path: Path) -> None:
    todo = Comparison(SMALL, ("fp32", "unpatched"), (0,))
    assert not compare(todo, tokens, tmp_path, device="cpu", until=0.0)
    assert gather(todo, tmp_path) == 0
    with pytest.raises(ValueError, match="holds no run"):
        read(tmp_path)


def test_a_run_that_raises_is_named_stops_no_other_and_is_tried_again(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = Comparison(replace(SMALL, steps=2, heldout_every=0, gradient_every=0), ("fp32", "unpatched"), (0,))
    with monkeypatch.context() as patch:

        def broken(recipe: Recipe, *_: object, **__: object) -> None:
            raise FloatingPointError("the loss is nan")

        patch.setattr(convergence, "run", broken)
        assert compare(todo, tokens, tmp_path, device="cpu")  # nothing is left to go on with
        assert gather(todo, tmp_path) == 0
    said = [
        "fp32, seed 0: FloatingPointError: the loss is nan",
        "unpatched, seed 0: FloatingPointError: the loss is nan",
    ]
    assert convergence.failures(tmp_path) == said
    assert compare(todo, tokens, tmp_path, device="cpu") and gather(todo, tmp_path) == 2


@pytest.mark.slow
def test_processes_make_the_same_runs(made: tuple[Comparison, Path], tokens: Tokens, tmp_path: Path) -> None:
    todo, out = made
    rows: list[tuple[str, int]] = []
    note = lambda recipe, row: rows.append((recipe.method, recipe.seed))  # noqa: E731
    assert compare(todo, tokens, tmp_path, device="cpu", processes=2, on_row=note)
    assert gather(todo, tmp_path) == 6
    for one, other in zip(read(out), read(tmp_path)):
        assert (one.method, one.seed, one.train, one.heldout) == (other.method, other.seed, other.train, other.heldout)
    assert set(rows) == {(r.method, r.seed) for r in todo.recipes()}


def test_a_difference_is_paired_and_its_interval_students() -> None:
    one = Difference.of({0: 1.0, 1: 2.0, 2: 6.0})
    assert one.mean == 3.0
    # Student's t with two degrees of freedom: q = a sqrt(2 / (1 - a^2)) for the two-sided level a.
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert math.isclose(one.half, quantile * statistics.stdev([1.0, 2.0, 6.0]) / math.sqrt(3), rel_tol=1e-12)
    assert not one.apart and Difference.of({0: 1.0, 1: 1.1, 2: 1.05}).apart
    assert math.isnan(Difference.of({5: 1.0}).half) and not Difference.of({5: 1.0}).apart


def test_smoothing_is_means_of_equal_runs() -> None:
    assert smoothed({i: float(i) for i in range(1, 10)}, 3) == {2.0: 2.0, 5.0: 5.0, 8.0: 8.0}
    assert smoothed({1: 4.0}, 24) == {1.0: 4.0}


def test_differences_pair_seeds_and_leave_out_what_has_no_partner(drawn: Path) -> None:
    text = (drawn / "runs.jsonl").read_text().splitlines()
    (drawn / "runs.jsonl").write_text("\n".join(text[:-6] + text[-5:][1:]) + "\n")  # seed 2 lost its reference
    found = differences(read(drawn), "fp32", lambda r: r.heldout)
    assert set(found["cce"][48].each) == {0, 1}
    assert found["cce"][0].mean == 0.0 and math.isclose(found["cce"][48].mean, 0.1 - 0.0005)


def test_the_answer_tells_drift_from_difference(drawn: Path) -> None:
    found = convergence_page.lines(read(drawn))
    control = convergence_page.control_of(found)
    assert math.isclose(convergence_page.drift(control), 0.002, rel_tol=1e-9)
    told = {line.method: convergence_page.apart(line, control) for line in found}
    # The last one's interval leaves 0 out, but the control drifts as far.
    assert told == {"fp32": False, CONTROL: False, "cce_exact": False, "cce": True, "cce_unbiased@2^-10": False}
    assert found[-1].difference is not None and found[-1].difference.apart
    assert convergence_page.apart(found[-1], None) and "one in 80 does by chance" in convergence_page.rule(found)
    said = " ".join(convergence_page.sentences(found))
    assert "cce_exact, cce_unbiased@2^-10 are not distinguishable from fp32" in said
    assert "cce ends 0.1000 nats above fp32 in held-out loss (+0.0960 to +0.1030 by seed)" in said
    assert "| `cce` |" in convergence_page.markdown(drawn) and said.split(".")[0] in convergence_page.markdown(drawn)


def test_the_chance_of_being_apart_is_that_of_random_ranks_and_signs() -> None:
    """Counted: of all orders of 2n differences by size and all their signs, those where the method's n come last and
    on one side."""
    for n in (1, 2, 3):
        orders = list(itertools.combinations(range(2 * n), n))  # the ranks of the method's differences
        signs = list(itertools.product((-1, 1), repeat=n))
        hits = sum(min(o) >= n and len(set(s)) == 1 for o in orders for s in signs)
        assert math.isclose(convergence_page.chance(n), hits / (len(orders) * len(signs)), rel_tol=1e-12)


def test_the_page_is_whole_and_escapes_what_it_quotes(drawn: Path) -> None:
    page = convergence_page.build(drawn).read_text()
    assert "&lt;all&gt;" in page and "<all>" not in page
    for figure in ("loss", "difference", "spread", "gradient"):
        assert f'data-figure="{figure}"' in page
    assert page.count('src="data:image/svg+xml') == 4
    live = json.loads(page.split('id="figures">')[1].split("</script>")[0])["fixed"]
    names = {trace["name"] for trace in live["loss"]["data"]}
    assert names == {"fp32", CONTROL, "cce_exact", "cce", "cce_unbiased@2^-10"}
    colours = {t["name"]: (t["line"]["color"], t["marker"]["symbol"]) for t in live["loss"]["data"] if "marker" in t}
    assert len(set(colours.values())) == len(names)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without matplotlib's part, which takes seconds a page."""
    monkeypatch.setattr(pages, "draw", lambda figure, path: path.write_text("<svg/>"))


def test_a_page_of_one_seed_and_no_gradients_claims_nothing(tmp_path: Path, sketched: None) -> None:
    (tmp_path / "runs.jsonl").write_text(line("baseline", 0, 4.0, None) + "\n" + line("cce", 0, 5.0, None) + "\n")
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(json.dumps({"method": "cce", "seed": 1, "failed": "FloatingPointError: <nan>"}) + "\n")
    page = convergence_page.build(tmp_path).read_text()
    assert "1 run raised" in page and "cce, seed 1: FloatingPointError: &lt;nan&gt;" in page
    assert "One seed" in page and "not distinguishable" not in page and "error of dE" not in page


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_trains_compares_and_draws(tmp_path: Path, sketched: None) -> None:
    from typer.testing import CliRunner

    common = ["train", "--device", "cpu", "--megabytes", "0.05", "--vocabulary", "300", "--context", "32"]
    common += ["--batch", "4", "--steps", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*common, "--compare", "unpatched,cce_exact", "--heldout-every", "0"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "index.html").exists() and len(read(tmp_path)) == 2
    (tmp_path / "index.html").unlink()
    assert CliRunner().invoke(app, [*common, "--page-only"]).exit_code == 0
    assert (tmp_path / "index.html").exists()
    done = CliRunner().invoke(app, [*common, "--fresh", "--impl", "cce_sparse", "--minutes", "0"])
    assert done.exit_code == 130 and "the same command goes on" in done.output
    assert not (tmp_path / "index.html").exists() and list(tmp_path.glob("checkpoint-1"))
    done = CliRunner().invoke(app, [*common, "--impl", "cce_sparse"])
    assert done.exit_code == 0 and (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--impl", "cce_exakt"], "cce_exakt"),
        (["--text", "/none.txt"], "does not exist"),
        (["--seeds", "2"], "--compare"),
        (["--device", "tpu"], "neither"),
        (["--precision", "int8"], "precision"),
        (["--page-only"], "holds no run"),
        (["--model", "/none"], "tokenizer"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], said: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["train", "--out", str(tmp_path), *options])
    assert done.exit_code == 2 and said in done.output


def test_the_readmes_block_is_rewritten_and_nothing_else(drawn: Path) -> None:
    readme = drawn / "README.md"
    with pytest.raises(FileNotFoundError):
        convergence_page.update_readme(drawn)
    readme.write_text(f"before\n{convergence_page.BEGIN}\nold\n{convergence_page.END}\nafter\n")
    convergence_page.update_readme(drawn)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| `cce` |" in text and "old" not in text
    convergence_page.update_readme(drawn)
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        convergence_page.update_readme(drawn)
