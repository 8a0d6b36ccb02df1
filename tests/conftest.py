"""How every test runs: without a GPU the Triton kernels are interpreted, hypothesis follows a profile, threads are
few."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

import pytest
from hypothesis import HealthCheck, Verbosity, settings

# No deadline: a machine's speed is no property of the code. `default` draws the same examples every time, so that a run
# of the tests tells about the change at hand; `slow` is the hunt (make fuzz), with new examples each time.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=50, derandomize=True, **COMMON)  # type: ignore[arg-type]
settings.register_profile("slow", max_examples=10_000, verbosity=Verbosity.normal, **COMMON)  # type: ignore[arg-type]
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
