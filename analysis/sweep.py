"""The sweep: variants x thresholds x dtypes x cases, one cell at a time, into one tidy table.

A cell is one call of `linear_cross_entropy` with its gradients, graded against the fp64 truth. A finished cell is
written as a small file at once, under a name that hashes all it depends on, so that an interrupted sweep resumes and a
changed one does not reuse what is stale. Engines (`engines.py`) decide where cells run; each gives the same table.

The table has one number a row: case, stage, variant, dtype, n, v, d, eps, seed, quantity, metric, value, then the
provenance. eps is NaN where a variant has no threshold. Timings are the quantity `time`, the only rows that two runs
need not share.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

import cce_precision
from cce_precision import LinearCrossEntropyOutput, linear_cross_entropy
from cce_precision.analysis import budget as budgets
from cce_precision.analysis import metrics
from cce_precision.analysis.capture import STAGES
from cce_precision.analysis.cases import Case, describe, find, from_file
from cce_precision.analysis.provenance import provenance
from cce_precision.analysis.references import Objective, Truth, truth
from cce_precision.numerics import Path as CodePath
from cce_precision.numerics import Variant, auto_eps
from cce_precision.problem import Problem
from cce_precision.variants import ALL, get

__all__ = ["Cell", "Failure", "Outcome", "Sweep", "identity", "parse_eps", "plan", "run"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GRID = tuple(2.0**-k for k in range(4, 25, 2))
RUN = 128  # tokens of a tile
CALLS = 3  # most calls that a time is the best of, where it answers what is cheapest
AGREE = 1.05  # the best is repeated as often until two calls differ by less
GRADIENTS = ("dE", "dC", "dbias")
BUDGET = 128  # tokens of a budget
SHAPE = (1024, 8192, 128)  # tokens, vocabulary, width of synthetic cases: that of the captured head
KEY = ("case", "stage", "variant", "dtype", "n", "v", "d", "eps", "seed", "quantity", "metric")
COLUMNS = (*KEY, "value", "commit", "versions", "device", "command")

Row = dict[str, Any]
Head = TypeVar("Head", bound=Problem)


def digest(problem: Problem) -> str:
    """A hash of the operands' bytes."""
    sha = hashlib.sha256(repr((problem.softcap, problem.temperature)).encode())
    for tensor in (problem.e, problem.c, problem.targets, problem.bias):
        if tensor is not None:
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class Cell:
    """One call. `variant` "" stands for the softmax itself: its statistics and its rank-probability curve.

    `budget`: not the call's errors but where they come from, with their bounds (`budget.py`), on fewer tokens.
    """

    case: str
    stage: str
    dtype: str
    variant: str
    eps: float | None
    seed: int
    calls: int = 1  # at most, of which the fastest is the time
    budget: bool = False

    @property
    def group(self) -> tuple[Any, ...]:
        """Cells of one group share what is computed once: best one after the other in one process."""
        return self.case, self.stage, self.dtype, self.budget

    def __str__(self) -> str:
        what = self.variant or "softmax"
        eps = "" if self.eps is None else f"eps={self.eps:.3g}"
        return " ".join(filter(None, (self.case, self.stage, self.dtype, what, eps, self.budget * "budget")))


