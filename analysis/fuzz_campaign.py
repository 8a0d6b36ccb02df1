"""Campaigns of random problems under the oracle: resumable, on the CPU, in Triton's interpreter or on GPUs.

    cce-precision fuzz --problems 10000 --seed 0          cce-precision fuzz --minutes 10 --backend cuda --workers 16

"emulated": in the interpreter with the tiles and the tensor cores of an H200, judged by the bounds of one.

A folder holds rows.jsonl (a problem a line; an interrupted campaign goes on there), failures/ (an example a file: the
knobs as found, the knobs made small, what was wrong; `--replay` judges them again), summary.json and index.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from cce_precision import kernels
from cce_precision.analysis.bounds import HOPPER, Machine
from cce_precision.analysis.fuzz import judge
from cce_precision.analysis.fuzz_problems import COMPILED, Knobs, build, random_knobs, sensible
from cce_precision.analysis.fuzz_summary import holds, page, summary
from cce_precision.analysis.isolation import Lost, isolated
from cce_precision.numerics import Path as CodePath
from cce_precision.variants import ALL

__all__ = ["BACKENDS", "campaign", "replay", "settle", "shrink"]

BACKENDS = ("eager", "interpreter", "emulated", "cuda")
INTERPRETED = ("interpreter", "emulated")
SECONDS = 1800.0  # for one problem, a compilation and making it small included
SHRINKING = 60.0  # of the processor, for making an example small
SHRINKING_ALL = 180.0  # the same, for all examples of a process: a defect of many problems is small enough in a few
TRIES = 300  # calls that making an example small may take
FEATURES = 160  # sets of features of a campaign on a GPU
OF_SETS = ("bf16", "fp16", "fp32") * 4 + ("bf16",)  # dtypes of e in a variant's sets, in the shares of `random_knobs`
KIN = 64  # shapes that are tried for one of a kind
NUMBERS = ("seed", "scale", "margin", "upstream", "ignored", "nan_ignored")  # knobs that no kernel is compiled for
WITH_BIAS = ("straddle", "masked")  # patterns that need one
Row = dict[str, Any]
Example = TypeVar("Example")


def _judgement(knobs: Knobs, backend: str) -> Row:
    """What the oracle says of a problem on a backend: its quantities, or the error that was raised."""
    device = "cuda" if backend == "cuda" else "cpu"
    try:
        with _arithmetic(backend) as machine:
            # An interpreting process runs the kernels where they take the call; the others are asked for what they run.
            verdict = judge(knobs, None, machine, backend="eager" if backend == "eager" else "triton", device=device)
    except Exception as error:  # a crash is a finding like any other
        return {"error": f"{type(error).__name__}: {error}"}
    return {"quantities": {name: asdict(q) for name, q in verdict.quantities.items()}}


@contextlib.contextmanager
def _arithmetic(backend: str) -> Iterator[Machine | None]:
    """What the kernels calculate with, and the machine by whose bounds they are judged; None: what runs them."""
    if backend != "emulated":
        yield None
        return
    from cce_precision.analysis.tensor_core_passes import emulated

    with emulated():
        yield HOPPER


@functools.cache
def settle(device: str) -> None:
    """One thread, and one of the visible GPUs, for this process: processes spread over all."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())


def _runs(knobs: Knobs, backend: str) -> bool:
    """Whether a backend takes the call: the kernels do not take all."""
    if backend == "eager":
        return True
    call = build(knobs, "triton", "cuda" if backend == "cuda" else "cpu")
    return kernels.supports(call.placed(), call.plan) is None


def _kind(k: Knobs) -> tuple[object, ...]:
    """What kernels are compiled for in a shape: sizes of 1, of multiples of 8 and 16 (copies, vectors), tiles."""
    sizes = [(size == 1, size % 8 == 0, size % 16 == 0) for size in (k.n, k.v, k.d)]
    return (*sizes, k.n > 128, k.v > 128, k.v > 256, (k.d - 1).bit_length())


