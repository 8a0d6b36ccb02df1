"""Which variant to take: predictions of time, memory and error from a committed table of measurements.

`choose` ranks the variants at a shape, with the logits product timed on the spot; `resolve` is what impl="auto" does in
every call: a look-up that depends on shapes, dtype, device and options alone, never on the values of tensors.

The table (`data/costs.json`, written by `python -m cce_precision.analysis.choose_table`) holds, by backend and dtype,

    time    product * (time of the logits product) + (logits * N V + width * (N + V) D) ps + fixed ms
    memory  gradients + logits * N V + classifier * V D + embeddings * N D + vocabulary * V + fixed bytes
    errors  normwise relative errors, by kind of softmax (`SOFTMAX`): of dE and dC the upper ends of 95 % prediction
            intervals for one more problem, or the largest measured where that is more; of the loss the largest

An error is a prediction, not a bound: it holds for heads like those. `analysis.choose.measured` looks at the very data.
In float16 a mean over N tokens underflows: `choose` takes errors to grow with N; impl="auto" counts on a loss scale.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

from .autograd import choose_backend
from .numerics import Accumulation, FilterKind, Path, Variant, auto_eps
from .problem import Plan, Problem
from .validation import check_tolerance
from .variants import ALL, DEFAULT, get

__all__ = ["AUTO", "SOFTMAX", "Candidate", "Choice", "Cost", "Errors", "Resolved", "Table", "choose", "resolve"]

AUTO = "auto"
BASELINE = "baseline"
WORKSPACE_MB = 256  # scratch that impl="auto" may take where the caller names none: the kernels' own default
SLACK = 1.05  # errors at the rounding floor differ by so much from one batch to another
LOSS_FLOOR = 2.0**-20  # relative errors of an fp32 loss below it count as none
TIE = 1.05  # candidates within it of the fastest: the most exact of them is taken
ONE_PASS_TOKENS = 4096  # a chunk of the one-pass mode, with which it was measured
FEWEST_TOKENS = 1024  # with which it runs at all
MIB = 2**20
SOFTMAX = ("flat", "diffuse", "peaked")  # initialised models; captured in training; synthetic trained, confident heads


class Errors(NamedTuple):
    """Normwise relative errors."""

    loss: float
    dE: float
    dC: float

    @property
    def gradient(self) -> float:
        """The worse of the two gradients', which a tolerance is about."""
        return max(self.dE, self.dC)

    def worst(self, other: Errors) -> Errors:
        return Errors(*(max(a, b) for a, b in zip(self, other)))

    def no_worse_than(self, other: Errors) -> bool:
        """As exact as `other`, up to scatter at the rounding floor."""
        return (
            self.loss <= max(SLACK * other.loss, LOSS_FLOOR)
            and self.dE <= SLACK * other.dE
            and self.dC <= SLACK * other.dC
        )


