"""Tiles for tensor cores: operands made of hashes, what a GPU gives for them, and the model held against it.

A group of tiles shares format, instruction and depth; its blocks of tiles share a category, the kind of numbers in it.
A recording (`tensor_core.npz`) has for each block two hashes, of some outputs of all its tiles (which is quickly
replayed) and of all outputs, and some whole tiles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cce_precision.analysis.tensor_core import HOPPER, Rounding, TensorCore, dot

__all__ = ["CATEGORIES", "GROUPS", "Group", "Mismatch", "Operands", "operands", "record", "replay", "some_outputs"]

COLUMNS = 16  # of a tile
BLOCKS = 18  # of a group: each category twice
TILES = 313  # of a block
WHOLE = 4  # tiles of a group that are kept whole
FILE = "tensor_core.npz"


@dataclass(frozen=True)
class Format:
    """A format of operands: `stored` holds it, `spare` low bits of that are 0."""

    stored: torch.dtype
    bits: torch.dtype  # integers of the same size
    mantissa: int
    bias: int
    spare: int = 0


FORMATS = {
    "bf16": Format(torch.bfloat16, torch.int16, 7, 127),
    "fp16": Format(torch.float16, torch.int16, 10, 15),
    "tf32": Format(torch.float32, torch.int32, 10, 127, 13),
    "fp32": Format(torch.float32, torch.int32, 23, 127),
}


@dataclass(frozen=True)
class Group:
    """Tiles of one kind. 64 rows make a warp group's instruction (wgmma), 16 a warp's (mma.sync)."""

    format: str
    rows: int
    depth: int

    def __str__(self) -> str:
        return f"{self.format} {self.rows}x{COLUMNS}x{self.depth}"


GROUPS = tuple(Group(*key) for key in itertools.product(("bf16", "fp16", "tf32"), (64, 16), (16, 32, 64)))


class Category(NamedTuple):
    """A kind of numbers: lowest and highest exponents of a, b and the accumulator. Below a format's own: subnormal."""

    name: str
    a: tuple[int, int]
    b: tuple[int, int]
    acc: tuple[int, int]
    simple: bool = False  # significands 1 and 1.5 alone: sums end where bits are cut
    paired: bool = False  # products cancel in pairs, but for the last bit of one
    opposed: bool = False  # the accumulator cancels the first product
    empty: bool = False  # the accumulator is 0


WIDE = {
    "plain": Category("plain", (-3, 4), (-3, 4), (-3, 8)),
    "wide": Category("wide", (-13, 13), (-13, 13), (-27, 27)),
    "simple": Category("simple", (-14, 12), (-14, 12), (-28, 24), simple=True),
    "paired": Category("paired", (-6, 6), (-6, 6), (-30, 4), paired=True),
    "opposed": Category("opposed", (-14, 0), (-14, 0), (0, 0), opposed=True),
    "subnormal": Category("subnormal", (-128, -124), (100, 126), (-40, 4)),
    "tiny": Category("tiny", (-80, -60), (-80, -60), (-127, -118)),
    "vanishing": Category("vanishing", (-84, -72), (-84, -72), (0, 0), empty=True),
    "large": Category("large", (50, 66), (50, 61), (90, 127)),
}
NARROW = WIDE | {  # fp16 has exponents from -14 to 15
    "subnormal": Category("subnormal", (-16, -12), (-2, 15), (-30, 4)),
    "tiny": Category("tiny", (-17, -13), (-17, -13), (-127, -30)),
    "vanishing": Category("vanishing", (-17, -13), (-17, -13), (0, 0), empty=True),
    "large": Category("large", (8, 15), (8, 15), (10, 45)),
}
CATEGORIES = tuple(WIDE)


class Operands(NamedTuple):
    """Operands of some rows and columns of some tiles."""

    a: Tensor  # (T, R, K)
    b: Tensor  # (T, C, K)
    acc: Tensor  # (T, R, C) fp32

    def expected(self, core: TensorCore, tf32: bool) -> Tensor:
        """(T, R, C) what `core` makes of them."""
        return dot(self.a[:, :, None, :], self.b[:, None, :, :], self.acc, core, tf32)


