"""Audit of any implementation of the linear cross-entropy: checks, a report card, and a snippet for each failure.

    cce-precision audit torch                     cce-precision audit my_package.losses:fused_loss --style functional

Each check runs in a process apart, with a time limit, so that a crash, a hang or a broken GPU costs one check. A check
passes, fails, meets a known limit of the method, or is not offered by the target. What fails is made small and written
as a program of a few lines that a maintainer can run; it is run once, and shown only if it fails there too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cce_precision.analysis.audit_checks import CHECKS, Check, NotOffered, fuzzed, missing
from cce_precision.analysis.audit_snippets import snippet
from cce_precision.analysis.audit_targets import Target, Unavailable
from cce_precision.analysis.audit_trials import Finding, Subject, Trial, plainer
from cce_precision.analysis.fuzz_campaign import settle
from cce_precision.analysis.isolation import Lost, isolated
from cce_precision.analysis.provenance import commit

__all__ = ["STATUSES", "Card", "Outcome", "audit", "examine", "read", "write"]

STATUSES = ("pass", "fail", "limit", "not offered")
SECONDS = 300.0  # for one check, its failure made small and its programs included
SPARE = 10.0  # of them, for what is between those
SHRINKING = 6.0  # of the processor, for making a failure small
LATEST = 50.0  # by the clock, for the same: a compiler works in other processes
PROGRAM = 90.0  # for one of the two programs that may be run
STYLED = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # a terminal's colours and the like
REFUSALS = (NotImplementedError, TypeError, ValueError, AssertionError)  # how a function says that it cannot


@dataclass(frozen=True)
class Outcome:
    """What a check found of a target."""

    check: str
    status: str
    summary: str
    findings: tuple[dict[str, Any], ...] = ()
    snippet: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Card:
    """All outcomes of a target on a device."""

    target: str
    function: str
    version: str
    device: str
    software: str
    commit: str  # of this package
    command: str
    outcomes: tuple[Outcome, ...] = field(default=())

    def count(self, status: str) -> int:
        return sum(o.status == status for o in self.outcomes)

    @property
    def name(self) -> str:
        """Of its file."""
        return re.sub(r"[^\w.-]+", "-", f"{self.target}-{'cpu' if self.device == 'CPU' else 'cuda'}")


# One check, in a process of its own.


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _record(f: Finding) -> dict[str, Any]:
    """A finding as it stands in a card."""
    numbers = {"error": f.error, "relative": f.relative, "allowed": f.allowed, "ratio": f.ratio}
    floor = f.floor / f.truth if f.truth else 0.0
    numbers |= {"relative allowed": f.allowed / f.truth if f.truth else f.allowed, "floor": floor}
    large = {k: _number(v if v < 1e300 else math.inf) for k, v in numbers.items()}
    return {"trial": str(f.trial), "quantity": f.quantity, "note": f.note, "holds": f.holds} | large


def _plain(message: object) -> str:
    """A message without what is meant for a terminal."""
    return STYLED.sub("", str(message))


def _lines(text: str) -> list[str]:
    """Those that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _excused(f: Finding) -> bool:
    return f.note.startswith("within the bound of")


