"""The oracle of random problems: |out - truth| <= bound + radius, and no further tolerance.

`judge` runs the call that some knobs describe and compares every output and gradient with the truth. Which arithmetic
the bound assumes follows from what runs: the eager passes, or the kernels on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cce_precision import compute_z_loss, kernels, linear_cross_entropy
from cce_precision.analysis.bounds import CPU, INTERPRETER, Machine, bound
from cce_precision.analysis.bounds_model import gpu_machine
from cce_precision.analysis.fuzz_problems import Call, Knobs, build
from cce_precision.analysis.references import Quantities, Truth, truth
from cce_precision.autograd import choose_backend
from cce_precision.numerics import unit_roundoff
from cce_precision.problem import Problem

__all__ = [
    "QUANTITIES",
    "Comparison",
    "Verdict",
    "compare",
    "judge",
    "judge_outputs",
    "machine_of",
    "outputs",
    "promised",
    "sparse_way",
]

BALLS = 2**12  # products up to which a call in fp64 is judged by ball arithmetic
QUANTITIES = ("value", "lse", "entropy", "dE", "dC", "dbias")


@dataclass(frozen=True)
class Comparison:
    """One quantity of one call against the truth."""

    ratio: float  # largest error / (bound + radius) of an element: at most 1, or the bound is wrong
    error: float  # Frobenius norm
    bound: float  # Frobenius norm of bound + radius
    truth: float  # Frobenius norm
    worst: tuple[int, ...]  # index of the largest ratio

    @property
    def holds(self) -> bool:
        return self.ratio <= 1

    @property
    def tells(self) -> bool:
        """Whether a zero in place of the quantity would be rejected in the norm."""
        return self.bound < self.truth


@dataclass(frozen=True)
class Verdict:
    knobs: Knobs
    quantities: dict[str, Comparison]

    @property
    def holds(self) -> bool:
        return all(q.holds for q in self.quantities.values())

    def __str__(self) -> str:
        lines = [
            f"{name}: largest error / bound {q.ratio:.3g} at {q.worst}; norms of error, bound and truth "
            f"{q.error:.3g}, {q.bound:.3g}, {q.truth:.3g}"
            for name, q in self.quantities.items()
        ]
        return "\n".join((self.knobs.to_json(), *lines))


def norm(x: Tensor) -> float:
    """Frobenius norm in fp64, without NaN."""
    return float(torch.linalg.vector_norm(x.double().nan_to_num()))


def compare(computed: Tensor, exact: Tensor, allowed: Tensor) -> Comparison:
    """Error against allowance, elementwise. Equal infinities and NaN against NaN are exact; inf allows anything."""
    computed, exact = computed.detach().double(), exact.double()
    same = (computed == exact) | (computed.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (computed - exact).abs()).nan_to_num(nan=math.inf)
    ratio = torch.where(error == 0, 0.0, torch.where(allowed.isinf(), 0.0, error / allowed))
    bounded = math.inf if bool(allowed.isinf().any()) else norm(allowed)
    if not ratio.numel():
        return Comparison(0.0, 0.0, 0.0, 0.0, ())
    worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    return Comparison(float(ratio.max()), norm(error), bounded, norm(exact), worst)


def outputs(call: Call) -> dict[str, Tensor]:
    """Runs the call where it belongs: the value of its objective, lse and entropy (flat, 0 where without a place), the
    gradients; all on the CPU.
    """
    there = call.there()
    leaves = [x.detach().requires_grad_() for x in (there.e, there.c, there.bias) if x is not None]
    bias = leaves[2] if call.bias is not None else None
    result: Any = linear_cross_entropy(leaves[0], leaves[1], there.targets, bias, **there.options)
    if call.knobs.one_pass:
        result = (result,)
    heads: dict[str, Tensor] = dict(zip(("loss", "lse"), result))
    if call.knobs.use_entropy:
        heads["entropy"] = result[2]
    if "z_loss" in call.grads:
        k = call.knobs
        heads["z_loss"] = compute_z_loss(heads["lse"], there.targets, k.shift, k.ignore_index, k.reduction)
    gradients = torch.autograd.grad([heads[name] for name in there.grads], leaves, list(there.grads.values()))
    heads = {name: head.detach().cpu() for name, head in heads.items()}
    flat = {name: _flat(call, head) for name, head in heads.items() if name in ("lse", "entropy")}
    named = {name: g.cpu() for name, g in zip(("dE", "dC", "dbias"), gradients, strict=False)}
    named["dE"] = named["dE"].reshape(-1, call.problem.d)
    return {"value": _value(call, heads, flat), **flat, **named}


def _flat(call: Call, head: Tensor) -> Tensor:
    """An unreduced output as (N,), with 0 for the tokens that a shift leaves without a place."""
    full = torch.zeros(call.problem.n, dtype=head.dtype)
    full[call.counted] = head.detach().reshape(-1)
    return full


def _value(call: Call, heads: dict[str, Tensor], flat: dict[str, Tensor]) -> Tensor:
    """The objective from the call's outputs; what the call itself does not add up is added in fp64."""
    o, n = call.objective, call.problem.n
    rows = torch.arange(n)
    extra = sum((o.per_token(name, rows) * flat[name].double() for name in flat), torch.zeros(n, dtype=torch.float64))
    valid = call.problem.targets >= 0
    extra = torch.where(valid, extra, 0.0)
    total = _flat(call, heads["loss"]).double() if o.reduction == "none" else heads["loss"].detach().double()
    if "z_loss" in heads:
        z = heads["z_loss"]
        total = (
            total + o.per_token("z_loss", rows[:1]) * (_flat(call, z) if o.reduction == "none" else z.detach()).double()
        )
    if o.reduction == "none":
        return total + extra
    weight = o.column_weight(call.problem, extra.device)[call.problem.targets[valid]]
    count = 1.0 if o.reduction == "sum" else weight.sum() if o.class_weight is not None else valid.sum()
    return total.reshape(()) + (extra.sum() / count if bool(extra.any()) else 0.0)


