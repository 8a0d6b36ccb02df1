"""The benchmark: time, memory and error of every method at every shape, in turn in one run, beside the logits product.

    jobs     a shape, a dtype and a case; all methods see the same tensors
    call     loss = method(e, c, targets), then loss.backward(); one call gives all three kinds: loss-fw (the forward
             pass of a training step, gradients asked for), loss-bw (the backward pass) and loss-fw-bw (both)
    rounds   every method in turn, then every method again, so that drift of the machine meets all alike; the first
             round of calls (warm-up, memory, check) is not timed; a time is the median over the rounds, its spread the
             interquartile range
    turn     on CUDA a method repeats its step for 1.2 s, and the second half counts: a GPU lowers its clock under load
             for some half a second, and training is load. On a CPU one step
    graph    on CUDA, after the last round, the whole step as one CUDA graph, replayed for a turn: the host's time to
             launch kernels is left out. Of our methods and PyTorch's alone: those of cut-cross-entropy and Liger wait
             for the device in their step, and a capture that fails leaves PyTorch's generator unusable
    product  torch.mm(e, c^T) into memory that is there already, in the same rounds and the same way: the unit of
             "x product"
    memory   the most that PyTorch's allocator had handed out beyond the inputs; gradients count, a library's own
             scratch does not. CUDA: max_memory_allocated; CPU: the allocator's events of torch.profiler, summed in
             order of time
    error    normwise relative against the fp64 truth of the very same operands; the worse of the first and the last
             call

**No time without a green check.** A method passes when its loss and gradients are finite, each gradient is at least
twice as near to the truth as a zero gradient is (relative error <= 1/2: a missing 1/N, a dropped target term or an
empty gradient fail), and its loss is within 2^-6 max(1, |loss|) of the truth (a 16-bit running sum of losses fails).
Both checks are coarse on purpose: they say that a method computes the right thing; how well is in the error columns.

On CUDA a short wait is queued before each turn, so that the time to launch kernels shows only where it outlasts the
kernels.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cce_precision.analysis.bench_job import (
    DTYPES,
    Interrupted,
    Job,
    Row,
    captured,
    device_name,
    is_file,
    measure,
)
from cce_precision.analysis.bench_methods import DEFAULT, METHODS, Method, method
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.provenance import git
from cce_precision.analysis.shapes import SHAPES, Shape, shape

__all__ = ["Plan", "draw", "import_seconds", "plan", "provenance", "read", "run", "scaled", "verdict"]

LONG_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# The targets of the shape `cpu` on a CPU: cce_exact against the baseline.
CPU_TIME_TARGET, CPU_MEMORY_TARGET = 1.3, 0.2
JOB_KEY = ("n", "v", "d", "softcap", "dtype", "case", "device")


@dataclass(frozen=True)
class Plan:
    """All that a run does. `repeat` 0: as many rounds as fit in a minute a job, between 3 and 30. `limit`: most seconds
    for a method's first call, its compilation in it; 0: any."""

    device: torch.device
    jobs: tuple[Job, ...]
    methods: tuple[Method, ...]
    repeat: int = 0
    out: Path = Path("reports/bench")
    fresh: bool = False
    scale: bool = False
    limit: float = 0


# -- what to run -------------------------------------------------------------------------------------------------------