def _plainest(trial: Trial, fails: Callable[[Trial], bool], until: float = math.inf) -> Trial:
    """The plainest trial that fails as this one does, of those that Hypothesis, if it is there, finds in time: with
    some left, `until`, for two programs.
    """
    try:
        from hypothesis import HealthCheck, Phase, Verbosity, errors, find, settings
    except ModuleNotFoundError:
        return trial

    ends, latest = time.process_time() + SHRINKING, min(time.monotonic() + LATEST, until - 2 * PROGRAM)
    known = {trial: True}

    def still(candidate: Trial) -> bool:
        if candidate not in known:
            known[candidate] = time.process_time() < ends and time.monotonic() < latest and fails(candidate)
        return known[candidate]

    how = settings(
        database=None,
        deadline=None,
        derandomize=True,
        max_examples=100,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    with contextlib.suppress(errors.NoSuchExample):
        return find(plainer(trial), still, settings=how)
    return trial


def _small(subject: Subject, check: Check, worst: Finding, until: float) -> Finding:
    """The failure on the smallest trial found."""
    failing = {worst.trial: worst}

    def fails(trial: Trial) -> bool:
        if not missing(subject.target, trial):
            with contextlib.suppress(Exception):
                for f in check.measure(subject, trial):
                    if f.quantity == worst.quantity and not f.holds and not _excused(f) and _alike(f, worst):
                        failing[trial] = f
                        return True
        return False

    return failing[_plainest(worst.trial, fails, until)]


def _alike(f: Finding, worst: Finding) -> bool:
    """Whether a smaller failure is as telling: as wrong as a tenth of the first, and clearly above what is allowed."""
    return (
        f.note == worst.note
        and (not math.isfinite(f.ratio) or f.ratio > min(worst.ratio, 1.5))
        and (f.relative > 0.1 * worst.relative or not math.isfinite(f.relative))
    )


def _raised(subject: Subject, check: Check, trial: Trial, error: Exception, until: float) -> Outcome:
    """The outcome of a call that raised."""
    message = _plain(error)
    said = f"{type(error).__name__}: {' '.join(message.split())[:200]}"
    if isinstance(error, REFUSALS) and trial != Trial():  # not even the plainest call
        return Outcome(check.name, "not offered", f"raises {said}")
    kind = type(error)

    def fails(candidate: Trial) -> bool:
        if missing(subject.target, candidate):
            return False
        try:
            list(check.measure(subject, candidate))
        except Exception as other:
            return type(other) is kind
        return False

    small = _plainest(trial, fails, until) if check.minimal else trial
    candidates = ((small, None), (trial, None))
    text, lack = _program(subject, check, f"it raises {kind.__name__}", kind.__name__, candidates, message, until)
    return Outcome(check.name, "fail", f"raises {said} ({trial}){lack}", snippet=text)


def examine(task: tuple[Target, str, str]) -> Outcome:
    """One check (by name) of a target on a device ("cpu" or "cuda"): the work of one process."""
    target, device, name = task
    settle(device)
    started = time.monotonic()
    until = started + SECONDS - SPARE
    check, subject = CHECKS[name], Subject(target, device)
    try:
        trials = check.trials or fuzzed(target)
        able = [trial for trial in trials if not missing(target, trial)]
    except Unavailable as error:
        return Outcome(name, "not offered", _plain(error))
    if not able:
        return Outcome(name, "not offered", f"it has no {missing(target, trials[0])}")
    found: list[Finding] = []
    refused: list[str] = []
    for trial in able:
        try:
            found += check.measure(subject, trial)
        except NotOffered as error:
            return Outcome(name, "not offered", _plain(error))
        except Exception as error:
            outcome = _raised(subject, check, trial, error, until)
            refused.append(f"{trial} {outcome.summary}")
            if outcome.status == "fail":
                break
    else:
        outcome = _verdict(subject, check, found, until) if found else Outcome(name, "not offered", refused[0])
        if found and refused:
            summary = f"{outcome.summary}; {len(refused)} of {len(able)} calls refused: {refused[0]}"
            outcome = dataclasses.replace(outcome, summary=summary)
    return dataclasses.replace(outcome, seconds=round(time.monotonic() - started, 1))


def _verdict(subject: Subject, check: Check, found: list[Finding], until: float) -> Outcome:
    failing = [f for f in found if not f.holds and not _excused(f)]
    excused = [f for f in found if not f.holds and _excused(f)]
    records = tuple(map(_record, found))
    logits = check.limit and (subject.target.promise is None or subject.target.logits or check.name == "mutants")
    if not failing and not excused:
        return Outcome(check.name, "pass", _summary(max(found, key=lambda f: f.ratio)), records)
    if not failing:
        worst = max(excused, key=lambda f: f.relative)
        return Outcome(check.name, "limit", f"{_summary(worst)}; {worst.note}, by design", records)
    worst = max(failing, key=lambda f: (f.ratio, f.relative))
    if logits:
        return Outcome(check.name, "limit", f"{_summary(worst)}; {check.limit}", records)
    said = f"{len(failing)} of {len(found)}: {_summary(worst)}"
    if not check.minimal and not worst.assertion:
        return Outcome(check.name, "fail", said, records)
    small = _small(subject, check, worst, until) if check.minimal else worst
    candidates = ((small.trial, small), (worst.trial, worst))
    text, lack = _program(subject, check, said, "AssertionError", candidates, until=until)
    return Outcome(check.name, "fail", said + lack, records, text)


def _summary(f: Finding) -> str:
    """A finding in one line."""
    if not math.isfinite(f.relative) or f.relative > 1e300:
        size = f.note or "not finite"
    elif f.quantity == "MiB":
        size = f"{f.error:.3g} MiB, the logits {f.allowed:.3g}"
    elif f.error == 0:
        size = "exact" + (f", {f.note}" if f.note else "")
    else:
        allowed = f.allowed / f.truth if f.truth else f.allowed
        size = f"off by {f.relative:.2g}, allowed {allowed:.2g}" + (f" ({f.note})" if f.note and f.holds else "")
    return f"{f.quantity} {size} ({f.trial})"


def _program(
    subject: Subject,
    check: Check,
    said: str,
    error: str,
    candidates: Iterable[tuple[Trial, Finding | None]],
    message: str = "",
    until: float = math.inf,
) -> tuple[str, str]:
    """The first program of trials (with what was found, or None where they raise) that fails with an error when it is
    run: what was small here may not fail alone, as a compiler remembers shapes. Where none does, no text, and how the
    last one ended. A package may show its errors' messages without the name: the first line of `message` tells too.
    """
    ending = ""
    for trial, found in dict.fromkeys(candidates):
        text = snippet(subject, trial, said, found, raising=found is None, form=check.form)
        ending = _ending(text, min(PROGRAM, until - time.monotonic()))
        if error in ending or set(_lines(message)[:1]) & set(_lines(ending)):
            return text, ""
    return "", f"; as a program of its own it ends with: {(_lines(ending) or ['no error'])[-1][:200]}"


def _ending(text: str, seconds: float = PROGRAM) -> str:
    """What a program says as it fails; empty where it ends well.

    It says so into a file: a pipe would stay open with every process that the program has started and left behind.
    """
    late = f"no answer within {max(seconds, 0):.3g} s"
    if seconds <= 0:
        return late
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "snippet.py", Path(folder) / "said"
        path.write_text(text)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
        command = [sys.executable, str(path)]
        try:
            with said.open("w") as file:
                done = subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=file, timeout=seconds, env=environment, check=False
                )
        except subprocess.TimeoutExpired:
            return late
        message = _plain(said.read_text(errors="replace")).strip()
    return (message or f"code {done.returncode}") if done.returncode else ""


