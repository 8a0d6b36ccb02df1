"""Processes that share a vocabulary, under gloo: every variant against the truth, within bounds for every share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cce_precision.analysis.bounds import INTERPRETER
from tests.parallel_cases import CASES, WORLD, judge_kernels, problems, run, run_kernels, verdict_of
from tests.strategies import EAGER, TILED


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each case returned in each process."""
    folder = tmp_path_factory.mktemp("parallel")
    multiprocessing.spawn(run, args=(str(folder), list(CASES)), nprocs=WORLD)
    stored = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [results[name] for results in stored] for name in CASES}


@pytest.mark.parametrize("world", [2, WORLD])
@pytest.mark.parametrize("impl", EAGER)
def test_every_variant(impl: str, world: int, ran: dict[str, list[Any]]) -> None:
    """Loss, heads and gradients within the bounds, the same bits on every process, own rows of dC and dbias alone."""
    telling = set()
    for i, k in enumerate(problems(impl)):
        parts = [results[impl, i, world] for results in ran["every_variant"] if (impl, i, world) in results]
        assert len(parts) == world
        verdict = verdict_of(parts, k)
        assert verdict.holds, str(verdict)
        telling |= {name for name, q in verdict.quantities.items() if q.tells and q.truth > 0}
    assert {"value", "dE", "dC", "dbias"} <= telling  # a zero would have been rejected


@pytest.mark.interpreter
def test_kernels_of_every_variant(tmp_path: Path) -> None:
    """The kernels, interpreted, with targets that the other of two processes holds."""
    multiprocessing.spawn(run_kernels, args=(str(tmp_path), "cpu"), nprocs=2)
    stored = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    judged = 0
    for impl in TILED:
        count, telling = judge_kernels(stored, impl, "cpu", INTERPRETER)
        assert not count or {"value", "dE", "dC"} <= telling
        judged += count
    assert judged
