"""Two GPUs under NCCL: every variant with a shared vocabulary within the bounds, beside one GPU alone; DTensors, heads
of FSDP2 and patched models as under gloo.

Processes start once, two for each variant and two for all DTensors: with `pytest -n` in every one of its workers that
gets a test of theirs, unless `--dist loadfile` leaves the file to one. Several variants run at once: compiling their
kernels takes minutes, the kernels themselves seconds.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cce_precision.analysis.bounds_model import gpu_machine
from cce_precision.variants import ALL
from tests.parallel_cases import judge_kernels, run, run_kernels
from tests.parallel_placements import (
    SHARDED,
    judge_features,
    judge_placements,
    judge_sharded_head,
    judge_unknown_placements,
    placements_of,
)

WORLD = 2
PLACED = ("placements", "placed_features", "sharded_head", "unknown_placements")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < WORLD, reason=f"needs two CUDA devices, found {torch.cuda.device_count()}"
    ),
]


def stored(folder: Path) -> list[Any]:
    """What the processes found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Of each variant a folder with what its processes found, and how they ended, if before the last."""

    def compute(impl: str, folder: Path) -> tuple[Path, str]:
        try:
            multiprocessing.spawn(run_kernels, args=(str(folder), "cuda", (impl,)), nprocs=WORLD)
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            return folder, str(error)
        return folder, ""

    folders = [tmp_path_factory.mktemp(impl) for impl in ALL]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // WORLD)) as pool:
        return dict(zip(ALL, pool.map(compute, ALL, folders)))


@pytest.mark.parametrize("impl", ALL)
def test_every_variant(impl: str, computed: dict[str, tuple[Path, str]]) -> None:
    """Loss, heads and gradients within the bounds of the truth and of what one GPU gives, the same bits on both."""
    folder, ended = computed[impl]
    assert all((folder / impl / f"{rank}.pt").exists() for rank in range(WORLD)), ended
    judged, telling = judge_kernels(stored(folder / impl), impl, "cuda", gpu_machine())
    assert judged, "there is a problem that the kernels compute, of every tiled variant"
    assert {"value", "dE", "dC", "dbias"} <= telling  # a zero would have been rejected


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each case of DTensors returned in each process."""
    folder = tmp_path_factory.mktemp("placed")
    multiprocessing.spawn(run, args=(str(folder), PLACED, "cuda", WORLD), nprocs=WORLD)
    return {name: [results[name] for results in stored(folder)] for name in PLACED}


@pytest.mark.parametrize("name", placements_of(WORLD))
def test_placements(name: str, placed: dict[str, list[Any]]) -> None:
    """DTensors placed in every way that has a meaning give what one process gives; gradients are placed alike."""
    judge_placements(placed["placements"], name, gpu_machine())


def test_placed_features(placed: dict[str, list[Any]]) -> None:
    """Shift, smoothing, class weights, entropy, softcap, temperature, unreduced, under placements."""
    judge_features(placed["placed_features"], gpu_machine())


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_head_has_the_mean_gradient(name: str, placed: dict[str, list[Any]]) -> None:
    """A head of fully_shard, or sharded like one, beside plain tokens: as data parallelism reduces it."""
    judge_sharded_head(placed["sharded_head"], name, gpu_machine())


def test_unknown_placements(placed: dict[str, list[Any]]) -> None:
    judge_unknown_placements(placed["unknown_placements"])


def test_patched_models(tmp_path: Path) -> None:
    """Under FSDP2, and with a head that the processes share, no logits are made; beside the unpatched model."""
    pytest.importorskip("transformers")
    from tests.parallel_models import judge_patched_models, patched_models

    multiprocessing.spawn(patched_models, args=(str(tmp_path), "cuda"), nprocs=WORLD)
    judge_patched_models(stored(tmp_path))
