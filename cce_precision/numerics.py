"""The words of low-precision softmax gradients: filters, accumulations, operands, and the `Variant` record made of
them.

This module is a leaf: it imports nothing of the project. Every pass, kernel, bound and report derives its behaviour
from the records defined here, so a new variant is a new record and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Accumulation",
    "Filter",
    "FilterKind",
    "Granularity",
    "NO_FILTER",
    "Operand",
    "Path",
    "Variant",
    "auto_eps",
    "power_of_two",
    "unit_roundoff",
]


class FilterKind(str, enum.Enum):
    """What happens to softmax entries below the threshold eps in a gradient."""

    NONE = "none"  # nothing is skipped
    DROP = "drop"  # skipped: a bias of at most the dropped mass, always in the same direction
    STOCHASTIC = "stochastic"  # kept with probability P/eps and then counted as eps: unbiased, variance P (eps - P)
    SUBSET = "subset"  # one of every `share` columns (dE) or tokens (dC) kept, weight `share`: unbiased


class Granularity(str, enum.Enum):
    """The unit that a filter keeps or skips."""

    TILE = "tile"  # a whole tile, when every |P - onehot| in it is below eps (the paper's definition)
    ELEMENT = "element"  # single entries P < eps; the target's entry is never filtered


class Accumulation(str, enum.Enum):
    """How the contributions of the tiles to one gradient element are summed."""

    INPUT = "input"  # read-modify-write in the gradient's dtype, in tile order: error up to ub * T * sum
    KAHAN = "kahan"  # a compensated pair in the gradient's dtype, in tile order: error about 2 ub * sum
    FP32 = "fp32"  # summed in fp32 and rounded once: bitwise reproducible, error ub * |out| + (T - 1) u * sum


class Operand(str, enum.Enum):
    """How dZ, the left factor of the second products dE = dZ C and dC = dZ^T E, is represented."""

    INPUT = "input"  # rounded to the common dtype of e and c: relative error ub an entry
    SPLIT = "split"  # a hi + lo pair of that dtype: relative error 2^-17 an entry for bf16
    FP32 = "fp32"  # not rounded
    FP32_ABOVE = "fp32-above"  # not rounded where P >= eps, rounded to the common dtype below


class Path(str, enum.Enum):
    """How the logits are treated."""

    TILED = "tiled"  # recomputed tile by tile, never stored
    PLAIN = "plain"  # stored in the common dtype of e and c, as a user of PyTorch writes it
    COMPILED = "compiled"  # the plain expression under torch.compile


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: 2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32, 2^-53 for
    fp64."""
    return torch.finfo(dtype).eps / 2