@dataclass(frozen=True)
class Cost:
    """Time and memory of one variant on one backend in one dtype; see the module. `one_pass`: cce_exact in the
    workspace that its one-pass mode needs."""

    backend: str  # "triton" or "eager"
    dtype: str
    impl: str
    one_pass: bool
    product_dtype: str  # of the logits product that is its unit of time
    product: float
    logits_ps: float
    width_ps: float
    fixed_ms: float
    logits_bytes: float
    classifier_bytes: float
    embeddings_bytes: float
    vocabulary_bytes: float
    fixed_bytes: float
    rows: int  # measurements behind it
    time_error: float  # largest relative deviation of the fit from them

    @property
    def name(self) -> str:
        return f"{self.impl} (one pass)" if self.one_pass else self.impl

    def milliseconds(self, n: int, v: int, d: int, tflops: float) -> float:
        product = 2 * n * v * d / (tflops * 1e9)
        return self.product * product + (self.logits_ps * n * v + self.width_ps * (n + v) * d) / 1e9 + self.fixed_ms

    def scratch_mib(self, n: int, v: int, d: int) -> float:
        """Memory beyond inputs and gradients; of the one-pass mode what its workspace must hold."""
        if self.one_pass:
            return float(self.workspace_mb(n, v, d) or 0)
        size = self.logits_bytes * n * v + self.classifier_bytes * v * d + self.embeddings_bytes * n * d
        return (size + self.vocabulary_bytes * v + self.fixed_bytes) / MIB

    def workspace_mb(self, n: int, v: int, d: int, tokens: int = ONE_PASS_TOKENS) -> int | None:
        """MiB that one pass needs, by chunks of `tokens` or for the powers of all; None for other variants."""
        if not self.one_pass:
            return None
        token = 2 * v + 8 * (v // 256 + 1) + 2 * d
        size = 4 * v * d + 6 * n * d + token * 128 * math.ceil(min(n, tokens) / 128)
        if n < 2 * d:  # the powers of all, padded as one_pass.Runs does at most, and the gradients
            kept = 2 * (n + 127) * (v + v // 32 + 512) + 16 * n * (v // 256 + 1)
            size = min(size, kept + (8 * n + 2 * v + 4 * min(v, 2**14)) * d)
        return math.ceil(size / MIB)


class _Case(NamedTuple):
    errors: Errors
    vocabulary: int  # the largest measured
    tokens: float  # likewise; inf in a table that does not say


class Table:
    """The committed measurements."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.sources: list[dict[str, Any]] = data["sources"]
        self.devices: dict[str, dict[str, Any]] = data["devices"]
        self.costs = [Cost(**row) for row in data["costs"]]
        self._errors: dict[tuple[str, str, bool], dict[str, _Case]] = {}
        for row in data["errors"]:
            cases = self._errors.setdefault((row["dtype"], row["impl"], row["one_pass"]), {})
            errors = Errors(row["loss"], row["dE"], row["dC"])
            cases[row["case"]] = _Case(errors, row["vocabulary"], row.get("tokens", math.inf))

    @staticmethod
    def load() -> Table:
        return Table(json.loads((FilePath(__file__).parent / "data" / "costs.json").read_text()))

    def of(self, backend: str, dtype: torch.dtype) -> list[Cost]:
        """Costs of a backend and a dtype. Raises ValueError where nothing was measured, naming what was."""
        name = str(dtype).removeprefix("torch.")
        found = [cost for cost in self.costs if (cost.backend, cost.dtype) == (backend, name)]
        if not found:
            known = sorted({f"{cost.dtype} ({cost.backend})" for cost in self.costs})
            raise ValueError(
                f"impl='auto' has no measured cost of {name} with backend {backend!r}; it has: {', '.join(known)}. "
                "Name an impl"
            )
        return found

    def tflops(self, backend: str, dtype: str) -> float:
        return float(self.devices[backend]["product_tflops"][dtype])

    def errors(
        self, cost: Cost, variant: Variant, v: int, n: int | None = None, softmax: str | None = None
    ) -> dict[str, Errors]:
        """Predicted errors by kind of softmax (`softmax` alone, or all), for `variant`, the cost's own or with other
        options; {}: not measured.

        Beyond the largest vocabulary measured, sums in 16 bits are taken to grow in proportion to it; above the
        automatic threshold, errors in proportion to the threshold; in float16, beyond the most tokens measured, in
        proportion to `n`, the tokens of a mean whose gradients no loss scale keeps from underflow. All overestimate.
        """
        dtype = getattr(torch, cost.dtype)
        found = {}
        for case, known in self._errors.get((cost.dtype, cost.impl, cost.one_pass), {}).items():
            if softmax not in (None, case):
                continue
            growth = 1.0
            if Accumulation.INPUT in (variant.accum_e, variant.accum_c):
                growth = max(1.0, v / known.vocabulary)
            if n is not None and dtype is torch.float16:
                growth = max(growth, n / known.tokens)
            for filt in (variant.filter_e, variant.filter_c):
                if filt.kind is not FilterKind.NONE:
                    growth = max(growth, filt.threshold(dtype) / auto_eps(dtype))
            found[case] = Errors(known.errors.loss, known.errors.dE * growth, known.errors.dC * growth)
        return found

    def limits(self, backend: str, dtype: torch.dtype, *known: Any) -> dict[str, Errors]:
        """`errors` of the baseline (v, n, softmax); {} where it was not measured."""
        plain = next((cost for cost in self.of(backend, dtype) if cost.impl == BASELINE), None)
        return {} if plain is None else self.errors(plain, get(BASELINE), *known)


TABLE = Table.load()


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss, judged."""

    impl: str
    workspace_mb: int | None  # to pass on; None: the backend's default
    time_ms: float  # loss and gradients; NaN where unknown
    memory_mib: float  # beyond the inputs, gradients included; NaN where unknown
    errors: Errors  # the largest predicted, or the upper ends of the measured intervals; NaN where unknown
    meets: bool  # tolerance and memory
    reason: str  # why it is taken, or why not

    @property
    def name(self) -> str:
        return self.impl if self.workspace_mb is None else f"{self.impl}, workspace_mb={self.workspace_mb}"


@dataclass(frozen=True)
class Choice:
    """The candidates, the chosen one first, then those that meet the demands by time, then the others."""

    candidates: tuple[Candidate, ...]
    demand: str  # what was asked for, in words
    basis: str  # where the numbers come from, in words

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate; None where none meets the demands."""
        first = self.candidates[0] if self.candidates else None
        return first if first is not None and first.meets else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        rows = [dataclasses.asdict(one) | {"errors": one.errors._asdict()} for one in self.candidates]
        return {"demand": self.demand, "basis": self.basis, "candidates": rows}


def select(candidates: list[Candidate], demand: str, basis: str) -> Choice:
    """The choice among candidates whose `meets` and, where that is False, `reason` are settled already.

    Of those that meet the demands the fastest is taken, or the most exact of those within `TIE` of it.
    """
    able = sorted((one for one in candidates if one.meets), key=lambda one: one.time_ms)
    close = [one for one in able if one.time_ms <= TIE * able[0].time_ms]
    best = min(close, key=lambda one: one.errors.gradient) if close else None
    judged = []
    for one in able:
        if one is best:
            reason = "fastest that meets the demands"
            if one is not able[0]:
                reason = f"as fast as {able[0].name} (within {TIE - 1:.0%}), and more exact"
        elif best is not None and one.time_ms < best.time_ms:
            reason = f"as fast as the choice (within {TIE - 1:.0%}), but less exact"
        else:
            reason = f"meets the demands; {one.time_ms / able[0].time_ms:.2f} times the time of {able[0].name}"
        judged.append(dataclasses.replace(one, reason=reason))
    judged.sort(key=lambda one: best is None or one.name != best.name)  # stable: the others stay by time
    others = sorted(
        (one for one in candidates if not one.meets), key=lambda one: (math.isnan(one.time_ms), one.time_ms)
    )
    return Choice((*judged, *others), demand, basis)


def against(tolerance: float | None) -> str:
    """The demand on the error, in words."""
    if tolerance is None:
        return f"errors no larger than those of {BASELINE!r}, PyTorch's own loss in this dtype"
    return f"relative errors of dE and dC at most {tolerance:g}"


def judged(found: dict[str, Errors], baseline: dict[str, Errors], tolerance: float | None) -> tuple[Errors, str]:
    """The largest errors over the kinds of softmax, and why they fail the demand ("" where they meet it)."""
    nothing = Errors(math.nan, math.nan, math.nan)
    if not found:
        return nothing, "its error was not measured on such a problem"
    worst = functools.reduce(Errors.worst, found.values())
    if tolerance is not None:
        side, value = ("dE", worst.dE) if worst.dE >= worst.dC else ("dC", worst.dC)
        return worst, "" if worst.gradient <= tolerance else f"error of {side} {value:.2g}"
    for case, limit in baseline.items():
        mine = found.get(case)
        if mine is None:
            return worst, f"its error on a {case} softmax was not measured"
        if not mine.no_worse_than(limit):
            named = zip(Errors._fields, mine, limit)
            name, value, allowed = max(named, key=lambda one: one[1] / one[2] if one[2] else math.inf)
            return worst, f"error of {name} {value:.2g} on a {case} softmax, {BASELINE} has {allowed:.2g}"
    return worst, ""


# -- impl="auto" -------------------------------------------------------------------------------------------------------


class Resolved(NamedTuple):
    """What impl="auto" stands for in a call."""

    impl: str
    workspace_mb: int | None
    error: float  # the largest predicted of dE and dC


class Options(NamedTuple):
    """The options of a call that bear on the choice; hashable."""

    tolerance: float | None = None
    workspace_mb: int | None = None
    one_pass: bool = False  # whether the call allows the one-pass mode
    filter_eps: float | str | None = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True

    def configured(self, variant: Variant) -> Variant | None:
        """The variant with these options, None where it cannot honour them."""
        try:
            return variant.configure(*self[3:])
        except ValueError:
            return None


def backend_of(device: torch.device, e_dtype: torch.dtype, c_dtype: torch.dtype, wanted: str) -> str:
    """ "triton" or "eager": where tiled variants run. Raises ValueError where backend="triton" cannot run there."""
    return _cached_backend(device, e_dtype, c_dtype, wanted)


@functools.lru_cache(maxsize=64)
def _cached_backend(device: torch.device, e_dtype: torch.dtype, c_dtype: torch.dtype, wanted: str) -> str:
    e, c = (torch.zeros(1, 1, dtype=dtype, device=device) for dtype in (e_dtype, c_dtype))
    problem = Problem(e, c, torch.zeros(1, dtype=torch.int64, device=device))
    return choose_backend(problem, Plan(get(DEFAULT), backend=wanted))


def resolve(n: int, v: int, d: int, dtype: torch.dtype, backend: str, options: Options) -> Resolved:
    """What impl="auto" takes for N tokens, V columns, D features in `dtype` on `backend` ("triton" or "eager").

    Depends on n through the next power of two alone, so that few values of a dynamic n lead to another program under
    `torch.compile`. Without a workspace, `WORKSPACE_MB` is the most that may be used.

    Raises ValueError where no variant meets the tolerance, naming the nearest, and where nothing was measured.
    """
    for limit, impl, workspace_mb, error in _by_tokens(int(v), int(d), dtype, backend, *options):  # noqa: B007
        if n <= limit:
            break
    return Resolved(impl, workspace_mb, error)


def _by_tokens(
    v: int, d: int, dtype: torch.dtype, backend: str, *options: Any
) -> tuple[tuple[int, str, int | None, float], ...]:
    """The choice for n up to each of some limits, ascending; a constant for `torch.compile`."""
    return _cached_by_tokens(v, d, dtype, backend, Options(*options))


# What torch.compiler.assume_constant_result does, which would import torch._dynamo (1 to 3 s) with the library.
for _constant in (_by_tokens, backend_of):
    vars(_constant)["_dynamo_marked_constant"] = True


@functools.lru_cache(maxsize=256)
def _cached_by_tokens(
    v: int, d: int, dtype: torch.dtype, backend: str, options: Options
) -> tuple[tuple[int, str, int | None, float], ...]:
    found: list[tuple[int, str, int | None, float]] = []
    for n in (2**k for k in range(25)):
        taken = _resolved(n, v, d, dtype, backend, options)
        if found and found[-1][1:] == taken:
            found.pop()
        found.append((n, *taken))
    return tuple(found)


def _resolved(n: int, v: int, d: int, dtype: torch.dtype, backend: str, options: Options) -> Resolved:
    """The choice for n tokens."""
    costs = TABLE.of(backend, dtype)
    limits = TABLE.limits(backend, dtype, v)
    most = WORKSPACE_MB if options.workspace_mb is None else options.workspace_mb
    candidates, nearest, off = [], "", math.inf
    for cost in costs:
        variant = options.configured(get(cost.impl))
        if variant is None or (cost.one_pass and not options.one_pass):
            continue
        needed = cost.workspace_mb(n, v, d, FEWEST_TOKENS)
        if needed is not None and needed > most:
            continue
        if variant.path is not Path.TILED and cost.scratch_mib(n, v, d) > most:
            continue
        errors, failure = judged(TABLE.errors(cost, variant, v), limits, options.tolerance)
        if failure:
            if errors.gradient < off:
                nearest, off = cost.name, errors.gradient
            continue
        time_ms = cost.milliseconds(n, v, d, TABLE.tflops(backend, cost.product_dtype))
        workspace = options.workspace_mb if needed is None else most
        candidates.append(Candidate(cost.impl, workspace, time_ms, cost.scratch_mib(n, v, d), errors, True, ""))
    best = select(candidates, "", "").best
    if best is None:
        hint = f"; the nearest is {nearest!r} with {off:.2g}" if nearest else ""
        raise ValueError(
            f"impl='auto' finds no variant with {against(options.tolerance)} for V={v}, D={d} in "
            f"{str(dtype).removeprefix('torch.')} that these options allow{hint}"
        )
    workspace = best.workspace_mb if get(best.impl).path is Path.TILED else None
    return Resolved(best.impl, workspace, best.errors.gradient)


# -- choose ------------------------------------------------------------------------------------------------------------


def product_tflops(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Speed of the logits product here, 10^12 operations a second, on at most 2^32 (CPU) or 2^43 (GPU) of them."""
    most = 2**43 if device.type == "cuda" else 2**32
    while n * v * d * 2 > most and max(n, v) > 256:
        n, v = (n // 2, v) if n >= v else (n, v // 2)
    e, c = (torch.randn(rows, d, device=device).to(dtype) for rows in (n, v))
    out = torch.empty(n, v, dtype=dtype, device=device)
    seconds = []
    # One thread of a CPU counts its own time, which other processes do not lengthen.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    for _ in range(rounds + 1):
        wait(device)
        started = clock()
        torch.mm(e, c.T, out=out)
        wait(device)
        seconds.append(clock() - started)
    return 2 * n * v * d / max(statistics.median(seconds[1:]), 1e-9) / 1e12


def choose(
    n: int,
    v: int,
    d: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    tolerance: float | None = None,
    memory_mb: float | None = None,
    softmax: str | None = None,
    tflops: Mapping[str, float] | None = None,
    table: Table | None = None,
) -> Choice:
    """Ranks the variants for N tokens, V columns and D features by predicted time, with predicted error and memory.

    Args:
        dtype: of e and c: bfloat16, float16 or float32, as far as measured.
        device: where it is to run; None: the current CUDA device where there is one, else the CPU.
        tolerance: most relative error of dE and dC, Euclidean norms; None: no less exact than `baseline`, PyTorch's own
            loss in this dtype, in loss, dE and dC, on every kind of softmax.
        memory_mb: most MiB beyond the inputs, gradients included; None: no limit.
        softmax: what is known of it: "flat" (perplexity near V, as of an initialised model), "diffuse" (tens to
            hundreds, as in training) or "peaked" (below ten, as of a confident one); None: the worst of these counts.
        tflops: speed of the logits product by dtype ("bfloat16", ...), 10^12 operations a second, by which the table's
            times are scaled; None: timed here, which takes a fraction of a second.
        table: of measurements; None: the committed one.

    Returns a `Choice`: `.best` has `impl` and `workspace_mb` to pass on, every candidate says why it wins or loses.
    `cce_precision.analysis.choose.measured` does the same from measurements on given data.

    Raises TypeError or ValueError for a bad argument, and ValueError where nothing was measured in this dtype.
    """
    check_tolerance(tolerance)
    for name, size in (("n", n), ("v", v), ("d", d)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}")
    if memory_mb is not None and not memory_mb > 0:
        raise ValueError(f"memory_mb must be None or a number > 0, got {memory_mb!r}")
    if softmax is not None and softmax not in SOFTMAX:
        raise ValueError(f"softmax must be None or one of {', '.join(map(repr, SOFTMAX))}, got {softmax!r}")
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    backend = "triton" if place.type == "cuda" else "eager"
    table = TABLE if table is None else table
    costs = table.of(backend, dtype)
    speeds = {name: table.tflops(backend, name) for name in {cost.product_dtype for cost in costs}}
    here = {name: product_tflops(n, v, d, getattr(torch, name), place) for name in speeds} if tflops is None else tflops
    basis = (
        f"predicted for {softmax or 'any'} softmax from measurements on {table.devices[backend]['device']}, "
        "scaled by the logits product here: "
        + ", ".join(f"{here[name]:.3g} Tflop/s in {name} (there {speeds[name]:.3g})" for name in sorted(speeds))
    )
    limits = table.limits(backend, dtype, v, n, softmax)
    gradients = (n + v) * d * dtype.itemsize / MIB
    candidates = []
    for cost in costs:
        if cost.one_pass and dtype is not torch.bfloat16:
            continue
        errors, failure = judged(table.errors(cost, get(cost.impl), v, n, softmax), limits, tolerance)
        memory = gradients + cost.scratch_mib(n, v, d)
        if not failure and memory_mb is not None and memory > memory_mb:
            failure = f"needs {memory:,.0f} MiB"
        slower = speeds[cost.product_dtype] / here[cost.product_dtype]
        time_ms = cost.milliseconds(n, v, d, speeds[cost.product_dtype]) * slower
        workspace = cost.workspace_mb(n, v, d)
        candidates.append(Candidate(cost.impl, workspace, time_ms, memory, errors, not failure, failure))
    known = {cost.impl for cost in costs}
    missing = Errors(math.nan, math.nan, math.nan)
    for name in ALL:
        if name not in known:
            reason = f"its time was not measured with backend {backend!r}"
            candidates.append(Candidate(name, None, math.nan, math.nan, missing, False, reason))
    demand = against(tolerance) + ("" if memory_mb is None else f", at most {memory_mb:,.0f} MiB")
    return select(candidates, demand, basis)
