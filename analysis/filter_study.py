"""What filters with and without bias cost and leave: error against time, averaged over draws, on rows of rare words.

    python -m cce_precision.analysis.filter_study --device cpu --out reports/unbiased-filter
    python -m cce_precision.analysis.filter_study --device cuda --out OUT --heads FOLDER --seconds-limit 120

FOLDER holds captured-STAGE.safetensors, as `pretrain` writes them. Rows are appended to OUT/rows.jsonl, each with its
subject (case, stage, n, v, d, dtype, device), what it is and of which method:

    head       what the softmax is like
    step       errors of the gradients of one step against fp64, also by how often a row of dC is a target; entries a
               row that enter dE, counted on at most 1024 tokens
    time       of a step, beside the logits product, as `bench` takes it: on CUDA alone, methods in turn, each in a row
               of steps, no time without the check of the same calls
    average    error of gradients averaged over 1 to 64 draws: the root mean square over groups of draws
    estimator  errors of other estimators of what a filter leaves out (`filter_estimators`), on the shipped head and a
               synthetic trained one

The same command goes on where it stopped, after Ctrl-C or at its limit, and tries again what failed.
`filter_study_page` draws the page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bench import provenance
from cce_precision.analysis.bench_job import DTYPES, FLOOR, Interrupted, Job, device_name, measure, relative_error
from cce_precision.analysis.bench_methods import Call
from cce_precision.analysis.bench_methods import Method as Timed
from cce_precision.analysis.capture import STAGES
from cce_precision.analysis.cases import CASES, Case, describe, from_file
from cce_precision.analysis.filter_estimators import ESTIMATORS, Softmax, errors
from cce_precision.analysis.references import truth
from cce_precision.analysis.shapes import SHAPES, Shape
from cce_precision.analysis.train_models import Method
from cce_precision.numerics import Variant

__all__ = [
    "AVERAGED",
    "METHODS",
    "ONE_PASS",
    "ROOM_MB",
    "SUBJECT",
    "Study",
    "Subject",
    "contender",
    "main",
    "read",
    "run",
    "subjects",
]

EXPONENTS = (10, 12, 14, 16)
SHARES = (4, 8, 16, 32)
ONE_PASS = "cce_exact@4096MB"
DENSE = ("baseline", "cce_exact", ONE_PASS, "cce_split")
FILTERS = ("cce", "cce_sparse", "cce_unbiased")
ROOM_MB = 1024  # a workspace in which the entries of a real head fit
METHODS = (
    *DENSE,
    *(f"{name}@2^-{k}" for name in FILTERS for k in EXPONENTS),
    *(f"cce_subsampled@2^-12/{share}" for share in SHARES),
    *(f"{name}@{ROOM_MB}MB" for name in ("cce_sparse@2^-12", "cce_unbiased@2^-12", "cce_unbiased@2^-14")),
    *(f"cce_subsampled@2^-12/{share}@{ROOM_MB}MB" for share in (8, 16)),
)
AVERAGED = (*(f"cce_unbiased@2^-{k}" for k in (10, 12, 14)), *(f"cce_subsampled@2^-12/{k}" for k in (8, 32)))
DRAWS = 64
GROUPS = 8  # at most so many averages of each number of draws are judged
STRATA = ((0, 0), (1, 1), (2, 5), (6, math.inf))  # how often a row's token is a target
COUNTED = 1024  # tokens whose kept entries are counted
ROUNDS = 2  # of timed turns
ROWS = 8192  # of a gradient that are compared at a time
ESTIMATED = (8, 32)  # shares
ESTIMATES = 8  # draws of an estimator
SUBJECT = ("case", "stage", "n", "v", "d", "dtype", "device")
UNIT = (*SUBJECT, "what", "unit")

Row = dict[str, Any]
Gradients = tuple[Tensor, Tensor]


# -- what is studied ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A head, before it is in memory. `shape` is that of a synthetic case; `path` a captured head's file."""

    case: str
    stage: str = ""
    shape: Shape | None = None
    path: str = ""
    dtype: str = "bf16"

    def load(self, device: torch.device) -> Case:
        dtype = DTYPES[self.dtype]
        if self.path:
            return from_file(self.path, dtype=dtype, device=device)
        if self.shape is None:
            return CASES[self.case](dtype=dtype, device=device, stage=self.stage)
        s = self.shape
        return CASES[self.case](n=s.n, v=s.v, d=s.d, dtype=dtype, device=device)


