"""Launch configurations per architecture as frozen data. CCE_AUTOTUNE=1 searches the neighbourhood and prints what it
finds.

Nothing here depends on the number of tokens: a token's loss must not depend on what shares its batch.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Config",
    "architecture",
    "cdiv",
    "config_for",
    "descriptor_fits",
    "hopper_fits",
    "multiprocessors",
    "next_power_of_2",
    "precision_of",
    "tuned",
]


@dataclass(frozen=True)
class Config:
    """One launch of a logits kernel: its tile (m tokens, n columns, k of D), warps, pipeline depth and walk."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 16  # row blocks that share a column tile in the walk
    flatten: bool = False  # whether the loops over tiles and over D are one pipelined loop

    @property
    def hopper(self) -> bool:
        """Whether hopper.py is made for this tile."""
        return (self.m, self.n, self.k) == (128, 256, 64)

    def __str__(self) -> str:
        tile = f"{self.m}x{self.n}x{self.k}"
        return f"{tile} warps={self.warps} stages={self.stages} group={self.group} flatten={self.flatten}"


# pass -> architecture -> bytes of an operand -> config. "sm_80" stands for everything without a bulk copy engine and
# fits in 99 KB of shared memory; four-byte operands are fp32.
_CONFIGS: dict[str, dict[str, dict[int, Config]]] = {
    "forward": {
        "sm_80": {2: Config(128, 128, 32, 8, 4), 4: Config(64, 64, 32, 8, 2)},
        "sm_90": {2: Config(128, 256, 64, 8, 3), 4: Config(64, 64, 16, 8, 3)},
        "sm_100": {2: Config(128, 128, 64, 8, 3), 4: Config(64, 64, 16, 8, 3)},
    },
    "dz": {
        "sm_80": {2: Config(128, 128, 32, 8, 4), 4: Config(64, 64, 32, 8, 2)},
        "sm_90": {2: Config(128, 256, 64, 8, 3, flatten=True), 4: Config(64, 64, 16, 8, 3)},
        "sm_100": {2: Config(128, 256, 64, 8, 3, flatten=True), 4: Config(64, 64, 16, 8, 3)},
    },
}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own is made for kernels and takes the host 5 us."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << (x - 1).bit_length()


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table for a tensor's device; the interpreter (CPU) runs the Hopper row."""
    if device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def config_for(kernel: str, x: Tensor) -> Config:
    """The pinned config of a kernel for operands like x; small tiles where kernels are interpreted."""
    if x.device.type != "cuda":
        return Config(16, 32, 16, 4, 1, group=2)
    return _CONFIGS[kernel][architecture(x.device)][x.element_size()]


def precision_of(x: Tensor) -> str:
    """How tl.dot treats the operands: by torch's float32 matmul precision for fp32, which 16-bit operands ignore."""
    if x.dtype is not torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def descriptor_fits(x: Tensor) -> bool:
    """Whether the bulk copy engine can read the matrix x: rows contiguous, base and row stride aligned to 16 bytes."""
    row, step = x.stride()
    aligned = (x.data_ptr() | row * x.element_size()) % 16 == 0
    return step == 1 and aligned and row >= x.shape[1] and x.numel() > 0 and architecture(x.device) != "sm_80"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _runs_gluon(device: torch.device) -> bool:
    """Whether it is a Hopper device and this Triton has the Gluon dialect that hopper.py is written in (experimental:
    3.6 is what it was tested with).
    """
    import triton

    return device.type == "cuda" and architecture(device) == "sm_90" and triton.__version__.startswith("3.6.")


def hopper_fits(x: Tensor, tile_fits: bool) -> bool:
    """Whether the warp-specialised kernels take a launch: a Hopper device, 16-bit operands, and the tile they are made
    for.
    """
    return tile_fits and x.element_size() == 2 and _runs_gluon(x.device)


def tuned(kernel: str, x: Tensor, run: Callable[[Config], Any]) -> Config:
    """The config to use: the pinned one, or under CCE_AUTOTUNE=1 the fastest neighbour, found once a shape and
    printed.
    """
    config = config_for(kernel, x)
    if os.environ.get("CCE_AUTOTUNE") != "1" or x.device.type != "cuda":
        return config
    key = (kernel, architecture(x.device), x.dtype, tuple(x.shape))
    if key not in _FOUND:
        _FOUND[key] = _search(kernel, config, run)
    return _FOUND[key]


_FOUND: dict[tuple[Any, ...], Config] = {}


def _neighbours(config: Config) -> Sequence[Config]:
    shapes = [(config.m, config.n, config.k, config.warps, config.stages)]
    shapes += [
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (64, 256, 64, 4, 4),
    ]
    shapes += [(128, 128, 32, 8, 4), (64, 128, 32, 4, 4), (64, 64, 32, 4, 3)]
    found = [Config(*shape, group=group) for shape in shapes for group in (8, 16, 64)]
    return list(dict.fromkeys([config, *found]))


def _search(kernel: str, pinned: Config, run: Callable[[Config], Any]) -> Config:
    import triton

    times: dict[Config, float] = {}
    for candidate in _neighbours(pinned):
        try:
            times[candidate] = triton.testing.do_bench(
                functools.partial(run, candidate), warmup=20, rep=60, return_mode="median"
            )
        except Exception as reason:  # out of shared memory or registers on this device
            print(f"cce-precision autotune {kernel}: {candidate}: {type(reason).__name__}", file=sys.stderr)
    best = min(times, key=lambda c: times[c])
    print(
        f"cce-precision autotune {kernel}: {best} ({times[best]:.3f} ms; pinned {times.get(pinned, float('nan')):.3f})",
        file=sys.stderr,
    )
    return best
