"""Training runs that differ in nothing but the loss: `cce-precision train --compare fp32,baseline,cce,...`.

Every method trains from the same weights on the same windows in the same order, for each of several seeds (which
draw the weights and the order). The first method is the reference that the others are subtracted from, run by run.
Training amplifies any difference, however small: `fp32-perturbed`, the reference from weights one rounding away, shows
how far apart two runs drift that are equally right, and with it what a difference has to exceed.

A folder holds one run a subfolder (see `train`), which resumes by itself; runs.jsonl, a line a finished run, is what
the page is drawn from.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cce_precision.analysis.bench import provenance
from cce_precision.analysis.sampled_statistics import t_quantile
from cce_precision.analysis.train import Outcome, Recipe, Row, run
from cce_precision.analysis.train_models import Method
from cce_precision.analysis.train_text import Tokens

__all__ = ["Comparison", "Difference", "Run", "compare", "differences", "failures", "gather", "read", "smoothed"]

DIGITS = 8  # of the numbers in runs.jsonl
CONFIDENCE = 0.95
REASON = 400  # characters of a failure that are kept
STOPPED = 130  # exit code of a process whose run was stopped


@dataclass(frozen=True)
class Comparison:
    """Which runs to make. Raises ValueError for methods that are unknown or given twice."""

    recipe: Recipe  # of every run but for method and seed
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for method in self.methods:
            Method.parse(method)
        if len(set(self.methods)) != len(self.methods) or len(self.methods) < 2:
            raise ValueError(f"compare needs at least two methods, each once, got {', '.join(self.methods)}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must differ, and there must be one, got {self.seeds}")

    def recipes(self) -> list[Recipe]:
        """One a run, seed by seed, so that a comparison that is stopped has whole seeds."""
        return [replace(self.recipe, method=m, seed=s) for s in self.seeds for m in self.methods]


@dataclass(frozen=True)
class Run:
    """One finished run: its curves by step."""

    method: str
    seed: int
    train: dict[int, float]  # step: loss before it
    heldout: dict[int, float]
    gradient: dict[int, Row]  # step: dE, dC and their intervals
    tokens_per_second: float  # median
    peak_mib: float
    about: Row  # recipe and provenance


def slug(method: str) -> str:
    """A method's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", method)


# -- making the runs ---------------------------------------------------------------------------------------------------