def _draw(index: int, seed: int, impls: Sequence[str], backend: str) -> Knobs:
    """Problem `index` of a campaign. On a GPU a call's features and the kind of its shape come from few, because each
    is a compilation: every variant has as many of them, and every dtype its share of a variant's.
    """
    compiled = tuple(k.impl for k in COMPILED[:1] if k.impl in impls)
    others = tuple(name for name in impls if name not in compiled)
    drawn = compiled if compiled and (index % 100 == 99 or not others) else others
    numbers = random.Random(f"{seed} {index}")
    if backend != "cuda":
        return next(k for k in (random_knobs(numbers, drawn) for _ in itertools.count()) if _runs(k, backend))
    features = random.Random(f"{seed} features {index % FEATURES}")
    turn, which = divmod(index % FEATURES, len(drawn))
    dtype, drawn = OF_SETS[turn % len(OF_SETS)], drawn[which : which + 1]
    k = next(
        k
        for k in (random_knobs(features, drawn) for _ in itertools.count())
        if k.e_dtype == dtype and _runs(k, backend)
    )
    other = random_knobs(numbers, drawn)
    changes: dict[str, Any] = {name: getattr(other, name) for name in NUMBERS}
    if k.pattern not in WITH_BIAS and other.pattern not in WITH_BIAS:
        changes["pattern"] = other.pattern
    shapes = (random_knobs(numbers, drawn) for _ in range(KIN))
    shape = next((x for x in shapes if _kind(x) == _kind(k)), k)
    changes |= {"n": shape.n, "v": shape.v, "d": shape.d}
    return sensible(dataclasses.replace(k, **changes))


def _row(index: int, seed: int, impls: Sequence[str], backend: str) -> Row:
    """Problem `index` of a campaign, judged, and made small where it fails."""
    settle(backend)
    knobs = _draw(index, seed, impls, backend)
    row = {"index": index, "seed": seed, "backend": backend, "knobs": json.loads(knobs.to_json())}
    row |= _judgement(knobs, backend)
    if not holds(row):
        began = time.process_time()
        ends = began + min(SHRINKING, SHRINKING_ALL - _shrinking.spent)
        fails = lambda k: time.process_time() < ends and _runs(k, backend) and not holds(_judgement(k, backend))  # noqa: E731
        small = shrink(knobs, fails, _smaller)
        row["small"] = json.loads(small.to_json())
        _shrinking.spent += time.process_time() - began
    return row


@dataclasses.dataclass
class _Shrinking:
    """What this process has spent on making examples small."""

    spent: float = 0.0


_shrinking = _Shrinking()


# Making an example small.


def shrink(
    example: Any, fails: Callable[[Any], bool], smaller: Callable[[Any], Iterable[Any]], tries: int = TRIES
) -> Any:
    """The last of a chain of `smaller` examples that all fail, found with at most `tries` calls of `fails`."""
    seen = {example}
    progress = True
    while progress:
        progress = False
        for candidate in smaller(example):
            if candidate in seen:
                continue
            if len(seen) > tries:
                return example
            seen.add(candidate)
            if fails(candidate):
                example, progress = candidate, True
                break
    return example


