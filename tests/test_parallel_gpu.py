"""Two GPUs that share a vocabulary, under NCCL: every variant within the bounds, beside one GPU alone.

Each variant has processes of its own, so that `pytest -n` compiles the kernels of several at a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from cce_precision.analysis.bounds import AMPERE, HOPPER
from cce_precision.variants import ALL
from tests.parallel_cases import judge_kernels, run_kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("impl", ALL)
def test_every_variant(impl: str, tmp_path: Path) -> None:
    """Loss, heads and gradients within the bounds of the truth and of what one GPU gives, the same bits on both."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    multiprocessing.spawn(run_kernels, args=(str(tmp_path), "cuda", (impl,)), nprocs=2)
    stored = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    machine = HOPPER if torch.cuda.get_device_capability()[0] >= 9 else AMPERE
    judged, telling = judge_kernels(stored, impl, "cuda", machine)
    assert judged, "there is a problem that the kernels compute, of every tiled variant"
    assert {"value", "dE", "dC", "dbias"} <= telling  # a zero would have been rejected
