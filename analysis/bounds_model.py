"""How a machine rounds: the vocabulary in which `bounds` writes its error analysis.

`Computed` is a running error analysis made of tensors: the exact value of a quantity and a bound of the error of the
number that a pass holds in its place. Its operators propagate errors through exact arithmetic; `rounded` adds that of
storing a result. So a bound reads like the pass that it follows. Values and errors are fp64; `bounds` inflates by 1 +
1e-4 for the rounding of the errors.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_precision.analysis.metrics import binade
from cce_precision.numerics import unit_roundoff

__all__ = [
    "AMPERE",
    "BLACKWELL",
    "CPU",
    "HOPPER",
    "INTERPRETER",
    "MACHINES",
    "Computed",
    "Kernels",
    "Machine",
    "Precision",
    "gpu_machine",
    "half_ulp",
    "inexact_additions",
    "largest",
    "significand_bits",
]

LARGEST_EXPONENT = 600.0  # of a bound: exp beyond it would overflow fp64, and says nothing more


def significand_bits(dtype: torch.dtype) -> int:
    """Bits of the significand, the leading one included: 8, 11, 24, 53 for bf16, fp16, fp32, fp64."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def half_ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding to nearest, to `dtype`, a number of at most `magnitude`; inf where that may overflow.

    Between u/2 and u of the magnitude; in the subnormal range half the smallest subnormal.
    """
    info = torch.finfo(dtype)
    error = binade(magnitude).mul_(info.eps / 2).clamp_(min=info.smallest_normal * info.eps / 2)
    error.masked_fill_(~(magnitude < info.max * (1 + info.eps / 4)), torch.inf)
    return error.masked_fill_(magnitude == 0, 0.0)


def _lowest_bit(x: Tensor, bits: int) -> Tensor:
    """Exponent of the lowest set bit of numbers of `bits` significant bits, (..., ) int; large for 0."""
    fraction, exponent = torch.frexp(x)
    integer = (fraction * 2.0**bits).to(torch.int64)
    _, place = torch.frexp((integer & -integer).double())
    return torch.where(x == 0, 2**14, exponent - bits + place - 1)


def largest(*operands: Tensor) -> float:
    """The sum of the operands' largest finite magnitudes."""
    return sum(float(x.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()) for x in operands if x.numel())


def inexact_additions(a: Tensor, b: Tensor, bits: tuple[int, int], largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, V) how many additions of sum_k a_ik b_jk can round, in a sum held in `dtype`, in any order; 0: nothing does.

    a (N, D), b (V, D) of `bits` significant bits each; no partial sum exceeds `largest` (N, V). Let w be the ulp of
    `largest`. Partial sums of products that are multiples of w are exact. A product with lower bits makes its partial
    sum round, which is then a multiple of its own ulp; clean summands round it again only when it grows into a higher
    binade, with errors that at least double each time, so all in all by less than w. Partial sums with such products
    meet at most once less than there are such products: f of them cost 2 f - 1 times w, which is 2 (2 f - 1) times
    the half ulp that one addition costs.
    """
    grid = _lowest_bit(a, bits[0])[:, None, :] + _lowest_bit(b, bits[1])[None, :, :]  # (N, V, D)
    _, top = torch.frexp(largest)
    _, least = math.frexp(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    w = (top - significand_bits(dtype)).clamp(min=least - 1)
    fine = (grid < w[:, :, None]).sum(2)
    return (4.0 * fine - 2).clamp(min=0)


@dataclass(frozen=True)
class Precision:
    """A floating-point dtype, and how a machine's elementary functions and exponents round in it."""

    dtype: torch.dtype
    ulps: float = 1.0  # error of the elementary functions, in units in the last place
    roundings: int = 1  # how often a difference of logits is rounded on its way into or out of an exponential
    flushes: bool = False  # whether a result below the normal range may become 0

    @property
    def u(self) -> float:
        return unit_roundoff(self.dtype)

    @property
    def tiny(self) -> float:
        """Underflow of one operation."""
        info = torch.finfo(self.dtype)
        return info.smallest_normal * (1.0 if self.flushes else info.eps)

    @property
    def function(self) -> float:
        """Relative error of exp, expm1, log, log1p and tanh."""
        return 2 * self.ulps * self.u


