"""Training: the order of the windows, runs that survive a kill, and what is measured on the live model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from cce_precision.analysis import train as training
from cce_precision.analysis.bounds import bound
from cce_precision.analysis.references import Objective, truth
from cce_precision.analysis.train import Recipe, Row, peak_mib, read_curve, run
from cce_precision.analysis.train_gradient import Head, check_head, head_gradient_errors, head_of, relative_errors
from cce_precision.analysis.train_models import SIZES, Method, build, prepare
from cce_precision.analysis.train_text import SHIPPED, Order, Tokens, documents, load_tokenizer, share, tokenise
from cce_precision.numerics import FilterKind
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL

SMALL = Recipe(
    context=32, batch=8, steps=8, warmup=2, heldout_every=4, heldout_windows=4, checkpoint_every=3, log_every=2
)
FACTS = ("kind", "step", "loss", "grad_norm", "lr", "tokens", "dE", "dC")  # what two runs must share to the last bit


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return tokenise([SHIPPED], None, context=SMALL.context, vocabulary=300, megabytes=0.05)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(None, "llama", "tiny", 300, 32, torch.float32)


def facts(curve: list[Row]) -> list[Row]:
    return [{k: row[k] for k in FACTS if k in row} for row in curve]


# -- text --------------------------------------------------------------------------------------------------------------


def test_files_of_every_kind_give_their_documents(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\ntwo\n")
    lines.write_text('{"body": "three"}\n\n{"body": "four"}\n')
    assert list(documents(plain)) == ["one\ntwo\n"]
    assert list(documents(lines, "body")) == ["three", "four"]
    lines.write_text('{"body": "three"}\n{"text": "four"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: no JSON object with the field 'body'"):
        list(documents(lines, "body"))
    lines.write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match="is no text but int"):
        list(documents(lines))
    with pytest.raises(FileNotFoundError, match=r"c\.txt"):
        list(documents(tmp_path / "c.txt"))


def test_tokens_depend_on_the_text_alone_and_survive_a_file(tokens: Tokens, tmp_path: Path) -> None:
    again = tokenise([SHIPPED], None, context=SMALL.context, vocabulary=300, megabytes=0.05)
    assert again.digest == tokens.digest
    again.save(tmp_path / "t.npz")
    assert Tokens.load(tmp_path / "t.npz").digest == tokens.digest
    other = tokenise([SHIPPED], None, context=SMALL.context, vocabulary=301, megabytes=0.05)
    assert other.digest != tokens.digest and other.vocabulary == 301


def test_documents_end_with_the_separator_and_a_tokenizer_is_read_back(tokens: Tokens, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokens.tokenizer)
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps({"text": "In the beginning God created"}) + "\n" for _ in range(90)))
    found = tokenise([lines], lines, context=32, vocabulary=0, tokenizer=tmp_path, separator=7)
    own = load_tokenizer(tmp_path).encode("In the beginning God created").ids
    assert found.training.tolist() == [*own, 7] * 90
    assert found.heldout.tolist() == found.training.tolist()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="fewer than one window of 4096"):
        tokenise([lines], None, context=4096, vocabulary=0, tokenizer=tmp_path)


def test_a_share_of_a_text_is_whole_lines_from_all_over() -> None:
    text = "".join(f"line {i}\n" for i in range(20_000))
    some = share(text, len(text) // 10)
    numbers = [int(line.split()[1]) for line in some.splitlines()]
    assert len(text) // 20 < len(some) < len(text) // 5
    assert numbers == sorted(numbers) and numbers[0] < 1000 and numbers[-1] > 19_000
    assert share(text, len(text)) == text


@given(windows=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3), first=st.integers(0, 5))
def test_every_epoch_takes_every_window_once(windows: int, batch: int, seed: int, first: int) -> None:
    order = Order(np.arange(windows * 3, dtype=np.int32), 3, batch, seed)
    seen = [i for step in range(first + windows) for i in order.indices(step)]
    for epoch in range(len(seen) // windows):
        assert sorted(seen[epoch * windows : (epoch + 1) * windows]) == list(range(windows))
    assert order.indices(first) == seen[first * batch : (first + 1) * batch]  # whatever came before
    taken = order.take([windows - 1, 0])
    assert taken.tolist() == [[3 * windows - 3, 3 * windows - 2, 3 * windows - 1], [0, 1, 2]]


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_methods_are_variants_with_settings_or_references() -> None:
    assert Method.parse("cce_exact").variant == ALL["cce_exact"]
    cce = Method.parse("cce@2^-10").variant
    assert cce is not None and cce.filter_e.eps == cce.filter_c.eps == 2.0**-10
    whole = Method.parse("cce_exact@off").variant
    assert ALL["cce_exact"].flushed and not whole.flushed and not Method.parse("cce_unbiased@off").variant.filtered
    sub = Method.parse("cce_subsampled@2^-12/16").variant
    assert sub is not None and sub.filter_e.kind is FilterKind.SUBSET
    assert (sub.filter_e.share, sub.filter_c.share, sub.filter_e.eps) == (16, 16, 2.0**-12)
    assert Method.parse("unpatched").variant is None and Method.parse("fp32").fp32
    for bad, said in (
        ("cce_exakt", "cce_exact"),
        ("cce@five", "five"),
        ("cce_unbiased@2^-12/8", "subsets"),
        ("cce_subsampled@2^-12/0", "SHARE"),
        ("cce_exact@2^-12", "filters nothing"),
    ):
        with pytest.raises(ValueError, match=said):
            Method.parse(bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"steps": 0}, "steps is 0"),
        ({"context": 1}, "two tokens"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"heldout_every": -1}, "heldout_every is -1"),
        ({"method": "nobody"}, "nobody"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_models_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    for model, config, size, said in (
        (str(tmp_path / "none"), "llama", "tiny", "folder of a pretrained model"),
        (None, "lama", "tiny", "'lama'.*family that transformers knows"),
        (None, str(tmp_path / "none.json"), "tiny", "no such file"),
        (None, "llama", "huge", f"allowed are {', '.join(SIZES)}"),
    ):
        with pytest.raises(ValueError, match=said):
            build(model, config, size, 300, 32, torch.float32)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of a sampled variant, whose draws a checkpoint has to bring back."""
    out = tmp_path_factory.mktemp("whole")
    assert run(replace(SMALL, method="cce_unbiased", gradient_every=8), tokens, out, device="cpu").finished
    return out