def machine_of(call: Call) -> Machine:
    """The arithmetic of what runs the call. Raises ValueError for plain PyTorch on a GPU, for which no bound stands."""
    kernels = choose_backend(call.placed(), call.plan) == "triton"
    if torch.device(call.device).type == "cpu":
        return INTERPRETER if kernels else CPU
    if not kernels:
        raise ValueError(f"plain PyTorch runs {call.knobs.to_json()} on {call.device}, where its errors have no bound")
    return gpu_machine(call.device)


def _watched(module: ModuleType, name: str, note: Callable[[Any], None]) -> contextlib.AbstractContextManager[Any]:
    """A function of a module while `note` is told what it returns."""
    function = getattr(module, name)

    def watched(*arguments: Any) -> Any:
        result = function(*arguments)
        note(result)
        return result

    return mock.patch.object(module, name, watched)


@contextlib.contextmanager
def sparse_way(call: Call) -> Iterator[list[Tensor]]:
    """Collects, for each backward pass over lists of entries, whether they were too many (0-dim, not 0): then its
    gradient is the exact one. Shortens the lists of a crowded call.
    """
    taken: list[Tensor] = []
    problem = call.placed()
    with contextlib.ExitStack() as stack:
        if choose_backend(problem, call.plan) == "triton" and kernels.capacity(problem, call.plan) is not None:
            from cce_precision.kernels import filtered

            capacities = filtered.capacities

            def short(n: int, blocks: int, size: int) -> tuple[int, int]:
                """Room for one hit, unless that is all that there can be."""
                return (1, 1) if n * blocks > 1 else capacities(n, blocks, size)

            stack.enter_context(_watched(filtered, "entries_of", lambda entries: taken.append(entries.dense)))
            if call.knobs.crowded:
                stack.enter_context(mock.patch.object(filtered, "capacities", short))
        yield taken


@contextlib.contextmanager
def visits(call: Call) -> Iterator[list[Tensor]]:
    """Collects the orders in which kernels visit the columns, (V,) int64."""
    taken: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if call.plan.variant.sort_vocabulary and choose_backend(call.placed(), call.plan) == "triton":
            from cce_precision.kernels import dense, subsets

            note = lambda order: taken.extend(() if order is None else (order,))  # noqa: E731
            for module in (dense, subsets):
                stack.enter_context(_watched(module, "visiting_order", note))
        yield taken


