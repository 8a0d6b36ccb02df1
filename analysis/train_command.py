"""The command `cce-precision train`: from its options to a run or a comparison, with what the screen shows of it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cce_precision.analysis import convergence
from cce_precision.analysis.train import Recipe, Row, is_main, run
from cce_precision.analysis.train_text import SHIPPED, Tokens, tokenise

__all__ = ["alone", "compare", "draw", "load", "on_gpu", "start"]

STOPPED = 130


def load(
    recipe: Recipe,
    text: Sequence[Path],
    heldout: Path | None,
    *,
    tokenizer: Path | None,
    vocabulary: int,
    field: str,
    megabytes: float | None,
    console: Console,
) -> Tokens:
    """The tokens that the options name: the shipped text where none is given, a pretrained model's own tokenizer.

    Raises ValueError or FileNotFoundError as `train_text.tokenise`.
    """
    separator = None
    if recipe.model is not None:
        folder = Path(recipe.model)
        tokenizer = tokenizer or folder
        settings = folder / "config.json"
        found = json.loads(settings.read_text()).get("eos_token_id") if settings.is_file() else None
        separator = found if isinstance(found, int) else None
    started = time.perf_counter()
    tokens = tokenise(
        text or [SHIPPED],
        heldout,
        context=recipe.context,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        separator=separator,
        field=field,
        megabytes=megabytes,
    )
    if is_main():
        counts = f"{len(tokens.training):,} tokens to train on, {len(tokens.heldout):,} held out"
        console.print(f"{counts}, V = {tokens.vocabulary:,}, read in {time.perf_counter() - started:.0f} s")
    return tokens


def on_gpu(device: str) -> bool:
    """Whether the runs take a GPU. Raises ValueError for a device that is neither auto nor cpu."""
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device: {device!r} is neither auto nor cpu; CUDA_VISIBLE_DEVICES chooses among GPUs")
    return device == "auto" and torch.cuda.is_available()


def start(
    recipe: Recipe,
    text: Sequence[Path],
    heldout: Path | None,
    reading: dict[str, Any],
    out: Path,
    console: Console,
    *,
    methods: Sequence[str],
    seeds: int,
    fresh: bool,
    device: str | None,
    processes: int,
    minutes: float | None,
) -> int:
    """One run, or with `methods` a comparison of them with so many seeds; the command's exit code.

    `reading`: the options of `load`. Raises ValueError or FileNotFoundError for what cannot be.
    """
    todo = None
    if methods:
        todo = convergence.Comparison(recipe, tuple(methods), tuple(range(recipe.seed, recipe.seed + seeds)))
    elif seeds > 1:
        raise ValueError("--seeds belongs to --compare; one run has --seed")
    tokens = load(recipe, text, heldout, **reading, console=console)
    if fresh:
        clear(out)
    if todo is None:
        return alone(recipe, tokens, out, console, device=device, minutes=minutes)
    return compare(todo, tokens, out, console, device=device, processes=processes, minutes=minutes)


def clear(out: Path) -> None:
    """Removes the runs of a folder, and nothing else."""
    for folder in (out, *(p.parent for p in out.glob("*/recipe.json"))):
        for path in (*folder.glob("checkpoint-*"), *folder.glob("part-*"), folder / "model"):
            shutil.rmtree(path, ignore_errors=True)
        for name in ("recipe.json", "curve.jsonl", "summary.json", "runs.jsonl", "index.html"):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar over steps: a function of the steps done and of what is said beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not is_main()) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=text)


def _said(row: Row) -> str:
    return f"loss {row['loss']:.4f}  {row['tokens_per_second']:,} tokens/s  {row['peak_mib']:,.0f} MiB"


def alone(
    recipe: Recipe, tokens: Tokens, out: Path, console: Console, *, device: str | None, minutes: float | None
) -> int:
    """One run under a progress bar; the command's exit code: 0, or 130 where it was stopped and can go on."""
    until = math.inf if minutes is None else time.time() + 60 * minutes
    with _bar(console, recipe.steps) as show:

        def on_row(row: Row) -> None:
            if row["kind"] == "train":
                show(row["step"], _said(row))
            elif row["kind"] == "heldout":
                console.print(f"step {row['step']}: held-out loss {row['loss']:.4f}")
            else:
                console.print(f"step {row['step']}: error of dE {row['dE']:.2e}, of dC {row['dC']:.2e}")

        outcome = run(recipe, tokens, out, device=device, on_row=on_row, stopped=lambda: time.time() > until)
    if not is_main():
        return 0 if outcome.finished else STOPPED
    if not outcome.finished:
        console.print(f"stopped at step {outcome.step} of {recipe.steps}; the same command goes on from {out}")
        return STOPPED
    console.print(f"{out / 'curve.jsonl'}; the model is in {out / 'model'}")
    return 0


def compare(
    todo: convergence.Comparison,
    tokens: Tokens,
    out: Path,
    console: Console,
    *,
    device: str | None,
    processes: int,
    minutes: float | None,
) -> int:
    """All runs of a comparison under one bar, then the page; exit codes as `alone`, and 1 where a run raised."""
    until = math.inf if minutes is None else time.time() + 60 * minutes
    done: dict[tuple[str, int], int] = {}
    stopped = False
    with _bar(console, todo.recipe.steps * len(todo.recipes())) as show:

        def on_row(recipe: Recipe, row: Row) -> None:
            name = f"{recipe.method}, seed {recipe.seed}"
            if row["kind"] == "train":
                done[recipe.method, recipe.seed] = row["step"]
                show(sum(done.values()), f"{name}  {_said(row)}")
            elif row["kind"] == "heldout" and (row["step"] == recipe.steps or not console.is_terminal):
                console.print(f"{name}, step {row['step']}: held-out loss {row['loss']:.4f}")

        try:
            whole = convergence.compare(
                todo, tokens, out, device=device, processes=processes, on_row=on_row, until=until
            )
        except KeyboardInterrupt:
            whole, stopped = False, True
    if is_main():
        count, total = convergence.gather(todo, out), len(todo.recipes())
        failed = convergence.failures(out)
        for reason in failed:
            console.print(f"failed: {reason}", markup=False)
        if count:
            draw(out, console)
        if not whole:
            why = "stopped" if stopped else "out of time"
            console.print(f"{why} with {count} of {total} runs finished; the same command goes on")
        if whole and failed:
            return 1
    return 0 if whole else STOPPED


def draw(out: Path, console: Console) -> None:
    """The page from the folder's runs.jsonl. Raises ValueError where there is none."""
    from importlib.util import find_spec

    from cce_precision.analysis import convergence_page

    if not find_spec("plotly"):
        console.print(f"{out / 'runs.jsonl'}; for the page: pip install 'cce-precision[report]', then --page-only")
        return
    console.print(str(convergence_page.build(out)))