def _smaller(k: Knobs) -> Iterator[Knobs]:
    """Simpler knobs: a feature less, then smaller sizes."""
    for f in dataclasses.fields(Knobs):
        if f.name not in ("n", "v", "d", "impl", "seed") and getattr(k, f.name) != f.default:
            simpler: dict[str, Any] = {f.name: f.default}
            yield sensible(dataclasses.replace(k, **simpler))
    for name in ("n", "v", "d"):
        size = getattr(k, name)
        for less in dict.fromkeys((1, size // 2, size - 1)):
            if 0 < less < size:
                yield sensible(dataclasses.replace(k, **{name: less}))
    if k.seed:
        yield dataclasses.replace(k, seed=0)


# The folder.


def _read(path: Path, seed: int, backend: str) -> dict[int, Row]:
    """The rows of an earlier run of the same campaign; a last line that was cut short is left out."""
    rows: dict[int, Row] = {}
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if (row["seed"], row.get("backend", "eager")) == (seed, backend):
                rows[row["index"]] = row
    return rows


def _minutes(out: Path, seed: int, backend: str) -> float:
    """What earlier runs of the same campaign took, as far as they came to an end."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        found = json.loads((out / "summary.json").read_text())
        if (found.get("seed"), found["backend"]) == (seed, backend):
            return float(found["minutes"])
    return 0.0


def _store(row: Row, folder: Path) -> None:
    """A failure as a file that `replay` reads, named by its knobs."""
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(json.dumps(row["knobs"], sort_keys=True).encode()).hexdigest()[:12]
    entry = {key: value for key, value in row.items() if key != "index"}
    (folder / f"{row['backend']}-{name}.json").write_text(json.dumps(entry, indent=1) + "\n")


def _present(backend: str) -> None:
    """Raises ValueError for a GPU that is not there."""
    if backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("backend cuda: PyTorch sees no CUDA device here")


def _spread(
    work: Callable[[Any], Row], tasks: Iterable[Any], backend: str, workers: int
) -> Iterator[tuple[Any, Row | Lost]]:
    """`work` on all tasks, in this process (no workers) or in others; the interpreter always has one of its own."""
    if not workers and backend not in INTERPRETED:
        return ((task, work(task)) for task in tasks)
    settings = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if backend in INTERPRETED else {})
    return isolated(work, tasks, workers=max(workers, 1), seconds=SECONDS, environment=settings)


def campaign(
    problems: int | None,
    out: Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    impls: Sequence[str] = tuple(ALL),
    backend: str = "eager",
    workers: int = 0,
) -> dict[str, Any]:
    """Judges `problems` random problems, or as many as `minutes` allow, and writes what it found; returns the summary.

    `torch_compile` takes part with one problem in a hundred, of few shapes, because each shape is a compilation.
    Interrupted, it writes what it has; called again, it goes on. Raises ValueError for an unknown backend, a GPU that
    is not there, or no limit.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _present(backend)
    if problems is None and minutes is None:
        raise ValueError("a campaign needs a number of problems, or minutes")
    if backend != "eager":
        impls = tuple(name for name in impls if ALL[name].path is CodePath.TILED)
    some = (
        () if set(impls) >= {name for name in ALL if backend == "eager" or ALL[name].path is CodePath.TILED} else impls
    )
    if not impls:
        raise ValueError(f"none of the variants has a kernel, so backend {backend!r} runs none")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.jsonl"
    rows = _read(path, seed, backend)
    began, before = time.monotonic(), _minutes(out, seed, backend) if rows else 0.0
    cut_short = path.exists() and not path.read_text().endswith("\n")
    ends = None if minutes is None else began + 60 * minutes

    def todo() -> Iterator[int]:
        for index in itertools.count() if problems is None else range(problems):
            if ends is not None and time.monotonic() > ends:
                return
            if index not in rows:
                yield index

    work = functools.partial(_row, seed=seed, impls=impls, backend=backend)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with path.open("a") as file, Progress(*columns) as bar, contextlib.suppress(KeyboardInterrupt):
        task = bar.add_task("problems", total=problems, completed=sum(problems is None or i < problems for i in rows))
        failures = 0
        file.write("\n" * cut_short)
        for index, found in _spread(work, todo(), backend, workers):
            if isinstance(found, Lost):
                knobs = json.loads(_draw(index, seed, impls, backend).to_json()) if backend not in INTERPRETED else {}
                found = {"index": index, "seed": seed, "backend": backend, "knobs": knobs, "error": found.reason}
            rows[index] = found
            file.write(json.dumps(found) + "\n")
            file.flush()
            if not holds(found):
                failures += 1
                if found["knobs"]:
                    _store(found, out / "failures")
            bar.update(task, advance=1, description=f"problems, {failures} failures")
    result = summary([rows[i] for i in sorted(rows) if problems is None or i < problems], seed, backend, some)
    result["minutes"] = round(before + (time.monotonic() - began) / 60, 2)
    (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "index.md").write_text(page(result))
    return result


def replay(folder: Path, workers: int = 0) -> list[Row]:
    """The stored examples below a folder, or the one in a file, judged again: as found and as made small.

    Each row names its file, its knobs, and holds quantities or an error. Raises ValueError where there is none,
    or a GPU is not there.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("failures/*.json")) or sorted(folder.glob("*-*.json"))
    if not files:
        raise ValueError(f"{folder} holds no failure of a campaign")
    entries = [(file, json.loads(file.read_text())) for file in files]
    result: list[Row] = []
    for backend in BACKENDS:
        tasks = [
            (str(file), Knobs(**entry[key]))
            for file, entry in entries
            for key in ("knobs", "small")
            if entry["backend"] == backend and key in entry
        ]
        if tasks:
            _present(backend)
        for (name, knobs), found in _spread(functools.partial(_again, backend=backend), tasks, backend, workers):
            row = {"error": found.reason} if isinstance(found, Lost) else found
            result.append({"file": name, "backend": backend, "knobs": json.loads(knobs.to_json())} | row)
    return result


def _again(task: tuple[str, Knobs], backend: str) -> Row:
    settle(backend)
    return _judgement(task[1], backend)
