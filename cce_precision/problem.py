"""`Problem`: one flat call as the passes see it; `Plan`: how to compute it; `Heads` and `Upstream`: what goes out and
comes back.

The passes know four per-token quantities, the heads, and nothing of reductions, class weights or label smoothing, which
are linear in the heads and therefore composed (and differentiated by PyTorch) in `interface`:

    nll_i     = lse_i - z[i, t_i]                       (complement form: log1p of the odds against the target)
    lse_i     = log sum_j exp z_ij
    entropy_i = - sum_j P_ij log P_ij
    smooth_i  = sum_j w_j (lse_i - z_ij)                (w: column weights, ones unless class weights are given)

with z = cap(e c^T + bias) / temperature and cap(y) = softcap tanh(y / softcap). Their joint gradient is

    dZ_ij = P_ij (alpha_i - kappa_i (log P_ij + entropy_i)) - beta_i [j = t_i] - sigma_i w_j,
    alpha = g_nll + g_lse + sum(w) g_smooth,   beta = g_nll,   kappa = g_entropy,   sigma = g_smooth,

where the target's entry is taken in complement form: -beta (1 - P_t) + (alpha - beta) P_t - ..., 1 - P_t =
-expm1(-nll).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numerics import Accumulation, Filter, FilterKind, Granularity, Operand, Path, Variant, auto_eps

__all__ = [
    "ELSEWHERE",
    "Heads",
    "Plan",
    "Problem",
    "Statistics",
    "Upstream",
    "is_centred",
    "is_witness",
    "pairs_a_witness",
]

# A target whose column another process holds (vocabulary-parallel backward passes): the token counts, no column of this
# problem is its target. Beyond every column, and far enough from int32's end for differences of positions.
ELSEWHERE = 2**30
WITNESSES = 512  # tokens, spread over all, whose kept entries make the centres of a centred variant


class Heads(NamedTuple):
    """Per-token outputs, each (N,) in the compute dtype (argmax: int64); 0 on ignored tokens; empty (0,) where not
    asked for."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    smooth: Tensor
    argmax: Tensor


class Upstream(NamedTuple):
    """Gradients with respect to the heads, each (N,) in the compute dtype; None where a head has none."""

    nll: Tensor | None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    smooth: Tensor | None = None

    @property
    def of_nll_alone(self) -> bool:
        return self.lse is None and self.entropy is None and self.smooth is None


class Statistics(NamedTuple):
    """What a filter does to each row of P^, the sampled or thresholded softmax that dE is computed from; each (N,).

    The filter moves dE_i by at most |g_i| deviation_i max_j ||C_j||, of a centred variant by twice as much.
    """

    kept_mass: Tensor  # sum_j P^_ij, the target's entry included; 1 without a filter, whatever is flushed
    hits: Tensor  # entries with P^_ij > 0, int64
    deviation: Tensor  # upper bound of sum_j |P^_ij - P_ij|, rounding included


@dataclass(frozen=True)
class Plan:
    """How to compute a problem: the variant and every scalar of the call. Travels through the operator as a string."""

    variant: Variant
    softcap: float | None = None
    temperature: float = 1.0
    want_entropy: bool = False
    want_smooth: bool = False
    want_argmax: bool = False
    backend: str = "auto"  # "auto" | "triton" | "eager"
    workspace_mb: int | None = None  # None: the backend's default
    # Gradients (of e, c, bias) that the forward pass may compute with it, because every token's upstream gradient will
    # be one scalar, that of a summed nll; None where it may not.
    one_pass: tuple[bool, bool, bool] | None = None
    want_record: bool = False  # whether a backward pass may follow, which wants to know where its filter keeps anything
    # dE is one process's part of a sum over processes: it leaves the pass in the compute dtype, not rounded to e's.
    partial_e: bool = False
    first_column: int = 0  # see Problem
    # Largest relative error of dE and dC that the filter, of single entries and one for both, may cause; where no such
    # promise can be kept the gradient is exact. None: the filter filters.
    tolerance: float | None = None

    def encode(self) -> str:
        """The plan as text, in operations that `torch.compile` folds to a constant: an f-string takes the value of a
        symbolic number (dynamic=True) and guards it, `str` refuses."""
        v = self.variant
        values: list[Any] = [v.name, v.path.value, v.operand.value, v.accum_e.value, v.accum_c.value]
        for f in (v.filter_e, v.filter_c):
            values += [f.kind.value, f.granularity.value, f.eps, f.share]
        values += [v.label_apart, v.sort_vocabulary, v.centred, v.flushed, *v.tile, self.softcap, self.temperature]
        values += [self.want_entropy, self.want_smooth, self.want_argmax]
        values += [self.backend, self.workspace_mb, self.want_record, self.partial_e, self.first_column, self.tolerance]
        values += [None] if self.one_pass is None else self.one_pass
        return "|".join([f"{value}" for value in values])

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def decode(text: str) -> Plan:
        """The plan that `encode` wrote; the variant without its summary and aliases, which no pass reads."""
        fields = iter(text.split("|"))
        flag = lambda: next(fields) == "True"  # noqa: E731
        optional = lambda kind: (lambda x: None if x == "None" else kind(x))(next(fields))  # noqa: E731

        def filter_() -> Filter:
            kind, granularity = FilterKind(next(fields)), Granularity(next(fields))
            return Filter(kind, granularity, optional(float), int(next(fields)))

        variant = Variant(
            next(fields),
            "",
            path=Path(next(fields)),
            operand=Operand(next(fields)),
            accum_e=Accumulation(next(fields)),
            accum_c=Accumulation(next(fields)),
            filter_e=filter_(),
            filter_c=filter_(),
            label_apart=flag(),
            sort_vocabulary=flag(),
            centred=flag(),
            flushed=flag(),
            tile=(int(next(fields)), int(next(fields))),
        )
        plan = Plan(
            variant,
            softcap=optional(float),
            temperature=float(next(fields)),
            want_entropy=flag(),
            want_smooth=flag(),
            want_argmax=flag(),
            backend=next(fields),
            workspace_mb=optional(int),
            want_record=flag(),
            partial_e=flag(),
            first_column=int(next(fields)),
            tolerance=optional(float),
        )
        one_pass = [x == "True" for x in fields if x != "None"]
        return dataclasses.replace(plan, one_pass=(one_pass[0], one_pass[1], one_pass[2])) if one_pass else plan


