"""How far a result is from the truth: every number a tidy row (quantity, metric, value).

    for row in rows("dE", e.grad, truth.dE, radius=truth.radius.dE, strata=by_complement(truth.p_complement)):
        table.append(row)

Errors are taken in fp64. A NaN where the truth is NaN is no error, a NaN for a number is an infinite one, and so for
infinities. A vector counts as rows of one element. The metrics of `rows`:

    rel            |out - exact| / |exact|, Euclidean norms of the whole
    growth         the factor by which rel may differ from that of another run without a change of the numerics
    floor          the same for the exact value rounded once to the dtype of `out`: nothing stored in it does better
    certificate    |radius| / |exact|: an error below it says nothing (with `radius`)
    bits           -log2(rel), in [0, p] for p significant bits
    cosine_deficit half the squared distance of the unit vectors: 1 - cos without its cancellation
    norm_ratio     |out| / |exact|
    bias, bias_z   sum of errors towards the exact value's sign over sum |exact|; its t-score over tiles of 128 rows
    row_q50, row_q90, row_q99, row_max   quantiles of the rows' own relative errors
    row_undetermined   share of rows no larger than their certificate: they are left out of the quantiles
    scaled, scaled_max   |error| / |scale|, scale = |x| |W|, of norms and of the worst element (with `scale`)
    ulp_q50, ulp_q99, ulp_max   |error| in ulp(max(|exact|, u scale)), u the unit round-off of the dtype
    ulp_share:K    share of elements whose error is at most K such ulps and more than the next smaller K
    worst_row, worst_column   index of the element with ulp_max

With `strata`, rel, row_q50, row_q99, row_max and the count `rows` come once a stratum, as "metric:stratum".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cce_precision.numerics import unit_roundoff

__all__ = [
    "Row",
    "Worst",
    "bias",
    "binade",
    "by_complement",
    "by_count",
    "cosine_deficit",
    "effective_bits",
    "errors",
    "floor_error",
    "relative",
    "row_errors",
    "rows",
    "significant_bits",
    "ulps",
    "worst",
]

FP64_EXPONENT = 0x7FF0000000000000  # the bits of an fp64 number that hold its exponent
TILE = 128  # rows whose errors may depend on each other
ULP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, math.inf)
COMPLEMENT_EDGES = (0.0, 1e-6, 1e-4, 1e-2, 1e-1, math.inf)
COUNT_EDGES = ((0, 0, "0"), (1, 1, "1"), (2, 9, "2-9"), (10, math.inf, "10+"))


class Row(NamedTuple):
    """One number of a table; `metric` is "name" or "name:stratum"."""

    quantity: str
    metric: str
    value: float


class Worst(NamedTuple):
    """The element that is farthest from the truth, in ulps."""

    element: tuple[int, ...]  # its index
    out: float
    exact: float
    ulps: float


# -- elementwise -------------------------------------------------------------------------------------------------------


def signed_errors(out: Tensor, exact: Tensor) -> Tensor:
    """out - exact in fp64: 0 where both are NaN or the same infinity, infinite where only one is a number."""
    out, exact = out.detach().to(device=exact.device, dtype=torch.float64), exact.double()
    error = out - exact
    if error.isfinite().all():
        return error
    same = (out == exact) | (out.isnan() & exact.isnan())
    return torch.where(same, 0.0, error.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf))


def errors(out: Tensor, exact: Tensor) -> Tensor:
    """|out - exact| in fp64, with the rules of `signed_errors` for NaN and infinities."""
    return signed_errors(out, exact).abs()


def significant_bits(dtype: torch.dtype) -> int:
    """8 for bf16, 11 for fp16, 24 for fp32, 53 for fp64."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def binade(magnitude: Tensor) -> Tensor:
    """The largest power of two that is not above each magnitude, fp64; 0 below the normal numbers, inf for NaN."""
    return (magnitude.double().view(torch.int64) & FP64_EXPONENT).view(torch.float64)


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of the numbers of `dtype` around `magnitude`; the subnormals' spacing below the smallest normal."""
    info = torch.finfo(dtype)
    return binade(magnitude.double().clamp(min=info.smallest_normal)) * info.eps


