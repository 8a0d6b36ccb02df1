"""How the host launches kernels: the short way takes the binary that Triton would take, with the same arguments."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no binaries", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from cce_precision.kernels import entry  # noqa: E402
from cce_precision.kernels.entry import Entry, Tiles, kinds  # noqa: E402


@triton.jit
def some_kernel(x, y, shape, SIZE: tl.constexpr):
    pass


MATRIX = torch.zeros(8, 64, dtype=torch.bfloat16)
TENSORS = [
    torch.zeros(32), torch.zeros(33)[1:], torch.zeros(32, dtype=torch.int32), MATRIX, Tiles(MATRIX, (8, 16)),
    Tiles(MATRIX, (8, 32)), Tiles(MATRIX.half(), (8, 16)), torch.nn.Parameter(torch.zeros(32)),
]  # fmt: skip
EDGES = [0, 1, -1, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 16]
numbers = st.one_of(st.sampled_from(EDGES), st.integers(-64, 64), st.sampled_from([0.0, 1.0, 0.5]), st.booleans())
arguments = st.one_of(st.sampled_from(TENSORS), numbers, st.none(), st.tuples(numbers, st.sampled_from(TENSORS[:4])))


def of_triton(given: tuple[Any, ...]) -> Any:
    """What Triton chooses a binary by."""
    bind = create_function_from_signature(
        some_kernel.signature, some_kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return bind(*(x.checked() if isinstance(x, Tiles) else x for x in given), SIZE=1)[1]


@given(st.tuples(arguments, arguments, arguments), st.tuples(arguments, arguments, arguments))
@example((1, 2, 3), (2, 2, 3))
@example((16, 2, 3), (2, 2, 3))
@example((TENSORS[0], 2, 3), (TENSORS[1], 2, 3))
@example((2**31, 2, 3), (2**31 - 1, 2, 3))
@example((2**63 - 1, 2, 3), (2**63, 2, 3))
@example((TENSORS[4], 2, 3), (TENSORS[5], 2, 3))
def test_kinds_tell_apart_what_triton_does(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    if of_triton(one) != of_triton(other):
        assert kinds(one) != kinds(other)
    assert kinds(one) == kinds(one)


class Binary:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.log.append((grid, arguments))


class Launcher:
    """Stands for a triton.JITFunction."""

    arg_names = ("x", "n", "SIZE", "SHARE")

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.short: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Binary:
            self.log.append((grid, arguments, options))
            return Binary(self.short)

        return launch


def test_arguments_of_known_kinds_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the binary of their kinds, constants in the kernel's order; another kind, constant or device asks Triton."""
    device = 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(entry.triton, "JITFunction", Launcher)
    own = Launcher()
    kernel = Entry(own)
    x, y = Tiles(MATRIX, (8, 16)), Tiles(torch.ones_like(MATRIX), (8, 16))
    kernel[(3,)](x, 32, SHARE=0.5, SIZE=8, num_warps=4)
    assert own.log.pop()[1][0].block_shape == [8, 16]  # checked by Triton's own descriptor
    kernel[(5, 2)](y, 48, SHARE=0.5, SIZE=8, num_warps=4)
    assert (own.log, own.short) == ([], [((5, 2, 1), (y, 48, 8, 0.5))])
    kernel[(5,)](y, 1, SHARE=0.5, SIZE=8, num_warps=4)
    kernel[(5,)](y, 48, SHARE=0.5, SIZE=16, num_warps=4)
    kernel[(5,)](y, 48, SHARE=0.5, SIZE=8, num_warps=8)
    device = 1
    kernel[(5,)](y, 48, SHARE=0.5, SIZE=8, num_warps=4)
    assert (len(own.log), len(own.short)) == (4, 1)


def test_a_descriptor_is_checked_before_a_binary_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(entry.triton, "JITFunction", Launcher)
    with pytest.raises(AssertionError):
        Entry(Launcher())[(1,)](Tiles(MATRIX[:, 1:], (8, 16)), 1, SIZE=8, SHARE=0.5)


def test_the_rest_is_the_functions_own() -> None:
    assert Entry(some_kernel).arg_names == ["x", "y", "shape", "SIZE"]
