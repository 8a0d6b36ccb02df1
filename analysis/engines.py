"""Where the cells of a sweep run: in processes of this machine, or spread over machines by Ray. The table is the same.

An engine is a function (sweep, cells) -> iterator of (cell, rows or the reason why there are none), in any order. A
cell has the sweep's threads, by default one, wherever it runs: so its numbers do not depend on the engine.
"""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from cce_precision.analysis.sweep import Cell, Engine, Row, Sweep, measure

__all__ = ["ENGINES", "engine", "local", "pool", "spread"]

ENGINES = ("local", "ray")
Result = tuple[Cell, list[Row] | str]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def attempt(sweep: Sweep, cell: Cell) -> list[Row] | str:
    """The rows of a cell, or the reason why it raised."""
    try:
        return measure(sweep, cell)
    except Exception as error:  # a sweep goes on
        return reason(error)


def local(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[Result]:
    """One cell after the other in this process."""
    with _threads(sweep.threads):
        for cell in cells:
            yield cell, attempt(sweep, cell)


_ADOPTED: list[Sweep] = []  # in a process of the pool: the sweep that it works for


def _adopt(pickled: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes the parts
    _ADOPTED.append(pickle.loads(pickled))
    torch.set_num_threads(_ADOPTED[0].threads)


def _work(cell: Cell) -> list[Row] | str:
    return attempt(_ADOPTED[0], cell)


def pool(workers: int | None = None) -> Engine:
    """So many processes of this machine; None: as many as its cores hold. One is this process itself."""

    def run(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[Result]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(workers or max(1, cores // sweep.threads), len(cells))
        if count <= 1:
            yield from local(sweep, cells)
            return
        yield from _dispatch(count, sweep, list(cells))

    return run


def _executor(sweep: Sweep) -> ProcessPoolExecutor:
    """A process of its own."""
    return ProcessPoolExecutor(1, get_context("spawn"), _adopt, (pickle.dumps(sweep),))


def _dispatch(count: int, sweep: Sweep, waiting: list[Cell]) -> Iterator[Result]:
    """Each process stays with a group of cells, then takes one that no other is at; at the end they share the rest."""
    executors = [_executor(sweep) for _ in range(count)]
    running: dict[Future[list[Row] | str], tuple[int, Cell]] = {}

    def give(worker: int, before: Cell | None) -> None:
        if waiting:
            others = {cell.group for _, cell in running.values()}
            stays = lambda cell: before is not None and cell.group == before.group  # noqa: E731
            cell = min(waiting, key=lambda cell: (not stays(cell), cell.group in others))
            waiting.remove(cell)
            running[executors[worker].submit(_work, cell)] = worker, cell

    try:
        for worker in range(count):
            give(worker, None)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, cell = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    executors[worker] = _executor(sweep)
                give(worker, cell)
                yield cell, future.result() if error is None else reason(error)
    finally:
        for executor in executors:
            executor.shutdown(cancel_futures=True)


def spread(workers: int | None = None) -> Engine:
    """The Ray engine: on the cluster that RAY_ADDRESS names, else on local processes; needs the extra `ray`.

    `workers`: cells at a time; None: as many as the CPUs hold. A cell takes as many CPUs as the sweep has threads.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("engine 'ray' needs Ray: pip install 'cce-precision[ray]'", name="ray") from error

    def run(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[Result]:
        started = not ray.is_initialized()
        if started:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _start(ray, sweep, workers)
        try:
            yield from _schedule(ray, sweep, cells, workers)
        finally:
            if started:
                ray.shutdown()

    return run


def _start(ray: Any, sweep: Sweep, workers: int | None) -> None:
    local_cpus = {} if os.environ.get("RAY_ADDRESS") or workers is None else {"num_cpus": workers * sweep.threads}
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, **local_cpus)


def _schedule(ray: Any, sweep: Sweep, cells: Sequence[Cell], workers: int | None) -> Iterator[Result]:
    """Cells in their order: those that share a truth follow each other, and a worker keeps its last truth."""

    @ray.remote(num_cpus=sweep.threads)
    def work(sweep: Sweep, cell: Cell) -> list[Row] | str:
        with _threads(sweep.threads):
            return attempt(sweep, cell)

    shared = ray.put(sweep)
    waiting = list(reversed(cells))
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // sweep.threads)
    running: dict[Any, Cell] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            cell = waiting.pop()
            running[work.remote(shared, cell)] = cell
        done, _ = ray.wait(list(running))
        for reference in done:
            cell = running.pop(reference)
            try:
                yield cell, ray.get(reference)
            except ray.exceptions.RayError as error:
                yield cell, reason(error)


def engine(name: str, workers: int | None = None) -> Engine:
    """The engine called `name`, with so many cells at a time. Raises ValueError for an unknown one."""
    if name == "ray":
        return spread(workers)
    if name == "local":
        return pool(workers)
    raise ValueError(f"engine {name!r} is not known; known: {', '.join(ENGINES)}")
