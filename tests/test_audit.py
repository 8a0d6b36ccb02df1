"""The audit: a careful implementation passes, each defect is caught by the check that is there for it, snippets run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cce_precision.analysis import audit as auditing
from cce_precision.analysis import audit_checks as checks
from cce_precision.analysis import audit_page
from cce_precision.analysis.audit import Outcome, audit, examine, read, write
from cce_precision.analysis.audit_checks import CHECKS, fuzzed
from cce_precision.analysis.audit_snippets import snippet
from cce_precision.analysis.audit_targets import CAREFUL, FAMILIES, TARGETS, Target, Unavailable, targets
from cce_precision.analysis.audit_trials import PATTERNS, Subject, Trial, findings, run
from cce_precision.analysis.isolation import Lost, isolated
from cce_precision.cli import app
from tests.broken_losses import DEFECTS
from tests.with_children import start_or_hang

# Lighter trials for the tests; none: the check is asked elsewhere.
HEAVY: dict[str, tuple[Trial, ...]] = {
    "fp16 underflow": (Trial(n=4096, v=40, d=8, dtype="fp16", pattern="flat", stretch=6),),
    "fp16 sums": (Trial(n=16384, v=64, d=1, dtype="fp16", pattern="flat", reduction="sum"),),
    "growth with the batch": (Trial(n=2048, v=252, d=8, pattern="flat"),),
    "memory": (),
    "random calls": (),
    "torch.compile": (),
}


def broken(name: str) -> Target:
    return Target(name, f"tests.broken_losses:{name}", package="tests")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are not made small, snippets not run, heavy checks take their first trials."""
    monkeypatch.setattr(auditing, "SHRINKING", 0.0)
    monkeypatch.setattr(auditing, "_ending", lambda text, seconds: text and "AssertionError")
    for name, trials in HEAVY.items():
        if trials:
            monkeypatch.setitem(CHECKS, name, dataclasses.replace(CHECKS[name], trials=trials))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [name for name in CHECKS if HEAVY.get(name) != ()])
def test_a_careful_implementation_passes(name: str) -> None:
    outcome = examine((broken("correct"), "cpu", name))
    assert outcome.status == "pass", outcome.summary
    assert outcome.findings


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "wrong_when_compiled" else ())  # a compiler's start
        for name in DEFECTS
        if name != "crashes_on_odd_sizes"
    ],
)
def test_a_defect_is_caught_by_its_check(defect: str) -> None:
    outcome = examine((broken(defect), "cpu", DEFECTS[defect]))
    assert outcome.status == "fail", outcome.summary
    assert "target(e, c, targets" in outcome.snippet


def test_every_check_has_a_defect_that_it_catches() -> None:
    """But those whose findings are known limits, and those that only repeat others on more calls."""
    others = {name for name, check in CHECKS.items() if check.limit} | {"random calls", "relations"}
    assert set(CHECKS) == set(DEFECTS.values()) | others


