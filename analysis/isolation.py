"""Functions run in processes of their own: a crash, a hang or a broken GPU ends one task, not the program.

    for task, result in isolated(judge, problems, workers=4, seconds=60): ...     result may be a Lost

A process serves many tasks, one after the other; after one that it does not survive, another takes its place. It may
start processes of its own: they are of its process group, and end with it, however it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

__all__ = ["Lost", "isolated"]

Task = TypeVar("Task")
Result = TypeVar("Result")
SPAWN = multiprocessing.get_context("spawn")  # a fork would share the state of CUDA and of OpenMP's threads
LONGEST_WAIT = 3600.0
STARTING = 60.0  # seconds that a new process may take before its first task


@dataclass(frozen=True)
class Lost:
    """A task without a result: its process died, or did not answer in time."""

    reason: str


def _gpu_works() -> bool:
    """False after an error that leaves a process's CUDA context unusable."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _end_with_parent() -> None:
    """Ends this group once the process that started it has ended: signals to that one's group do not reach it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    os.setsid()  # a group of its own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.current_process().daemon = False  # which may start processes
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        usable = True
        while usable:
            result = function(pipe.recv())
            usable = _gpu_works()
            pipe.send((result, usable))


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Changes what processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class _Worker:
    function: Callable[[Any], Any]
    environment: Mapping[str, str]
    process: BaseProcess = field(init=False)
    pipe: Connection = field(init=False)
    task: Any = None
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.pipe, other = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(self.function, other), daemon=True)
        with _environment(self.environment):
            self.process.start()
        other.close()

    def stop(self) -> None:
        """Ends the process, and all that it started."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no such group: not yet, or no longer
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def isolated(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int = 1,
    seconds: float = LONGEST_WAIT,
    environment: Mapping[str, str] | None = None,
) -> Generator[tuple[Task, Result | Lost], None, None]:
    """Results of `function`, as they come, from `workers` processes with `environment` on top of this one's.

    `function` and what goes in and out must pickle, and the function should catch its own exceptions. A task may take
    `seconds`. Tasks are taken from the iterable only when a process is free. Leaving the loop ends all processes.
    """
    waiting = iter(tasks)
    idle: list[_Worker] = []
    busy: dict[Connection, _Worker] = {}
    try:
        while True:
            while len(busy) < workers:
                try:
                    task = next(waiting)
                except StopIteration:
                    break
                start = 0.0 if idle else STARTING
                worker = idle.pop() if idle else _Worker(function, environment or {})
                worker.task, worker.deadline = task, time.monotonic() + start + seconds
                busy[worker.pipe] = worker
                with contextlib.suppress(BrokenPipeError):
                    worker.pipe.send(task)
            if not busy:
                return
            left = min(worker.deadline for worker in busy.values()) - time.monotonic()
            ready = wait(list(busy), timeout=max(0.0, left))
            late = [pipe for pipe, worker in busy.items() if pipe not in ready and worker.deadline <= time.monotonic()]
            for pipe in [*ready, *late]:
                worker = busy.pop(pipe)  # type: ignore[call-overload]
                result: Result | Lost = Lost(f"no answer within {seconds:g} s")
                usable = False
                if pipe in ready:
                    try:
                        result, usable = worker.pipe.recv()
                    except EOFError:
                        worker.process.join()
                        result = Lost(f"its process ended with code {worker.process.exitcode}")
                if usable:
                    idle.append(worker)
                else:
                    worker.stop()
                yield worker.task, result
    finally:
        for worker in [*idle, *busy.values()]:
            worker.stop()