def compare(
    todo: Comparison,
    tokens: Tokens,
    out: Path,
    *,
    device: str | None = None,
    processes: int = 1,
    on_row: Callable[[Recipe, Row], None] = lambda recipe, row: None,
    until: float = math.inf,
) -> bool:
    """Makes the runs that a folder lacks, `processes` at a time; whether all are there.

    `until`: a time.time() after which the runs in progress stop; the same call goes on with them. So it does after
    Ctrl-C, which raises KeyboardInterrupt once the runs in progress have written their checkpoints. A run that raises
    is noted in runs.jsonl (a loss that is no number is a result too), tried again by the next call, and stops no other.
    """
    out.mkdir(parents=True, exist_ok=True)
    recipes = todo.recipes()
    whole = True
    if processes == 1:
        for recipe in recipes:
            done = _one(recipe, tokens, out, device, partial(on_row, recipe), lambda: time.time() > until)
            whole &= done is not False
            if done is False and time.time() <= until:
                raise KeyboardInterrupt
        return whole
    path = out / "tokens.npz"
    tokens.save(path)
    context = multiprocessing.get_context("spawn")
    stop, rows = context.Event(), context.Queue()
    threading.Thread(target=_relay, args=(rows, on_row), daemon=True).start()
    threads = max(1, (os.cpu_count() or 1) // processes)
    # A process a run: its peak memory is its own, and a device that one run has broken is not the next one's.
    waiting = list(reversed(recipes))
    running: dict[Any, tuple[Any, Recipe]] = {}  # by what says that the process ended
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                recipe = waiting.pop()
                if _there(recipe, tokens, out):
                    continue
                if time.time() > until:
                    whole = False
                    continue
                worker = context.Process(target=_work, args=(recipe, path, out, device, threads, stop, rows, until))
                worker.start()
                running[worker.sentinel] = worker, recipe
            for sentinel in multiprocessing.connection.wait(list(running)):
                worker, recipe = running.pop(sentinel)
                worker.join()
                whole &= worker.exitcode != STOPPED
                if worker.exitcode not in (0, STOPPED):
                    _note_failure(recipe, out, f"its process ended with exit code {worker.exitcode}")
    except BaseException:
        stop.set()  # the runs in progress write their checkpoints
        for worker, _ in running.values():
            worker.join()
        raise
    path.unlink()
    return whole


def _folder(recipe: Recipe, out: Path) -> Path:
    return out / f"{slug(recipe.method)}-seed{recipe.seed}"


def _there(recipe: Recipe, tokens: Tokens, out: Path) -> bool:
    """Whether this very run is finished."""
    summary = _folder(recipe, out) / "summary.json"
    held: Row = json.loads(summary.read_text()) if summary.exists() else {"failed": ""}
    return "failed" not in held and held["recipe"] == asdict(recipe) and held["tokens"]["digest"] == tokens.digest


def _note_failure(recipe: Recipe, out: Path, reason: str) -> None:
    folder = _folder(recipe, out)
    folder.mkdir(exist_ok=True)
    line = {"method": recipe.method, "seed": recipe.seed, "failed": reason}
    (folder / "summary.json").write_text(json.dumps(line) + "\n")


def _one(
    recipe: Recipe,
    tokens: Tokens,
    out: Path,
    device: str | None,
    on_row: Callable[[Row], None],
    stopped: Callable[[], bool],
) -> bool | None:
    """One run of a comparison, unless it is there; whether it is now, None where it raised."""
    if _there(recipe, tokens, out):
        return True
    if stopped():
        return False
    folder = _folder(recipe, out)
    try:
        outcome = run(recipe, tokens, folder, device=device, on_row=on_row, stopped=stopped, keep_model=False)
    except ValueError:  # what was asked for cannot be
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        _note_failure(recipe, out, f"{type(error).__name__}: {said[:REASON]}")
        return None
    if outcome.finished and outcome.curve:
        (folder / "summary.json").write_text(json.dumps(_summary(recipe, tokens, outcome)) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return outcome.finished


def _work(
    recipe: Recipe, path: Path, out: Path, device: str | None, threads: int, stop: Any, rows: Any, until: float
) -> None:
    """One run in a process of its own; exit code STOPPED where it was stopped."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the runs
    torch.set_num_threads(threads)
    stopped = lambda: stop.is_set() or time.time() > until  # noqa: E731
    try:
        if _one(recipe, Tokens.load(path), out, device, lambda row: rows.put((recipe, row)), stopped) is False:
            sys.exit(STOPPED)
    except ValueError as error:
        _note_failure(recipe, out, f"ValueError: {error}")


def _relay(rows: Any, on_row: Callable[[Recipe, Row], None]) -> None:
    while True:
        on_row(*rows.get())


def _summary(recipe: Recipe, tokens: Tokens, outcome: Outcome) -> Row:
    """The line of a run in runs.jsonl."""

    def curve(kind: str) -> list[Row]:
        return [row for row in outcome.curve if row["kind"] == kind]

    short = lambda x: float(f"{x:.{DIGITS}g}")  # noqa: E731
    train = curve("train")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "method": recipe.method,
        "seed": recipe.seed,
        "train": [short(row["loss"]) for row in train],
        "heldout": [[row["step"], short(row["loss"])] for row in curve("heldout")],
        "gradient": [
            {k: short(v) if isinstance(v, float) else v for k, v in row.items() if k != "kind"}
            for row in curve("gradient")
        ],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in train),
        "peak_mib": max(row["peak_mib"] for row in train),
        "recipe": asdict(recipe),
        "tokens": {"training": len(tokens.training), "heldout": len(tokens.heldout), "vocabulary": tokens.vocabulary}
        | {"digest": tokens.digest},
        "device": device,
        **provenance(),
    }


def gather(todo: Comparison, out: Path) -> int:
    """Writes runs.jsonl from the finished and the failed runs of a folder; how many finished."""
    lines = []
    for recipe in todo.recipes():
        path = out / f"{slug(recipe.method)}-seed{recipe.seed}" / "summary.json"
        if path.exists():
            lines.append(path.read_text())
    (out / "runs.jsonl").write_text("".join(lines))
    return len(lines) - len(failures(out))


# -- reading them ------------------------------------------------------------------------------------------------------


def _lines(out: Path) -> list[Row]:
    path = out / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def failures(out: Path) -> list[str]:
    """The runs of a folder's runs.jsonl that raised, each with its reason."""
    return [f"{one['method']}, seed {one['seed']}: {one['failed']}" for one in _lines(out) if "failed" in one]


def read(out: Path) -> list[Run]:
    """The finished runs of a folder's runs.jsonl. Raises ValueError where there is none."""
    found = [one for one in _lines(out) if "failed" not in one]
    if not found:
        raise ValueError(f"{out / 'runs.jsonl'} holds no run; run the comparison first")
    runs = []
    for one in found:
        runs.append(
            Run(
                one["method"],
                one["seed"],
                {i + 1: loss for i, loss in enumerate(one["train"])},
                {int(step): loss for step, loss in one["heldout"]},
                {row["step"]: row for row in one["gradient"]},
                one["tokens_per_second"],
                one["peak_mib"],
                {k: v for k, v in one.items() if k not in ("train", "heldout", "gradient")},
            )
        )
    return runs


def smoothed(curve: dict[int, float], windows: int) -> dict[float, float]:
    """Means of a curve over so many runs of equal length, at their middle steps."""
    steps = sorted(curve)
    size = max(1, len(steps) // windows)
    parts = [steps[i : i + size] for i in range(0, len(steps) - size + 1, size)]
    return {statistics.fmean(part): statistics.fmean(curve[s] for s in part) for part in parts}


@dataclass(frozen=True)
class Difference:
    """A method's loss less the reference's of the same seed: mean over the seeds and its 95 % interval's half width
    (NaN for one seed); `each` by seed."""

    mean: float
    half: float
    each: dict[int, float]

    @staticmethod
    def of(each: dict[int, float]) -> Difference:
        values = list(each.values())
        if len(values) < 2:
            return Difference(values[0] if values else math.nan, math.nan, each)
        spread = statistics.stdev(values) / math.sqrt(len(values))
        # Student's t: the two-sided quantile for so few seeds.
        return Difference(statistics.fmean(values), t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * spread, each)

    @property
    def apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.half


def differences(
    runs: Iterable[Run], reference: str, curve: Callable[[Run], dict[Any, float]]
) -> dict[str, dict[Any, Difference]]:
    """By method and step: what `curve` gives less what it gives for the reference's run of the same seed."""
    by = {(r.method, r.seed): curve(r) for r in runs}
    methods = dict.fromkeys(m for m, _ in by if m != reference)
    found: dict[str, dict[Any, Difference]] = {}
    for method in methods:
        pairs = {s: (own, by[reference, s]) for (m, s), own in by.items() if m == method and (reference, s) in by}
        steps: Sequence[Any] = sorted({step for own, base in pairs.values() for step in own if step in base})
        found[method] = {
            step: Difference.of(
                {s: own[step] - base[step] for s, (own, base) in pairs.items() if step in own and step in base}
            )
            for step in steps
        }
    return found


def late(run_: Run) -> dict[str, float]:
    """One number a run: the mean training loss of the last quarter."""
    steps = sorted(run_.train)
    return {"late": statistics.fmean(run_.train[s] for s in steps[-max(1, len(steps) // 4) :])}
