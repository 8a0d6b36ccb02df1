"""The truth: loss and gradients of a linear cross-entropy head in three arithmetics, each with a certificate.

    truth(problem, objective, method="fp64" | "balls" | "mpmath") -> Truth

`fp64` runs at any size on any device, `balls` (128-bit ball arithmetic) and `mpmath` (50 digits) at small shapes.
Every result carries `radius`, a rigorous elementwise bound of its own error, so that a test needs no tolerance:
|out - truth| <= bound + radius.

With z = cap(e c^T + bias) / temperature and the heads nll, lse, entropy, smooth of `problem.py`, a call is

    loss_i = nll_coef w_t (1 - eps) nll_i + (eps / V + smooth_coef) smooth_i + lse_coef lse_i + z_loss lse_i^2
             + entropy_coef H_i
    value  = loss (none) | sum_i loss_i (sum) | sum_i loss_i / denominator (mean)

with eps the label smoothing, w the class weights, and the denominator of F.cross_entropy: the number of tokens that
are not ignored, or the sum of their w_t with class weights. It is NaN when all are ignored; the gradients are then 0.

Everything is in terms of the surprisals q_ij = -log P_ij. With k the largest logit of row i and
l = log1p(sum_{j != k} exp(z_j - z_k)),

    q_j = (z_k - z_j) + l,    P_j = exp(-q_j),    1 - P_j = -expm1(-q_j),    lse = z_k + l,    H = sum_j P_j q_j,

sums of non-negative terms all: no row is too confident for full relative accuracy (Blanchard, Higham and Higham 2021,
for l).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cce_precision.problem import Problem, Upstream

__all__ = ["METHODS", "Magnitudes", "Objective", "Quantities", "Truth", "magnitudes", "truth"]

METHODS = ("fp64", "balls", "mpmath")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class Objective:
    """What is made of the heads: the whole call beyond the flat problem. Coefficients are numbers or (N,) tensors.

    `grad_out` is the gradient that arrives at the value: a number, or (N,) for reduction "none"; it scales the
    gradients alone. `class_weight` (V,) weighs both the nll and the smooth head; without it the smooth head uses
    `problem.column_weight`.
    """

    reduction: str = "mean"
    grad_out: float | Tensor = 1.0
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None
    z_loss: float | Tensor = 0.0  # coefficient of lse^2
    entropy: float | Tensor = 0.0
    lse: float | Tensor = 0.0
    smooth: float | Tensor = 0.0  # beyond the label smoothing
    nll: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if self.reduction != "none" and isinstance(self.grad_out, Tensor) and self.grad_out.numel() != 1:
            raise ValueError(f"grad_out must be a scalar for reduction {self.reduction!r}, got {self.grad_out.shape}")

    @staticmethod
    def from_upstream(upstream: Upstream) -> Objective:
        """The objective whose gradient with respect to the heads is `upstream`, as a backward pass receives it."""

        def coefficient(gradient: Tensor | None) -> float | Tensor:
            return 0.0 if gradient is None else gradient

        return Objective(
            "sum",
            nll=coefficient(upstream.nll),
            lse=coefficient(upstream.lse),
            entropy=coefficient(upstream.entropy),
            smooth=coefficient(upstream.smooth),
        )

    def per_token(self, name: str, rows: Tensor) -> Tensor:
        """Coefficient `name` for the tokens `rows`: (B,) fp64, exact."""
        number = torch.as_tensor(getattr(self, name), dtype=torch.float64, device=rows.device)
        return number.expand(rows.shape) if number.numel() == 1 else number.reshape(-1)[rows]

    def uses(self, name: str) -> bool:
        return bool((torch.as_tensor(getattr(self, name)) != 0).any())

    def column_weight(self, problem: Problem, device: torch.device) -> Tensor:
        """(V,) fp64: w of the smooth head."""
        weight = problem.column_weight if self.class_weight is None else self.class_weight
        if weight is None:
            return torch.ones(problem.v, dtype=torch.float64, device=device)
        return weight.to(device=device, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Quantities:
    """What a call computes, or the error radii of it: fp64 tensors. Ignored tokens are 0 in per-token quantities."""

    loss: Tensor  # (N,) per token, before the reduction
    value: Tensor  # () reduced; (N,), equal to loss, for reduction "none"
    nll: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    smooth: Tensor  # (N,)
    p_complement: Tensor  # (N,) 1 - P_t
    dE: Tensor  # (N, D)
    dC: Tensor  # (V, D)
    dbias: Tensor  # (V,) whether or not the problem has a bias


@dataclass(frozen=True, eq=False)
class Truth(Quantities):
    """The quantities, with `radius`: |quantity - exact| <= radius, elementwise; 0 where a quantity is not finite."""

    radius: Quantities


class Magnitudes(NamedTuple):
    """Sums of the absolute terms of each gradient element, |x| |W|, fp64: what its rounding errors are relative to."""

    dE: Tensor  # (N, D)
    dC: Tensor  # (V, D)
    dbias: Tensor  # (V,)


def truth(
    problem: Problem,
    objective: Objective | None = None,
    method: str = "fp64",
    device: torch.device | str | None = None,
    chunk: tuple[int, int] | None = None,
) -> Truth:
    """The exact loss and gradients of `objective` (mean nll by default) with respect to e, c and bias.

    Args:
        problem: operands of any float dtype, taken as exact; targets -1 are ignored whatever their rows hold.
        objective: reduction, upstream gradient, coefficients.
        method: "fp64" (any size), "balls" (needs python-flint) or "mpmath"; the last two on the CPU at small shapes.
        device: where "fp64" computes and where the result lies; None: where e lies.
        chunk: (tokens, columns) of a block of the fp64 method; None: chosen for the device. The rows of a token
            block hold all V logits, 16 bytes each, twice that with a softcap.

    Special values: bias -inf masks a column (P = 0; with a softcap z = -softcap / temperature, as the formula says);
    a masked target has nll inf and 1 - P_t = 1; a head whose coefficient is 0 takes no part. All ignored: value 0
    (sum) or NaN (mean), gradients 0.

    Raises: ValueError for an unknown method or reduction.
    """
    objective = Objective() if objective is None else objective
    device = problem.e.device if device is None else torch.device(device)
    if method == "fp64":
        from cce_precision.analysis.reference_fp64 import fp64_truth

        return fp64_truth(problem, objective, device, chunk)
    if method in ("balls", "mpmath"):
        from cce_precision.analysis.reference_exact import exact_truth

        return exact_truth(problem, objective, method, device)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def magnitudes(
    problem: Problem,
    objective: Objective | None = None,
    device: torch.device | str | None = None,
    chunk: tuple[int, int] | None = None,
) -> Magnitudes:
    """|x| |c|, |x|^T |e| and the column sums of |x|, x being the exact gradient with respect to e c^T + bias.

    Computed as `truth` with method "fp64"; the relative error is of the order of the certificate's.
    """
    from cce_precision.analysis.reference_fp64 import fp64_magnitudes

    device = problem.e.device if device is None else torch.device(device)
    return fp64_magnitudes(problem, Objective() if objective is None else objective, device, chunk)
