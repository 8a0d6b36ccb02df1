"""The passes as Triton kernels."""

from __future__ import annotations

from torch import Tensor

from ..problem import Heads, Plan, Problem, Upstream

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem, plan: Plan) -> str | None:
    """None if the kernels can run this call, else the reason why not."""
    return "the Triton kernels are not part of this version"


def forward(problem: Problem, plan: Plan) -> Heads:
    raise NotImplementedError(supports(problem, plan))


def backward(
    problem: Problem, plan: Plan, heads: Heads, upstream: Upstream, need: tuple[bool, bool, bool], seed: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    raise NotImplementedError(supports(problem, plan))