def test_a_failure_is_made_small_and_its_snippet_runs(tmp_path: Path) -> None:
    outcome = examine((broken("none_when_frozen"), "cpu", "one gradient alone"))
    assert outcome.status == "fail" and "torch.ones(1, 1)" in outcome.snippet  # which has failed when it was run
    path = tmp_path / "snippet.py"
    path.write_text(outcome.snippet.replace("none_when_frozen", "correct"))
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # a compiler's start, twice
def test_a_failure_under_compile_has_a_snippet_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles the call; the plain one is right."""
    monkeypatch.setattr(auditing, "SHRINKING", 0.0)
    outcome = examine((broken("wrong_when_compiled"), "cpu", "torch.compile"))
    assert outcome.status == "fail" and "loss = torch.compile(lambda e, c, targets: target(" in outcome.snippet


def test_a_snippet_calls_as_its_check_does() -> None:
    """A second backward pass needs the first to keep its graph; bits that differ now and then do in some of 20 runs."""
    subject, form = Subject(broken("correct"), "cpu"), CHECKS["second backward"].form
    assert "\nloss.backward(retain_graph=True)\n" in snippet(subject, Trial(), "it raises", raising=True, form=form)
    for name in ("determinism", "second backward"):
        for f in CHECKS[name].measure(subject, Trial(n=4, v=5, d=3)):
            text = snippet(subject, f.trial, "they differ", f, form=CHECKS[name].form)
            assert "for _ in range(20):\n    e.grad = c.grad = None\n    loss = target(" in text
            exec(text, {})  # which holds for what is right
    text = snippet(subject, Trial(bias=True), "it raises", raising=True, form=CHECKS["torch.compile"].form)
    call = "target(e, c, targets, bias=bias)"
    assert f'torch.compile(lambda e, c, targets, bias: {call}, backend="aot_eager")(e, c, targets, bias)' in text


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_relation_between_calls_has_a_snippet(dtype: str) -> None:
    """Which holds for what is right, and fails where another call goes wrong."""
    subject, trial = Subject(broken("correct"), "cpu"), Trial(n=7, v=5, d=3, dtype=dtype, reduction="sum")
    found = list(CHECKS["relations"].measure(subject, trial))
    assert len(found) == 9
    for f in found:
        text = snippet(subject, trial, "they differ", f)
        exec(text, {})
        if "def again" in text:
            right = "return loss.detach().double(), e.grad.double(), c.grad.double()"
            assert right in text
            with pytest.raises(AssertionError):
                exec(text.replace(right, "return 0, 0 * e, 0 * c"), {})


@pytest.mark.parametrize("held", [2**26, 2**26 + 1])
def test_a_program_asks_for_the_memory_of_the_logits(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with what a GPU would say: 64 MiB beyond both gradients is what the logits take, a byte more too much."""
    trial = CHECKS["memory"].trials[0]
    monkeypatch.setattr(checks, "allocated", lambda work, device: (None, 3 * held / 2**20, 0.0))
    monkeypatch.setattr(checks, "run", lambda *_: {})
    monkeypatch.setattr(Trial, "tensors", lambda *_: dict.fromkeys(("e", "c"), torch.zeros(1, dtype=torch.bfloat16)))
    (found,) = CHECKS["memory"].measure(Subject(broken("correct"), "cuda"), trial)
    assert not found.holds
    gradients = 2 * (trial.n + trial.v) * trial.d
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + gradients + held)
    text = snippet(Subject(broken("correct"), "cuda"), trial, "too much", found).replace('"cuda", ', "")
    with contextlib.nullcontext() if held == 2**26 else pytest.raises(AssertionError):
        exec(text.replace('.to("cuda")', ""), {})


@pytest.mark.gpu
def test_what_takes_more_memory_than_the_logits_has_a_program() -> None:
    outcome = examine((TARGETS["cce_split"], "cuda", "memory"))
    assert outcome.status == "fail" and "max_memory_allocated" in outcome.snippet, outcome.summary


def test_a_snippet_that_does_not_fail_is_not_shown() -> None:
    assert not auditing._ending("pass\n")
    assert "AssertionError" in auditing._ending("assert False\n")
    subject, check = Subject(broken("correct"), "cpu"), CHECKS["accuracy"]
    text, lack = auditing._program(subject, check, "it raises", "ValueError", [(Trial(n=1, v=2, d=1), None)])
    assert not text and lack == "; as a program of its own it ends with: no error"


def test_a_program_ends_as_it_does_whatever_it_leaves_behind() -> None:
    """A process that lives on, and so keeps what it was given open, is not waited for."""
    with Listener() as listener:
        hangs = "from multiprocessing.connection import Client; Client(sys.argv[1]).recv()"
        start = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import sys; {hangs}', "
        ending = auditing._ending(f"{start}{listener.address!r}])\nraise ValueError('after that')\n")
        assert ending.endswith("ValueError: after that")
        with listener.accept() as left:
            left.send(None)


def test_a_failure_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a check's measurements have taken what it may take, it fails as it is: not made small, no program run."""
    monkeypatch.setattr(auditing, "SECONDS", 0.0)
    outcome = examine((broken("dropped_target"), "cpu", "odd sizes"))
    assert outcome.status == "fail" and outcome.findings and not outcome.snippet
    assert outcome.summary.endswith("as a program of its own it ends with: no answer within 0 s")


def test_an_error_in_colours_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is recorded plainly, with its trial; its program is known by the message, or shown by its last words."""
    monkeypatch.setattr(auditing, "SHRINKING", 0.0)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the target changes
    outcome = examine((broken("raises_in_colour"), "cpu", "determinism"))
    assert outcome.status == "fail"
    assert outcome.summary == "raises RuntimeError: error: it cannot here (N=512 V=1000 D=64 bf16 gaussian)"
    assert "it raises RuntimeError" in outcome.snippet
    subject, check = Subject(broken("raises_in_colour"), "cpu"), CHECKS["determinism"]
    text, lack = auditing._program(subject, check, "it raises", "ValueError", [(Trial(), None)], "something else")
    assert not text and lack == "; as a program of its own it ends with: here"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("check", ["all ignored", "growth with the batch", "NaN in ignored rows"])
def test_the_defects_of_the_chunked_loss_of_pytorch(check: str) -> None:
    """Found again where the release has them: a 16-bit sum of losses, NaN where all tokens are ignored."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the defects are those of 2.13")
    assert examine((TARGETS["torch-chunked"], "cpu", check)).status == "fail"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("impl", ["cce", "cce_unbiased"])