@dataclass(frozen=True)
class Failure:
    """A cell that raised, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class Sweep:
    """All that a sweep does. `threads` is fixed for every cell: sums on a CPU may depend on it in their last bits."""

    subjects: tuple[Case, ...]
    cells: tuple[Cell, ...]
    threads: int
    variants: tuple[Variant, ...] = tuple(ALL.values())

    def subject(self, cell: Cell) -> Case:
        return next(s for s in self.subjects if (s.name, s.stage) == (cell.case, cell.stage))

    @functools.cached_property
    def digests(self) -> dict[tuple[str, str], str]:
        return {(s.name, s.stage): digest(s) for s in self.subjects}

    def variant(self, cell: Cell) -> Variant:
        return next(v for v in self.variants if v.name == cell.variant)

    def key(self, cell: Cell) -> str:
        """A hash of all that the numbers of a cell depend on."""
        record = dataclasses.asdict(self.variant(cell)) if cell.variant else {}
        parts = (
            dataclasses.asdict(cell),
            record,
            self.digests[cell.case, cell.stage],
            self.threads,
            torch.__version__,
            _source_digest(),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """What a sweep gave: the merged table (a pandas.DataFrame) and the cells that raised."""

    table: Any
    failures: tuple[Failure, ...]


# An engine takes a sweep and its unfinished cells and yields each with its rows, or with the reason why it has none.
Engine = Callable[[Sweep, Sequence[Cell]], Iterator[tuple[Cell, list[Row] | str]]]


# -- what to run -------------------------------------------------------------------------------------------------------


def parse_eps(text: str) -> tuple[float, ...]:
    """Thresholds from `2^-4..2^-24` (in steps of 2^2), `2^-12`, `1e-3`, or several of them between commas; falling.

    Raises ValueError naming the part that is none of these, or is no probability.
    """

    def number(part: str) -> float:
        base, caret, exponent = part.partition("^")
        try:
            value = float(base) ** int(exponent) if caret else float(part)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"{part!r} is no threshold; write 2^-12, 1e-3 or a range 2^-4..2^-24") from None
        if not 0 < value <= 1:
            raise ValueError(f"threshold {part!r} must lie in (0, 1]")
        return value

    found: set[float] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = [number(end) for end in part.split("..")]
        if len(ends) > 2:
            raise ValueError(f"{part!r} is no range; write one as 2^-4..2^-24")
        low, high = min(ends), max(ends)
        found |= {high / 4.0**i for i in range(int(math.log(high / low, 4) + 1e-9) + 1)} | (
            {low} if len(ends) == 1 else set()
        )
    if not found:
        raise ValueError(f"{text!r} holds no threshold; write 2^-12, 1e-3 or a range 2^-4..2^-24")
    return tuple(sorted(found, reverse=True))


def nearest(eps: Iterable[float], default: float) -> float:
    """The threshold whose logarithm is nearest to that of the default, the smaller of two."""
    return min(eps, key=lambda e: (abs(math.log2(e / default)), e))


def _subjects(cases: Sequence[str], data: Sequence[Path], seed: int) -> Iterator[Case]:
    for name in cases:
        make = find(name)
        for stage in STAGES if name == "captured" else ("",):
            yield make(stage=stage) if stage else make(*SHAPE, dtype=torch.float32, seed=seed)
    for path in data:
        yield from_file(path)


def some_rows(n: int, tokens: int) -> list[int]:
    """So many of n rows, in runs of up to 128 neighbours (text stays in its order) that are spread evenly."""
    runs = -(-tokens // RUN)
    cuts = [tokens * i // runs for i in range(runs + 1)]
    return [row + (n - tokens) * i // runs for i in range(runs) for row in range(cuts[i], cuts[i + 1])]


def _some(problem: Head, tokens: int | None) -> Head:
    """The problem with so many of its tokens."""
    if tokens is None or tokens >= problem.n:
        return problem
    rows = torch.tensor(some_rows(problem.n, tokens))
    return dataclasses.replace(problem, e=problem.e[rows], targets=problem.targets[rows])


def plan(
    *,
    data: Sequence[Path] = (),
    variants: Sequence[str | Variant] | None = None,
    eps: Sequence[float] | None = None,
    dtypes: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    tokens: int | None = None,
    seed: int = 0,
    threads: int = 1,
    budget: bool = True,
) -> Sweep:
    """The sweep of these lists. A variant without a filter runs once, others at each threshold.

    `budget`: also the error budgets of the last stage's first dtype, at the threshold nearest its default.

    `cases` None: the captured head, or with `data` only that. `dtypes` None: bf16, on the last stage fp16 too.
    `eps` None: 2^-4 to 2^-24 in steps of 2^2, in steps of 2^4 where it is not the last stage's first dtype, and each
    dtype's default. `tokens`: only so many of each subject's, see `some_rows`. Raises ValueError for unknown names.
    """
    if unknown := [d for d in dtypes or () if d not in DTYPES]:
        raise ValueError(f"dtype {unknown[0]!r} is not known; known: {', '.join(DTYPES)}")
    records = tuple(dict.fromkeys(get(v) for v in (variants if variants is not None else ALL)))
    names = cases if cases is not None else [] if data else ["captured"]
    subjects = tuple(_some(case, tokens) for case in _subjects(names, data, seed))
    if len({(s.name, s.stage) for s in subjects}) < len(subjects):
        raise ValueError("two subjects have the same case and stage; rename one of the files")
    last = {s.name: s.stage for s in subjects}
    cells = []
    for subject in reversed(subjects):  # the last stage, which answers, comes first
        answers = last[subject.name] == subject.stage
        chosen = dtypes or (("bf16", "fp16") if answers else ("bf16",))
        cells.append(Cell(subject.name, subject.stage, chosen[0], "", None, 0))
        for dtype in chosen:
            main = answers and dtype == chosen[0]
            steps = eps or sorted({*GRID[:: 1 if main else 2], auto_eps(DTYPES[dtype])}, reverse=True)
            budgets = [v for v in records if budget and main and v.path is not CodePath.COMPILED]
            for variant in budgets:
                step = nearest(steps, auto_eps(DTYPES[dtype])) if variant.filtered else None
                draw = seed if variant.random else 0
                cells.append(Cell(subject.name, subject.stage, dtype, variant.name, step, draw, budget=True))
            for variant in records:
                draw, calls = seed if variant.random else 0, CALLS if main else 1
                for step in steps if variant.filtered else (None,):
                    cells.append(Cell(subject.name, subject.stage, dtype, variant.name, step, draw, calls))
    return Sweep(subjects, tuple(cells), threads, records)


# -- one cell ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the cells of one subject and dtype share, computed when the first of them asks."""

    problem: Problem  # operands rounded to the dtype
    kept: dict[tuple[Any, ...], tuple[float, float]] = dataclasses.field(default_factory=dict)  # by filters of dE

    @functools.cached_property
    def exact(self) -> Truth:
        """The truth of exactly those operands."""
        return truth(self.problem, Objective(reduction="none"))

    @functools.cached_property
    def floors(self) -> dict[str, float]:
        """`floor_error` of the gradients."""
        return {name: metrics.floor_error(getattr(self.exact, name), self.problem.operand_dtype) for name in GRADIENTS}


