"""The warp-specialised kernels for Hopper compile without a GPU, within their registers."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from tests.test_kernels_compile import FP32, I32, I64, SHARED, Constant, needs_cuobjdump, resources  # noqa: E402

pytestmark = needs_cuobjdump


def hopper_matrix(rows: int, columns: int) -> str:
    from cce_precision.kernels.hopper import _LAYOUT

    return f"tensordesc<bf16[{rows}, {columns}],{_LAYOUT!r}>"


DZ_FLAGS = {  # (label, row statistics, chosen tiles, filter, bias, softcap, split, active, flushed)
    "dz": (False,) * 9,
    "dz flushed": (False,) * 8 + (True,),
    "filter": (True, False, False, True, False, False, False, False, False),
    "filter record": (True, False, True, True, False, False, False, False, False),
    "powers": (False, True, True, False, False, False, False, False, True),
    "split": (False, False, False, False, True, False, True, False, False),
    "softcap": (False, False, False, False, True, True, False, True, True),
}


@pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="Gluon is experimental: hopper.py is written for 3.6"
)
@pytest.mark.parametrize(
    "which",
    ["forward", "forward softcap", "forward record", "forward softcap record", *DZ_FLAGS] + ["input", "kahan"],
)
def test_warp_specialised_kernels(which: str) -> None:
    """Two consumers of 240 registers a thread: 168 on average."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from cce_precision.kernels import hopper, hopper_dz, hopper_tiles

    logits = {
        "e": hopper_matrix(64, 64),
        "c": hopper_matrix(256, 64),
        "targets": I64,
        "n": "i32",
        "d": "i32",
        "GROUP": Constant(16),
    }
    if "forward" in which:
        kernel = hopper.hopper_forward_kernel
        arguments: dict[str, Any] = logits | {
            "bias": "*bf16",
            "partial": FP32,
            "target_logit": FP32,
            "bounds": FP32,
            "record": I32,
            "v": "i32",
            "splits": "i32",
            "tiles_a_split": "i32",
            "scale": "fp32",
            "softcap": "fp32",
            "threshold": "fp32",
            "FLAGS": Constant(("softcap" in which, "softcap" in which, "record" in which)),
            "STAGES": Constant(4),
        }
    elif which in DZ_FLAGS:
        kernel = hopper_dz.hopper_dz_kernel
        arguments = logits | {
            "dz": hopper_matrix(64, 256),
            "dz_low": hopper_matrix(64, 128) if DZ_FLAGS[which][6] else "*bf16",
            "rows_terms": FP32,
            "label": FP32,
            "bias": "*bf16",
            "row_stats": FP32,
            "chosen": I32,
            "alive": I32,
            "active": I32,
            "width": "i32",
            "start": "i32",
            "temperature": "fp32",
            "softcap": "fp32",
            "FLAGS": Constant(DZ_FLAGS[which]),
            "STAGES": Constant(3),
        }
    else:
        kernel = hopper_tiles.hopper_tile_product_kernel
        features = 128 if which == "kahan" else 256
        arguments = {
            "dz": hopper_matrix(64, 64),
            "other": hopper_matrix(64, features),
            "places": I32,
            "counts": I32,
            "out": "*bf16",
            "lost": "*bf16",
            "order": I64,
            "factor": FP32,
            "shift": FP32,
            "scale": FP32,
            "rows_end": "i32",
            "d": "i32",
            "walked": "i32",
            "FEATURES": Constant(features),
            "TRANSPOSED": Constant(which == "input"),
            "KAHAN": Constant(which == "kahan"),
            "FLAGS": Constant((which == "input", False, False)),
            "STAGES": Constant(4),
        }
    used = resources(GluonASTSource, kernel, arguments, "sm_90", num_warps=4)
    spills = 64 if "softcap" in which else 16  # once a tile, outside the loop over D
    assert used["in products"] == 0
    assert used["stack"] <= spills and used["registers"] <= 168 and used["shared"] <= SHARED["sm_90"], used


PRODUCT_FLAGS = {  # (dC, split, label apart, dE, active)
    "both": (True, False, True, True, False),
    "active": (True, False, True, True, True),
    "frozen c": (False, False, False, True, False),
    "frozen e": (True, False, True, False, False),
    "split": (True, True, True, True, False),
}


@pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="Gluon is experimental: hopper.py is written for 3.6"
)
@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("which", PRODUCT_FLAGS)
def test_products(which: str, consumers: int) -> None:
    """Two consumers of 240 registers a thread, or three of 160: there what finishes a tile of dC puts some by."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from cce_precision.kernels.hopper_product import SUMS_LAYOUT, hopper_product_kernel

    sums = f"tensordesc<fp32[64, 32],{SUMS_LAYOUT.value!r}>"
    arguments: dict[str, Any] = {
        "dz": hopper_matrix(64, 64),
        "dz_low": hopper_matrix(64, 64) if PRODUCT_FLAGS[which][1] else "*bf16",
        **dict.fromkeys(("e", "c"), hopper_matrix(64, 256)),
        "out": hopper_matrix(64, 64),
        "sum_e": sums,
        "labels": ("*bf16", I64, FP32, I64, I32, FP32),
        "scale": FP32,
        **dict.fromkeys(("own_units", "other_units", "ahead", "rows_first"), "i32"),
        "active": I32,
        "shape": ("i32",) * 5,
        "FLAGS": Constant(PRODUCT_FLAGS[which]),
        "CONSUMERS": Constant(consumers),
        "STAGES": Constant(3),
    }
    used = resources(GluonASTSource, hopper_product_kernel, arguments, "sm_90", num_warps=4)
    spills = 320 if PRODUCT_FLAGS[which][0] and consumers == 3 else 0
    assert used["in products"] == 0
    assert (
        used["stack"] <= spills and used["registers"] <= (168, 128)[consumers - 2] and used["shared"] <= SHARED["sm_90"]
    ), used
