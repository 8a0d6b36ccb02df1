"""DTensor arguments and FSDP2 under gloo: cases of tests/test_parallel.py, and what they must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds_parallel import parallel_bound
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import Quantities, magnitudes, truth
from cce_precision.numerics import unit_roundoff
from tests.parallel_cases import WORLD, Place, case

# (batch, tokens, D) = (4, 7, 8): neither the vocabulary nor the tokens are multiples of the processes
KNOBS = Knobs(seed=11, n=28, v=50, d=8, batch=4, e_dtype="fp32", bias="fp32", ignored="some", scale=3.0, margin=4.0)
PLACEMENTS = {  # mesh, placements of e, of c and bias
    "rows": ((WORLD,), "R", "S0"),
    "rows, sequence": ((WORLD,), "S1", "S0"),
    "rows, batch": ((WORLD,), "S0", "S0"),
    "sequence": ((WORLD,), "S1", "R"),
    "batch": ((WORLD,), "S0", "R"),
    "nothing": ((WORLD,), "R", "R"),
    "batch and rows": ((2, 2), "S0 R", "R S0"),
    "batch and sequence, rows": ((2, 2), "S0 S1", "R S0"),
}


def _placements(text: str) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if word == "R" else Shard(int(word[1:])) for word in text.split()]


def _mesh(shape: Sequence[int]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(shape))


def _distributed(x: Tensor, mesh: Any, placements: list[Any]) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_()


@case
def placements(place: Place) -> dict[str, dict[str, Tensor]]:
    """Loss, lse and whole gradients of one problem under each kind of placement."""
    call, results = build(KNOBS), {}
    meshes = {shape: _mesh(shape) for shape in {shape for shape, _, _ in PLACEMENTS.values()}}
    for name, (shape, of_e, of_c) in PLACEMENTS.items():
        mesh = meshes[shape]
        assert call.bias is not None
        e = _distributed(call.e, mesh, _placements(of_e))
        c, bias = (_distributed(x, mesh, _placements(of_c)) for x in (call.c, call.bias))
        loss, lse = linear_cross_entropy(e, c, call.targets, bias, return_lse=True)  # type: ignore[misc]
        loss.backward()
        for x in (e, c, bias):
            assert x.grad.placements == x.placements, (name, x.grad.placements)
        gradients = {"dE": e.grad.full_tensor().reshape(-1, 8), "dC": c.grad.full_tensor()}
        gradients["dbias"] = bias.grad.full_tensor()
        results[name] = {"value": loss.detach(), "lse": lse.detach().reshape(-1)} | gradients
    return results


FEATURES = dataclasses.replace(
    KNOBS, seed=13, shift=1, label_smoothing=0.1, class_weight=True, use_entropy=True, z_loss=False, reduction="none",
    upstream="random", temperature=0.7, softcap=5.0, nan_ignored=True,
)  # fmt: skip


@case
def placed_features(place: Place) -> dict[str, dict[str, Tensor]]:
    """The same with every option that looks at tokens or columns, one impl each."""
    results = {}
    for name, impl in zip(("rows, sequence", "sequence", "batch and rows"), ("cce_unbiased", "cce_exact", "cce_split")):
        call = build(dataclasses.replace(FEATURES, impl=impl))
        shape, of_e, of_c = PLACEMENTS[name]
        mesh = _mesh(shape)
        e = _distributed(call.e, mesh, _placements(of_e))
        c, bias = (_distributed(x, mesh, _placements(of_c)) for x in (call.c, call.bias) if x is not None)
        out: Any = linear_cross_entropy(e, c, call.targets, bias, return_argmax=True, **call.options)
        heads = {"loss": out.loss, "lse": out.lse, "entropy": out.entropy}
        gradients = torch.autograd.grad([heads[x] for x in call.grads], (e, c, bias), list(call.grads.values()))
        whole = dict(zip(("dE", "dC", "dbias"), (x.full_tensor() for x in gradients)))
        whole["dE"] = whole["dE"].reshape(-1, call.problem.d)
        results[name] = {x: heads[x].detach() for x in ("lse", "entropy")} | whole | {"argmax": out.argmax}
    return results


def parts() -> list[Call]:
    """A problem for each process, with one classifier."""
    calls = [build(dataclasses.replace(KNOBS, batch=1, n=9, bias=None, seed=20 + rank)) for rank in range(WORLD)]
    c = calls[0].c
    return [dataclasses.replace(call, c=c, problem=dataclasses.replace(call.problem, c=c)) for call in calls]


class Head(nn.Module):
    """A classifier whose loss is computed inside the module, where fully_shard has gathered the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, e: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(e, self.weight, targets)  # type: ignore[return-value]


