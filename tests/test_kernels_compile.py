"""Every kernel compiles for sm_80, sm_90 and sm_100 without a GPU, within its registers and without spills."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cce_precision.kernels import (  # noqa: E402
    dz,
    heads,
    launch,
    one_pass,
    one_pass_rows,
    row_terms,
    terms,
    tile_filter,
)
from cce_precision.kernels.labels import label_sums_kernel  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
FP32, I32, I64 = "*fp32", "*i32", "*i64"
needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton carries no cuobjdump")
pytestmark = needs_cuobjdump


class Constant:
    def __init__(self, value: Any) -> None:
        self.value = value


def spills_in_products(cubin: bytes) -> int:
    """Loads and stores of spilled registers inside the innermost loop around each product."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(a, 16), what) for a, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", text)]
    jumps = [(int(m[1], 16), at) for at, what in code if (m := re.search(r"\bBRA 0x([0-9a-f]+)", what))]
    multiply = [at for at, what in code if re.search(r"\bU?\w*MMA\b", what)]
    multiply = multiply or [at for at, what in code if "FFMA" in what]
    around = [[(a, b) for a, b in jumps if a <= at <= b] for at in multiply]
    least = {min(loops, key=lambda loop: loop[1] - loop[0]) for loops in around if loops}
    inner = [x for x in least if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in least)]
    return sum(bool(re.search(r"\b(LDL|STL)\b", what)) for at, what in code if any(a <= at <= b for a, b in inner))


