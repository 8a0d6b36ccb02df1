"""Times a head whose vocabulary is shared by the processes of torchrun, against the whole head on one device.

    torchrun --nproc-per-node 2 -m cce_precision.analysis.parallel_bench --out reports/parallel

Every process first runs the whole problem by itself, then all run it together; the two take turns, each a burst of
steps at the clock that such work sustains. Both are checked against the fp64 truth and against each other in the same
run; a step of all processes takes as long as that of the slowest. Without CUDA it runs under gloo, as a check.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.nn.functional  # before there is a group: its functions' defaults would hold it for ever
import typer
from torch import Tensor, distributed

from cce_precision import VocabParallelOptions, linear_cross_entropy
from cce_precision.analysis.bench_job import DTYPES, Row, device_name, relative_error
from cce_precision.analysis.cases import CASES
from cce_precision.analysis.references import truth
from cce_precision.analysis.shapes import Shape, shape
from cce_precision.problem import Problem

__all__ = ["measure", "page"]

BURST = 10  # steps of one turn, the second half of which counts
ROWS, PAGE = "rows.jsonl", "README.md"


class _Bench:
    """One head on every process, and this process's share of it."""

    def __init__(self, size: Shape, dtype: str, case: str, device: torch.device) -> None:
        self.size, self.dtype, self.case, self.device = size, dtype, case, device
        head = CASES[case](n=size.n, v=size.v, d=size.d, dtype=DTYPES[dtype], device=device)
        self.e, self.c, self.targets = head.e, head.c, head.targets
        for x in (self.e, self.c, self.targets):
            distributed.broadcast(x, 0)
        self.options = VocabParallelOptions.from_vocab(size.v)
        self.rows = slice(self.options.start, self.options.stop)
        exact = truth(Problem(self.e, self.c, self.targets, softcap=size.softcap))
        self.loss, self.d_e, self.d_c = float(exact.value), exact.dE, exact.dC

    def step(self, impl: str, together: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dE and dC (the own rows of it) of one forward and backward pass."""
        e = self.e.detach().requires_grad_()
        c = (self.c[self.rows] if together else self.c).detach().requires_grad_()
        options = self.options if together else None
        loss: Any = linear_cross_entropy(
            e, c, self.targets, softcap=self.size.softcap, impl=impl, vocab_parallel_options=options
        )
        loss.backward()
        assert e.grad is not None and c.grad is not None
        return loss.detach(), e.grad, c.grad if together else c.grad[self.rows]

    def errors(self, impl: str) -> dict[str, float]:
        """Relative errors against the truth, alone and together, and of one against the other; the worst process's."""
        alone, together = self.step(impl, False), self.step(impl, True)
        exact = (torch.tensor([self.loss], device=self.device, dtype=torch.float64), self.d_e, self.d_c[self.rows])
        found = {}
        for name, one, all_, true in zip(("loss", "dE", "dC"), alone, together, exact):
            rows = lambda x: x.reshape(len(true), -1)  # noqa: B023, E731
            found[f"{name}_alone"] = relative_error(rows(one), rows(true))
            found[f"{name}_together"] = relative_error(rows(all_), rows(true))
            found[f"{name}_apart"] = relative_error(rows(all_), rows(one).double())
        losses = [torch.empty_like(together[0]) for _ in range(distributed.get_world_size())]
        distributed.all_gather(losses, together[0])
        if any(not torch.equal(x, losses[0]) for x in losses):
            raise RuntimeError(f"{impl}: the processes' losses differ: {[float(x) for x in losses]}")
        return {name: self.worst(value) for name, value in found.items()}

    def worst(self, value: float) -> float:
        """The largest of all processes."""
        x = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
        return float(x)

    def turn(self, work: Callable[[], Any]) -> float:
        """Milliseconds of one step of the slowest process, in a burst."""
        distributed.barrier()
        times = []
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(BURST + 1)]
            marks[0].record()
            for mark in marks[1:]:
                work()
                mark.record()
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
        else:
            for _ in range(BURST):
                start = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - start))
        return self.worst(statistics.median(times[BURST // 2 :]))

    def peak(self, work: Callable[[], Any]) -> float:
        """MiB above what was there; NaN without CUDA."""
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work()
        torch.cuda.synchronize()
        del kept
        return self.worst((torch.cuda.max_memory_allocated() - before) / 2**20)


def measure(
    size: Shape, dtype: str, case: str, impls: list[str], rounds: int, device: torch.device, say: Callable[[str], None]
) -> list[Row]:
    """One row for each variant, and one for the collectives alone. Every process of the default group calls this."""
    bench = _Bench(size, dtype, case, device)
    where = {
        "shape": size.name, "n": size.n, "v": size.v, "d": size.d, "softcap": size.softcap, "dtype": dtype,
        "case": case, "processes": distributed.get_world_size(), "device": device_name(device), "rounds": rounds,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }  # fmt: skip
    rows: list[Row] = []
    times: dict[tuple[str, bool], list[float]] = {}
    for impl in impls:
        say(f"{impl}: check")
        peaks = {
            "peak_alone_mib": bench.peak(functools.partial(bench.step, impl, False)),
            "peak_together_mib": bench.peak(functools.partial(bench.step, impl, True)),
        }
        rows.append(where | {"method": impl} | peaks | bench.errors(impl))
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        for impl in impls:
            for together in (False, True):
                time_ms = bench.turn(functools.partial(bench.step, impl, together))
                times.setdefault((impl, together), []).append(time_ms)
    for row in rows:
        alone, shared = (statistics.median(times[row["method"], together]) for together in (False, True))
        row |= {"alone_ms": alone, "together_ms": shared, "ratio": shared / alone}
    rows.append(where | {"method": "all-reduce of dE"} | _collective(bench))
    return rows


def _collective(bench: _Bench) -> Row:
    part = torch.zeros(bench.size.n, bench.size.d, device=bench.device)
    return {"together_ms": bench.turn(lambda: distributed.all_reduce(part))}


def page(rows: list[Row]) -> str:
    """The table as Markdown."""
    first = rows[0]
    cap = "" if first["softcap"] is None else f", softcap {first['softcap']:g}"
    lines = [
        "# A vocabulary shared by processes",
        "",
        f"{first['processes']} x {first['device']}, {first['shape']} (N = {first['n']}, V = {first['v']}, "
        f"D = {first['d']}{cap}), {first['dtype']}, case {first['case']}; {first['versions']}.",
        "Forward and backward of `linear_cross_entropy`, mean reduction, one device with the whole head against all "
        f"with a share each, in turn, {first['rounds']} rounds of {BURST} steps, medians; the slowest process counts.",
        "",
        "| variant | one device, ms | together, ms | ratio | peak MiB, one | peak MiB, together | dE, dC error, one | "
        "dE, dC error, together | dE, dC apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "ratio" not in row:
            continue
        pair = lambda kind, row=row: f"{row[f'dE_{kind}']:.2e}, {row[f'dC_{kind}']:.2e}"  # noqa: E731
        lines.append(
            f"| `{row['method']}` | {row['alone_ms']:.2f} | {row['together_ms']:.2f} | {row['ratio']:.3f} | "
            f"{row['peak_alone_mib']:.0f} | {row['peak_together_mib']:.0f} | {pair('alone')} | {pair('together')} | "
            f"{pair('apart')} |"
        )
    (collective,) = (row["together_ms"] for row in rows if "ratio" not in row)
    beyond = rows[0]["together_ms"] - rows[0]["alone_ms"] / first["processes"]
    lines += [
        "",
        f"Beyond its share of the work (one device's time over the processes) a step of `{first['method']}` takes "
        f"{beyond:.2f} ms. The all-reduce of dE alone takes {collective:.2f} ms: all that overlapping it with the "
        "passes could hide.",
        "",
        "A tile filter gains less: in a vocabulary ordered by frequency the first share keeps most of the tiles that "
        "survive, and the processes wait for it.",
    ]
    lines += [
        "",
        "Errors are relative to the fp64 truth, normwise; *apart* is together against one device. The loss had the "
        "same bits on every process. Memory is above the inputs, gradients included.",
        "",
        "Made by `torchrun --nproc-per-node 2 -m cce_precision.analysis.parallel_bench --out reports/parallel`, which "
        f"writes `{ROWS}` and this page; `--page` writes the page again.",
    ]
    return "\n".join(lines) + "\n"


def _write(out: Path, rows: list[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / PAGE).write_text(page(rows))


def main(
    out: Annotated[Path, typer.Option(help="Folder of rows.jsonl and README.md.")] = Path("reports/parallel"),
    size: Annotated[str, typer.Option("--shape", help="A known shape or NxVxD, without its softcap.")] = "gemma2-2b",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    case: Annotated[str, typer.Option(help=f"One of {', '.join(CASES)}.")] = "trained",
    impl: Annotated[str, typer.Option(help="Variants, separated by commas.")] = "cce_exact,cce",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    again: Annotated[bool, typer.Option("--page", help="Write the page of stored rows, and measure nothing.")] = False,
) -> None:
    """Measures under torchrun, and writes rows and page."""
    if again:
        _write(out, [json.loads(line) for line in (out / ROWS).read_text().splitlines()])
        return
    if "RANK" not in os.environ:
        raise typer.BadParameter("run this with torchrun --nproc-per-node 2 -m cce_precision.analysis.parallel_bench")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    first = distributed.get_rank() == 0
    say = (lambda text: print(text, flush=True)) if first else (lambda text: None)
    try:
        rows = measure(shape(size, softcap=False), dtype, case, impl.split(","), rounds, device, say)
        if first:
            _write(out, rows)
            print(page(rows))
        distributed.barrier()  # none leaves while another still speaks to it
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
