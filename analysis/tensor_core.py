"""Tensor cores bit for bit: what one multiply-accumulate instruction makes of its operands, and how that was recorded.

    dot(a, b, acc, HOPPER)      fp32 acc + a . b, as the hardware rounds it
    python -m cce_precision.analysis.tensor_core record --out DIR      on a GPU; `replay FILE` anywhere

A tensor core adds `block` products and the accumulator at once: every term is aligned to the largest exponent among
them and cut `fraction` bits below it, the cut terms are added exactly, and the sum is cut to fp32. A product's exponent
is the sum of its factors' exponents, so its significand lies in [1, 4). A longer sum is a chain of such blocks. All of
it is exact in fp64, which holds the cut terms as integers.

A recording is one file: hashes of what a GPU gave for some 100,000 tiles, and some whole tiles. The operands are not
stored: each is a hash of its place (`tensor_core_tiles`), so that any machine makes the same ones.

Sources: Fasi, Higham, Mikaitis and Pranesh, peerj cs-330; arXiv 2511.10909; arXiv 2512.07004.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["AMPERE", "HOPPER", "Rounding", "TensorCore", "dot", "power_of_two"]

NOTHING = -(10**4)  # exponent of a term that is 0


class Rounding(str, enum.Enum):
    """How bits are cut off."""

    ZERO = "towards zero"
    DOWN = "towards minus infinity"  # two's complement
    NEAREST = "to nearest"


@dataclass(frozen=True)
class TensorCore:
    """The arithmetic of one multiply-accumulate block."""

    block: int  # products of 16-bit numbers that are added at once; half as many of tf32 numbers
    fraction: int  # bits that an aligned term keeps below the largest exponent
    align: Rounding = Rounding.ZERO  # of the terms
    result: Rounding = Rounding.ZERO  # of the sum, to fp32
    normalised: bool = False  # whether products count with their own exponent: significands in [1, 2)
    least: int | None = None  # exponents below it count as it; None: there is none
    signed_zero: bool = False  # whether a negative sum that is cut to 0 keeps its sign

    def __str__(self) -> str:
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)[2:]]
        changed = [f"{name} {value}" for name, value, default in fields if value != default]
        return ", ".join([f"blocks of {self.block}", f"{self.fraction} bits", *changed])


HOPPER = TensorCore(block=16, fraction=25, least=-133)  # wgmma and mma.sync alike: all that was recorded, to the bit
AMPERE = TensorCore(block=8, fraction=24)  # as published; not recorded here


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp64, for exponents of normal numbers."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _exponent(x: Tensor, least: int) -> Tensor:
    """floor(log2 |x|) of fp64 numbers, not below `least`, the exponent of their format's subnormals; int32."""
    return (torch.frexp(x)[1] - 1).clamp(min=least)


def _cut(x: Tensor, rounding: Rounding) -> Tensor:
    """To an integer."""
    if rounding is Rounding.NEAREST:
        return x.round()
    return x.floor() if rounding is Rounding.DOWN else x.trunc()


def _single(x: Tensor, rounding: Rounding, signed_zero: bool) -> Tensor:
    """fp64 numbers cut to fp32, subnormals included; an overflow is infinite."""
    unit = _exponent(x, -126) - 23
    cut = _cut(x * power_of_two(-unit), rounding) * power_of_two(unit)
    cut = torch.where(cut.abs() >= 2.0**128, cut.sign() * torch.inf, cut)
    return cut if signed_zero else cut + 0.0  # -0 + 0 = 0


def dot(a: Tensor, b: Tensor, acc: Tensor, core: TensorCore, tf32: bool = False) -> Tensor:
    """acc + sum_k a_k b_k as a chain of tensor core blocks gives it.

    Args:
        a, b: (..., K) bf16 or fp16, or fp32 holding tf32 numbers (11 significant bits) with `tf32`; they broadcast.
        acc: (...) fp32.

    Returns (...) fp32. Operands are finite; sums beyond fp32 are infinite, one that is cut to nothing is +0. Error
    guarantee: HOPPER gave each of 64.9 million outputs of an H200 (bf16, fp16, tf32; subnormals, cancellation and
    overflow among them; data/tensor_core.npz) bit for bit.
    """
    info = torch.finfo(a.dtype)
    lowest = round(torch.log2(torch.tensor(info.smallest_normal, dtype=torch.float64)).item())
    exponents = [_exponent(x.double(), lowest) for x in (a, b)]
    a, b, total = a.double(), b.double(), acc.double()
    block = core.block // 2 if tf32 else core.block
    for start in range(0, a.shape[-1], block):
        stop = start + block
        product = a[..., start:stop] * b[..., start:stop]
        if core.normalised:
            exponent = _exponent(product, NOTHING)
        else:
            exponent = exponents[0][..., start:stop] + exponents[1][..., start:stop]
        exponent = torch.where(product == 0, NOTHING, exponent)
        own = torch.where(total == 0, NOTHING, _exponent(total, -126))
        top = torch.maximum(exponent.amax(-1), own)
        if core.least is not None:
            top = top.clamp(min=core.least)
        unit = top.clamp(min=-900) - core.fraction
        scale = power_of_two(-unit)
        terms = _cut(product * scale[..., None], core.align).sum(-1) + _cut(total * scale, core.align)
        total = _single(terms * power_of_two(unit), core.result, core.signed_zero)
    return total.float()


def main(arguments: list[str] | None = None) -> int:
    from cce_precision.analysis import tensor_core_tiles as tiles

    parser = argparse.ArgumentParser(
        description="Record what the tensor cores of this GPU give, or replay a recording."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="on a GPU: tiles, hashes, and the model that reproduces them")
    record.add_argument("--out", type=Path, required=True)
    replay = commands.add_parser("replay", help="anywhere: compare the model with a recording")
    replay.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "record":
        return tiles.record(given.out)
    return tiles.replay_and_say(given.file)


if __name__ == "__main__":
    sys.exit(main())