def subjects(device: torch.device, heads: Path | None) -> list[Subject]:
    """What is studied on a device, what matters most first. Raises ValueError for a folder without heads."""
    files = {} if heads is None else {p.stem.removeprefix("captured-"): p for p in heads.glob("captured-*.safetensors")}
    if heads is not None and not files:
        raise ValueError(f"{heads} holds no captured-STAGE.safetensors")
    late_first = sorted(files, key=lambda stage: (stage != "trained", stage != "initial", stage))
    real = [Subject("real", stage, path=str(files[stage])) for stage in late_first]
    if device.type == "cuda":
        gemma = Shape("gemma2-2b", SHAPES["gemma2-2b"].n, SHAPES["gemma2-2b"].v, SHAPES["gemma2-2b"].d)
        return [
            *real[:1],
            Subject("trained", shape=gemma),
            *real[1:2],
            Subject("init", shape=SHAPES["real"]),
            *real[2:],
        ]
    small = Shape("small", 512, 16384, 128)
    shipped = [Subject("captured", stage) for stage in reversed(STAGES)]
    exact = Subject("captured", "trained", dtype="fp32")
    return [*real, *shipped, exact, Subject("trained", shape=small), Subject("init", shape=small)]


@dataclass(frozen=True)
class Contender:
    """A method of this study: a variant, and the workspace that it may have."""

    name: str
    variant: Variant
    workspace_mb: int | None = None

    def call(self, seed: int | None = None) -> Call:
        return lambda e, c, t: linear_cross_entropy(  # type: ignore[return-value]
            e, c, t, impl=self.variant, workspace_mb=self.workspace_mb, seed=seed, validate=False
        )


def contender(name: str) -> Contender:
    """A variant as `train` names it (cce_unbiased@2^-12, cce_subsampled@2^-12/8), and its workspace (cce_exact@64MB).

    Raises ValueError for what is no variant.
    """
    base, _, size = name.rpartition("@") if name.endswith("MB") else (name, "", "")
    variant = Method.parse(base).variant
    if variant is None:
        raise ValueError(f"{name!r} is no variant")
    return Contender(name, variant, int(size.removesuffix("MB")) if size else None)


# -- measuring ---------------------------------------------------------------------------------------------------------


def row_squares(x: Tensor, exact: Tensor, count: int = 1) -> Tensor:
    """(M,) fp64: squared error of each row of x / count."""
    pairs = zip(x.split(ROWS), exact.split(ROWS), strict=True)
    return torch.cat([(a.double() / count - b).square_().sum(1) for a, b in pairs])


def share(part: Tensor, whole: Tensor) -> float:
    """sqrt(sum part / sum whole); 0 for nothing of nothing."""
    a, b = float(part.sum()), float(whole.sum())
    return math.sqrt(a / b) if b else (0.0 if a == 0 else math.inf)