# A card.


def audit(
    targets: Sequence[Target],
    device: str = "cpu",
    *,
    checks: Iterable[str] = tuple(CHECKS),
    workers: int = 1,
    command: str = "",
    on_outcome: Callable[[Target, Outcome], None] = lambda target, outcome: None,
) -> list[Card]:
    """The cards of targets on a device; `on_outcome` is told each outcome as it comes. Interrupted, what is done.

    Raises ValueError for an unknown check, or a GPU that is not there.
    """
    checks = list(checks)
    if unknown := [name for name in checks if name not in CHECKS]:
        raise ValueError(f"{unknown[0]!r} is no known check; known: {', '.join(CHECKS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch sees no CUDA device here")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    tasks = [(target, device, name) for target in targets for name in checks]
    found: dict[str, dict[str, Outcome]] = {target.name: {} for target in targets}
    settings = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": os.devnull}  # no folder where it is run
    results = isolated(examine, tasks, workers=workers, seconds=SECONDS, environment=settings)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(results):
        for (target, _, name), result in results:
            outcome = Outcome(name, "fail", result.reason) if isinstance(result, Lost) else result
            found[target.name][name] = outcome
            on_outcome(target, outcome)
    done = {target: [found[target.name][name] for name in checks if name in found[target.name]] for target in targets}
    return [_card(target, device, command, outcomes) for target, outcomes in done.items() if outcomes]


def _card(target: Target, device: str, command: str, outcomes: Sequence[Outcome]) -> Card:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    software = [f"PyTorch {torch.__version__}", f"Python {platform.python_version()}"]
    with contextlib.suppress(ImportError):
        import triton

        software.append(f"Triton {triton.__version__}")
    try:
        version = target.version
    except Exception:  # its package may fail in any way
        version = "not installed"
    return Card(
        target.name,
        target.text({}),
        f"{target.package} {version}",
        where,
        ", ".join(software),
        commit(),
        command,
        tuple(outcomes),
    )


def write(cards: Iterable[Card], out: Path) -> None:
    """Cards as files, out/cards/TARGET-DEVICE.json. Other cards stay, and so do checks that were not asked again."""
    folder = out / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    old = {card.name: card for card in (read(out) if any(folder.iterdir()) else ())}
    for card in cards:
        before = old.get(card.name)
        if before is not None and (before.version, before.software) == (card.version, card.software):
            outcomes = {o.check: o for o in (*before.outcomes, *card.outcomes)}
            order = [name for name in CHECKS if name in outcomes]
            command = card.command if len(order) == len(card.outcomes) else f"{before.command}; {card.command}"
            card = dataclasses.replace(card, command=command, outcomes=tuple(outcomes[name] for name in order))
        text = json.dumps(dataclasses.asdict(card), indent=1, allow_nan=False)
        (folder / f"{card.name}.json").write_text(text + "\n")


def read(out: Path) -> list[Card]:
    """The cards in a folder. Raises ValueError where there is none."""
    files = sorted((out / "cards").glob("*.json"))
    if not files:
        raise ValueError(f"{out} holds no card")
    cards = []
    for file in files:
        data = json.loads(file.read_text())
        outcomes = tuple(Outcome(**o | {"findings": tuple(o["findings"])}) for o in data.pop("outcomes"))
        cards.append(Card(**data, outcomes=outcomes))
    return cards