def ulps(out: Tensor, exact: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """|out - exact| in ulp(max(|exact|, u scale)): with scale = |x| |W| cancelled elements do not dominate."""
    return Grades(out, exact, scale=scale, dtype=dtype).ulps


def worst(out: Tensor, exact: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Worst:
    """The element with the largest error in ulps. Raises ValueError for an empty tensor."""
    return Grades(out, exact, scale=scale, dtype=dtype).worst()


# -- the whole ---------------------------------------------------------------------------------------------------------


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size else math.inf


def relative(out: Tensor, exact: Tensor) -> float:
    """Normwise relative error |out - exact| / |exact|; 0 for 0/0, infinite for an error against 0."""
    return Grades(out, exact).relative()


def floor_error(exact: Tensor, dtype: torch.dtype) -> float:
    """Normwise relative error of the exact value rounded once to `dtype`."""
    return relative(exact.to(dtype), exact)


def effective_bits(relative_error: float, dtype: torch.dtype) -> float:
    """-log2(relative_error), in [0, p] for p significant bits; 0 for NaN."""
    most = significant_bits(dtype)
    if relative_error == 0:
        return float(most)
    return min(max(-math.log2(relative_error), 0.0), float(most)) if math.isfinite(relative_error) else 0.0


def cosine_deficit(out: Tensor, exact: Tensor) -> float:
    """1 - cos of the angle between the two, as half the squared distance of the unit vectors; NaN where one is 0."""
    a, b = out.detach().to(device=exact.device, dtype=torch.float64), exact.double()
    return float((a / a.norm() - b / b.norm()).square().sum()) / 2


def bias(out: Tensor, exact: Tensor, tile: int = TILE) -> tuple[float, float]:
    """(bias, z): the mean error towards the exact value's own sign over its mean size, and its t-score over tiles.

    -1 is a gradient of zeros. Rows of a tile share roundings and filters, so tiles are the samples; z is NaN for one
    tile, and infinite where all err alike.
    """
    return Grades(out, exact).bias(tile)


# -- by row ------------------------------------------------------------------------------------------------------------


def row_errors(out: Tensor, exact: Tensor, radius: Tensor | None = None) -> Tensor:
    """(N,) relative error of each row.

    NaN marks a row that says nothing: nothing to compute and nothing computed (both 0, as of an ignored token), or no
    larger than its `radius`, the certificate of the truth (undetermined).
    """
    return Grades(out, exact, radius).rows


def undetermined(exact: Tensor, radius: Tensor | None) -> Tensor:
    """(N,) rows that are not 0 but no larger than their certificate."""
    if radius is None:
        return torch.zeros(len(_as_rows(exact)), dtype=torch.bool, device=exact.device)
    size, doubt = _row_norms(exact.double()), _row_norms(radius)
    return (size <= doubt) & (doubt > 0)


def _as_rows(x: Tensor) -> Tensor:
    """(N, D); a vector as (N, 1), a number as (1, 1)."""
    return x.reshape(-1, 1) if x.ndim < 2 else x.reshape(len(x), -1)


def _row_norms(x: Tensor) -> Tensor:
    return _as_rows(x).norm(dim=1)


def _quantile(values: Tensor, q: float) -> float:
    """The smallest value that at least a share q does not exceed; NaN for none."""
    rank = max(1, math.ceil(q * values.numel()))
    return float(values.reshape(-1).kthvalue(rank).values) if values.numel() else math.nan


def by_complement(p_complement: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """(N,) masks of tokens by 1 - p_t: rows of dE, and losses. `valid`: tokens that are not ignored."""
    pairs = zip(COMPLEMENT_EDGES[:-1], COMPLEMENT_EDGES[1:], strict=True)
    valid = torch.ones_like(p_complement, dtype=torch.bool) if valid is None else valid
    return {_between(a, b): (p_complement >= a) & (p_complement < b) & valid for a, b in pairs}


def _between(a: float, b: float) -> str:
    return f"1-p<{b:g}" if a == 0 else f"1-p>={a:g}" if b == math.inf else f"{a:g}<=1-p<{b:g}"


def by_count(targets: Tensor, v: int) -> dict[str, Tensor]:
    """(V,) masks of vocabulary rows by how often they are a target: 0, 1, 2-9, 10+."""
    count = torch.bincount(targets[targets >= 0], minlength=v)
    return {f"targets={name}": (count >= low) & (count <= high) for low, high, name in COUNT_EDGES}


# -- all ---------------------------------------------------------------------------------------------------------------


class Grades:
    """A tensor beside the truth, with what several metrics share computed once. Arguments as of `rows`."""

    def __init__(
        self,
        out: Tensor,
        exact: Tensor,
        radius: Tensor | None = None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.out, self.exact, self.radius, self.scale, self.dtype = out, exact, radius, scale, dtype or out.dtype

    @functools.cached_property
    def signed(self) -> Tensor:
        return signed_errors(self.out, self.exact)

    @functools.cached_property
    def error(self) -> Tensor:
        return self.signed.abs()

    @functools.cached_property
    def finite(self) -> Tensor:
        """The truth in fp64, 0 where it is not finite."""
        exact = self.exact.double()
        return exact if exact.isfinite().all() else torch.where(exact.isfinite(), exact, 0.0)

    @functools.cached_property
    def ulps(self) -> Tensor:
        magnitude = self.exact.double().abs().nan_to_num()
        if self.scale is not None:
            magnitude = torch.maximum(magnitude, unit_roundoff(self.dtype) * self.scale.double())
        return self.error / ulp(magnitude, self.dtype)

    @functools.cached_property
    def undetermined(self) -> Tensor:
        return undetermined(self.exact, self.radius)

    @functools.cached_property
    def rows(self) -> Tensor:
        error, size = _row_norms(self.error), _row_norms(self.finite)
        relative_error = torch.where(error == 0, 0.0, error / size)
        silent = (error == 0) & (size == 0)
        return relative_error.masked_fill(silent | self.undetermined, math.nan)

    def relative(self, mask: Tensor | None = None) -> float:
        """`relative`, of the rows in `mask`."""
        error, finite = (self.error, self.finite) if mask is None else (self.error[mask], self.finite[mask])
        return _ratio(float(error.norm()), float(finite.norm()))

    def growth(self) -> float:
        """1 + 4 standard errors of the ratio of two runs' `rel`, the errors of rows being independent draws.

        The variance of a sum S of squares s_i is at most sum s_i^2; rel goes with the root of S, and two runs differ
        by sqrt 2 as much. Another machine's order of sums, or another seed, moves rel by less.
        """
        squares = _row_norms(self.error).square()
        total = float(squares.sum())
        if not 0 < total < math.inf:
            return 1.0
        return 1 + 4 * math.sqrt(2) / 2 * float(squares.norm()) / total

    def bias(self, tile: int = TILE) -> tuple[float, float]:
        exact = self.exact.double()
        size = float(exact.abs().sum())
        towards = _as_rows(self.signed * exact.sign()).sum(1)
        samples = torch.stack([part.sum() for part in towards.split(tile)])
        total = float(samples.sum())
        if total == 0 or size == 0:
            return 0.0 if total == 0 else math.inf, 0.0
        spread = float(samples.std()) * math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return total / size, total / spread if spread else math.copysign(math.inf, total)

    def worst(self) -> Worst:
        if self.out.numel() == 0:
            raise ValueError("an empty tensor has no worst element")
        flat = int(self.ulps.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), self.out.shape))
        return Worst(index, float(self.out.detach()[index]), float(self.exact[index]), float(self.ulps[index]))


def rows(
    quantity: str,
    out: Tensor,
    exact: Tensor,
    *,
    radius: Tensor | None = None,
    scale: Tensor | None = None,
    strata: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    floor: float | None = None,
) -> Iterator[Row]:
    """All metrics of the module's list for one tensor.

    Args:
        out: the result, any float dtype; exact: the truth, fp64, of the same shape; (N,) or (N, D).
        radius: the truth's certificate. scale: |x| |W|, as `references.magnitudes` gives it.
        strata: named masks over rows. dtype: in which ulps, bits and floor count; None: that of `out`.
        floor: `floor_error` of the truth in that dtype, where the caller has it already.

    Raises: ValueError where shapes differ.
    """
    if out.shape != exact.shape:
        raise ValueError(f"{quantity}: out is {tuple(out.shape)}, the truth is {tuple(exact.shape)}")
    if out.numel() == 0:
        return
    grades = Grades(out, exact, radius, scale, dtype)
    for metric, value in _whole(grades, floor):
        yield Row(quantity, metric, value)
    if scale is not None:
        error = grades.error
        yield Row(quantity, "scaled", _ratio(float(error.norm()), float(scale.norm())))
        yield Row(quantity, "scaled_max", float(torch.where(error == 0, 0.0, error / scale).max()))
    for metric, value in _ulp_rows(grades):
        yield Row(quantity, metric, value)
    yield Row(quantity, "row_undetermined", float(grades.undetermined.double().mean()))
    for metric, value in _row_quantiles(grades.rows, ("50", "90", "99")):
        yield Row(quantity, metric, value)
    for name, mask in (strata or {}).items():
        mask = mask.to(exact.device)
        yield Row(quantity, f"rows:{name}", float(mask.sum()))
        if mask.any():
            yield Row(quantity, f"rel:{name}", grades.relative(mask))
            for metric, value in _row_quantiles(grades.rows[mask], ("50", "99")):
                yield Row(quantity, f"{metric}:{name}", value)


def _whole(grades: Grades, floor: float | None) -> Iterator[tuple[str, float]]:
    out, exact, radius = grades.out, grades.exact, grades.radius
    rel = grades.relative()
    yield "rel", rel
    yield "growth", grades.growth()
    yield "floor", floor_error(exact, grades.dtype) if floor is None else floor
    if radius is not None:
        yield "certificate", _ratio(float(radius.norm()), float(exact.norm()))
    yield "bits", effective_bits(rel, grades.dtype)
    yield "cosine_deficit", cosine_deficit(out, exact)
    yield "norm_ratio", float(out.detach().double().norm()) / float(exact.norm()) if exact.any() else math.nan
    yield from zip(("bias", "bias_z"), grades.bias(), strict=True)


def _row_quantiles(by_row: Tensor, percents: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    known = by_row[~by_row.isnan()]
    for percent in percents:
        yield f"row_q{percent}", _quantile(known, int(percent) / 100)
    yield "row_max", float(known.max()) if known.numel() else math.nan


def _ulp_rows(grades: Grades) -> Iterator[tuple[str, float]]:
    distance = grades.ulps
    yield "ulp_q50", _quantile(distance, 0.5)
    yield "ulp_q99", _quantile(distance, 0.99)
    yield "ulp_max", float(distance.max())
    below = 0.0
    for edge in ULP_EDGES:
        share = int((distance <= edge).count_nonzero()) / distance.numel()
        yield f"ulp_share:{edge:g}", share - below
        below = share
    at = grades.worst()
    yield "worst_row", float(at.element[0] if at.element else 0)
    yield "worst_column", float(at.element[1] if len(at.element) > 1 else 0)
