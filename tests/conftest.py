"""How every test runs: hypothesis follows a profile, threads are few, and what cannot run here says why.

Triton interprets its kernels only if TRITON_INTERPRET=1 is set when it is first imported, and then for the whole
process, where backend="auto" takes the interpreted kernels. So tests of interpreted kernels carry the marker
`interpreter` and run in a process of their own (`make test` starts both): TRITON_INTERPRET=1 pytest -m interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
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
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if os.environ.get("TRITON_INTERPRET") != "1":
        reasons["interpreter"] = "needs TRITON_INTERPRET=1 and a process of its own (make test)"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