def stop_at(step: int, act: Callable[[], None]) -> Callable[[Row], None]:
    def on_row(row: Row) -> None:
        if row["kind"] == "train" and row["step"] == step:
            act()

    return on_row


def test_a_run_writes_its_curve_and_a_model_that_loads(whole: Path, tokens: Tokens) -> None:
    curve = read_curve(whole)
    train = [row for row in curve if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, SMALL.steps + 1))
    assert [row["step"] for row in curve if row["kind"] == "heldout"] == [0, 4, 8]
    assert [row["step"] for row in curve if row["kind"] == "gradient"] == [0, 8]
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(row["tokens"] == row["step"] * SMALL.batch * SMALL.context for row in train)
    assert all(0 < row["peak_mib"] <= round(peak_mib(torch.device("cpu")), 1) for row in train)
    loaded = build(str(whole / "model"), "", "", tokens.vocabulary, SMALL.context, torch.float32)
    ids = Order(tokens.heldout, SMALL.context, 1, 0).take([0])
    assert loaded(input_ids=ids, labels=ids).loss.item() < np.log(tokens.vocabulary)
    text = "In the beginning God created the heaven and the earth."
    (whole / "own.json").write_text(tokens.tokenizer)
    assert load_tokenizer(whole / "model").encode(text).ids == load_tokenizer(whole / "own.json").encode(text).ids


