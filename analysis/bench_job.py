"""One job of the benchmark: every method on the same tensors, checked against the truth and timed in turn (see
`bench`)."""

from __future__ import annotations

import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cce_precision.analysis.bench_methods import Call, Method, Unavailable
from cce_precision.analysis.cases import CASES, Case, from_file
from cce_precision.analysis.references import Truth, truth
from cce_precision.analysis.shapes import Shape
from cce_precision.problem import Problem

__all__ = [
    "DTYPES",
    "FLOOR",
    "KINDS",
    "PRODUCT",
    "Interrupted",
    "Job",
    "Row",
    "allocated",
    "captured",
    "check",
    "deferred",
    "device_name",
    "is_file",
    "measure",
    "relative_error",
]

KINDS = ("loss-fw", "loss-bw", "loss-fw-bw")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCT = "logits product"
FLOOR = "exact, rounded once"
LOSS_LIMIT = 2.0**-6
GRADIENT_LIMIT = 2.0**-1
BUDGET_SECONDS = 60.0
BURST_SECONDS = 1.2  # on CUDA: how long a method repeats its step in one turn, the second half of which counts
CAPTURED = ("ours", "torch")  # families whose steps are timed as CUDA graphs too
WAIT_CYCLES = 10_000_000  # of the GPU's clock, about 5 ms
MIB = 2**20

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Tensors that all methods share."""

    shape: Shape
    dtype: str
    case: str

    def key(self, device: str) -> tuple[Any, ...]:
        s = self.shape
        return (s.n, s.v, s.d, s.softcap, self.dtype, self.case, device)

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.case}"


@dataclass
class Trial:
    """What one method has shown so far in one job."""

    name: str
    family: str
    status: str = "ok"  # "ok", "skipped" (it cannot run here) or "failed" (its check did)
    reason: str = ""
    call: Call | None = None
    forward: list[float] = field(default_factory=list)  # seconds, one a round
    backward: list[float] = field(default_factory=list)
    replayed: float = math.nan  # seconds of both as one CUDA graph
    uncaptured: str = ""  # why there is no such graph
    peaks: tuple[float, float] = (math.nan, math.nan)  # MiB, forward and backward
    errors: dict[str, float] = field(default_factory=dict)  # loss, dE, dC

    def stop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.call = status, " ".join(reason.split())[:300], None


class _Clock:
    """Marks on the time line of the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda._sleep(WAIT_CYCLES)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, *marks: Any) -> list[float]:
        if not self.cuda:
            return [b - a for a, b in zip(marks, marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body after so many seconds (0: never), as soon as Python runs again. Main thread."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"its first call took more than {seconds:g} s")

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what native code writes to the standard error (the profiler announces each start and stop)."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C waits for the end: an interrupted capture of a CUDA graph may take the process and its numbers with it."""
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *event: came.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def allocated(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """(what `work` returns, the most memory it held beyond what was there, what it left behind), in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return result, (peak - before) / MIB, (after - before) / MIB
    with _quiet(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        result = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak / MIB, held / MIB


def relative_error(x: Tensor, exact: Tensor, rows: int = 4096) -> float:
    """||x - exact|| / ||exact|| in fp64, by blocks of rows; NaN where x holds one."""
    wrong = right = 0.0
    for a, b in zip(x.detach().split(rows), exact.split(rows), strict=True):
        wrong += float((a.double() - b).square().sum())
        right += float(b.square().sum())
    return math.sqrt(wrong / right) if right else (0.0 if wrong == 0 else math.inf)


def check(errors: dict[str, float], loss: float) -> str | None:
    """Why these errors fail the check of the module's docstring; None where they pass. `loss`: the exact one."""
    for name in ("loss", "dE", "dC"):
        if not math.isfinite(errors[name]):
            return f"{name} is not finite"
    for name in ("dE", "dC"):
        if errors[name] > GRADIENT_LIMIT:
            return f"{name} is off by {errors[name]:.1%}, more than half of what a zero gradient is"
    if errors["loss"] * abs(loss) > LOSS_LIMIT * max(1.0, abs(loss)):
        return f"the loss is off by {errors['loss']:.2%}"
    return None


def is_file(case: str) -> bool:
    """Whether a case is a captured head's file rather than a name."""
    return case.endswith(".safetensors")


def captured(case: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Case:
    """The shipped head or the one in a file. Raises ValueError for a head with a bias, which not every method takes."""
    head = from_file(case, dtype=dtype, device=device) if is_file(case) else CASES[case]()
    if head.bias is not None:
        raise ValueError(f"case {case!r} has a bias, which the benchmark leaves out: not every method takes one")
    return head


class _Bench:
    """One job on one device: tensors, truth and trials."""

    def __init__(self, job: Job, methods: Sequence[Method], device: torch.device) -> None:
        self.job, self.device, self.clock = job, device, _Clock(device)
        s = job.shape
        if is_file(job.case):
            case = captured(job.case, DTYPES[job.dtype], device)
        else:
            case = CASES[job.case](n=s.n, v=s.v, d=s.d, dtype=DTYPES[job.dtype], device=device)
        kept = case.targets >= 0  # a benchmark has no ignored tokens: not every method knows them
        self.problem = Problem(case.e[kept], case.c, case.targets[kept], softcap=s.softcap)
        self.e, self.c, self.targets = self.problem.e, self.problem.c, self.problem.targets
        exact: Truth = truth(self.problem)
        self.loss, self.de, self.dc = float(exact.value), exact.dE, exact.dC
        del exact
        self.product = Trial(PRODUCT, "torch", call=None)
        self.trials = [self._bind(m) for m in methods]

    def _bind(self, m: Method) -> Trial:
        trial = Trial(m.name, m.family)
        try:
            trial.call = m.bind(self.job.shape.softcap)
        except Unavailable as reason:
            trial.stop("skipped", str(reason))
        return trial

    def _leaves(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        return self.e[:tokens].detach().requires_grad_(), self.c.detach().requires_grad_()

    def _errors(self, loss: Tensor, e: Tensor, c: Tensor) -> dict[str, float]:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        de, dc = (zero.expand_as(x) if x.grad is None else x.grad for x in (e, c))
        apart = abs(float(loss.detach()) - self.loss)
        return {
            "loss": apart / abs(self.loss) if self.loss else apart,
            "dE": relative_error(de, self.de),
            "dC": relative_error(dc, self.dc),
        }

    def _judge(self, trial: Trial, errors: dict[str, float]) -> None:
        trial.errors = {k: max(errors[k], trial.errors.get(k, 0.0)) for k in errors}
        if reason := check(errors, self.loss):
            trial.stop("failed", reason)

    def first(self, trial: Trial, limit: float = 0) -> None:
        """Warm-up, then the call whose memory and errors count; both within `limit` seconds if that is not 0."""
        if (call := trial.call) is None:
            return
        try:
            with _limited(limit):
                self._first(trial, call)
        except torch.OutOfMemoryError:
            trial.stop("skipped", "out of memory")
        except Exception as error:  # other packages fail in their own ways; the reason is shown
            trial.stop("skipped", f"{type(error).__name__}: {error}")

    def _first(self, trial: Trial, call: Call) -> None:
        e, c = self._leaves(None if self.device.type == "cuda" else 16)
        call(e, c, self.targets[: len(e)]).backward()
        e, c = self._leaves()
        loss, forward, left = allocated(lambda: call(e, c, self.targets), self.device)
        _, backward, _ = allocated(loss.backward, self.device)
        trial.peaks = (forward, left + backward)
        self._judge(trial, self._errors(loss, e, c))

    def _turn(self, step: Callable[[], list[Any]]) -> list[float]:
        """Seconds between the marks of one step; on CUDA in a row of steps, at the clock that such work sustains."""
        self.clock.settle()
        first = self.clock.seconds(*step())
        count = math.ceil(BURST_SECONDS / sum(first)) if self.clock.cuda else 0
        row = [step() for _ in range(count)][count // 2 :]
        times = [self.clock.seconds(*marks) for marks in row] or [first]
        return [statistics.median(part) for part in zip(*times, strict=True)]

    @torch.no_grad()
    def _product(self) -> list[float]:
        """Seconds of the logits product, in a list of one."""
        buffer = torch.empty(self.problem.n, self.problem.v, dtype=self.e.dtype, device=self.device)

        def step() -> list[Any]:
            start = self.clock.mark()
            torch.mm(self.e, self.c.T, out=buffer)
            return [start, self.clock.mark()]

        return self._turn(step)

    def round(self, last: bool) -> None:
        """Every method has one turn; the results of the last round are checked again."""
        self.product.forward += self._product()
        for trial in self.trials:
            if (call := trial.call) is None:
                continue
            done: list[Any] = []

            def step(call: Call = call, done: list[Any] = done) -> list[Any]:
                done.clear()
                e, c = self._leaves()
                marks = [self.clock.mark()]
                loss = call(e, c, self.targets)
                marks.append(self.clock.mark())
                loss.backward()
                marks.append(self.clock.mark())
                done += [loss, e, c]
                return marks

            try:
                forward, backward = self._turn(step)
            except Exception as error:
                trial.stop("failed", f"{type(error).__name__}: {error}")
                continue
            trial.forward.append(forward)
            trial.backward.append(backward)
            if last:
                self._judge(trial, self._errors(*done))
        for trial in self.trials if last and self.clock.cuda else ():
            if trial.call is not None and trial.family in CAPTURED:
                self._replay(trial, trial.call)

    def _replay(self, trial: Trial, call: Call) -> None:
        """The time of a step as a CUDA graph, which leaves out what the host does; or why it cannot be one."""
        e, c = self._leaves()

        def step() -> Tensor:
            e.grad = c.grad = None
            loss = call(e, c, self.targets)
            loss.backward()
            return loss

        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with deferred(), torch.cuda.graph(graph):
                loss = step()

            def replay() -> list[Any]:
                start = self.clock.mark()
                graph.replay()
                return [start, self.clock.mark()]

            [trial.replayed] = self._turn(replay)
            if reason := check(self._errors(loss, e, c), self.loss):
                trial.replayed, trial.uncaptured = math.nan, f"replayed, {reason}"
        except Exception as error:  # what waits for the device
            trial.uncaptured = f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def rows(self) -> list[Row]:
        s = self.job.shape
        where = {
            "shape": s.name, "n": s.n, "v": s.v, "d": s.d, "softcap": s.softcap, "dtype": self.job.dtype,
            "case": self.job.case, "device": device_name(self.device), "exact_loss": self.loss,
        }  # fmt: skip
        unit = statistics.median(self.product.forward) if self.product.forward else math.nan
        rows = [where | _row(self.product, "product", self.product.forward, math.nan, unit)]
        for trial in self.trials:
            both = [a + b for a, b in zip(trial.forward, trial.backward, strict=True)]
            forward, backward = trial.peaks
            for kind, times, peak in zip(
                KINDS, (trial.forward, trial.backward, both), (forward, backward, max(forward, backward)), strict=True
            ):
                row = where | _row(trial, kind, times if trial.status == "ok" else [], peak, unit)
                if kind == "loss-fw-bw" and trial.status == "ok":
                    row |= {"graph_ms": 1e3 * trial.replayed, "graph_product": trial.replayed / unit}
                    row |= {"uncaptured": trial.uncaptured}
                rows.append(row)
        dtype = DTYPES[self.job.dtype]
        floor = Trial(FLOOR, "truth", errors={"loss": 0.0})
        floor.errors |= {
            "dE": relative_error(self.de.to(dtype), self.de),
            "dC": relative_error(self.dc.to(dtype), self.dc),
        }
        size = (self.e.nbytes + self.c.nbytes) / MIB
        return [*rows, where | _row(floor, "loss-fw-bw", [], size, unit)]


def _row(trial: Trial, kind: str, times: Sequence[float], peak: float, unit: float) -> Row:
    median = statistics.median(times) if times else math.nan
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [math.nan] * 3
    return {
        "method": trial.name, "family": trial.family, "kind": kind, "status": trial.status, "reason": trial.reason,
        "rounds": len(times), "time_ms": 1e3 * median, "spread_ms": 1e3 * (quarters[2] - quarters[0]),
        "fastest_ms": 1e3 * min(times, default=math.nan), "times_product": median / unit, "peak_mib": peak,
        "loss_error": trial.errors.get("loss", math.nan), "dE_error": trial.errors.get("dE", math.nan),
        "dC_error": trial.errors.get("dC", math.nan),
    }  # fmt: skip


def measure(
    job: Job,
    methods: Sequence[Method],
    device: torch.device,
    repeat: int = 0,
    say: Callable[[str], None] = print,
    limit: float = 0,
) -> list[Row]:
    """The rows of one job; `limit`: most seconds for a method's first call, 0 for any. Ctrl-C ends the rounds; what was
    measured until then is returned, marked by its `rounds`."""
    bench = _Bench(job, methods, device)
    try:
        for trial in bench.trials:
            say(f"{trial.name}: warm-up, memory, check")
            bench.first(trial, limit)
        started, done, rounds = time.perf_counter(), 0, repeat
        while not rounds or done < rounds:
            say(f"round {done + 1}{f' of {rounds}' if rounds else ''}")
            bench.round(last=done + 1 == rounds)
            done += 1
            if not rounds:
                rounds = max(3, min(30, int(BUDGET_SECONDS / (time.perf_counter() - started))))
    except KeyboardInterrupt:
        rows = bench.rows()
        raise Interrupted(rows) from None
    return bench.rows()


class Interrupted(Exception):
    """Ctrl-C, with the rows measured so far."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("interrupted")
        self.rows = rows


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