def plan(
    *,
    device: str = "auto",
    shapes: Sequence[str] = ("auto",),
    methods: Sequence[str] = ("auto",),
    dtypes: Sequence[str] = ("auto",),
    case: str = "trained",
    scale: bool = False,
    softcap: bool = True,
    repeat: int = 0,
    out: Path = Path("reports/bench"),
    fresh: bool = False,
    limit: float = 0,
) -> Plan:
    """The plan of these names; "auto" stands for what suits the device. Raises ValueError for a name that is not
    known."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch sees no CUDA device here; allowed: cpu, auto")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    auto = ["auto"]
    kinds = [LONG_NAMES.get(d, d) for d in dtypes]
    if list(dtypes) == auto:
        kinds = ["bf16"] if chosen.type == "cuda" else ["fp32", "bf16"]
    if unknown := [d for d in kinds if d not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]!r} is not known; known: {', '.join(DTYPES)}")
    if case not in CASES and not is_file(case):
        raise ValueError(f"case {case!r} is not known; known: {', '.join(CASES)}, or a head's .safetensors file")
    asked = list(shapes)
    if asked == auto:
        shapes = ["gemma2-2b"] if chosen.type == "cuda" else ["cpu"]
    sizes = [shape(text, softcap) for text in shapes]
    if case == "captured" or is_file(case):
        if asked != auto or scale:
            raise ValueError("a captured head has one shape: leave --shape and --scale away, or name another case")
        head = captured(case)
        sizes = [Shape(head.name, head.n, head.v, head.d, head.softcap if softcap else None)]
    if scale:
        sizes = [size for base in sizes for size in scaled(base, chosen.type)]
    found = tuple(dict.fromkeys(method(text) for text in (DEFAULT[chosen.type] if list(methods) == auto else methods)))
    jobs = tuple(Job(size, kind, case) for size in sizes for kind in kinds)
    if not jobs or not found:
        raise ValueError(f"nothing to measure; shapes: {', '.join(SHAPES)}; methods: {', '.join(METHODS)}")
    return Plan(chosen, jobs, found, repeat, Path(out), fresh, scale, limit)


def scaled(base: Shape, kind: str) -> list[Shape]:
    """`base` with other N, then with other V, by powers of two: 1k to 64k and 32k to 512k, on a CPU 256 to 4k and 8k
    to 128k."""
    tokens, vocabularies = (range(10, 17), range(15, 20)) if kind == "cuda" else (range(8, 13), range(13, 18))
    grown = [replace(base, n=2**k) for k in tokens] + [replace(base, v=2**k) for k in vocabularies]
    return list(dict.fromkeys(grown))


# -- a run -------------------------------------------------------------------------------------------------------------


def provenance() -> Row:
    """Commit (where there is no git checkout: CCE_COMMIT of the environment), versions, command and time of a run."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    with contextlib.suppress(ImportError):  # not everywhere
        import triton

        versions += f", triton {triton.__version__}"
    return {
        "commit": os.environ.get("CCE_COMMIT") or git("describe", "--always", "--dirty", "--exclude=*") or "unknown",
        "versions": versions,
        "command": "cce-precision " + " ".join(sys.argv[1:]),
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def read(out: Path) -> list[Row]:
    """The rows of a folder; of a method that a job measured twice the later ones, unless it did not run then."""
    lines = (out / "rows.jsonl").read_text().splitlines() if (out / "rows.jsonl").exists() else []
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(map(json.loads, filter(None, lines)), key=lambda row: str(row["measured_at"])):
        runs.setdefault((*(row[k] for k in JOB_KEY), row["method"], row["measured_at"]), []).append(row)
    jobs: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for (*key, name, _), rows in runs.items():
        methods = jobs.setdefault(tuple(key), {})
        if name not in methods or rows[0]["status"] != "skipped":
            methods[name] = rows
    return [row for methods in jobs.values() for rows in methods.values() for row in rows]


def _write(out: Path, rows: list[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    _tabulate(out, read(out))


def _tabulate(out: Path, rows: list[Row]) -> None:
    import pandas as pd

    pd.DataFrame(rows).to_parquet(out / "results.parquet", index=False)


def run(plan: Plan, console: Any) -> int:
    """Measures every job that the folder does not hold yet, printing a table and writing rows after each. Returns the
    exit code: 0, 1 where a method of ours failed its check, 130 after Ctrl-C."""
    from cce_precision.analysis.bench_page import table

    device = device_name(plan.device)
    console.print(f"{device}, {provenance()['versions']}")
    if plan.device.type == "cpu":
        with_torch, alone = import_seconds()
        console.print(
            f"import: torch {alone:.2f} s; from cce_precision import linear_cross_entropy {with_torch:.2f} s with it "
            f"({with_torch - alone:+.2f} s, target +0.30 s)"
        )
    names = {m.name for m in plan.methods}
    held: dict[tuple[Any, ...], list[Row]] = {}
    for row in [] if plan.fresh else read(plan.out):
        held.setdefault(tuple(row[k] for k in JOB_KEY), []).append(row)
    code = 0
    for job in plan.jobs:
        rows = held.get(job.key(device), [])
        if not names <= {row["method"] for row in rows}:
            stamp = provenance()
            try:
                with console.status(str(job)) as status:
                    say = functools.partial(_say, console, status, job)
                    rows = measure(job, plan.methods, plan.device, plan.repeat, say, plan.limit)
            except Interrupted as stop:
                rows, code = stop.rows, 130
            _write(plan.out, [row | stamp for row in rows])
        console.print(table(rows))
        if line := verdict(rows):
            console.print(line)
        if code == 130:
            console.print("interrupted; the same command goes on with the next job")
            break
        if any(row["family"] == "ours" and row["status"] == "failed" for row in rows):
            code = 1
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    draw(plan.out, console)
    return code


def _say(console: Any, status: Any, job: Job, what: str) -> None:
    """What is measured right now: in place on a terminal, else in lines on the standard error."""
    if console.is_terminal:
        status.update(f"{job}: {what}")
    else:
        print(f"{job}: {what}", file=sys.stderr, flush=True)


def verdict(rows: list[Row]) -> str:
    """cce_exact against the baseline in time and peak memory; with the targets where the shape has them."""
    full = {row["method"]: row for row in rows if row["kind"] == "loss-fw-bw" and row["rounds"]}
    if not {"baseline", "cce_exact"} <= set(full):
        return ""
    slower = full["cce_exact"]["time_ms"] / full["baseline"]["time_ms"]
    larger = full["cce_exact"]["peak_mib"] / full["baseline"]["peak_mib"]
    targets: tuple[str, ...] = ("", "")
    if full["baseline"]["shape"] == "cpu":
        targets = tuple(
            f" (target {limit:g}: {'met' if value <= limit else 'missed'})"
            for value, limit in ((slower, CPU_TIME_TARGET), (larger, CPU_MEMORY_TARGET))
        )
    return (
        f"cce_exact / baseline, loss and gradients: time {slower:.2f}{targets[0]}, "
        f"peak extra memory {larger:.3f}{targets[1]}"
    )


def draw(out: Path, console: Any) -> None:
    """Draws the folder's table and page from its rows."""
    from cce_precision.analysis import bench_page

    if not (rows := read(out)):
        console.print(f"{out} holds no rows to draw")
        return
    _tabulate(out, rows)
    console.print(f"{out / 'results.parquet'}; {bench_page.write(rows, out)}")


def import_seconds(repeats: int = 3) -> tuple[float, float]:
    """Median seconds of `from cce_precision import linear_cross_entropy` and of `import torch`, in fresh processes."""
    code = "import time; a = time.perf_counter(); {}; print(time.perf_counter() - a)"

    def seconds(statement: str) -> float:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-c", code.format(statement)]
        return float(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
            ).stdout
        )

    pairs = [
        (seconds("from cce_precision import linear_cross_entropy"), seconds("import torch")) for _ in range(repeats)
    ]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)
