"""The kernels of the element filters compile for sm_80, sm_90 and sm_100 without a GPU, within registers, unspilled."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402

from cce_precision.kernels import elements, entries, exact, hits, launch, lists, sparse, subsets  # noqa: E402
from tests.test_hopper_compile import hopper_matrix  # noqa: E402
from tests.test_kernels_compile import (  # noqa: E402
    CAPABILITY,
    FP32,
    I32,
    I64,
    SHARED,
    Constant,
    check,
    matrix,
    needs_cuobjdump,
    resources,
)

pytestmark = needs_cuobjdump

I16 = "*i16"
ROW_MAJOR = ("i32:16", Constant(1))  # strides of a contiguous matrix
KINDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
ARCHITECTURES = sorted(CAPABILITY)


def check_loops(arguments: dict[str, Any], kernel: Any, arch: str, **options: int) -> None:
    """As `check`, but up to 96 bytes of addresses may be put by, once a tile."""
    assert check(arguments, kernel, arch, spills=96, **options)["in products"] == 0


def tiled(config: launch.Config, arch: str, dtype: str) -> dict[str, Any]:
    """The arguments that the kernels over all logits share."""
    tma = arch != "sm_80"
    return {
        "e": matrix(dtype, tma, config.m, config.k),
        "c": matrix(dtype, tma, config.n, config.k),
        "bias": f"*{dtype}",
        "targets": I64,
        "seed": I64,
        "stride_e": ROW_MAJOR,
        "stride_c": ROW_MAJOR,
        "M": Constant(config.m),
        "N": Constant(config.n),
        "K": Constant(config.k),
        "GROUP": Constant(config.group),
        "FLATTEN": Constant(config.flatten),
        "TMA": Constant(tma),
        "PRECISION": Constant("ieee"),
    }


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("arch", "forward"), [*((arch, True) for arch in ARCHITECTURES), ("sm_90", False)])
def test_hits(arch: str, forward: bool, drawn: bool) -> None:
    config = launch._CONFIGS["forward"][arch][2]
    own = {
        "bounds": FP32,
        "partial": FP32,
        "target_logit": FP32,
        "record": I16,
        "hits": I32 if forward else I64,
        "shape": ("i32:16",) * 4,
        "splits": "i32",
        "tiles_a_split": "i32",
        "scalars": ("fp32",) * 3,
        "FLAGS": Constant((False, False, forward, drawn)),
    }
    check_loops(
        tiled(config, arch, "bf16") | own,
        hits.hits_kernel,
        arch,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="Gluon is experimental: hopper_hits.py is written for 3.6"
)
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("softcap", [False, True])
def test_warp_specialised_hits(softcap: bool, drawn: bool) -> None:
    """Two consumers of 240 registers a thread: 168 on average."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from cce_precision.kernels import hopper_hits

    arguments = {
        "e": hopper_matrix(64, 64),
        "c": hopper_matrix(256, 64),
        "bias": "*bf16",
        "targets": I64,
        **dict.fromkeys(("bounds", "partial", "target_logit"), FP32),
        "record": I16,
        "hits": I32,
        "seed": I64,
        "shape": ("i32:16",) * 4,
        "splits": "i32",
        "tiles_a_split": "i32",
        "scalars": ("fp32",) * 3,
        "FLAGS": Constant((softcap, softcap, drawn)),
        "GROUP": Constant(16),
        "STAGES": Constant(4),
    }
    used = resources(GluonASTSource, hopper_hits.hopper_hits_kernel, arguments, "sm_90", num_warps=4)
    spills = 16 if softcap else 0  # addresses, outside the loops
    assert used["stack"] <= spills and used["registers"] <= 168 and used["shared"] <= SHARED["sm_90"], used


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [elements.DROP, elements.STOCHASTIC, elements.COLUMNS, elements.ROWS])
def test_filtered_dz(arch: str, kind: int) -> None:
    config = launch._CONFIGS["dz"][arch][2]
    tma, tail = arch != "sm_80", kind in (elements.COLUMNS, elements.ROWS)
    own = {
        "FLATTEN": Constant(config.flatten and kind != elements.STOCHASTIC),
        "rows_terms": FP32,
        "label": FP32,
        "high": matrix("bf16", tma, config.m, config.n),
        "low": matrix("bf16", tma, config.m, config.n),
        "column_sums": FP32,
        "row_sums": FP32,
        "factor": FP32,
        "active": I32,
        "shape": ("i32:16",) * 5,
        "stride_dz": ROW_MAJOR,
        "scalars": ("fp32",) * 3,
        "FLAGS": Constant((False, False, False, not tail, False, kind, tail, tail, kind == elements.COLUMNS)),
        "DTYPE": Constant(tl.bfloat16),
    }
    check_loops(
        tiled(config, arch, "bf16") | own,
        elements.filtered_kernel,
        arch,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_of_the_exact_way(arch: str) -> None:
    config = exact.config_of("bf16", arch)
    arguments = {
        "total_e": FP32,
        "out_c": "*bf16",
        "dz": "*bf16",
        "e": "*bf16",
        "c": "*bf16",
        "targets": I64,
        "label": FP32,
        "by_target": I64,
        "target_starts": I32,
        "weight": FP32,
        "shift": FP32,
        "scale": FP32,
        "active": I32,
        "shape": ("i32:16",) * 5,
        "stride_dz": ROW_MAJOR,
        "stride_c": ROW_MAJOR,
        "M": Constant(config.m),
        "N": Constant(config.n),
        "K": Constant(config.k),
        "GROUP": Constant(config.group),
        "FLAGS": Constant((True, True, False, False)),
        "PRECISION": Constant("ieee"),
        "DTYPE": Constant(tl.bfloat16),
        "PARTS": Constant(3),
    }
    check_loops(arguments, exact.products_kernel, arch, num_warps=config.warps, num_stages=config.stages)


@pytest.mark.parametrize("kind", [elements.DROP, elements.STOCHASTIC])
@pytest.mark.parametrize(("arch", "dtype"), [*((arch, "bf16") for arch in ARCHITECTURES), ("sm_90", "fp32")])
def test_gathered_logits(arch: str, kind: int, dtype: str) -> None:
    arguments = {
        "e": f"*{dtype}",
        "c": f"*{dtype}",
        "bias": f"*{dtype}",
        "targets": I64,
        "rows_terms": FP32,
        "tokens": I32,
        "starts": I32,
        "units": I32,
        "unit_block": I32,
        "masks": I16,
        "offsets": I32,
        "values": FP32,
        "kept_entries": I32,
        "row_counts": I32,
        "room": "i32",
        "seed": I64,
        "blocks": "i32",
        "shape": ("i32:16",) * 4,
        "stride_c": ROW_MAJOR,
        "scalars": ("fp32",) * 3,
        "M": Constant(lists.BATCH),
        "WIDTH": Constant(hits.BLOCK),
        "K": Constant(64 if dtype == "bf16" else 16),
        "FLAGS": Constant((False, False, False, kind)),
        "PRECISION": Constant("ieee"),
    }
    check(arguments, entries.gather_kernel, arch, num_warps=4, num_stages=4)


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, "bf16") for arch in ARCHITECTURES), ("sm_90", "fp16"), ("sm_80", "fp32")]
)
def test_sparse_products(arch: str, dtype: str) -> None:
    rows = {
        "out": f"*{dtype}",
        "base": FP32,
        "c": f"*{dtype}",
        "targets": I64,
        "label": FP32,
        "sigma": FP32,
        "shift": FP32,
        **dict.fromkeys(("centre", "terms", "excess"), FP32),
        "scale": FP32,
        "starts": I32,
        "columns": I32,
        "weights": FP32,
        "dense": I32,
        "v": "i32",
        "d": "i32",
        "stride_c": ROW_MAJOR,
        "ENTRIES": Constant(8),
        "FEATURES": Constant(512),
        "FLAGS": Constant((False, True, True, True)),
    }
    check(rows, sparse.finish_rows_kernel, arch, num_warps=4, num_stages=3)
    blocks = {
        "out": f"*{dtype}",
        "bias_sums": FP32,
        "base": FP32,
        "e": f"*{dtype}",
        "targets": I64,
        "label": FP32,
        "by_target": I64,
        "target_starts": I32,
        "masks": I16,
        "offsets": I32,
        "values": FP32,
        "tokens": I32,
        "starts": I32,
        "dense": I32,
        "weight": FP32,
        "shift": FP32,
        "scale": FP32,
        "first": "i32",
        "shape": ("i32:16",) * 2,
        "M": Constant(32),
        "WIDTH": Constant(hits.BLOCK),
        "FEATURES": Constant(128 if dtype == "fp32" else 256),
        "FLAGS": Constant((True, False, False, False, False)),
        "PARTS": Constant(1 if dtype == "fp32" else 3),
        "DTYPE": Constant(KINDS[dtype]),
        "PRECISION": Constant("ieee"),
    }
    check(blocks, sparse.finish_blocks_kernel, arch, num_warps=4, num_stages=3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lists(arch: str) -> None:
    count = {
        "words": I16,
        "lse": FP32,
        "column_counts": I32,
        "row_counts": I32,
        "n": "i32",
        "v": "i32",
        "ROWS": Constant(512),
        "BITS": Constant(16),
        "WIDTH": Constant(16),
    }
    check(count, lists.count_kernel, arch, num_warps=4)
    tokens = {
        "words": I16,
        "lse": FP32,
        "starts": I32,
        "units": I32,
        "tokens": I32,
        "unit_block": I32,
        "fits": I32,
        "n": "i32",
        "v": "i32",
        "ROWS": Constant(256),
        "BITS": Constant(16),
        "WIDTH": Constant(16),
        "UNITS": Constant(128),
    }
    check(tokens, lists.tokens_kernel, arch, num_warps=4)
    blocks = {
        "words": I16,
        "lse": FP32,
        "row_starts": I32,
        "blocks": I32,
        "fits": I32,
        "n": "i32",
        "v": "i32",
        "tiles": "i32",
        "ROWS": Constant(16),
        "TILES": Constant(16),
        "BITS": Constant(16),
        "WIDTH": Constant(16),
    }
    check(blocks, lists.blocks_kernel, arch, spills=8, num_warps=4)
    rows = {
        "masks": I16,
        "offsets": I32,
        "values": FP32,
        "tokens": I32,
        "starts": I32,
        "blocks": I32,
        "row_starts": I32,
        "entry_starts": I32,
        "columns": I32,
        "weights": FP32,
        "counts": I32,
        "fits": I32,
        **dict.fromkeys(("v", "pairs", "steps"), "i32"),
        "HITS": Constant(32),
        "WIDTH": Constant(16),
        "COUNTED": Constant(True),
    }
    check(rows, entries.rows_kernel, arch, num_warps=1)
    members = {
        "seed": I64,
        "out": I64,
        "groups": "i32",
        "share": "i32",
        "count": "i32",
        "first": "i32",
        "OVER_COLUMNS": Constant(True),
        "BLOCK": Constant(256),
    }
    check(members, elements.members_kernel, arch, num_warps=4)
    tail = {
        **dict.fromkeys(("seed", "order", "columns", "targets", "part_targets", "among"), I64),
        **dict.fromkeys(("factor", "terms", "part_terms", "label"), FP32),
        **dict.fromkeys(("groups", "share", "first", "n", "v", "d"), "i32"),
        **dict.fromkeys(("e", "part_e"), "*bf16"),
        "places": I32,
        "BLOCK": Constant(256),
        "ORDER": Constant(True),
        "SHARE": Constant(8),
        "FEATURES": Constant(1024),
    }
    for kernel in (subsets.drawn_columns_kernel, subsets.drawn_tokens_kernel):
        check({name: tail[name] for name in kernel.arg_names}, kernel, arch, num_warps=4)