class Study:
    """One subject on one device; its tensors and the truth are made when they are first needed."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.subject, self.device = subject, device

    @cached_property
    def case(self) -> Case:
        """The head; tokens that are ignored are left out, as in a benchmark."""
        case = self.subject.load(self.device)
        kept = case.targets >= 0
        return Case(case.e[kept], case.c, case.targets[kept], case.bias, softcap=case.softcap, name=case.name)

    @cached_property
    def exact(self) -> Gradients:
        found = truth(self.case)
        return found.dE, found.dC

    @cached_property
    def sizes(self) -> Gradients:
        """Squared norms of the rows of the exact dE and dC."""
        e, c = self.exact
        return row_squares(torch.zeros_like(e), e), row_squares(torch.zeros_like(c), c)

    def gradients(self, call: Call) -> Gradients:
        e, c = self.case.e.detach().requires_grad_(), self.case.c.detach().requires_grad_()
        call(e, c, self.case.targets).backward()
        assert e.grad is not None and c.grad is not None
        return e.grad, c.grad

    def errors(self, found: Gradients, count: int = 1) -> dict[str, float]:
        """Normwise relative errors of found / count."""
        return {
            side: share(row_squares(x, exact, count), size)
            for side, x, exact, size in zip(("dE", "dC"), found, self.exact, self.sizes, strict=True)
        }

    def head(self) -> list[Row]:
        statistics = asdict(describe(self.case))
        floors = {
            f"floor_{side}": relative_error(x.to(DTYPES[self.subject.dtype]), x)
            for side, x in zip(("dE", "dC"), self.exact, strict=True)
        }
        return [{"statistics": statistics} | floors]

    def step(self, name: str) -> list[Row]:
        one = contender(name)
        found = self.gradients(one.call(seed=0))
        row: Row = self.errors(found) | {"entries": float(self.case.v), "kept_mass": 1.0}
        if one.variant.filtered:
            few = slice(min(self.case.n, COUNTED))
            e, targets = self.case.e[few], self.case.targets[few]
            with torch.no_grad():
                said: Any = linear_cross_entropy(
                    e, self.case.c, targets, impl=one.variant, seed=0, return_stats=True, validate=False
                )
            row["entries"] = float(said.stats.hits.double().mean())
            row["kept_mass"] = float(said.stats.kept_mass.double().mean())
        return [row | {"strata": self.strata(found[1])}]

    def strata(self, d_c: Tensor) -> dict[str, Row]:
        """Rows of dC by how often their token is a target: how many, their error together, how many are all zero."""
        squares, sizes = row_squares(d_c, self.exact[1]), self.sizes[1]
        empty = torch.cat([(part == 0).all(1) for part in d_c.split(ROWS)]) & (sizes > 0)
        count = torch.bincount(self.case.targets, minlength=self.case.v)
        found = {}
        for low, high in STRATA:
            some = (count >= low) & (count <= high)
            if rows := int(some.sum()):
                name = f"{low}" if low == high else f"{low}+" if high == math.inf else f"{low}-{high}"
                here = {
                    "rows": rows,
                    "error": share(squares[some], sizes[some]),
                    "empty": float(empty[some].double().mean()),
                }
                found[name] = here
        return found

    def times(self, names: Sequence[str], say: Callable[[str], None]) -> list[Row]:
        s = self.subject
        shape = s.shape or Shape("captured", self.case.n, self.case.v, self.case.d)
        methods = [Timed(name, "ours", lambda _, name=name: contender(name).call()) for name in names]  # type: ignore[misc]
        rows = measure(Job(shape, s.dtype, s.path or s.case), methods, self.device, ROUNDS, say)
        kept = (
            "method", "status", "reason", "rounds", "time_ms", "spread_ms", "times_product", "peak_mib", "dE_error",
            "dC_error",
        )  # fmt: skip
        wanted = [row for row in rows if row["kind"] in ("product", "loss-fw-bw") and row["method"] != FLOOR]
        return [{k: row[k] for k in kept} for row in wanted]

    def average(self, name: str) -> list[Row]:
        """Draws are added in pairs, the sums in pairs again, so that each power of two has many groups of its own.

        With a large workspace: where entries do not fit, the device takes the exact way, and nothing is drawn.
        """
        one = replace(contender(name), workspace_mb=ROOM_MB)
        waiting: dict[int, Gradients] = {}
        found: dict[int, list[dict[str, float]]] = {}
        for seed in range(1, DRAWS + 1):
            e, c = self.gradients(one.call(seed))
            total, count = (e.float(), c.float()), 1
            while True:
                if len(noted := found.setdefault(count, [])) < GROUPS:
                    noted.append(self.errors(total, count))
                if count not in waiting:
                    break
                for x, y in zip(total, waiting.pop(count), strict=True):
                    x += y
                count *= 2
            waiting[count] = total
        row: Row = {"workspace_mb": ROOM_MB, "draws": list(found), "groups": [len(x) for x in found.values()]}
        for side in ("dE", "dC"):
            row[side] = [math.sqrt(sum(x[side] ** 2 for x in group) / len(group)) for group in found.values()]
        return [row]

    def estimates(self, share: int) -> list[Row]:
        softmax = Softmax.of(self.case, share)
        rows = []
        for one in ESTIMATORS.values():
            draws = [errors(softmax, one.draw(softmax, torch.Generator().manual_seed(s))) for s in range(ESTIMATES)]
            d_e, d_c = (math.sqrt(sum(x * x for x in side) / len(side)) for side in zip(*draws, strict=True))
            about = {"method": one.name, "group": one.group, "unbiased": one.unbiased}
            about |= {"of_variant": one.of_variant, "share": share, "entries": softmax.entries, "draws": ESTIMATES}
            rows.append(about | {"dE": d_e, "dC": d_c})
        return rows

    def units(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, Callable[[], list[Row]]]]:
        """(what, method or "" for several, how to measure it), in the order of a run."""
        cuda = self.device.type == "cuda"
        names = [name for name in METHODS if cuda or not name.endswith("MB")]  # a workspace means nothing on a CPU
        yield "head", "", self.head
        for name in names:
            yield "step", name, lambda name=name: self.step(name)  # type: ignore[misc]
        if cuda:
            yield "time", f"{len(names)} methods", lambda: self.times(names, say)
        for name in AVERAGED:
            yield "average", name, lambda name=name: self.average(name)  # type: ignore[misc]
        if not cuda and self.subject.case in ("captured", "trained") and self.subject.dtype == "bf16":
            for share in ESTIMATED:
                yield "estimator", f"{share}", lambda share=share: self.estimates(share)  # type: ignore[misc]


# -- a run -------------------------------------------------------------------------------------------------------------


def read(out: Path) -> list[Row]:
    """The rows of a folder: of what was measured twice the later, and of what failed only what never succeeded."""
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {unit_of(row) for row in rows if "failed" not in row}
    kept = [row for row in rows if "failed" not in row or unit_of(row) not in done]
    return list({(*unit_of(row), row["method"]): row for row in kept}.values())


def unit_of(row: Row) -> tuple[Any, ...]:
    """What is measured at once, and again where it failed."""
    return tuple(row[k] for k in UNIT)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says what is measured right now: in place on a terminal where rich is there, else in lines."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield status.update
        return
    yield lambda what: print(what, file=sys.stderr, flush=True)


def run(todo: Sequence[Subject], device: torch.device, out: Path, seconds: float = math.inf) -> bool:
    """Measures what the folder lacks and writes it as it goes; whether all is there. A unit that is running when the
    seconds are over is finished."""
    out.mkdir(parents=True, exist_ok=True)
    began, name = time.monotonic(), device_name(device)
    done = {unit_of(row) for row in read(out) if "failed" not in row}
    stamp = provenance() | {"command": "python -m cce_precision.analysis.filter_study " + " ".join(sys.argv[1:])}
    whole = True
    with _progress() as say, (out / "rows.jsonl").open("a") as file:
        for subject in todo:
            study = Study(subject, device)
            case = study.case
            values = (subject.case, subject.stage, case.n, case.v, case.d, subject.dtype, name)
            where = dict(zip(SUBJECT, values, strict=True))
            for what, unit, work in study.units(say):
                if (*values, what, unit) in done:
                    continue
                if time.monotonic() - began > seconds:
                    return False
                say(f"{' '.join(map(str, values))}: {what} {unit}".rstrip())
                try:
                    rows = work()
                except Interrupted:
                    raise KeyboardInterrupt from None
                except Exception as error:  # what fails is shown, and the rest measured
                    rows, whole = [{"failed": f"{type(error).__name__}: {error}"[:400]}], False
                for row in rows:
                    line = where | {"what": what, "unit": unit, "method": unit} | row | stamp
                    file.write(json.dumps(line) + "\n")
                file.flush()
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("reports/unbiased-filter"), help="folder of rows.jsonl")
    parser.add_argument("--heads", type=Path, help="folder of captured-STAGE.safetensors")
    parser.add_argument("--seconds-limit", type=float, default=math.inf, help="after which nothing new is begun")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    try:
        whole = run(subjects(device, given.heads), device, given.out, given.seconds_limit)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    if not whole:
        print("not all was measured; the same command goes on", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