# Those of the cells that ran last (cells of one subject and dtype follow each other), and what has run before it is
# timed: (path, dtype).
_PREPARED: dict[tuple[str, str], Prepared] = {}
_WARM: set[tuple[str, torch.dtype]] = set()
_STEPS: dict[tuple[str, str, int], budgets.Steps] = {}


def _prepared(sweep: Sweep, cell: Cell) -> Prepared:
    """Computed once for all cells that share it."""
    key = (sweep.digests[cell.case, cell.stage], cell.dtype)
    if key not in _PREPARED:
        _PREPARED.clear()
        case, dtype = sweep.subject(cell), DTYPES[cell.dtype]
        bias = None if case.bias is None else case.bias.to(dtype)
        _PREPARED[key] = Prepared(dataclasses.replace(case, e=case.e.to(dtype), c=case.c.to(dtype), bias=bias))
    return _PREPARED[key]


def measure(sweep: Sweep, cell: Cell) -> list[Row]:
    """The rows of one cell, without provenance. Each token's loss has the upstream gradient 1, as for a sum."""
    prepared = _prepared(sweep, cell)
    problem = prepared.problem
    where = dataclasses.asdict(cell) | {"n": problem.n, "v": problem.v, "d": problem.d}
    where["eps"] = math.nan if cell.eps is None else cell.eps
    if cell.budget:
        found = _budget(sweep, cell, problem)
    elif cell.variant:
        found = _graded(prepared, sweep.variant(cell).with_eps(cell.eps), cell)
    else:
        found = _softmax(problem)
    return [where | {"quantity": q, "metric": m, "value": float(v)} for q, m, v in found]