def auto_eps(dtype: torch.dtype) -> float:
    """The paper's default filter threshold, finfo(dtype).eps / 32: 2^-12 for bf16, 2^-15 for fp16, 2^-28 for fp32."""
    return torch.finfo(dtype).eps / 32


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two not above max |x| over the finite entries (1 if there is none), 0-dim, without a host
    sync."""
    if x.numel() == 0:
        return torch.ones((), dtype=x.dtype, device=x.device)
    largest = torch.where(x.isfinite(), x, 0).abs().amax()
    _, exponent = torch.frexp(largest)
    exponent = exponent.clamp(min=-120, max=120)  # so that the factor and its inverse stay normal in fp32
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - 1), 1)


@dataclass(frozen=True)
class Filter:
    """Which softmax entries of a gradient are skipped or sampled.

    `eps` is a probability, tested before any upstream factor; None stands for `auto_eps` of the common dtype of e and
    c. `share` matters for subsets alone: one of every `share` neighbours is kept.
    """

    kind: FilterKind = FilterKind.NONE
    granularity: Granularity = Granularity.ELEMENT
    eps: float | None = None
    share: int = 1

    def __post_init__(self) -> None:
        if self.eps is not None and not (math.isfinite(self.eps) and 0 <= self.eps <= 1):
            raise ValueError(f"Filter.eps must be None (auto) or a probability in [0, 1], got {self.eps!r}")
        if self.share < 1:
            raise ValueError(f"Filter.share must be at least 1, got {self.share!r}")
        if self.granularity is Granularity.TILE and self.kind not in (FilterKind.NONE, FilterKind.DROP):
            raise ValueError(f"a {self.kind.value} filter works on elements, not on tiles")

    def __bool__(self) -> bool:
        return self.kind is not FilterKind.NONE

    @property
    def by_tile(self) -> bool:
        return bool(self) and self.granularity is Granularity.TILE

    @property
    def random(self) -> bool:
        return self.kind in (FilterKind.STOCHASTIC, FilterKind.SUBSET)

    def threshold(self, dtype: torch.dtype) -> float:
        """eps for operands of `dtype`; 0 where nothing is filtered."""
        if not self:
            return 0.0
        return auto_eps(dtype) if self.eps is None else self.eps

    def kept_from(self, dtype: torch.dtype) -> float:
        """The least probability of an entry that counts as kept, not sampled with others: eps of a subset filter, else
        0.
        """
        return self.threshold(dtype) if self.kind is FilterKind.SUBSET else 0.0


NO_FILTER = Filter()


@dataclass(frozen=True)
class Variant:
    """One way to compute the loss and its gradients, as a record of its numerics.

    `label_apart`: the label's part of dZ (the target's term in complement form) is added in fp32 beside the second
    products; otherwise it is an entry of the rounded operand, as in the paper.
    `sort_vocabulary`: columns are visited in the order of falling mean logit, which gathers the survivors in few tiles
    and makes neighbours alike for subset sampling.
    `centred`: dE takes the rows of c less a centre. The sum of a row of dZ is known, so the exact gradient does not
    change; but what a random filter has too much or too little of then moves it by how far the drawn rows are from the
    centre, not by all of them. The centre is the mean row of the entries that are kept (of a subset filter those above
    eps) for tokens at even places for those at odd ones, and the other way round, so that no draw meets itself. When:
    `problem.is_centred`.
    `flushed`: the kernels may write 0 for entries of dZ that all together, in their row, weigh less than auto_eps of
    what the row is about, 1 - P_t: those below auto_eps (1 - P_t) / V. That is a sixteenth of what rounding the others
    may lose, and where a softmax is peaked most entries are so small: products with zeros draw less power, which is
    what limits products on a GPU. When: `problem.flushed_below`.
    `tile`: (tokens, columns) of one tile: the unit of a tile filter and the step of INPUT and KAHAN accumulation.
    """

    name: str
    summary: str
    aliases: tuple[str, ...] = ()
    path: Path = Path.TILED
    filter_e: Filter = NO_FILTER
    filter_c: Filter = NO_FILTER
    operand: Operand = Operand.INPUT
    accum_e: Accumulation = Accumulation.FP32
    accum_c: Accumulation = Accumulation.FP32
    label_apart: bool = True
    sort_vocabulary: bool = False
    centred: bool = False
    flushed: bool = False
    tile: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        if self.label_apart and self.accum_c is not Accumulation.FP32:
            raise ValueError(f"{self.name}: label_apart needs accum_c fp32, got {self.accum_c.value}")
        apart = self.label_apart and self.accum_e is Accumulation.FP32
        if self.flushed and self.filtered:
            raise ValueError(f"{self.name}: flushed is for variants without a filter")
        if self.centred and (self.filter_e.by_tile or not apart):
            raise ValueError(
                f"{self.name}: centred needs a filter of dE by element (or none), label_apart and accum_e fp32, got "
                f"{self.filter_e}, {self.label_apart} and {self.accum_e.value}"
            )

    @property
    def filtered(self) -> bool:
        return bool(self.filter_e) or bool(self.filter_c)

    @property
    def random(self) -> bool:
        return self.filter_e.random or self.filter_c.random

    @property
    def tile_ordered(self) -> bool:
        """Whether the result depends on tiles: their filter, or their order in a low-precision sum."""
        sums = {self.accum_e, self.accum_c}
        return self.filter_e.by_tile or self.filter_c.by_tile or bool(sums - {Accumulation.FP32})

    @property
    def by_element(self) -> bool:
        """Whether both gradients are under one filter of single entries, which can keep a tolerance."""
        return bool(self.filter_e) and self.filter_e == self.filter_c and not self.filter_e.by_tile

    def exact(self) -> Variant:
        """What stands in where such a filter cannot keep a tolerance, or its entries do not fit: no filter."""
        return dataclasses.replace(
            self, filter_e=NO_FILTER, filter_c=NO_FILTER, operand=Operand.INPUT, sort_vocabulary=False
        )

    def with_eps(self, eps: float | None) -> Variant:
        """The same variant with another threshold on each filter that it has (None: auto)."""
        return dataclasses.replace(
            self,
            filter_e=dataclasses.replace(self.filter_e, eps=eps) if self.filter_e else self.filter_e,
            filter_c=dataclasses.replace(self.filter_c, eps=eps) if self.filter_c else self.filter_c,
        )

    def configure(
        self,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
    ) -> Variant:
        """This variant with the caller's options. Raises ValueError for an option that it cannot honour.

        `filter_eps`: "auto", a probability, or None for no filter, and then nothing is flushed either; `accum_*_fp32`:
        sum that gradient in fp32 whatever the record says; `filter_*_grad=False`: leave that gradient unfiltered.
        """
        changed: dict[str, object] = {}
        if filter_eps is None:
            changed |= {"filter_e": NO_FILTER, "filter_c": NO_FILTER, "flushed": False}
        elif filter_eps != "auto":
            if not self.filtered:
                raise ValueError(
                    f"filter_eps={filter_eps!r}: impl {self.name!r} filters nothing; "
                    "leave filter_eps='auto', or choose a variant with a filter, such as 'cce'"
                )
            if isinstance(filter_eps, bool) or not isinstance(filter_eps, (int, float)) or not 0 <= filter_eps <= 1:
                raise ValueError(f"filter_eps must be 'auto', None or a probability in [0, 1], got {filter_eps!r}")
            return self.with_eps(float(filter_eps)).configure(
                "auto", accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad
            )
        for side, fp32, filtered in (("e", accum_e_fp32, filter_e_grad), ("c", accum_c_fp32, filter_c_grad)):
            if fp32:
                if self.path is not Path.TILED:
                    raise ValueError(
                        f"accum_{side}_fp32=True: impl {self.name!r} leaves its sums to one library product; "
                        "choose a tiled variant, such as 'cce_exact'"
                    )
                changed[f"accum_{side}"] = Accumulation.FP32
            if not filtered:
                changed[f"filter_{side}"] = NO_FILTER
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[arg-type]
