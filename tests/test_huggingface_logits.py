"""`LazyLogits`: whatever is done to them before the loss, their values and their loss are those of real logits.

The hidden states and weights are multiples of 1/8, so that every logit is exact and both ways agree to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cce_precision.huggingface.head import Counts, Options, Request, install
from cce_precision.huggingface.logits import LazyLogits, deferred

B, T, D, V = 2, 5, 8, 13
UNIT = 2.0**-24


def lazy_and_real(seed: int = 0, bias: bool = True) -> tuple[LazyLogits, Tensor, nn.Linear, Counts]:
    generator = torch.Generator().manual_seed(seed)
    eighths = lambda *shape: torch.randint(-16, 17, shape, generator=generator) / 8  # noqa: E731
    head = nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(eighths(V, D))
        if bias:
            head.bias.copy_(eighths(V))
    hidden = eighths(B, T, D).requires_grad_()
    real = head(hidden)
    counts = Counts()
    request = Request("Model", head, torch.zeros(B, T, dtype=torch.int64), False, Options(), counts)
    hook = install(head)
    hook.task = deferred(request)
    lazy = head(hidden)
    hook.task, request.open = None, False
    return lazy, real, head, counts


VECTOR = torch.arange(V) / 8 - 1
Operation = Callable[[Any], Any]
# What stays lazy; every one is also given to the real logits.
LAZY: dict[str, Operation] = {
    "float": lambda x: x.float(),
    "double": lambda x: x.to(torch.float64),
    "to": lambda x: x.to(device="cpu", dtype=torch.float32),
    "like": lambda x: x.to(VECTOR),
    "contiguous": lambda x: x.contiguous(),
    "mul": lambda x: x * 0.25,
    "rmul": lambda x: 4 * x,
    "torch.mul": lambda x: torch.mul(x, 0.5),
    "div": lambda x: x / 2,
    "torch.div": lambda x: torch.div(x, 2),
    "tanh": torch.tanh,
    "add": lambda x: x + VECTOR[: x.shape[-1]],
    "radd": lambda x: VECTOR[None, : x.shape[-1]] + x if x.ndim > 1 else x,
    "drop last token": lambda x: x[..., :-1, :] if x.ndim > 1 and x.shape[-2] > 1 else x,
    "some rows": lambda x: x[torch.tensor([0, x.shape[0] - 1])],
    "masked rows": lambda x: x[torch.arange(x.shape[0]) != 1],
    "new axis": lambda x: x[None],
    "first": lambda x: x[0] if x.ndim > 1 else x,
    "columns": lambda x: x[..., : max(x.shape[-1] - 2, 2)],
    "flat": lambda x: x.view(-1, x.size(-1)),
    "split": lambda x: x.reshape(1, *x.shape),
    "flatten": lambda x: x.flatten(0, -2) if x.ndim > 2 else x,
    "transpose": lambda x: x.transpose(0, 1) if x.ndim > 2 else x,
    "squeeze": lambda x: x.squeeze(0) if x.ndim > 1 else x,
}
# What needs values.
EAGER: dict[str, Operation] = {
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(),
    "max": lambda x: torch.max(x, -1).values,
    "minus": lambda x: 1 - x,
    "negative": lambda x: -2.0 * x,
    "square": lambda x: x * x,
    "cat": lambda x: torch.cat([x, x], dim=-1),
    "compare": lambda x: (x > 0) & (x == x),
    "last column": lambda x: x[..., -1],
    "odd columns": lambda x: x[..., 1::2],
    "all in one": lambda x: x.reshape(-1),
    "iteration": lambda x: torch.stack(list(x)),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "argmax": lambda x: x.argmax(dim=-1),
    "half": lambda x: x.half().softmax(-1),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
}


@given(st.lists(st.sampled_from(sorted(LAZY)), max_size=7), st.integers(0, 3), st.booleans())
@settings(max_examples=60)
def test_what_is_done_to_lazy_logits_is_done_to_their_values_and_their_loss(
    names: list[str], seed: int, bias: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lazy, real, head, counts = lazy_and_real(seed, bias)
        for name in names:
            lazy, real = LAZY[name](lazy), LAZY[name](real)
        assert (lazy.shape, lazy.dtype, lazy.ndim) == (real.shape, real.dtype, real.ndim)
        if lazy.ndim >= 2 and type(lazy) is LazyLogits:
            lazy, real = (x.reshape(-1, x.shape[-1]) for x in (lazy, real))
            targets = torch.arange(real.shape[0]) % real.shape[1]
            targets[::3] = -100
            before = counts.fused
            ours = F.cross_entropy(lazy, targets, reduction="sum")
            theirs = F.cross_entropy(real.double(), targets, reduction="sum")
            assert counts.fused - before == (lazy._real is None)
            scale = float(real.detach().abs().max()) + float(theirs.detach()) + 1
            allowed = 8 * UNIT * max(scale, 1) * real.shape[0]
            assert abs(float(ours.detach()) - float(theirs.detach())) <= allowed
            grads = [torch.autograd.grad(x, head.weight, retain_graph=True)[0] for x in (ours, theirs)]
            # exp(z - lse) in fp32: the unit round-off of the largest logit, as a share of the gradient
            assert (grads[0] - grads[1]).norm() <= 8 * UNIT * scale * (grads[1].norm() + real.shape[0] * UNIT)
        values = lazy.clone() if type(lazy) is not LazyLogits else lazy + torch.zeros(())
        assert torch.equal(values, real)


@pytest.mark.parametrize("name", EAGER)
def test_what_needs_values_gets_them_and_is_named(name: str) -> None:
    lazy, real, _, counts = lazy_and_real()
    with pytest.warns(UserWarning, match="something after the model needs the logits of Model"):
        ours = EAGER[name](lazy)
    assert type(ours) is Tensor and torch.equal(ours, EAGER[name](real))
    assert counts.materialised == 1 and counts.fused == 0


def test_changes_in_place_stay() -> None:
    lazy, real, _, _ = lazy_and_real()
    with pytest.warns(UserWarning, match="__setitem__"):
        lazy[..., 0] = -5.0
    real = real.clone()
    real[..., 0] = -5.0
    assert torch.equal(lazy.float(), real)
    targets = torch.zeros(B * T, dtype=torch.int64)
    assert torch.equal(F.cross_entropy(lazy.view(-1, V), targets), F.cross_entropy(real.view(-1, V), targets))


def test_log_probabilities_and_their_loss() -> None:
    lazy, real, _, counts = lazy_and_real()
    targets = torch.arange(B * T) % V
    loss = F.nll_loss(F.log_softmax(lazy.view(-1, V), dim=-1), targets)
    assert counts.fused == 1
    theirs = F.cross_entropy(real.view(-1, V), targets)
    assert abs(loss.item() - theirs.item()) <= 8 * UNIT * float(real.detach().abs().max())
    with pytest.warns(UserWarning, match="needs the logits"):
        assert torch.equal(F.log_softmax(lazy, -1).exp(), F.log_softmax(real, -1).exp())


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"}, {"reduction": "sum", "ignore_index": 3}, {"label_smoothing": 0.1},
        {"weight": torch.arange(V) / 4}, {"weight": torch.arange(V) / 4, "label_smoothing": 0.2, "reduction": "sum"},
    ],
)  # fmt: skip
def test_the_options_of_cross_entropy(options: dict[str, Any]) -> None:
    lazy, real, _, counts = lazy_and_real()
    targets = torch.arange(B * T) % V
    ours = F.cross_entropy(lazy.view(-1, V), targets, **options)
    theirs = F.cross_entropy(real.view(-1, V).double(), targets, **_double(options))
    assert counts.fused == 1 and ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= 16 * UNIT * (theirs.abs() + real.detach().abs().max())).all()


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}


def test_targets_that_are_probabilities_need_the_logits() -> None:
    lazy, real, _, counts = lazy_and_real()
    targets = torch.softmax(real.detach().view(-1, V).flip(-1), -1)
    with pytest.warns(UserWarning, match="cross_entropy"):
        loss = F.cross_entropy(lazy.view(-1, V), targets)
    assert torch.equal(loss, F.cross_entropy(real.view(-1, V), targets)) and counts.fused == 0


def test_asking_what_is_known_computes_nothing() -> None:
    lazy, real, _, counts = lazy_and_real()
    assert lazy.size() == real.size() and lazy.size(-1) == V and lazy.dim() == 3 and lazy.numel() == real.numel()
    assert lazy.requires_grad and lazy.is_floating_point() and "LazyLogits" in repr(lazy)
    assert not hasattr(lazy, "no_such_thing") and not hasattr(lazy, "_fields")
    assert counts.materialised == 0