def explained(problem: Problem, orders: list[Tensor]) -> Tensor | None:
    """The order that was taken, if it is by falling mean logit but for what rounding can do to those in fp32: a sum
    over the tokens, one quotient, a sum over the features and the bias, each term rounded at most N + D + 3 times.
    """
    if not orders:
        return None
    order = orders[-1].cpu()
    e, c = problem.e[problem.targets >= 0].double(), problem.c.double()
    mean, largest = (e.mean(0), e.abs().mean(0)) if len(e) else (c.new_zeros(problem.d), c.new_zeros(problem.d))
    key, size = c @ mean, c.abs() @ largest
    if problem.bias is not None:
        key, size = key + problem.bias.double(), size + problem.bias.double().abs()
    slack = (sum(problem.e.shape) + 3) * unit_roundoff(torch.float32) * size
    rises = (key[order][1:] - key[order][:-1]).nan_to_num(nan=0.0)  # of two masked columns
    falls = bool((rises <= slack[order][1:] + slack[order][:-1]).all())
    return order if falls and torch.equal(order.sort().values, torch.arange(problem.v)) else None


def judge(
    k: Knobs,
    method: str | None = None,
    machine: Machine | None = None,
    *,
    backend: str = "auto",
    device: str = "cpu",
) -> Verdict:
    """Runs the call and compares what it gives with the truth, by the bound for `machine` (None: what runs it).

    The bound is that of the way that a pass over lists of entries really took: of its filter, or of the exact gradient;
    where a tolerance decided, of either, and the tolerance must hold (`promised`).
    `method` of the truth; None: fp64, but balls for small calls in fp64, whose errors an fp64 truth would share.
    """
    call = build(k, backend, device)
    if method is None:
        small = call.problem.n * call.problem.v * call.problem.d <= BALLS
        method = "balls" if small and call.problem.compute_dtype is torch.float64 else "fp64"
    machine = machine_of(call) if machine is None else machine
    exact = truth(call.problem, call.objective, method)
    with sparse_way(call) as full, visits(call) as orders:
        computed = outputs(call)
    order = explained(call.problem, orders)
    unfiltered = dataclasses.replace(call.plan, variant=call.plan.variant.exact())
    if any(bool(x) for x in full):
        ways = [unfiltered]
    elif call.knobs.tolerance is None:
        ways = [call.plan]
    else:  # the pass took one or the other and does not say which
        ways = [call.plan, unfiltered]
    seed = call.knobs.seed
    allowed = [bound(call.problem, way, call.objective, seed=seed, machine=machine, order=order) for way in ways]
    verdicts = [judge_outputs(call, computed, exact, one) for one in allowed]
    verdict = next((one for one in verdicts if one.holds), verdicts[0])
    return verdict if call.knobs.tolerance is None else promised(verdict, exact, allowed[-1])


def promised(verdict: Verdict, exact: Truth, allowed: Quantities) -> Verdict:
    """The verdict on a call with a tolerance: the errors of dE and dC, beyond what the exact pass is `allowed`, are
    within it in the norm. What is promised of draws may fail once in 10^6.
    """
    tolerance = verdict.knobs.tolerance
    assert tolerance is not None
    found = dict(verdict.quantities)
    for name in ("dE", "dC"):
        one, rest = found[name], getattr(allowed, name) + getattr(exact.radius, name)
        if one.error and not bool(rest.isinf().any()):
            most = tolerance * (one.truth + one.error) + norm(rest)
            found[name] = dataclasses.replace(one, ratio=max(one.ratio, one.error / most))
    return Verdict(verdict.knobs, found)


def judge_outputs(call: Call, computed: dict[str, Tensor], exact: Truth, allowed: Quantities) -> Verdict:
    """The verdict on outputs of the call, whoever computed them."""
    comparisons = {}
    for name, value in computed.items():
        radius = getattr(exact.radius, name)
        comparisons[name] = compare(value, getattr(exact, name), getattr(allowed, name) + radius)
    return Verdict(call.knobs, comparisons)