def _graded(prepared: Prepared, variant: Variant, cell: Cell) -> Iterator[tuple[str, str, float]]:
    problem, exact = prepared.problem, prepared.exact
    seconds, loss, gradients = _timed(problem, variant, cell)
    yield "time", "seconds", seconds
    tokens = metrics.by_complement(exact.p_complement, problem.targets >= 0)
    words = metrics.by_count(problem.targets, problem.v)
    yield from metrics.rows("loss", loss, exact.loss, radius=exact.radius.loss, strata=tokens)
    for name, gradient in gradients.items():
        right, radius, strata = getattr(exact, name), getattr(exact.radius, name), tokens if name == "dE" else words
        yield from metrics.rows(name, gradient, right, radius=radius, strata=strata, floor=prepared.floors[name])
    d_c = gradients["dC"]
    empty = (d_c == 0).all(1) & (exact.dC.to(d_c.dtype) != 0).any(1)
    yield "dC", "empty_rows", float(empty.double().mean())
    # Of all that makes a variant, this much decides what its filter of dE keeps.
    draw = cell.seed if variant.random else 0
    key = (variant.path, variant.filter_e, variant.sort_vocabulary, variant.tile, draw)
    if key not in prepared.kept:
        prepared.kept[key] = _kept(problem, variant, cell)
    yield from zip(("filter", "filter"), ("dropped_mass", "hits"), prepared.kept[key], strict=True)


def _call(problem: Problem, variant: Variant, cell: Cell, **options: Any) -> Any:
    return linear_cross_entropy(
        problem.e,
        problem.c,
        problem.targets,
        problem.bias,
        ignore_index=-1,
        softcap=problem.softcap,
        reduction="none",
        impl=variant,
        seed=cell.seed if variant.random else None,
        **options,
    )


def _step(problem: Problem, variant: Variant, cell: Cell) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Seconds of a call with its backward pass, the loss, and the gradients by name."""
    named = zip(GRADIENTS, (problem.e, problem.c, problem.bias), strict=True)
    leaves = {name: x.detach().requires_grad_() for name, x in named if x is not None}
    fields = {"e": leaves["dE"], "c": leaves["dC"], "bias": leaves.get("dbias")}
    given = dataclasses.replace(problem, **fields)  # type: ignore[arg-type]
    started = time.perf_counter()
    loss = _call(given, variant, cell)
    loss.backward(torch.ones_like(loss))
    seconds = time.perf_counter() - started
    return seconds, loss.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def _timed(problem: Problem, variant: Variant, cell: Cell) -> tuple[float, Tensor, dict[str, Tensor]]:
    """A step, with the least of the seconds of the cell's calls."""
    if (variant.path.value, problem.operand_dtype) not in _WARM:
        _step(_some(problem, RUN), variant, cell)
        _WARM.add((variant.path.value, problem.operand_dtype))
    seconds, loss, gradients = _step(problem, variant, cell)
    for _ in range(cell.calls - 1):
        before, again = seconds, _step(problem, variant, cell)[0]
        seconds = min(before, again)
        if max(before, again) < AGREE * seconds:
            break
    return seconds, loss, gradients


@torch.no_grad()
def _kept(problem: Problem, variant: Variant, cell: Cell) -> tuple[float, float]:
    """The mass of the softmax that the filter of dE drops, and how many entries a row it keeps: means over tokens."""
    stats = cast(LinearCrossEntropyOutput, _call(problem, variant, cell, return_stats=True)).stats
    assert stats is not None
    counted = problem.targets >= 0
    kept, hits = stats.kept_mass[counted].double(), stats.hits[counted].double()
    return float((1 - kept).mean()), float(hits.mean())