@pytest.mark.parametrize(
    "check", ["odd sizes", "confident rows", pytest.param("torch.compile", marks=pytest.mark.slow)]
)
def test_own_variants_keep_their_promise(impl: str, check: str) -> None:
    outcome = examine((TARGETS[impl], "cpu", check))
    assert outcome.status in ("pass", "limit") and not outcome.snippet, outcome.summary
    assert outcome.status == "pass" or f"within the bound of {impl}" in outcome.summary


def test_a_limit_is_told_from_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile filter drops confident rows: a limit of `cce`, a defect of what does not promise a filter."""
    assert examine((TARGETS["cce"], "cpu", "confident rows")).status == "limit"
    monkeypatch.setattr(auditing, "SHRINKING", 0.0)
    monkeypatch.setattr(auditing, "_ending", lambda text, seconds: text and "AssertionError")
    anonymous = dataclasses.replace(TARGETS["cce"], name="anonymous", promise=None)
    assert examine((anonymous, "cpu", "confident rows")).status == "fail"
    assert examine((TARGETS["baseline"], "cpu", "16-bit logits")).status == "limit"


def test_what_is_not_offered_is_said() -> None:
    assert examine((broken("missing"), "cpu", "bias")).summary == "tests.broken_losses (unknown) has no missing"
    assert (
        examine((Target("x", "no_such_package:f", package="x"), "cpu", "bias")).summary
        == "no_such_package is not installed"
    )
    functional = Target("f", "torch.nn.functional:cross_entropy", "functional")
    assert "bias" not in functional.offers and "reduction" in functional.offers
    assert examine((functional, "cpu", "bias")).summary == "it has no bias"
    with pytest.raises(Unavailable):
        _ = broken("missing").offers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_trial_is_text_that_makes_its_inputs(pattern: str) -> None:
    trial = Trial(n=9, v=12, d=4, pattern=pattern, bias=True, ignored="some", poison=True, strided=True, stretch=3)
    first, second = trial.tensors("cpu"), trial.tensors("cpu")
    assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)
    assert first["e"].shape == (9, 4) and first["c"].shape == (12, 4) and first["bias"].shape == (12,)
    assert not first["e"].is_contiguous() and first["e"].requires_grad and first["e"].dtype is torch.bfloat16
    assert bool(first["e"][::3].isnan().all()) and int((first["targets"] == -100).sum()) == 3


def test_a_failure_is_made_plain_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the least trial, the same one each time; to itself where nothing plainer fails, or no time is left."""
    trial = Trial(seed=3, n=70, v=90, scale=4.0, bias=True, strided=True, ignored="some", upstream=-2.0)
    asked: list[Trial] = []

    def fails(t: Trial) -> bool:
        asked.append(t)
        return t.n > 12 and t.bias

    least = auditing._plainest(trial, fails)
    assert least == Trial(n=13, v=1, d=1, pattern="flat", bias=True)
    assert len(asked) == len(set(asked)) and trial not in asked
    assert all(t.n <= trial.n and t.v <= trial.v and t.softcap is None for t in asked)
    assert auditing._plainest(trial, fails) == least
    assert auditing._plainest(trial, lambda t: False) == trial
    assert auditing._plainest(trial, fails, time.monotonic()) == trial
    monkeypatch.setattr(auditing, "SHRINKING", 0.0)
    assert auditing._plainest(trial, fails) == trial


def test_zero_gradients_are_rejected() -> None:
    subject, trial = Subject(broken("correct"), "cpu"), Trial()
    outcome = run(subject, trial)
    assert all(f.holds for f in findings(subject, trial, CAREFUL, outcome))
    for name in ("dE", "dC"):
        assert outcome[name] is not None
        wrong = findings(subject, trial, CAREFUL, outcome | {name: torch.zeros_like(outcome[name])})  # type: ignore[arg-type]
        assert [f.quantity for f in wrong if not f.holds] == [name]


