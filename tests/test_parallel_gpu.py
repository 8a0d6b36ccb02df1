"""Two GPUs that share a vocabulary, under NCCL: every variant within the bounds, beside one GPU alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cce_precision.analysis.bounds import AMPERE, HOPPER
from cce_precision.variants import ALL
from tests.parallel_cases import judge_kernels, run_kernels

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each process computed."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("parallel")
    multiprocessing.spawn(run_kernels, args=(str(folder), "cuda"), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("impl", ALL)
def test_every_variant(impl: str, ran: list[dict[Any, Any]]) -> None:
    """Loss, heads and gradients within the bounds of the truth and of what one GPU gives, the same bits on both."""
    machine = HOPPER if torch.cuda.get_device_capability()[0] >= 9 else AMPERE
    judged, telling = judge_kernels(ran, impl, "cuda", machine)
    assert judged, "there is a problem that the kernels compute, of every tiled variant"
    assert {"value", "dE", "dC", "dbias"} <= telling  # a zero would have been rejected
