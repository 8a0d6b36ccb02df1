"""DTensor arguments and FSDP2: cases of tests/test_parallel.py under gloo and of tests/test_parallel_gpu.py under NCCL,
and what they must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cce_precision import linear_cross_entropy
from cce_precision.analysis.bounds import CPU, Machine
from cce_precision.analysis.bounds_parallel import parallel_bound
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import Quantities, magnitudes, truth
from cce_precision.numerics import unit_roundoff
from tests.parallel_cases import Place, case

# (batch, tokens, D) = (4, 7, 8): neither the vocabulary nor the tokens are multiples of the processes
KNOBS = Knobs(seed=11, n=28, v=50, d=8, batch=4, e_dtype="fp32", bias="fp32", ignored="some", scale=3.0, margin=4.0)
ONE_DIMENSION = {  # placements of e, of c and bias
    "rows": ("R", "S0"),
    "rows, sequence": ("S1", "S0"),
    "rows, batch": ("S0", "S0"),
    "sequence": ("S1", "R"),
    "batch": ("S0", "R"),
    "nothing": ("R", "R"),
}
TWO_DIMENSIONS = {"batch and rows": ("S0 R", "R S0"), "batch and sequence, rows": ("S0 S1", "R S0")}
SQUARES = {2: {"2 x 1": (2, 1), "1 x 2": (1, 2)}, 4: {"2 x 2": (2, 2)}}  # meshes of two dimensions, by processes


def placements_of(world: int) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """By name: a mesh of that many processes, placements of e, and of c and bias."""
    line: dict[str, tuple[tuple[int, ...], str, str]] = {
        name: ((world,), *both) for name, both in ONE_DIMENSION.items()
    }
    for square, shape in SQUARES[world].items():
        line |= {f"{name}, {square}": (shape, *both) for name, both in TWO_DIMENSIONS.items()}
    return line


def _placements(text: str) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if word == "R" else Shard(int(word[1:])) for word in text.split()]


def _mesh(place: Place, shape: Sequence[int]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(place.device).type, tuple(shape))


def _distributed(x: Tensor, mesh: Any, placements: list[Any]) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_()


@case
def placements(place: Place) -> dict[str, dict[str, Tensor]]:
    """Loss, lse and whole gradients of one problem under each kind of placement."""
    ways = placements_of(place.world)
    meshes = {shape: _mesh(place, shape) for shape in dict.fromkeys(shape for shape, _, _ in ways.values())}
    return {name: _under(place, meshes[shape], of_e, of_c) for name, (shape, of_e, of_c) in ways.items()}


@case
def placements_of_pairs(place: Place) -> dict[str, dict[str, Tensor]]:
    """The same on meshes of two processes, two of which compute side by side."""
    from torch.distributed.device_mesh import init_device_mesh

    both = init_device_mesh(torch.device(place.device).type, (2, 2), mesh_dim_names=("pairs", "pair"))
    return {name: _under(place, both["pair"], *way) for name, way in ONE_DIMENSION.items()}


def _under(place: Place, mesh: Any, of_e: str, of_c: str) -> dict[str, Tensor]:
    call = build(KNOBS, device=place.device).there()
    assert call.bias is not None
    e = _distributed(call.e, mesh, _placements(of_e))
    c, bias = (_distributed(x, mesh, _placements(of_c)) for x in (call.c, call.bias))
    loss, lse = linear_cross_entropy(e, c, call.targets, bias, return_lse=True)  # type: ignore[misc]
    loss.backward()
    for x in (e, c, bias):
        assert x.grad.placements == x.placements, (of_e, of_c, x.grad.placements)
    gradients = {"dE": e.grad.full_tensor().reshape(-1, 8), "dC": c.grad.full_tensor()}
    gradients["dbias"] = bias.grad.full_tensor()
    return {"value": loss.detach(), "lse": lse.detach().reshape(-1)} | gradients


FEATURES = dataclasses.replace(
    KNOBS, seed=13, shift=1, label_smoothing=0.1, class_weight=True, use_entropy=True, z_loss=False, reduction="none",
    upstream="random", temperature=0.7, softcap=5.0, nan_ignored=True,
)  # fmt: skip


def features(world: int, kernels: bool) -> dict[str, Knobs]:
    """What `placed_features` runs: under each of some placements one impl. Smoothing under a softcap has a kernel only
    without a filter."""
    impls = ("cce_unbiased", "cce_exact", "cce_split")
    names = ("rows, sequence", "sequence", f"batch and rows, {next(iter(SQUARES[world]))}")
    chosen = {name: dataclasses.replace(FEATURES, impl=impl) for name, impl in zip(names, impls)}
    if kernels:
        chosen[names[0]] = dataclasses.replace(chosen[names[0]], softcap=None)
    return chosen


@case
def placed_features(place: Place) -> dict[str, dict[str, Tensor]]:
    """The same with every option that looks at tokens or columns."""
    results = {}
    for name, knobs in features(place.world, place.device != "cpu").items():
        call = build(knobs, device=place.device).there()
        shape, of_e, of_c = placements_of(place.world)[name]
        mesh = _mesh(place, shape)
        e = _distributed(call.e, mesh, _placements(of_e))
        c, bias = (_distributed(x, mesh, _placements(of_c)) for x in (call.c, call.bias) if x is not None)
        out: Any = linear_cross_entropy(e, c, call.targets, bias, return_argmax=True, **call.options)
        heads = {"loss": out.loss, "lse": out.lse, "entropy": out.entropy}
        gradients = torch.autograd.grad([heads[x] for x in call.grads], (e, c, bias), list(call.grads.values()))
        whole = dict(zip(("dE", "dC", "dbias"), (x.full_tensor() for x in gradients)))
        whole["dE"] = whole["dE"].reshape(-1, call.problem.d)
        results[name] = {x: heads[x].detach() for x in ("lse", "entropy")} | whole | {"argmax": out.argmax}
    return results


def parts(world: int, device: str = "cpu") -> list[Call]:
    """A problem for each process, with one classifier."""
    knobs = [dataclasses.replace(KNOBS, batch=1, n=9, bias=None, seed=20 + rank) for rank in range(world)]
    calls = [build(k, device=device).there() for k in knobs]
    c = calls[0].c
    return [dataclasses.replace(call, c=c, problem=dataclasses.replace(call.problem, c=c)) for call in calls]


class Head(nn.Module):
    """A classifier whose loss is computed inside the module, where fully_shard has gathered the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, e: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(e, self.weight, targets)  # type: ignore[return-value]


