"""The kernels beside the products compile too, and no kernel is left out; see test_kernels_compile.py."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from cce_precision.kernels import entries, launch, one_pass_rows, record, terms, tile_filter
from tests.test_kernels_compile import (
    CAPABILITY,
    FP32,
    I32,
    I64,
    PAIR,
    TRIPLE,
    Constant,
    check,
    needs_cuobjdump,
)

pytestmark = needs_cuobjdump


def small_kernels() -> dict[Any, dict[str, Any]]:
    """Kernels beside the products, and what they are given."""
    records = {
        **dict.fromkeys(("alive", "record", "units", "places", "counts"), I32),
        **dict.fromkeys(("order", "packed"), I64),
        **dict.fromkeys(("blocks", "tiles", "columns", "words", "stride", "walked", "least"), "i32"),
        **dict.fromkeys(("stride_block", "stride_tile", "stride_owner", "stride_walked"), "i32"),
        "lse": FP32,
        "targets": I64,
        "shape": TRIPLE,
        **{name: Constant(value) for name, value in (("HEIGHT", 128), ("TM", 128), ("TN", 128), ("ORDER", True))},
        **{name: Constant(value) for name, value in (("GROUP", 16), ("PAIR", 2), ("CHUNK", 1024), ("WALKED", 1024))},
    }
    rows = {
        **dict.fromkeys(("e", "c", "x", "bias"), "*bf16"),
        **dict.fromkeys(("jensen", "bounds", "label", "sigma", "shift", "vector", "weight", "factor"), FP32),
        **dict.fromkeys(("n", "v", "d", "rows", "rows_a_block", "size"), "i32"),
        **dict.fromkeys(("stride_e", "stride_c", "stride_x"), PAIR),
        **dict.fromkeys(("softcap", "scale"), "fp32"),
        "targets": I64,
        "active": I32,
        "out": FP32,
        **dict.fromkeys(("LABEL", "SHIFT", "ACTIVE", "WEIGHT"), Constant(True)),
        **{name: Constant(value) for name, value in (("FEATURES", 1024), ("COLUMNS", 256), ("ROWS", 16))},
        "FLAGS": Constant((True, True, True)),
    }
    kept = {
        **dict.fromkeys(("weights", "alpha", "norms", "out"), FP32),
        **dict.fromkeys(("starts", "columns", "dense"), I32),
        **dict.fromkeys(("n", "stride"), "i32"),
        "drawn": "fp32",
        "ENTRIES": Constant(64),
    }
    return {
        record.candidates_kernel: records,
        record.units_kernel: records,
        tile_filter.survivors_kernel: records,
        record.first_bounds_kernel: rows,
        terms.clean_rows_kernel: rows | {"out": "*bf16", "COLUMNS": Constant(1024)},
        terms.label_rows_kernel: rows | {"COLUMNS": Constant(1024)},
        terms.matvec_kernel: rows,
        terms.scale_kernel: rows | {"out": "*bf16", "unit": FP32, "BLOCK": Constant(4096)},
        terms.weighted_sum_kernel: rows | {"COLUMNS": Constant(128), "SUMS": Constant(2)},
        one_pass_rows.weighted_rows_kernel: rows | {"out": "*bf16"},
        entries.seen_kernel: kept,
    }


@pytest.mark.parametrize("arch", list(CAPABILITY))
def test_small_kernels(arch: str) -> None:
    for kernel, given in small_kernels().items():
        warps = {record.units_kernel: 8, terms.scale_kernel: 8, entries.seen_kernel: 1}.get(kernel, 4)
        check({name: given[name] for name in kernel.arg_names}, kernel, arch, num_warps=warps)


def test_no_kernel_is_left_out() -> None:
    """Each that the host launches is named in one of the files that compile them."""
    tests = "".join(x.read_text() for x in Path(__file__).parent.glob("test_*_compile.py"))
    sources = "".join(x.read_text() for x in Path(launch.__file__).parent.glob("*.py"))
    launched = re.findall(r"^@entry\n@\w+\.jit\ndef (\w+)\(", sources, re.MULTILINE)
    assert len(launched) == len(re.findall(r"^@entry$", sources, re.MULTILINE)) > 30
    assert not [name for name in launched if not re.search(rf"\b{name}\b", tests)]