def test_sigterm_ends_the_step_and_the_run_resumes_to_the_same_bits(
    whole: Path, tokens: Tokens, tmp_path: Path
) -> None:
    recipe = replace(SMALL, method="cce_unbiased", gradient_every=8)
    before = signal.getsignal(signal.SIGTERM)
    ask = stop_at(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = run(recipe, tokens, tmp_path, device="cpu", on_row=ask)
    assert not first.finished and 4 <= first.step < SMALL.steps
    assert signal.getsignal(signal.SIGTERM) is before and not torch.are_deterministic_algorithms_enabled()
    second = run(recipe, tokens, tmp_path, device="cpu")
    assert second.finished and facts(second.curve) == facts(read_curve(whole))


def killed(recipe: Recipe, tokens: Tokens, folder: Path, device: str | None) -> None:
    """A run in a process that SIGKILL ends after its sixth step, and the last line of whose curve is cut off."""
    tokens.save(folder / "tokens.npz")
    code = (
        "import sys; from pathlib import Path; from cce_precision.analysis.train import Recipe, run;"
        "from cce_precision.analysis.train_text import Tokens;"
        "import os, signal;"
        "die = lambda row: row['kind'] == 'train' and row['step'] == 6 and os.kill(os.getpid(), signal.SIGKILL);"
        f"run(eval(sys.argv[1]), Tokens.load(Path({str(folder)!r}) / 'tokens.npz'), Path({str(folder)!r}),"
        f" device={device!r}, on_row=die)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, repr(recipe)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3"}  # steps 4 to 6 are lost ...
    with (folder / "curve.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # ... and a line may be cut off
    assert max(row["step"] for row in read_curve(folder)) > 3


def test_a_killed_run_resumes_to_the_same_bits(whole: Path, tokens: Tokens, tmp_path: Path) -> None:
    recipe = replace(SMALL, method="cce_unbiased", gradient_every=8)
    killed(recipe, tokens, tmp_path, "cpu")
    second = run(recipe, tokens, tmp_path, device="cpu")
    assert second.finished and facts(second.curve) == facts(read_curve(whole))


def test_a_folder_of_another_run_is_refused(whole: Path, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="learning_rate is 0.001 there, 0.002 here"):
        run(replace(SMALL, method="cce_unbiased", gradient_every=8, learning_rate=2e-3), tokens, whole, device="cpu")


def test_micro_batches_make_the_same_step(tokens: Tokens, tmp_path: Path) -> None:
    recipe = replace(SMALL, steps=1, checkpoint_every=0, heldout_every=0)
    with pytest.raises(ValueError, match="multiple of accumulate x processes = 3 x 1"):
        run(replace(recipe, accumulate=3), tokens, tmp_path / "three", device="cpu")
    found = run(replace(recipe, accumulate=2, method="unpatched"), tokens, tmp_path, device="cpu").curve[0]
    torch.manual_seed(recipe.seed)
    plain = build(None, "llama", "tiny", tokens.vocabulary, recipe.context, torch.float32)
    order = Order(tokens.training, recipe.context, recipe.batch, recipe.seed)
    total = torch.zeros(())
    for half in torch.split(order.take(order.indices(0)), recipe.batch // 2):
        loss = plain(input_ids=half, labels=half).loss / 2
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
    assert (found["loss"], found["grad_norm"]) == (float(total), float(norm)) and norm > 0


def test_a_loss_that_is_no_number_stops_the_run(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Trainer.train_step

    def broken(self: training.Trainer) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = step(self)
        return loss * torch.nan, norm

    monkeypatch.setattr(training.Trainer, "train_step", broken)
    with pytest.raises(FloatingPointError, match="nan"):
        run(replace(SMALL, heldout_every=0), tokens, tmp_path, device="cpu")


# -- the live model's head ---------------------------------------------------------------------------------------------


def test_the_heads_operands_are_those_of_the_models_own_loss(model: torch.nn.Module) -> None:
    ids = torch.randint(300, (4, 32))
    head = head_of(model, ids)
    own = model(input_ids=ids, labels=ids).loss
    e, c = head.e.requires_grad_(), head.c.requires_grad_()
    loss = torch.nn.functional.cross_entropy(e @ c.T, head.targets)
    assert loss.item() == own.item()
    check_head(model, ids[:1, :8])


def test_a_head_that_is_more_than_a_product_is_refused(model: torch.nn.Module) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda e: 1.1 * forward(e)
    with pytest.raises(ValueError, match="LlamaForCausalLM's logits are not"):
        check_head(model, torch.randint(300, (1, 8)))
    model.lm_head.forward = forward


@pytest.mark.parametrize("name", ["cce_exact", "cce"])
def test_the_measured_error_is_real_and_within_its_bound(name: str, model: torch.nn.Module) -> None:
    ids = torch.randint(300, (4, 32))
    head = head_of(model, ids)
    head = head._replace(e=head.e.bfloat16(), c=head.c.bfloat16())
    errors = head_gradient_errors(
        model, ids, Method.parse(name), autocast=lambda: torch.autocast("cpu", torch.bfloat16), seed=1
    )
    targets = torch.where(head.targets >= 0, head.targets, -1)
    problem, objective = Problem(head.e, head.c, targets, None, None, None, 1.0), Objective()
    exact, allowed = truth(problem, objective), bound(problem, Plan(ALL[name], None, 1.0), objective)
    for side in ("dE", "dC"):
        most = getattr(allowed, side).norm() / getattr(exact, side).norm()
        assert 0 < errors[side] <= most < 1
        assert errors[f"{side}_low"] <= errors[side] <= errors[f"{side}_high"]


def test_a_zero_gradient_is_all_wrong(model: torch.nn.Module) -> None:
    head: Head = head_of(model, torch.randint(300, (4, 32)))
    errors = relative_errors(head, torch.zeros_like(head.e), torch.zeros_like(head.c), seed=0)
    assert all(errors[f"{side}_low"] <= 1 <= errors[f"{side}_high"] and errors[side] > 0.9 for side in ("dE", "dC"))


def test_the_perturbed_control_differs_in_last_bits_alone() -> None:
    torch.manual_seed(0)
    plain = build(None, "llama", "tiny", 300, 32, torch.float32)
    torch.manual_seed(0)
    moved = build(None, "llama", "tiny", 300, 32, torch.float32)
    prepare(moved, Method.parse("fp32-perturbed"))
    for a, b in zip(plain.parameters(), moved.parameters()):
        assert torch.equal(torch.nextafter(a, torch.full_like(a, torch.inf)), b)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["cce_exact", "cce", "cce_unbiased"])
def test_a_stopped_run_on_a_gpu_resumes_to_the_same_bits(method: str, tokens: Tokens, tmp_path: Path) -> None:
    recipe = replace(SMALL, method=method, precision="bf16", size="small")
    straight = run(recipe, tokens, tmp_path / "straight")
    reached: list[int] = []
    note = stop_at(4, lambda: reached.append(4))
    first = run(recipe, tokens, tmp_path / "broken", on_row=note, stopped=lambda: bool(reached))
    assert not first.finished
    second = run(recipe, tokens, tmp_path / "broken")
    assert second.finished and facts(second.curve) == facts(straight.curve)
    assert second.curve[-2]["peak_mib"] > 0


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_is_killed_resumes_to_the_same_bits(tokens: Tokens, tmp_path: Path) -> None:
    recipe = replace(SMALL, method="cce_exact", precision="bf16", size="small", gradient_every=8)
    straight = run(recipe, tokens, tmp_path / "straight")
    (broken := tmp_path / "broken").mkdir()
    killed(recipe, tokens, broken, None)
    second = run(recipe, tokens, broken)
    assert second.finished and facts(second.curve) == facts(straight.curve)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tokens: Tokens, tmp_path: Path) -> None:
    single = run(replace(SMALL, method="cce_exact"), tokens, tmp_path / "one", device="cpu").curve
    tokens.save(tmp_path / "tokens.npz")
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path; from cce_precision.analysis.train import Recipe, run\n"
        "from cce_precision.analysis.train_text import Tokens\n"
        f"run(eval(sys.argv[1]), Tokens.load(Path({str(tmp_path)!r}) / 'tokens.npz'), Path({str(tmp_path)!r}) / 'two',"
        " device='cpu')\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29519", str(script)]
    done = subprocess.run([*command, repr(replace(SMALL, method="cce_exact"))], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    double = read_curve(tmp_path / "two")
    assert [(r["kind"], r["step"]) for r in double] == [(r["kind"], r["step"]) for r in single]
    # Sums in another order drift apart as the control of a comparison does; another window would be percents away.
    control = run(replace(SMALL, method="fp32-perturbed"), tokens, tmp_path / "moved", device="cpu").curve
    drift = max(abs(a["loss"] - b["loss"]) for a, b in zip(single, control))
    assert all(abs(a["loss"] - b["loss"]) <= 100 * drift for a, b in zip(single, double))


def test_a_trained_model_goes_on_with_json_lines_and_its_own_tokenizer(whole: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cce_precision.cli import app

    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"verse": f"And God said, Let there be {i}."}) + "\n" for i in range(300)))
    options = ["--model", str(whole / "model"), "--text", str(lines), "--field", "verse", "--impl", "cce_sparse"]
    options += ["--context", "32", "--batch", "4", "--steps", "3", "--precision", "pure-bf16", "--heldout-every", "0"]
    done = CliRunner().invoke(app, ["train", "--device", "cpu", "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    first, *_, last = [row["loss"] for row in read_curve(tmp_path / "out") if row["kind"] == "train"]
    assert last < first < read_curve(whole)[0]["loss"] * 1.5
    loaded = build(str(tmp_path / "out" / "model"), "", "", 300, 32, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