@case
def sharded_head(place: Place) -> dict[str, dict[str, Tensor]]:
    """A fully sharded head with other tokens on each process: inside the module, and its weight passed from outside."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    call = parts()[place.rank]
    mesh, results = _mesh((WORLD,)), {}
    for name in ("inside", "outside", "sharded by hand"):
        e = call.e.detach().requires_grad_()
        head = Head(call.c)
        if name == "sharded by hand":
            head.weight = nn.Parameter(_distributed(call.c, mesh, [Shard(0)]))
        else:
            fully_shard(head, mesh=mesh)
        loss: Any = head(e, call.targets) if name == "inside" else linear_cross_entropy(e, head.weight, call.targets)
        loss.backward()
        gradient: Any = head.weight.grad
        assert gradient.placements == head.weight.placements == (Shard(0),)  # type: ignore[attr-defined]
        assert e.grad is not None
        results[name] = {"value": loss.detach(), "dE": e.grad, "dC": gradient.full_tensor()}
    return results


@case
def unknown_placements(place: Place) -> dict[str, str]:
    """The messages of placements without a meaning."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    call, mesh, square = build(KNOBS), _mesh((WORLD,)), _mesh((2, 2))
    whole = lambda x, mesh=mesh: _distributed(x, mesh, [Replicate()] * mesh.ndim)  # noqa: E731
    e, c, bias = call.e, call.c, call.bias
    assert bias is not None
    partial = DTensor.from_local(e, mesh, [Partial()])
    tries = {
        "c by columns": (whole(e), _distributed(c, mesh, [Shard(1)]), None),
        "e by features": (_distributed(e, mesh, [Shard(2)]), whole(c), None),
        "partial e": (partial, whole(c), None),
        "other mesh": (whole(e, square), whole(c), None),
        "plain c": (_distributed(e, mesh, [Shard(0)]), c, None),
        "plain bias": (whole(e), _distributed(c, mesh, [Shard(0)]), bias),
        "rows twice": (whole(e, square), _distributed(c, square, [Shard(0), Shard(0)]), None),
    }
    messages = {}
    for name, arguments in tries.items():
        try:
            linear_cross_entropy(arguments[0], arguments[1], call.targets, arguments[2])
        except ValueError as error:
            messages[name] = str(error)
    return messages


# -- what they must give -----------------------------------------------------------------------------------------------


def allowance(call: Call) -> Quantities:
    """Bounds of a problem whose rows and tokens are shared in any way by WORLD processes.

    Sums of gradients over processes add WORLD additions and a division, each a rounding of a partial sum.
    """
    size = -(-call.problem.v // WORLD)
    shares = [(i * size, min((i + 1) * size, call.problem.v)) for i in range(WORLD)]
    allowed = parallel_bound(call.problem, call.plan, shares, call.objective)
    total = magnitudes(call.problem, call.objective)
    u = (WORLD + 2) * unit_roundoff(torch.float32)
    more = {name: getattr(allowed, name) + u * getattr(total, name) for name in ("dE", "dC", "dbias")}
    return dataclasses.replace(allowed, **more)


def mean_of_parts() -> tuple[Tensor, Tensor]:
    """The exact mean of the processes' gradients of the classifier, and how far a computed one may be."""
    exact, allowed = [], []
    for call in parts():
        t = truth(call.problem, call.objective)
        exact.append(t.dC)
        allowed.append(allowance(call).dC + t.radius.dC)
    return torch.stack(exact).mean(0), torch.stack(allowed).mean(0)
