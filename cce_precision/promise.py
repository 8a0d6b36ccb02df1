"""How far a filter of single entries can have moved the gradients of one call, from what the pass itself saw.

Without the truth and without a pass over the logits: the drawn entries and the mass that is missing, the norms of the
rows of e and c, and of the gradients that the filter left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import Filter, FilterKind
from .problem import Problem

__all__ = ["Seen", "distances", "filter_error", "row_norms"]

_ROWS = 1024
_CONFIDENCE = math.log(1e6)


@dataclass(frozen=True)
class Seen:
    """What a pass saw of its filter; all over the factor that turns its sums into gradients, in the compute dtype."""

    alpha: Tensor  # (N,) the factor of P in dZ
    above: Tensor  # (N,) mass that enters dZ for certain: the target's, and what the filter never touches
    # 0-dim: sums of x_ij^2 ||c_j||^2 (for dE; of a centred variant c_j less the centre) and x_ij^2 ||e_i||^2 (for dC)
    # over the drawn entries x_ij of dZ
    energy_e: Tensor
    energy_c: Tensor
    # See `row_norms`; of a centred variant the second are (2, V), distances from the centres of even and odd tokens.
    norms: tuple[Tensor, Tensor]


def row_norms(problem: Problem) -> tuple[Tensor, Tensor]:
    """||e_i|| (N,), 0 where ignored, and ||c_j|| (V,), in the compute dtype."""
    of_e, of_c = (torch.linalg.vector_norm(x, dim=1, dtype=problem.compute_dtype) for x in (problem.e, problem.c))
    return torch.where(problem.targets >= 0, of_e, 0), of_c


def distances(norms: Tensor, along: Tensor, centre: Tensor) -> Tensor:
    """||c_j - centre|| (V,) at most, of the norms (V,) of c_j, c_j . centre (V,), and the centre (D,).

    The square loses what its three parts do (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    length = torch.linalg.vector_norm(centre)
    slack = 2 * (centre.numel() + 4) * torch.finfo(norms.dtype).eps * (norms + length).square()
    return ((norms.square() - 2 * along + length.square()).clamp(min=0) + slack).sqrt()


def filter_error(
    problem: Problem,
    filt: Filter,  # of both sides
    seen: Seen,
    scale: Tensor,  # 0-dim, from the sums over dZ to the gradients
    gradients: tuple[Tensor | None, Tensor | None],  # dE, dC under the filter; None: not wanted
) -> Tensor:
    """The larger relative error of dE and dC (Frobenius norms) that the filter causes, at most; 0-dim.

    For a filter that draws it is the root of the mean square over the draws. An entry counts x = P^ alpha (times a
    softcap's slope) where it is drawn and 0 elsewhere, hence its variance is at most E x^2, and the sum over the
    entries that were drawn has the expectation of that bound. A Bernstein bound turns the sum into one that fails once
    in 10^6: of independent terms in [0, b] the expectation is at most S with S - sqrt(2 b S log 10^6) = what was seen
    (Boucheron, Lugosi and Massart, Concentration Inequalities, section 2.7). A term is an entry, or what one of `share`
    columns or tokens brings, and P^ is at most share eps.

    What is dropped leaves no trace but the missing mass: with m_i at most 1 - above_i and what the error of two logits
    adds (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and C = max_j ||c_j||,

        ||err dE||^2 <= C^2 sum_i alpha_i^2 m_i^2,    ||err dC||^2 <= ||E||_2^2 eps sum_i alpha_i^2 m_i.

    The exact gradient's norm is at least the filtered one's less the error. NaN where an input is not finite.
    """
    eps, kind = filt.threshold(problem.operand_dtype), problem.compute_dtype
    norms, longest = seen.norms[0], seen.norms[1].amax()
    if filt.kind is FilterKind.DROP:
        slack = 2 * (problem.d + 4) * torch.finfo(kind).eps / problem.temperature * norms * longest
        below = (1 - seen.above + seen.above * slack).clamp(min=0)
        spread = seen.alpha.square() * below
        errors = longest * (spread * below).sum().sqrt(), _spectral_norm(problem) * (eps * spread.sum()).sqrt()
    else:
        squares, drawn = seen.alpha.square(), filt.share * eps
        whole = filt.kind is FilterKind.SUBSET  # a column's term sums over tokens, a token's over P
        most_e = (drawn * longest) ** 2 * (squares.sum() if whole else squares.amax())
        most_c = drawn * (filt.share if whole else eps) * (squares * norms.square()).amax()
        errors = _root(seen.energy_e, most_e), _root(seen.energy_c, most_c)
    relative = [_relative(error * scale, x) for error, x in zip(errors, gradients) if x is not None]
    return torch.stack(relative).amax()


def _root(total: Tensor, most: Tensor) -> Tensor:
    """The root of the Bernstein bound of the expectation of a sum of independent terms in [0, most]."""
    half = most * (_CONFIDENCE / 2)
    return half.sqrt() + (total + half).sqrt()


def _relative(error: Tensor, gradient: Tensor) -> Tensor:
    """The error over the least that the exact gradient's norm can be."""
    exact = torch.linalg.vector_norm(gradient, dtype=error.dtype) - error
    return torch.where(exact > 0, error / exact, torch.where(error == 0, 0.0, torch.inf)) + 0 * exact


def _spectral_norm(problem: Problem) -> Tensor:
    """||E||_2 of the tokens that count, at most: the fourth root of ||G^2||_F for G = E^T E."""
    gram = torch.zeros((problem.d, problem.d), dtype=problem.compute_dtype, device=problem.e.device)
    for e, targets in zip(problem.e.split(_ROWS), problem.targets.split(_ROWS)):
        rows = torch.where((targets >= 0)[:, None], e, 0).to(gram.dtype)
        gram.addmm_(rows.T, rows)
    return torch.linalg.vector_norm(gram @ gram) ** 0.25 * (1 + 2.0**-8)  # the products' own error, also in tf32
