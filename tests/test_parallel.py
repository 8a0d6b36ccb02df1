"""Processes that share a vocabulary, under gloo: every variant against the truth, within bounds for every share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cce_precision.analysis.bounds import INTERPRETER
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.fuzz_problems import build
from cce_precision.analysis.references import truth
from tests.parallel_cases import CASES, WORLD, judge_kernels, problems, run, run_kernels, verdict_of
from tests.parallel_placements import KNOBS, PLACEMENTS, allowance, mean_of_parts, parts
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


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements(name: str, ran: dict[str, list[Any]]) -> None:
    """DTensors placed in every way that has a meaning give what one process gives; gradients are placed alike."""
    call = build(KNOBS)
    exact, allowed = truth(call.problem, call.objective), allowance(call)
    for results in ran["placements"]:
        for quantity, value in results[name].items():
            judged = compare(
                value, getattr(exact, quantity), getattr(allowed, quantity) + getattr(exact.radius, quantity)
            )
            assert judged.holds and judged.tells, (quantity, judged)


@pytest.mark.parametrize("name", ["inside", "outside", "sharded by hand"])
def test_a_sharded_head_has_the_mean_gradient(name: str, ran: dict[str, list[Any]]) -> None:
    """A head of fully_shard, or sharded like one, beside plain tokens: as data parallelism reduces it."""
    mean, allowed = mean_of_parts()
    for call, results in zip(parts(), ran["sharded_head"]):
        exact, own = truth(call.problem, call.objective), allowance(call)
        for quantity in ("value", "dE"):
            judged = compare(results[name][quantity], getattr(exact, quantity), getattr(own, quantity))
            assert judged.holds and judged.tells, (quantity, judged)
        judged = compare(results[name]["dC"], mean, allowed)
        assert judged.holds and judged.tells, judged


def test_unknown_placements(ran: dict[str, list[Any]]) -> None:
    expected = {
        "c by columns": "c must be Shard(0) or Replicate on each dimension of its mesh",
        "e by features": "e must be Replicate or Shard along a dimension of tokens",
        "partial e": "e must be Replicate or Shard along a dimension of tokens",
        "other mesh": "e must be a DTensor on the mesh of c",
        "plain c": "c must be a DTensor on the mesh of e",
        "plain bias": "bias must be a DTensor placed as c",
        "rows twice": "c must be Shard(0) on one dimension of its mesh",
    }
    for messages in ran["unknown_placements"]:
        assert messages.keys() == expected.keys()
        for name, text in expected.items():
            assert text in messages[name], messages[name]


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