def resources(source_class: Any, kernel: Any, arguments: dict[str, Any], arch: str, **options: int) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills), of them accesses where it multiplies, and bytes of shared memory of
    a kernel compiled for `arch`. "i32:16" is an integer that 16 divides, as Triton sees the sizes and strides of most
    calls.
    """
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, tuple):
            signature[name] = tuple("constexpr" if isinstance(x, Constant) else x.removesuffix(":16") for x in value)
        else:
            signature[name] = "constexpr" if isinstance(value, Constant) else value
        for place, x in [((i,), value)] if not isinstance(value, tuple) else [((i, j), x) for j, x in enumerate(value)]:
            if isinstance(x, Constant):
                constants[place] = x.value
            elif x.startswith("*") or x.endswith(":16"):
                attributes[place] = [["tt.divisibility", 16]]
    source = source_class(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY[arch], 32), options=options)
    # Triton 3.6 moves matrices of booleans between layouts to the wrong rows.
    assert not re.search(r"convert_layout .*: tensor<\d+x\d+xi1\b", compiled.asm["ttgir"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    stack = int(found[2])
    in_products = spills_in_products(compiled.asm["cubin"]) if stack else 0
    return {
        "registers": int(found[1]), "stack": stack, "in products": in_products, "shared": compiled.metadata.shared
    }  # fmt: skip


SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def check(arguments: dict[str, Any], kernel: Any, arch: str, spills: int = 0, **options: int) -> dict[str, int]:
    used = resources(ASTSource, kernel, arguments, arch, **options)
    assert used["stack"] <= spills and used["registers"] <= 255 and used["shared"] <= SHARED[arch], used
    return used


def matrix(dtype: str, tma: bool, rows: int, columns: int) -> str:
    return f"tensordesc<{dtype}[{rows}, {columns}]>" if tma else f"*{dtype}"


PAIR, TRIPLE = ("i32", "i32"), ("i32", "i32", "i32")
RECORD = (False,) * 6 + (True,)
PLAIN = {"forward": (False,) * 7, "dz": (False,) * 15}
BUSY = {
    "forward": (True,) * 7,
    "dz": (True, True, True, True, True, False, False, True, False, False, False, False, False, True, True),
}


def logits_arguments(
    kernel: str, config: launch.Config, dtype: str, tma: bool, flags: tuple[bool, ...]
) -> dict[str, Any]:
    m, n, k = config.m, config.n, config.k
    tiles = {"e": matrix(dtype, tma, m, k), "c": matrix(dtype, tma, n, k)}
    shared = {
        "bias": f"*{dtype}",
        "weight": FP32,
        "targets": I64,
        "stride_e": PAIR,
        "stride_c": PAIR,
        "M": Constant(m),
        "N": Constant(n),
        "K": Constant(k),
        "GROUP": Constant(config.group),
        "FLATTEN": Constant(config.flatten),
        "FLAGS": Constant(flags),
        "TMA": Constant(tma),
        "PRECISION": Constant("ieee"),
    }
    if kernel == "forward":
        own = {
            "shape": TRIPLE,
            "softcap": "fp32",
            "partial": FP32,
            "place": I32,
            "target_logit": FP32,
            "bounds": FP32,
            "record": I32,
            "splits": "i32",
            "tiles_a_split": "i32",
            "scale": "fp32",
            "threshold": "fp32",
        }
    else:
        out = matrix(dtype, tma, m, n)
        kind = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
        own = {
            "rows_terms": FP32,
            "label": FP32,
            "dz": out,
            "dz_low": out,
            "alive": I32,
            "column_sums": FP32,
            "row_stats": FP32,
            "chosen": I32,
            "active": I32,
            "stride_dz": PAIR,
            "shape": ("i32",) * 4,
            "scalars": ("fp32", "fp32", "i32"),
            "DTYPE": Constant(kind),
        }
    return tiles | shared | own


@pytest.mark.parametrize("arch", sorted(CAPABILITY))
@pytest.mark.parametrize("kernel", ["forward", "dz"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_logits_kernels(kernel: str, arch: str, dtype: str) -> None:
    """The pinned configs. Every option at once may spill outside the loop over D; the plain call may not anywhere."""
    config = launch._CONFIGS[kernel][arch][2 if dtype == "bf16" else 4]
    function = heads.forward_kernel if kernel == "forward" else dz.dz_kernel
    arguments = logits_arguments(kernel, config, dtype, arch != "sm_80", PLAIN[kernel])
    check(arguments, function, arch, num_warps=config.warps, num_stages=config.stages)
    if kernel == "dz" and dtype == "bf16":
        arguments |= {"FLAGS": Constant((False,) * 14 + (True,))}  # what is flushed
        check(arguments, function, arch, num_warps=config.warps, num_stages=config.stages)


@pytest.mark.parametrize("arch", sorted(CAPABILITY))
def test_forward_with_a_record(arch: str) -> None:
    config = launch._CONFIGS["forward"][arch][2]
    arguments = logits_arguments("forward", config, "bf16", arch != "sm_80", RECORD)
    spills = 128  # once a tile, outside the loop over D
    check(arguments, heads.forward_kernel, arch, spills, num_warps=config.warps, num_stages=config.stages)


@pytest.mark.parametrize("arch", sorted(CAPABILITY))
def test_split_and_filter(arch: str) -> None:
    flags = (False,) * 6 + (True,) + (False,) * 8
    config = launch._CONFIGS["dz"][arch][2]
    check(
        logits_arguments("dz", config, "bf16", arch != "sm_80", flags),
        dz.dz_kernel,
        arch,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    flat = arch != "sm_80"
    config = launch.Config(128, 128, 64 if flat else 32, 8, 4, flatten=flat)
    flags = (False,) * 5 + (True, False, False, True, True) + (False,) * 5
    check(
        logits_arguments("dz", config, "bf16", flat, flags),
        dz.dz_kernel,
        arch,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_tile_products(mode: int, transposed: bool) -> None:
    features = 64 if mode == 2 else 128
    arguments = {
        "dz": matrix("bf16", True, 128, 128),
        "other": matrix("bf16", True, 128, features),
        "places": I32,
        "counts": I32,
        "out": FP32 if mode == 0 and not transposed else "*bf16",
        "lost": "*bf16",
        "order": I64,
        "factor": FP32,
        "shift": FP32,
        "scale": FP32,
        "shape": TRIPLE,
        "stride_dz": PAIR,
        "stride_other": PAIR,
        "walked": "i32",
        "TM": Constant(128),
        "TN": Constant(128),
        "FEATURES": Constant(features),
        "TRANSPOSED": Constant(transposed),
        "MODE": Constant(mode),
        "FLAGS": Constant((transposed, False, False)),
        "TMA": Constant(True),
        "PRECISION": Constant("ieee"),
    }
    check(arguments, tile_filter.tile_product_kernel, "sm_90", num_warps=8, num_stages=3)


@pytest.mark.parametrize("arch", sorted(CAPABILITY))
def test_row_kernels(arch: str) -> None:
    finish = {
        "out": "*bf16",
        "total": FP32,
        "e": "*bf16",
        "tokens": I64,
        "starts": I32,
        "label": FP32,
        "weight": FP32,
        "shift": FP32,
        "scale": FP32,
        "order": I64,
        "width": "i32",
        "d": "i32",
        "start": "i32",
        "ROWS": Constant(4),
        "COLUMNS": Constant(512),
        "TOKENS": Constant(8),
        "LABEL": Constant(True),
        "SHIFT": Constant(True),
        "WEIGHT": Constant(True),
        "ORDER": Constant(True),
    }
    check(finish, terms.finish_columns_kernel, arch, spills=16, num_warps=4)  # loop bounds, outside the loop
    labels = {
        "total": FP32,
        "e": "*bf16",
        "values": I64,
        "tokens": I64,
        "label": FP32,
        "n": "i32",
        "d": "i32",
        "TOKENS": Constant(16),
        "FEATURES": Constant(512),
    }
    check(labels, one_pass.add_labels_kernel, arch, num_warps=4)
    sums = {
        **dict.fromkeys(("out", "label"), FP32),
        "e": "*bf16",
        **dict.fromkeys(("tokens", "targets"), I64),
        **dict.fromkeys(("starts", "active"), I32),
        **dict.fromkeys(("n", "v", "d"), "i32"),
        "SHORT": Constant(8),
        "TOKENS": Constant(32),
        "FEATURES": Constant(128),
        "ACTIVE": Constant(True),
    }
    check(sums, label_sums_kernel, arch, num_warps=4)
    powers = {
        **dict.fromkeys(("maxima", "sums", "reference", "target_logit", "nll", "lse", "label", "factor"), FP32),
        **dict.fromkeys(("e", "c"), "*bf16"),
        **dict.fromkeys(("n", "tiles", "d"), "i32"),
        "targets": I64,
        "terms": FP32,
        "again": I32,
        "stride_c": PAIR,
        **dict.fromkeys(("largest", "below"), "fp32"),
        "HEIGHT": Constant(128),
        "ROWS": Constant(16),
        "TILES": Constant(64),
        "FEATURES": Constant(1024),
    }
    of_rows = one_pass_rows.start_rows_kernel, one_pass_rows.restart_rows_kernel, one_pass_rows.heads_kernel
    for kernel in (*of_rows, one_pass_rows.flushed_below_kernel):
        check({name: powers[name] for name in kernel.arg_names}, kernel, arch, num_warps=4)
    upstream = {
        "upstream": (FP32,) * 4,
        "strides": ("i32",) * 4,
        **dict.fromkeys(("total", "power", "scale", "nll", "lse", "entropy", "terms", "label"), FP32),
        **dict.fromkeys(("targets", "problem_targets"), I64),
        **dict.fromkeys(("temperature", "over_cap", "flushed_below"), "fp32"),
        "n": "i32",
        "TOKENS": Constant(512),
    }
    for last in ((False, False), (True, False), (False, True)):
        flags = {"FLAGS": Constant((True,) * 5 + last)}
        for kernel in (row_terms.power_kernel, row_terms.row_terms_kernel):
            check({name: (upstream | flags)[name] for name in kernel.arg_names}, kernel, arch, num_warps=4)
    combine = {
        "partial": FP32,
        "place": I32,
        "split_weight": FP32,
        "target_logit": FP32,
        "targets": I64,
        "nll": FP32,
        "lse": FP32,
        "entropy": FP32,
        "smooth": FP32,
        "argmax": I64,
        "n": "i32",
        "splits": "i32",
        "scale": "fp32",
        "temperature": "fp32",
        "M": Constant(128),
        "FLAGS": Constant(BUSY["forward"]),
    }
    check(combine, heads.combine_kernel, arch, num_warps=4)
