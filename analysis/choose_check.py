"""Sampled measurement against the whole truth at full size, and errors of every variant for the table, on a GPU.

    python -m cce_precision.analysis.choose_check --out reports/choose

writes OUT/measure.json (the `trained` case at N=8192, V=256000, D=2304 in bf16: what 256 rows say of three variants,
what the whole fp64 truth says, and how long each took) and OUT/errors.jsonl (one row a variant, dtype and kind of
softmax, at N=8192, V=131072, D=1024 and on the captured head: the upper ends of intervals from 1024 rows).
`choose_table` reads the latter; --measure leaves it out. --small checks the command itself, on any device.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cce_precision.analysis.bench import provenance
from cce_precision.analysis.bench_job import device_name, relative_error
from cce_precision.analysis.cases import CASES, Case
from cce_precision.analysis.choose import Run, candidates
from cce_precision.analysis.references import truth
from cce_precision.analysis.sampled import ExactRows, measure
from cce_precision.choosing import Errors
from cce_precision.numerics import Path as Way
from cce_precision.variants import DEFAULT, get

__all__ = ["errors", "full_size"]

FULL = (8192, 256000, 2304)
REAL = (8192, 131072, 1024)
SMALL = (256, 2048, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IMPLS = ("cce_exact", "cce", "baseline")
ROWS = 1024
DIGITS = 2.0**-30  # to which the fp64 of both sides agrees


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def full_size(shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Sampled errors of some variants beside the whole truth's, and seconds."""
    n, v, d = shape
    case = CASES["trained"](n=n, v=v, d=d, dtype=torch.bfloat16, device=device)
    results = {impl: Run(impl)(case) for impl in IMPLS}
    found: dict[str, Any] = {"n": n, "v": v, "d": d, "case": "trained", "dtype": "bf16", "impls": {}}
    for impl, (loss, de, dc) in results.items():
        found["impls"][impl] = {}
        for lse in ("fp32", "fp64"):
            for attempt in ("first", "again"):  # the first call brings library handles and code with it
                started = _now(device)
                one = measure(
                    case.e, case.c, case.targets, dE=de, dC=dc, loss=loss, ignore_index=-1, lse=lse, seed=1
                )  # fmt: skip
                seconds = _now(device) - started
                found["impls"][impl].setdefault(lse, {})[f"seconds_{attempt}"] = seconds
            found["impls"][impl][lse]["sampled"] = one.as_dict()
    started = _now(device)
    exact = truth(case)
    found["truth_seconds"] = _now(device) - started
    for impl, (loss, de, dc) in results.items():
        whole = {
            "loss": abs(float(loss) - float(exact.value)) / abs(float(exact.value)),
            "dE": relative_error(de, exact.dE),
            "dC": relative_error(dc, exact.dC),
        }
        found["impls"][impl]["whole"] = whole
        for lse in ("fp32", "fp64"):
            part = found["impls"][impl][lse]["sampled"]
            found["impls"][impl][lse]["covered"] = {
                side: part[side]["rel"]["low"] * (1 - DIGITS) <= whole[side] <= part[side]["rel"]["high"] * (1 + DIGITS)
                for side in ("dE", "dC")
            }
    return found


def _cases(shape: tuple[int, int, int], device: torch.device) -> Iterator[tuple[str, str, Case]]:
    """(kind, dtype, case) that the table of errors knows."""
    n, v, d = shape
    for name, dtype in DTYPES.items():
        for case, kind in (("init", "flat"), ("trained", "peaked"), ("confident", "peaked")):
            yield kind, name, CASES[case](n=n, v=v, d=d, dtype=dtype, device=device)
        for stage in ("initial", "early", "trained"):
            kind = "flat" if stage == "initial" else "diffuse"
            yield kind, name, CASES["captured"](dtype=dtype, stage=stage, device=device)


def errors(shape: tuple[int, int, int], device: torch.device, say: Any) -> Iterator[dict[str, Any]]:
    """Errors of every variant that runs here on every case."""
    for kind, dtype, case in _cases(shape, device):
        exact = None
        for one in candidates(case):
            if get(one.impl).path is Way.COMPILED and dtype != "bf16":
                continue  # the same expression as the baseline; compiling takes its time
            say(f"{case.name} {case.stage}, {dtype}: {one.impl}")
            try:
                loss, de, dc = one(case, seed=1)
            except Exception as error:  # a variant that cannot run here is left out, with its reason
                say(f"{one.impl}: {type(error).__name__}: {str(error)[:200]}")
                continue
            if exact is None:
                _, like_e, like_c = Run(DEFAULT)(case)
                exact = ExactRows(case, (like_e, like_c), rows=ROWS, columns=ROWS, lse="fp64")
            found = exact.compare(de, dc, loss)
            assert found.dE and found.dC and found.loss
            high = Errors(found.loss.rel, found.dE.rel.high, found.dC.rel.high)
            yield {
                "n": case.n, "v": case.v, "d": case.d, "case": case.name, "stage": case.stage, "kind": kind,
                "dtype": dtype, "impl": one.impl, "one_pass": one.workspace_mb is not None, **high._asdict(),
                "rel_dE": found.dE.rel.value, "rel_dC": found.dC.rel.value,
            }  # fmt: skip
            del loss, de, dc
        del exact
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/choose"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", action="store_true", help="measure.json alone")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    stamp = provenance() | {"device": device_name(device)}
    stamp["command"] = f"python -m cce_precision.analysis.choose_check {' '.join(sys.argv[1:])}".strip()

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    say("sampled measurement at full size")
    found = full_size(SMALL if given.small else FULL, device)
    (given.out / "measure.json").write_text(json.dumps(found | stamp, indent=1) + "\n")
    gc.collect()
    if given.measure:
        return
    with (given.out / "errors.jsonl").open("w") as file:
        for row in errors(SMALL if given.small else REAL, device, say):
            file.write(json.dumps(row | stamp) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