@dataclass(frozen=True)
class Kernels:
    """How Triton's kernels round on a machine, as `bounds_kernels` counts it. Errors of functions in ulp.

    On a GPU `tl.exp2` is ex2.approx.ftz.f32 (2 ulp; 2.055 on an H200, over every number), `tl.log` and `tl.log2` are
    libdevice's (1 ulp), `/` is
    div.full.f32 (2 ulp; a multiplication by the reciprocal that the special function unit gives, which is 1 for 1, so
    that division by 1 is exact), `reciprocal` is rcp.approx.ftz.f32 (1 ulp), and a product that is added to is one
    instruction. So it stands in the PTX of the kernels, and so NVIDIA documents the instructions (PTX ISA; CUDA C++
    Programming Guide, mathematical functions, which gives 2 ulp or less for what torch's exp and expm1 call).
    """

    exp2: float
    log: float
    divide: float
    reciprocal: float
    library: float  # of torch's own functions
    fused: bool  # whether a product that is added to is not rounded
    chain: bool  # whether a logit is one sum in the order of the features
    columns: tuple[int, int]  # least columns of a tile of the forward pass, of 16-bit and of fp32 operands
    widest: int  # most columns of a tile of 16-bit operands
    # how a row of a tile lies in the threads, of 16-bit and of fp32 operands: columns side by side in one, threads in
    # a row, additions from thread to thread and from warp to warp
    rows: tuple[tuple[int, int, int], tuple[int, int, int]]

    def tiles(self, v: int, itemsize: int) -> int:
        """Tiles of a row of v columns, or more: what is merged into a running sum."""
        return -(-v // self.columns[itemsize > 2])

    def row_depth(self, v: int, itemsize: int) -> int:
        """Most additions that a term of a row's sum in one tile passes through; the target's is none. Threads that hold
        columns beyond the last one add 0, which rounds nothing.
        """
        side, threads, levels = self.rows[itemsize > 2]
        terms = min(v, self.columns[1] if itemsize > 2 else self.widest)
        holding = min(threads, -(-terms // side))
        idle = (threads - 1).bit_length() - (holding - 1).bit_length()  # levels on which one of a pair holds nothing
        inside = min(terms, side * -(-terms // (side * threads))) - 1
        return min(max(terms - 2, 0), inside + levels - idle)


@dataclass(frozen=True)
class Machine:
    """What rounds how. `block` = 0: products and sums in any order, fused or not (CPU, and fp32 without tensor cores).

    Tensor cores add `block` products of 16-bit numbers and the accumulator at once: aligned to the largest exponent,
    cut to `fraction` bits, added exactly, and cut again on normalising. One step then errs by at most (block + 1)
    2^-fraction of the largest term plus 2^-23 of the result (arXiv 2511.10909, 2512.07004; peerj cs-330).
    """

    name: str
    ulps: float = 1.0  # of exp, expm1, log, log1p and tanh
    roundings: int = (
        1  # of a difference of logits: more in base 2, where it is multiplied by a rounded log2(e) or ln(2)
    )
    block: int = 0
    fraction: int = 0
    cascade: bool = True  # whether sums are those of torch on a CPU (ATen/native/cpu/SumKernel.cpp); else any order
    flushes: bool = False  # whether exponentials below the normal range are 0 (ex2.approx, NumPy's float32 exp2)
    kernels: Kernels | None = None  # of the tiled variants; None: the eager passes, or somebody else's kernels

    @property
    def of_others(self) -> Machine:
        """The same device under kernels of which nothing is known."""
        return dataclasses.replace(self, kernels=None)

    @property
    def accuracy(self) -> float:
        """Error of torch's functions, in ulp."""
        return self.ulps if self.kernels is None else self.kernels.library

    def products(
        self,
        p: Precision,
        terms: int,
        absolute: Tensor,
        out: Tensor,
        operand: torch.dtype,
        exact: bool,
        inexact: Tensor | None = None,
        largest: float = 0.0,
    ) -> Tensor:
        """Error of sums of `terms` products, `absolute` = sum |a b|, `out` = |sum a b|. `exact`: no product is rounded.

        In any order every partial sum is that of a subset, hence at most max(sum of positives, sum of negatives) =
        (absolute + out) / 2 in magnitude; each addition errs by at most half an ulp of one. `inexact` bounds the
        number of additions that can err at all (see `inexact_additions`).
        `largest`: that of |a| plus that of |b|. A tensor core aligns a subnormal factor as if it were the smallest
        normal number, so that a block may err by (block + 1) 2^-fraction of that number times the other factor; and a
        subnormal accumulator as 2^-126. A library may multiply narrow matrices without tensor cores: the larger of both
        bounds.
        """
        if terms == 0:
            return torch.zeros_like(out)
        tensor_cores = bool(self.block) and operand in (torch.bfloat16, torch.float16)
        growth = 1 + terms * p.u  # a computed partial sum against an exact one
        count = torch.full_like(out, terms - 1)  # the first term is added to 0, or its product rounded by the addition
        if inexact is not None:
            count = torch.minimum(count, inexact)
        error = count * half_ulp(growth * (absolute + out) / 2, p.dtype)
        if not exact and not tensor_cores:
            error = error + p.u * growth * absolute
        underflow = absolute > 0 if inexact is None else (absolute > 0) & (inexact > 0)
        error = error + torch.where(underflow, terms * p.tiny, 0.0)
        if not tensor_cores:
            return error
        steps = -(-terms // self.block)
        step = (self.block + 1) * 2.0**-self.fraction + 2.0**-23 + p.u * self.block / 32  # fp32 sums of tiles of 32
        normal, cut = torch.finfo(operand).smallest_normal, (self.block + 1) * 2.0**-self.fraction
        least = steps * (cut * (normal * (largest + normal) + 2.0**-126) + p.tiny)
        blocks = steps * step / (1 - steps * step) * absolute + torch.where(absolute > 0, least, 0.0)
        return torch.maximum(error, blocks)

    def total_depth(self, n: int) -> int:
        """Most additions that round what a term ends up in, in torch.sum of n numbers to one.

        On a GPU (ATen/native/cuda/Reduce.cuh): below 128 numbers as many threads as the next lower power of two, so two
        numbers a thread at most, and then from thread to thread in pairs. From 128 on up to 512 threads, each with 4
        or 8 accumulators for a vector of 4 or 8 numbers at a time, one number before and one after them, which are
        then added; many numbers go to several blocks, whose sums are added the same way. Adding to 0 does not round.
        """
        if self.kernels is None:
            return self.sum_depth(n)
        if not self.block:  # kernels in the interpreter, whose sums of rows are torch's on a CPU
            return dataclasses.replace(self, cascade=True).sum_depth(n)
        if n < 128:
            return max(n, 1).bit_length() if n > 2 else max(n - 1, 0)
        return -(-n // 2048) + 19 + 16 * (n > 2**17)

    def sum_depth(self, n: int, inner: bool = True) -> int:
        """Most additions that round what a term ends up in, in torch.sum of n along the last (`inner`) or another axis.

        On a CPU (ATen/native/cpu/SumKernel.cpp): a cascade of four levels of 16 terms or more, for each of `lanes`
        lanes of 4 accumulators, which are then added one by one, as are the terms that fill no vector. Adding to 0
        does not round.
        """
        if n < 2:
            return 0
        if not self.cascade:  # inside tiles of at most 256 terms in any order, and from tile to tile
            return min(n - 1, 255 + -(-n // 64))
        threads = 64 if n >= 2**15 else 0

        def cascade(size: int) -> int:
            step = 2 ** max(4, math.ceil(math.log2(max(size, 1))) // 4)
            levels = [-(-size // step**level) for level in range(4)]
            depth = sum(min(step, levels[k]) for k in range(3) if levels[k] > 1) + (levels[3] if levels[3] > 1 else 0)
            return depth + 3 * (levels[1] > 1)

        depth = 0
        for lanes in (1, 2, 4, 8, 16):
            vectors, left = divmod(n, lanes)
            rows, spare = divmod(vectors, 4)
            depth = max(depth, cascade(rows) + spare + 3 + lanes, left + lanes)
        if not inner:
            depth = max(depth, cascade(n))
        return min(depth + threads, n - 1)


CPU = Machine("cpu")  # the eager passes
_GPU = Kernels(
    exp2=2.0625, log=1.0, divide=2.0, reciprocal=1.0, library=2.0, fused=True, chain=True,
    columns=(128, 64), widest=256, rows=((2, 4, 2), (4, 16, 4)),
)  # fmt: skip
_NUMPY = Kernels(
    exp2=4.0, log=4.0, divide=0.5, reciprocal=0.5, library=1.0, fused=False, chain=False, columns=(32, 32), widest=32,
    rows=((32, 1, 0), (32, 1, 0)),
)  # fmt: skip
_TENSOR_CORES = Machine("hopper", ulps=4.0, roundings=4, block=16, fraction=25, cascade=False, flushes=True)
INTERPRETER = Machine("interpreter", ulps=4.0, roundings=4, cascade=False, flushes=True, kernels=_NUMPY)
HOPPER = dataclasses.replace(_TENSOR_CORES, kernels=_GPU)
AMPERE = dataclasses.replace(  # rows may be spread over warps
    _TENSOR_CORES, name="ampere", block=8, fraction=24, kernels=dataclasses.replace(_GPU, rows=((2, 4, 5), (4, 16, 4)))
)
BLACKWELL = dataclasses.replace(  # its tensor cores are not recorded, and a thread may hold a whole row
    _TENSOR_CORES, name="blackwell", kernels=dataclasses.replace(_GPU, rows=((256, 1, 1), (4, 16, 4)))
)
_GENERATIONS = {8: AMPERE, 9: HOPPER}
MACHINES = {machine.name: machine for machine in (CPU, INTERPRETER, HOPPER, AMPERE, BLACKWELL)}


def gpu_machine(device: torch.device | str | None = None) -> Machine:
    """How a CUDA device rounds, by its compute capability."""
    return _GENERATIONS.get(torch.cuda.get_device_capability(device)[0], BLACKWELL)


@dataclass(frozen=True, eq=False)
class Computed:
    """An exact value and a bound of the error of what was computed for it; fp64 tensors that broadcast together."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(value: Tensor | float, like: Tensor | None = None) -> Computed:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=None if like is None else like.device)
        return Computed(tensor, torch.zeros_like(tensor))

    @property
    def upper(self) -> Tensor:
        """Bound of the magnitude of the computed number."""
        return self.value.abs() + self.error

    def __neg__(self) -> Computed:
        return Computed(-self.value, self.error)

    def __add__(self, other: Computed) -> Computed:
        return Computed(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Computed) -> Computed:
        return Computed(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Computed) -> Computed:
        error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return Computed(self.value * other.value, error)

    def over(self, other: Computed) -> Computed:
        """The quotient; other is nonzero."""
        value = self.value / other.value
        least = (other.value.abs() - other.error).clamp(min=0)
        lost = (self.error + value.abs() * other.error) / least
        return Computed(value, torch.where(self.upper == 0, 0.0, lost))

    def __getitem__(self, index: object) -> Computed:
        return Computed(self.value[index], self.error[index])  # type: ignore[index]

    def rounded(self, p: Precision, times: int = 1) -> Computed:
        """After `times` relative errors of u, and the underflow of one operation."""
        upper = self.upper
        underflow = torch.where(upper > 0, p.tiny, 0.0)
        lost = upper.mul_(times * p.u * (1 + times * p.u))
        return Computed(self.value, lost.add_(self.error).add_(underflow))

    def stored(self, dtype: torch.dtype) -> Computed:
        """After one rounding to nearest to `dtype`."""
        return Computed(self.value, self.error + half_ulp(self.upper, dtype))

    def exp(self, p: Precision) -> Computed:
        value, error = self.value.exp(), self.error.clamp(max=LARGEST_EXPONENT)
        growth = error.exp() * (1 + p.function)
        return Computed(value, value * (torch.expm1(error) + p.function * growth) + torch.where(value > 0, p.tiny, 0.0))

    def column(self) -> Computed:
        """(B,) as (B, 1)."""
        return Computed(self.value[:, None], self.error[:, None])

    def where(self, mask: Tensor, other: Computed) -> Computed:
        """This where `mask`, other elsewhere."""
        return Computed(torch.where(mask, self.value, other.value), torch.where(mask, self.error, other.error))

    def sum(self, dim: int, p: Precision, depth: int) -> Computed:
        """A floating-point sum in which each term passes through at most `depth` additions."""
        lost = depth * p.u * (1 + depth * p.u) * self.upper.sum(dim)
        return Computed(self.value.sum(dim), self.error.sum(dim) + lost)