SHARDED = ("inside", "outside", "sharded by hand")


@case
def sharded_head(place: Place) -> dict[str, dict[str, Tensor]]:
    """A fully sharded head with other tokens on each process: inside the module, and its weight passed from outside."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    call = parts(place.world, place.device)[place.rank]
    mesh, results = _mesh(place, (place.world,)), {}
    for name in SHARDED:
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

    call = build(KNOBS, device=place.device).there()
    mesh, square = _mesh(place, (place.world,)), _mesh(place, next(iter(SQUARES[place.world].values())))
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


def allowance(call: Call, world: int, machine: Machine = CPU) -> Quantities:
    """Bounds of a problem whose rows and tokens are shared in any way by so many processes.

    Sums of gradients over processes add `world` additions and a division, each a rounding of a partial sum.
    """
    size = -(-call.problem.v // world)
    shares = [(i * size, min((i + 1) * size, call.problem.v)) for i in range(world)]
    allowed = parallel_bound(call.problem, call.plan, shares, call.objective, seed=call.knobs.seed, machine=machine)
    total = magnitudes(call.problem, call.objective)
    u = (world + 2) * unit_roundoff(torch.float32)
    more = {name: getattr(allowed, name) + u * getattr(total, name) for name in ("dE", "dC", "dbias")}
    return dataclasses.replace(allowed, **more)


def judge_placements(stored: list[Any], name: str, machine: Machine = CPU, world: int | None = None) -> None:
    """Raises unless what each process found under one kind of placement is within the bounds, and a zero is not.
    `world`: how many share it; None: all."""
    call = build(KNOBS)
    exact, allowed = truth(call.problem, call.objective), allowance(call, world or len(stored), machine)
    for results in stored:
        for quantity, value in results[name].items():
            most = getattr(allowed, quantity) + getattr(exact.radius, quantity)
            judged = compare(value, getattr(exact, quantity), most)
            assert judged.holds and judged.tells, (quantity, judged)


def judge_features(stored: list[Any], machine: Machine = CPU) -> None:
    """The same of what `placed_features` found."""
    for name, knobs in features(len(stored), machine is not CPU).items():
        call = build(knobs)
        exact, allowed = truth(call.problem, call.objective), allowance(call, len(stored), machine)
        whole: Any = linear_cross_entropy(
            call.e, call.c, call.targets, call.bias, return_argmax=True, **call.options | {"impl": "cce_exact"}
        )
        for results in stored:
            assert torch.equal(results[name]["argmax"], whole.argmax)
            for quantity, value in results[name].items():
                if quantity == "argmax":
                    continue
                true, most = (getattr(x, quantity) for x in (exact, allowed))
                if quantity in ("lse", "entropy"):  # without the tokens that the shift leaves without a place
                    value, true, most = value.reshape(-1), true[call.counted], most[call.counted]
                judged = compare(value, true, most)
                assert judged.holds and judged.tells, (name, quantity, judged)


def judge_sharded_head(stored: list[Any], name: str, machine: Machine = CPU) -> None:
    """The same of a sharded head: its gradient is the mean of the processes' own."""
    calls = parts(len(stored))
    exact = [truth(call.problem, call.objective) for call in calls]
    allowed = [allowance(call, len(stored), machine) for call in calls]
    mean = torch.stack([x.dC for x in exact]).mean(0)
    most = torch.stack([own.dC + x.radius.dC for own, x in zip(allowed, exact)]).mean(0)
    for results, own, x in zip(stored, allowed, exact):
        for quantity in ("value", "dE"):
            judged = compare(results[name][quantity], getattr(x, quantity), getattr(own, quantity))
            assert judged.holds and judged.tells, (quantity, judged)
        judged = compare(results[name]["dC"], mean, most)
        assert judged.holds and judged.tells, judged


UNKNOWN = {
    "c by columns": "c must be Shard(0) or Replicate on each dimension of its mesh",
    "e by features": "e must be Replicate or Shard along a dimension of tokens",
    "partial e": "e must be Replicate or Shard along a dimension of tokens",
    "other mesh": "e must be a DTensor on the mesh of c",
    "plain c": "c must be a DTensor on the mesh of e",
    "plain bias": "bias must be a DTensor placed as c",
    "rows twice": "c must be Shard(0) on one dimension of its mesh",
}


def judge_unknown_placements(stored: list[dict[str, str]]) -> None:
    for messages in stored:
        assert messages.keys() == UNKNOWN.keys()
        for name, text in UNKNOWN.items():
            assert text in messages[name], messages[name]