def _budget(sweep: Sweep, cell: Cell, problem: Problem) -> Iterator[tuple[str, str, float]]:
    """Where the errors of loss, dE and dC come from, and their bounds, on some of the tokens."""
    key = (sweep.digests[cell.case, cell.stage], cell.dtype, cell.seed)
    if key not in _STEPS:
        _STEPS.clear()
        _STEPS[key] = budgets.Steps(_some(problem, BUDGET), seed=cell.seed)
    steps = _STEPS[key]
    yield "budget", "tokens", steps.problem.n
    for name, found in budgets.budget(steps, sweep.variant(cell).with_eps(cell.eps)).items():
        for field in ("relative", "bound", "combined", "residual"):
            yield name, f"budget_{field}", getattr(found, field)
        for line in found.lines:
            for field in ("relative", "share", "bound"):
                yield name, f"budget_{field}:{line.stage.value}", getattr(line, field)


def _softmax(problem: Problem) -> Iterator[tuple[str, str, float]]:
    """Statistics of the head, and the mean over tokens of its k-th largest probabilities at some ranks k."""
    for name, value in describe(problem).as_dict().items():
        for part, number in value.items() if isinstance(value, dict) else [("", value)]:
            yield "softmax", f"{name}:{part}" if part else name, number
    ranks = sorted({round(2 ** (i / 2)) for i in range(2 * int(math.log2(problem.v)) + 1)} | {problem.v})
    index = torch.tensor(ranks) - 1
    total = torch.zeros(len(ranks), dtype=torch.float64)
    rows = problem.e[problem.targets >= 0].float()
    for block in rows.split(256):
        z = block @ problem.c.float().T
        z = z if problem.bias is None else z + problem.bias.float()
        z = z if problem.softcap is None else problem.softcap * torch.tanh(z / problem.softcap)
        total += torch.softmax(z, 1).sort(1, descending=True).values[:, index].double().sum(0)
    for rank, value in zip(ranks, total / max(len(rows), 1), strict=True):
        yield "softmax", f"rank:{rank}", float(value)


# -- the whole ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _source_digest() -> str:
    """A hash of the library's sources and of the analysis that grades."""
    root = Path(cce_precision.__file__).parent
    sources = [p for p in root.rglob("*.py") if "analysis" not in p.relative_to(root).parts]
    grading = ("reference*.py", "metrics*.py", "sweep.py", "budget*.py", "bounds*.py")
    sources += [p for name in grading for p in Path(__file__).parent.glob(name)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sources))).hexdigest()


def _write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text)
    os.replace(draft, path)


def run(
    sweep: Sweep,
    out: Path,
    engine: Engine,
    command: str = "",
    on_cell: Callable[[Cell, str | None], None] = lambda cell, reason: None,
) -> Outcome:
    """Runs what `out` does not hold yet, and writes `out/results.parquet`.

    Finished cells lie in `out/parts` until all have succeeded; a cell that raised is tried again by the next run.
    `on_cell` is told of each cell as it ends, finished ones of an earlier run first, with the reason where it raised.
    """
    import pandas as pd

    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = {cell: parts / f"{sweep.key(cell)}.json" for cell in sweep.cells}
    for cell, file in files.items():
        if file.exists():
            on_cell(cell, None)
    failures = []
    for cell, result in engine(sweep, [cell for cell, file in files.items() if not file.exists()]):
        if isinstance(result, str):
            failures.append(Failure(cell, result))
        else:
            _write(files[cell], json.dumps(result))
        on_cell(cell, result if isinstance(result, str) else None)
    rows = [row for file in files.values() if file.exists() for row in json.loads(file.read_text())]
    table = pd.DataFrame(rows, columns=[*KEY, "value"]).assign(**provenance(sweep.threads, command))[list(COLUMNS)]
    table = table.sort_values(list(KEY), kind="stable", ignore_index=True)
    table = table.astype({"eps": float, "value": float, "n": int, "v": int, "d": int, "seed": int})
    draft = out / "results.parquet.tmp"
    table.to_parquet(draft, index=False)
    os.replace(draft, out / "results.parquet")
    if not failures:
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()
    return Outcome(table, tuple(failures))


def identity(table: Any) -> Any:
    """The part of a table that does not depend on who computed it, or how fast."""
    return table.loc[table["quantity"] != "time", [*KEY, "value"]].reset_index(drop=True)
