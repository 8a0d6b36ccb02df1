"""`torch.compile(dynamic=True)`: scalars of a call that Dynamo takes for symbols, in one graph and to the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cce_precision import linear_cross_entropy

V, D = 33, 8
SCALARS = ((0.7, None, 0.0), (0.8, 3.0, 0.1), (0.9, 4.0, 0.2))  # temperature, softcap, label smoothing


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("impl", "dynamic"), [("cce_exact", True), ("cce_unbiased", None), ("baseline", True)])
def test_scalars_may_change_between_calls(impl: str, dynamic: bool | None) -> None:
    def loss_of(
        e: Tensor, c: Tensor, targets: Tensor, temperature: float, softcap: float | None, smoothing: float
    ) -> Tensor:
        loss = linear_cross_entropy(
            e, c, targets, impl=impl, temperature=temperature, softcap=softcap, label_smoothing=smoothing, seed=3
        )
        assert isinstance(loss, Tensor)
        return loss

    compiled = torch.compile(loss_of, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    c = torch.randn(V, D)
    for n, scalars in enumerate(SCALARS, 5):
        e, targets = torch.randn(n, D), torch.randint(V, (n,))
        results = []
        for function in (loss_of, compiled):
            leaf = e.clone().requires_grad_()
            loss = function(leaf, c, targets, *scalars)
            loss.backward()
            assert leaf.grad is not None and leaf.grad.any()
            results.append((loss.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results)), scalars