def _mix(x: Tensor) -> Tensor:
    """A bijective mixer of 32-bit words held in int64 (constants: C. Wellons, hash-prospector, lowbias32; public
    domain)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _words(stream: int, tile: Tensor, place: Tensor) -> Tensor:
    """32-bit words in int64. Frozen: the recording was made with them."""
    return _mix(_mix(_mix(tile + stream)) ^ _mix((place + 0x9E3779B9) & 0xFFFFFFFF))


def _numbers(word: Tensor, low: Tensor, exponents: tuple[int, int], kind: Format, simple: bool) -> Tensor:
    """Numbers from 32-bit words: the sign, 1 in 16 a zero, the exponent; the significand from the words `low`."""
    first, last = exponents
    exponent = first + ((word >> 16 & 0xFF) * (last - first + 1) >> 8)
    field = (exponent + kind.bias).clamp(min=0)
    mantissa = (low & 1) << kind.mantissa - 1 if simple else low & (1 << kind.mantissa) - 1
    magnitude = torch.where(word >> 24 & 15 == 0, 0, field << kind.mantissa | mantissa) << kind.spare
    width = 8 * kind.bits.itemsize
    pattern = magnitude - (word >> 31 << width - 1)  # two's complement
    return pattern.to(kind.bits).view(kind.stored)


def operands(group: Group, category: str, tiles: Tensor, rows: Tensor, columns: Tensor) -> Operands:
    """Operands of tiles (T,), rows (T, R) and columns (T, C), all int64; the same bits on any machine."""
    kind = FORMATS[group.format]
    what = (NARROW if group.format == "fp16" else WIDE)[category]
    k, tile = torch.arange(group.depth, device=tiles.device), tiles[:, None, None]
    sides = []
    for side, (place, exponents) in enumerate(((rows, what.a), (columns, what.b))):
        word = _words(side, tile, place[:, :, None] * group.depth + k)
        number = _numbers(word, word, exponents, kind, what.simple)
        if what.paired:  # an odd place repeats the one before, in b with the other sign, in a perhaps off by a bit
            bits, odd = number.view(kind.bits), k % 2 == 1
            before = bits.roll(1, -1)
            flip = (word & 1).to(kind.bits) << kind.spare if side == 0 else torch.iinfo(kind.bits).min
            number = torch.where(odd, before ^ flip, bits).view(kind.stored)
        if what.opposed:  # the first products are the largest
            strong = _numbers(word, word, (3, 8), kind, False)
            number = torch.where(k == 0, strong, number)
        sides.append(number)
    a, b = sides
    place = rows[:, :, None] * COLUMNS + columns[:, None, :]
    word, low = _words(2, tile, place), _words(3, tile, place)
    acc = _numbers(word, low, what.acc, FORMATS["fp32"], what.simple)
    if what.opposed:
        acc = -(a[:, :, None, 0].double() * b[:, None, :, 0].double()).float()  # exact: at most 22 bits
    if what.empty:
        acc = torch.zeros_like(acc)
    return Operands(a, b, acc)


def some_outputs(group: Group, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """4 rows and 2 columns of each tile (T,), spread over it from a place that the tile's number draws."""
    word = _words(4, tiles, torch.zeros_like(tiles))
    steps = torch.arange(4, device=tiles.device)
    rows = (word[:, None] + steps * (group.rows // 4)) % group.rows
    columns = ((word >> 16)[:, None] + steps[:2] * (COLUMNS // 2)) % COLUMNS
    return rows, columns


def all_outputs(group: Group, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """All rows and columns of each tile (T,)."""
    every = lambda count: torch.arange(count, device=tiles.device).expand(len(tiles), count)  # noqa: E731
    return every(group.rows), every(COLUMNS)


def numbers_of(group: Group, block: int, device: str = "cpu") -> Tensor:
    """(TILES,) numbers of the tiles of a block, no two blocks' alike."""
    first = (GROUPS.index(group) * BLOCKS + block) * TILES
    return torch.arange(first, first + TILES, device=device)


def category_of(block: int) -> str:
    return CATEGORIES[block % len(CATEGORIES)]


def digest(out: Tensor) -> int:
    """64 bits of a hash of fp32 outputs."""
    data = out.contiguous().view(torch.int32).cpu().numpy().astype("<i4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


# -- the recording -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recording:
    """What a GPU gave. Axes: (groups, blocks)."""

    meta: dict[str, Any]  # device, versions, instructions
    some: np.ndarray  # uint64 hashes of some outputs of all tiles of a block
    whole: np.ndarray  # uint64 hashes of all outputs
    tiles: tuple[np.ndarray, ...]  # a group each: the first tile of the first blocks, (WHOLE, rows, COLUMNS) int32

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {f"tiles{i}": tiles for i, tiles in enumerate(self.tiles)}
        meta = np.frombuffer(json.dumps(self.meta).encode(), dtype=np.uint8)
        np.savez_compressed(path, meta=meta, some=self.some, whole=self.whole, **arrays)

    @staticmethod
    def load(path: Path) -> Recording:
        with np.load(path) as file:
            tiles = tuple(file[f"tiles{i}"] for i in range(len(GROUPS)))
            return Recording(json.loads(file["meta"].tobytes()), file["some"], file["whole"], tiles)


class Mismatch(NamedTuple):
    """A block of tiles in which a model differs from a recording."""

    group: Group
    block: int
    what: str  # "some outputs", "all outputs" or "a whole tile"


def replay(
    recording: Recording,
    core: TensorCore = HOPPER,
    groups: Sequence[Group] = GROUPS,
    blocks: Sequence[int] = range(BLOCKS),
    whole: bool = False,
) -> Iterator[Mismatch]:
    """Where `core` differs from a recording, in these groups and blocks; `whole`: in all outputs, which is slow."""
    for group in groups:
        g, tf32 = GROUPS.index(group), group.format == "tf32"
        choose, hashes = (all_outputs, recording.whole) if whole else (some_outputs, recording.some)
        for block in blocks:
            tiles = numbers_of(group, block)
            found = operands(group, category_of(block), tiles, *choose(group, tiles)).expected(core, tf32)
            if digest(found) != int(hashes[g, block]):
                yield Mismatch(group, block, "all outputs" if whole else "some outputs")
            if block < WHOLE:
                first = tiles[:1]
                tile = operands(group, category_of(block), first, *all_outputs(group, first)).expected(core, tf32)
                if not np.array_equal(tile[0].view(torch.int32).numpy(), recording.tiles[g][block]):
                    yield Mismatch(group, block, "a whole tile")


def replay_and_say(path: Path) -> int:
    """Prints how the model does on a recording; 1 where it differs."""
    recording = Recording.load(path)
    found = list(replay(recording))
    for mismatch in found:
        print(f"{mismatch.group}, block {mismatch.block} ({category_of(mismatch.block)}): {mismatch.what} differ")
    total = len(GROUPS) * BLOCKS * TILES
    print(f"{len(found)} mismatches in {total:,} tiles recorded on {recording.meta['device']}: {HOPPER}")
    return 1 if found else 0


def candidates() -> list[TensorCore]:
    """The models that a recording is held against."""
    align, result, either = (Rounding.ZERO, Rounding.DOWN), (Rounding.ZERO, Rounding.NEAREST), (False, True)
    found = [TensorCore(*key) for key in itertools.product((8, 16, 32), (23, 24, 25, 26), align, result, either)]
    refined = [
        dataclasses.replace(core, least=least, signed_zero=signed)
        for core in found
        if core.align is core.result is Rounding.ZERO and core.fraction > 23
        for least, signed in itertools.product((None, -126, -127, -132, -133, -149), either)
        if least is not None or signed
    ]
    return found + refined


def record(out: Path) -> int:
    """Runs all tiles on the GPU, finds the model that reproduces them and writes the recording to `out`.

    Also `outputs.npz`, the hashed outputs themselves, and `models.json`: for each format and instruction the models
    with the fewest mismatches, and where the best one differs. 1 where no model reproduces everything.
    """
    from cce_precision.analysis import tensor_core_kernel as kernel

    out.mkdir(parents=True, exist_ok=True)
    some, whole = (np.zeros((len(GROUPS), BLOCKS), dtype=np.uint64) for _ in range(2))
    kept: list[np.ndarray] = []
    outputs: dict[str, Any] = {}
    instructions: dict[str, str] = {}
    scores: dict[tuple[str, int], dict[TensorCore, np.ndarray]] = {}
    for g, group in enumerate(GROUPS):
        parts, inputs, tiles_kept = [], [], []
        for block in range(BLOCKS):
            tiles = numbers_of(group, block, "cuda")
            every = operands(group, category_of(block), tiles, *all_outputs(group, tiles))
            result, instructions[str(group)] = kernel.multiply(every.a, every.b, every.acc)
            rows, columns = some_outputs(group, tiles)
            t = torch.arange(TILES, device="cuda")[:, None, None]
            parts.append(result[t, rows[:, :, None], columns[:, None, :]])
            inputs.append(operands(group, category_of(block), tiles, rows, columns))
            some[g, block], whole[g, block] = digest(parts[-1]), digest(result)
            if block < WHOLE:
                tiles_kept.append(result[0].view(torch.int32).cpu().numpy())
        kept.append(np.stack(tiles_kept))
        outputs[f"outputs{g}"] = torch.stack(parts).view(torch.int32).cpu().numpy()  # (BLOCKS, TILES, 4, 2)
        joined = Operands(*(torch.cat(x) for x in zip(*inputs, strict=True)))
        of = scores.setdefault((group.format, group.rows), {})
        for core in candidates():
            same = joined.expected(core, group.format == "tf32").view(torch.int32) == torch.cat(parts).view(torch.int32)
            wrong = (~same).view(BLOCKS, -1).sum(1).cpu().numpy()
            of[core] = of.get(core, 0) + wrong
        print(f"{group}: {instructions[str(group)]}", flush=True)
    device = torch.cuda.get_device_name()
    meta = {"device": device, "torch": torch.__version__, "triton": kernel.VERSION, "instructions": instructions}
    Recording(meta, some, whole, tuple(kept)).save(out / FILE)
    np.savez_compressed(out / "outputs.npz", **outputs)
    report = {f"{name} {rows}": _judged(name, rows, of) for (name, rows), of in scores.items()}
    (out / "models.json").write_text(json.dumps(meta | {"models": report}, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if all(r["mismatches of all outputs"] == 0 for r in report.values()) else 1


def _judged(name: str, rows: int, scores: dict[TensorCore, np.ndarray]) -> dict[str, Any]:
    """The best models of a format and instruction, and the best one on all outputs of all tiles."""
    from cce_precision.analysis import tensor_core_kernel as kernel

    ranked = sorted(scores, key=lambda core: int(scores[core].sum()))
    best, wrong, total, examples = ranked[0], 0, 0, []
    for group in (g for g in GROUPS if (g.format, g.rows) == (name, rows)):
        for block in range(BLOCKS):
            tiles = numbers_of(group, block, "cuda")
            inputs = operands(group, category_of(block), tiles, *all_outputs(group, tiles))
            result, _ = kernel.multiply(inputs.a, inputs.b, inputs.acc)
            expected = inputs.expected(best, name == "tf32")
            differ = (result.view(torch.int32) != expected.view(torch.int32)).nonzero()
            wrong, total = wrong + len(differ), total + result.numel()
            for t, i, j in differ[:4].tolist():
                values = (float(result[t, i, j]).hex(), float(expected[t, i, j]).hex())
                examples.append([str(group), category_of(block), int(tiles[t]), i, j, *values])
    first = {category: int(scores[best][k :: len(CATEGORIES)].sum()) for k, category in enumerate(CATEGORIES)}
    return {
        "best": str(best),
        "ranking": {str(core): int(scores[core].sum()) for core in ranked[:12]},
        "ties with the best": [str(core) for core in ranked if (scores[core] == scores[best]).all()][:40],
        "mismatches by category": first,
        "all outputs": total,
        "mismatches of all outputs": wrong,
        "examples": examples,
    }