@dataclass(frozen=True)
class Problem:
    """One flat call. All tensors on one device; nothing is copied to build it."""

    e: Tensor  # (N, D) embeddings; a strided view is fine
    c: Tensor  # (V, D) classifier
    # (N,) int64 in [0, V), or -1 where the token is ignored, or (in a backward pass) ELSEWHERE; any shift is applied
    # already
    targets: Tensor
    bias: Tensor | None = None  # (V,)
    column_weight: Tensor | None = None  # (V,) w of the smooth head in the compute dtype; None: ones
    softcap: float | None = None
    temperature: float = 1.0
    # The number of column 0 in the whole vocabulary, where processes share it: random filters draw by that number.
    first_column: int = 0

    @property
    def n(self) -> int:
        return self.e.shape[0]

    @property
    def v(self) -> int:
        return self.c.shape[0]

    @property
    def d(self) -> int:
        return self.e.shape[1]

    def positions(self, order: Tensor | None) -> Tensor:
        """Targets (N,) as positions in a visiting order (V,) of the columns; -1 and ELSEWHERE stay as they are."""
        if order is None:
            return self.targets
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        here = (self.targets >= 0) & (self.targets < self.v)
        return torch.where(here, rank[self.targets.clamp(0, self.v - 1)], self.targets)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The common dtype of e and c: dZ is rounded to it, and `auto` thresholds derive from it."""
        return torch.promote_types(self.e.dtype, self.c.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs: logits, probabilities, losses and sums."""
        return torch.float64 if self.operand_dtype is torch.float64 else torch.float32


def is_centred(problem: Problem, plan: Plan) -> bool:
    """Whether dE takes the rows of c less a centre: the variant asks for it, both gradients have one filter, and the
    sum of each row of dZ, its smoothing part aside, is known. Without a softcap it is alpha - beta over all columns of
    the vocabulary, 0 for the nll alone.
    """
    variant = plan.variant
    filtered = variant.by_element and variant.filter_e.threshold(problem.operand_dtype) > 0
    return variant.centred and filtered and problem.softcap is None and not plan.partial_e


def flushed_below(problem: Problem, plan: Plan) -> float:
    """The probability, as a multiple of 1 - P_t, below which the kernels may write an entry of dZ as 0. It is 0 for a
    variant that is not `flushed`, an operand of more than 16 bits, and a shared vocabulary, whose size is not known.
    """
    dtype = problem.operand_dtype
    flushed = plan.variant.flushed and dtype.itemsize == 2 and not plan.partial_e
    return auto_eps(dtype) / max(problem.v, 1) if flushed else 0.0


def pairs_a_witness(n: int) -> int:
    """Of n tokens the pair at places 2 i and 2 i + 1 counts for the centres where this divides i."""
    return max(1, n // WITNESSES)


def is_witness(tokens: Tensor, n: int) -> Tensor:
    """Whether the tokens at these places, of n, count for the centres."""
    return tokens // 2 % pairs_a_witness(n) == 0