def test_random_calls_ask_for_what_is_offered_alone() -> None:
    drawn = fuzzed(TARGETS["torch"])
    assert not any(trial.softcap for trial in drawn) and any(trial.bias for trial in drawn)
    assert {trial.reduction for trial in drawn} == {"mean", "sum", "none"}
    assert {trial.reduction for trial in fuzzed(TARGETS["cce_exact"])} == {"mean", "sum", "none"}
    assert fuzzed(TARGETS["torch"]) == drawn


def test_targets_by_name() -> None:
    assert [t.name for t in targets("torch")] == list(FAMILIES["torch"])
    assert targets("cce_kahan_full")[0].name == "cce_exact"
    assert targets("my.losses:f", "functional")[0].text({"bias": "bias"}) == "target(e, c, targets, linear_bias=bias)"
    with pytest.raises(ValueError, match="did you mean 'liger'"):
        targets("ligr")
    with pytest.raises(ValueError, match="style must be one of ours"):
        targets("my.losses:f", "theirs")
    with pytest.raises(ValueError, match="no known check"):
        audit([TARGETS["baseline"]], checks=("nothing",))
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        audit([TARGETS["baseline"]], "tpu")


def test_cards_and_page(tmp_path: Path) -> None:
    outcome = examine((broken("correct"), "cpu", "determinism"))
    card = auditing._card(broken("correct"), "cpu", "the command", [outcome])
    bad = Outcome("bias", "fail", "dE <off>", snippet="assert 1 < 0")
    write([dataclasses.replace(card, outcomes=(*card.outcomes, bad))], tmp_path)
    (again,) = read(tmp_path)
    assert again.outcomes[0] == card.outcomes[0] and again.outcomes[1] == bad
    assert "1 pass, 1 fail" in audit_page.sentence(again)
    write([dataclasses.replace(card, outcomes=(dataclasses.replace(bad, summary="again"),), command="more")], tmp_path)
    (merged,) = read(tmp_path)  # a check asked again, the other kept
    assert [o.summary for o in merged.outcomes] == ["again", card.outcomes[0].summary]
    assert merged.command == "the command; more"
    write([again], tmp_path)
    text = audit_page.build(tmp_path).read_text()
    assert "assert 1 &lt; 0" in text and "dE &lt;off&gt;" in text and "the command" in text
    assert "default-src 'none'; style-src" in text and "<script" not in text
    json.loads((tmp_path / "cards" / "correct-cpu.json").read_text())
    with pytest.raises(ValueError, match="holds no card"):
        read(tmp_path / "cards")


def test_the_audit_command(tmp_path: Path) -> None:
    """On a target whose process ends within a check: that check fails, and the exit code tells."""
    command = ["audit", "tests.broken_losses:crashes_on_odd_sizes", "--workers", "1", "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--checks", "odd sizes", "--out", str(tmp_path)])
    assert run.exit_code == 1, run.output
    assert "1 fail" in run.output and "ended with code 3" in run.output
    (card,) = read(tmp_path)
    assert [o.status for o in card.outcomes] == ["fail"] and (tmp_path / "index.html").exists()
    run = CliRunner().invoke(app, ["audit", "nobody", "--out", str(tmp_path)])
    assert run.exit_code == 2 and "no known target" in run.output


def test_a_target_may_start_processes() -> None:
    (card,) = audit([broken("starting_processes")], checks=("reductions",))
    (outcome,) = card.outcomes
    assert outcome.status == "pass" and "refused" not in outcome.summary, outcome.summary


def ended(held: Connection) -> bool:
    """Whether the process that holds the other end has ended; it has a minute."""
    if not held.poll(60):
        return False
    with pytest.raises(EOFError):
        held.recv()
    return True


def test_what_a_process_started_ends_with_it() -> None:
    """With one that hangs, and with one that is done."""
    held = []
    with Listener() as listener:
        for address, result in isolated(start_or_hang, [listener.address, "", listener.address], seconds=1):
            if address:
                assert result is None
                held.append(listener.accept())
            else:
                assert result == Lost("no answer within 1 s") and ended(held[0])
        assert len(held) == 2 and ended(held[1])


def test_what_a_process_started_ends_with_the_program() -> None:
    """Also where the program is killed while a task hangs."""
    with Listener() as listener:
        lines = (
            "from cce_precision.analysis.isolation import isolated",
            "from tests.with_children import start_or_hang",
        )
        code = "; ".join((*lines, f"list(isolated(start_or_hang, [{listener.address!r}, '']))"))
        with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) as program:
            held = listener.accept()
            program.kill()
        assert ended(held)
