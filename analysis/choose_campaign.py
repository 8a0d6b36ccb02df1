"""Is the choice right? Random problems on the CPU, each chosen for by measurement, then judged by the truth.

    OMP_NUM_THREADS=1 python -m cce_precision.analysis.choose_campaign --problems 200 --seed 0 --out reports/choose

A problem is a case (init, trained, confident, or a captured head at a random stage), a shape, a dtype and a tolerance,
one in five without one (the promise to be no less exact than `baseline`). `choose.measured` takes a variant. Then every
variant runs again with another seed against the fp64 truth of the whole problem, and is timed in further rounds:

    meets   the chosen variant's largest error of dE and dC is within the tolerance
    ratio   its time over that of the fastest variant that truly meets the tolerance, the median over the rounds

Rows are appended to OUT/problems.jsonl, one a problem; the same command goes on where it stopped. They are also what
the table of costs and errors on a CPU is fitted to (`choose_table`). Times are the process's own CPU time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cce_precision.analysis.bench import provenance
from cce_precision.analysis.bench_job import device_name
from cce_precision.analysis.cases import CASES, Case
from cce_precision.analysis.choose import Run, Timer, measured, race
from cce_precision.analysis.metrics import relative
from cce_precision.analysis.references import truth
from cce_precision.choosing import BASELINE, Errors

__all__ = ["campaign", "judge", "one", "problem_of", "summary"]

KINDS = {"init": "flat", "trained": "peaked", "confident": "peaked", "captured": "diffuse"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCES = {"bf16": (2e-3, 1e-1), "fp16": (3e-4, 3e-2), "fp32": (2e-7, 1e-3)}
SIZES = {"n": (64, 256), "v": (512, 4096), "d": (16, 192)}
CAPTURED = (64, 160)  # tokens of a captured head
FRESH_SEED = 10_000  # variants that sample are judged by a draw that the choice has not seen
ROUNDS = 5
WITHIN = 1.15


def _between(random: random.Random, low: float, high: float) -> float:
    return float(low * (high / low) ** random.random())


def problem_of(index: int, seed: int) -> tuple[Case, dict[str, Any]]:
    """Problem `index` of a campaign: the case and what it is."""
    draw = random.Random(seed * 1_000_003 + index)
    name = draw.choice(list(KINDS))
    dtype = draw.choice(("bf16", "bf16", "fp16", "fp32"))
    n, v, d = (round(_between(draw, *SIZES[key])) for key in ("n", "v", "d"))
    if name == "captured":
        stage = draw.choice(("initial", "early", "trained"))
        case = CASES[name](n=round(_between(draw, *CAPTURED)), dtype=DTYPES[dtype], stage=stage)
        kind = "flat" if stage == "initial" else "diffuse"
    else:
        case, kind = CASES[name](n=n, v=v, d=d, dtype=DTYPES[dtype], seed=index), KINDS[name]
    tolerance = None if draw.random() < 0.2 else float(f"{_between(draw, *TOLERANCES[dtype]):.2g}")
    what = {"index": index, "seed": seed, "case": name, "stage": case.stage, "kind": kind, "dtype": dtype}
    return case, {**what, "n": case.n, "v": case.v, "d": case.d, "tolerance": tolerance}


def judge(case: Case, tolerance: float | None, chosen: str | None, impls: Sequence[str]) -> dict[str, Any]:
    """Errors of every variant against the truth, their times in turn, and how the chosen one stands."""
    exact = truth(case)
    errors: dict[str, Errors] = {}
    for name in impls:
        loss, de, dc = Run(name)(case, FRESH_SEED)
        loss_error = abs(float(loss) - float(exact.value)) / abs(float(exact.value))
        errors[name] = Errors(loss_error, relative(de, exact.dE), relative(dc, exact.dC))
    limit = errors[BASELINE]

    def passes(found: Errors) -> bool:
        return found.gradient <= tolerance if tolerance is not None else found.no_worse_than(limit)

    able = [name for name in impls if passes(errors[name])]
    timer, times = Timer(case.e.device), {}
    for group in (able, [name for name in impls if name not in able]):
        for one, found in race(case, [Run(name) for name in group], timer, ROUNDS).items():
            times[one.impl] = found
    middle = {name: statistics.median(found) for name, found in times.items()}
    slower = {}
    if chosen is not None:  # rounds in turn: what slows the machine down slows both of a pair
        slower = {name: statistics.median(a / b for a, b in zip(times[chosen], times[name])) for name in able}
    fastest = max(slower, key=lambda name: slower[name]) if slower else min(able, key=lambda n: middle[n], default=None)
    met = fastest is None if chosen is None else passes(errors[chosen])
    ratio = slower[fastest] if slower and fastest is not None else None
    products = {}
    for dtype in dict.fromkeys((case.operand_dtype, torch.float32)):
        e, c = case.e.to(dtype), case.c.to(dtype)
        out = torch.empty(case.n, case.v, dtype=dtype)
        torch.mm(e, c.T, out=out)
        name = str(dtype).removeprefix("torch.")
        products[name] = min(timer(lambda: torch.mm(e, c.T, out=out)) for _ in range(ROUNDS))  # noqa: B023
    return {
        "chosen": chosen, "fastest": fastest, "meets": met, "ratio": ratio, "product_ms": products,
        "variants": {name: {"time_ms": middle[name], **errors[name]._asdict()} for name in impls},
    }  # fmt: skip


def one(index: int, seed: int) -> dict[str, Any]:
    """Row `index` of a campaign."""
    torch.set_num_threads(1)
    case, what = problem_of(index, seed)
    choice = measured(case, tolerance=what["tolerance"], seed=index)
    best = choice.best
    impls = sorted(found.impl for found in choice.candidates)
    row = what | judge(case, what["tolerance"], None if best is None else best.impl, impls)
    for found in choice.candidates:
        row["variants"][found.impl]["memory_mib"] = found.memory_mib
    return row | {"device": device_name(torch.device("cpu"))}


def campaign(problems: int, seed: int, out: Path, console: Any, workers: int = 1) -> list[dict[str, Any]]:
    """Runs what `out`/problems.jsonl does not hold yet, in so many processes, and returns all rows by index."""
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    path = out / "problems.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["seed"], row["index"]) for row in rows}
    left = [index for index in range(problems) if (seed, index) not in done]
    stamp = provenance()
    stamp["command"] = f"python -m cce_precision.analysis.choose_campaign {' '.join(sys.argv[1:])}".strip()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        path.open("a") as file,
    ):
        task = progress.add_task("choosing", total=problems, completed=problems - len(left))
        try:
            for future in as_completed([pool.submit(one, index, seed) for index in left]):
                rows.append(future.result() | stamp)
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                progress.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(rows, key=lambda row: (row["seed"], row["index"]))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows say: how many choices met their tolerance, and the distribution of the time ratio."""
    ratios = sorted(row["ratio"] for row in rows if row["ratio"] is not None)
    quantiles = {
        f"{q:g}": ratios[min(len(ratios) - 1, round(q * (len(ratios) - 1)))] for q in (0.5, 0.9, 0.95, 0.99, 1)
    }
    return {
        "problems": len(rows),
        "meets": sum(row["meets"] for row in rows),
        "none_meets": sum(row["chosen"] is None and row["fastest"] is None for row in rows),
        "missed": [row["index"] for row in rows if not row["meets"]],
        "within": sum(r <= WITHIN for r in ratios),
        "of": len(ratios),
        "ratio": quantiles,
        "slower": [row["index"] for row in rows if row["ratio"] is not None and row["ratio"] > WITHIN],
        "chosen": {
            name: sum(row["chosen"] == name for row in rows)
            for name in sorted({row["chosen"] for row in rows if row["chosen"]})
        },
    }  # fmt: skip


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reports/choose"))
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    given = parser.parse_args()
    console = Console()
    rows = campaign(given.problems, given.seed, given.out, console, given.workers)
    console.print_json(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
