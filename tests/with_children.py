"""Functions that start processes and keep them: what the tests run in processes apart. It imports no PyTorch."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection

KEPT: list[Connection] = []


@functools.cache
def pool() -> ProcessPoolExecutor:
    """One of this process, which stays open."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def child() -> int:
    """The id of a process that this one has started."""
    return pool().submit(os.getpid).result()


def hold(address: str) -> None:
    """A connection that lasts as long as this process."""
    KEPT.append(Client(address))


def start_or_hang(address: str) -> None:
    """Starts a process that holds a connection to the address; without one, waits for ever."""
    if not address:
        threading.Event().wait()
    pool().submit(hold, address).result()
