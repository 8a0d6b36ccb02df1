"""Trials of an audit: one small call each, as text that makes its inputs, run and compared with the truth.

`Trial.inputs` is what a snippet prints and what the audit executes. `run` gives the loss and the gradients, `findings`
compares them with the fp64 truth and with what a stated arithmetic may be off by.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cce_precision.analysis.audit_targets import Target
from cce_precision.analysis.bounds import CPU, Machine, bound
from cce_precision.analysis.bounds_model import gpu_machine
from cce_precision.analysis.fuzz import compare
from cce_precision.analysis.fuzz_problems import DTYPES
from cce_precision.analysis.references import Objective, Quantities, Truth, truth
from cce_precision.numerics import Variant, unit_roundoff
from cce_precision.problem import Plan, Problem

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["GRADIENTS", "Finding", "Subject", "Trial", "findings", "plainer", "run"]

GRADIENTS = {"dE": "e", "dC": "c", "dbias": "bias"}
IGNORED = -100
PATTERNS = ("gaussian", "exact", "confident", "flat")
TENSORS = ("e", "c", "targets", "bias")
# A statement after which memory that nobody has written holds NaN, in blocks of every size, on a GPU.
STALE = '[torch.full((2**k,), float("nan"), device="cuda") for k in range(24) for _ in range(8)]  # freed at once'


@dataclass(frozen=True)
class Trial:
    """A call. Defaults are the plainest; `plainer` goes towards them."""

    seed: int = 0
    n: int = 64
    v: int = 256
    d: int = 64
    dtype: str = "bf16"
    # gaussian; exact: small integers, whose logits are exact in 16 bits; confident: the target's probability is 1 -
    # complement; flat: all logits 0, targets in the first half of the classes
    pattern: str = "gaussian"
    scale: float = 1.0  # of gaussian logits
    complement: float = 0.5
    offset: float = 0.0  # a common offset of all logits of a token, for `exact`
    stretch: int = 0  # e times 2^stretch, c over it
    bias: bool = False
    softcap: float | None = None
    reduction: str = "mean"
    upstream: float | None = 1.0  # None: another one for each token, for reduction none
    ignored: str = "none"  # none, some, all
    poison: bool = False  # NaN in ignored rows of e
    nan: bool = False  # NaN in the first row of e, which counts
    strided: bool = False
    frozen: str = ""  # e or c: needs no gradient

    def inputs(self, device: str) -> str:
        """Statements that make e, c, targets and bias."""
        n, v, d = self.n, self.v, self.d
        lines = [f"torch.manual_seed({self.seed})"]
        if self.pattern == "gaussian":
            lines += [f"e = torch.randn({n}, {d})", f"c = torch.randn({v}, {d}) * {self.scale / math.sqrt(d):.6g}"]
        elif self.pattern == "exact":
            lines += [f"e = torch.randint(-2, 3, ({n}, {d})).float()", f"c = torch.randint(-2, 3, ({v}, {d})).float()"]
        elif self.pattern == "confident":
            level = math.log((v - 1 or 1) / self.complement)
            lines += [f"e = torch.zeros({n}, {d})", "e[:, 0] = 1", f"c = torch.randn({v}, {d})", "c[:, 0] = 0"]
            lines += [f"c[0, 0] = {level:.6g}  # the target's logit; the others are 0"]
        else:
            lines += [f"e = torch.ones({n}, {d})", f"c = torch.zeros({v}, {d})"]
        if self.offset:
            lines += ["e[:, 0] = 32", f"c[:, 0] = {self.offset / 32:g}"]
        if self.pattern == "flat":
            lines.append(f"targets = torch.arange({n}) % {max(1, v // 2)}")
        elif self.pattern == "confident":
            lines.append(f"targets = torch.zeros({n}, dtype=torch.int64)")
        else:
            lines.append(f"targets = torch.randint({v}, ({n},))")
        if self.ignored != "none":
            lines.append(f"targets[{'::3' if self.ignored == 'some' else ':'}] = {IGNORED}")
        if self.poison:
            lines.append(f'e[targets == {IGNORED}] = float("nan")')
        if self.nan:
            lines.append('e[0] = float("nan")')
        if self.stretch:
            lines.append(f"e, c = e * 2.0**{self.stretch}, c / 2.0**{self.stretch}")
        place = "" if device == "cpu" else f'"{device}", '
        kind = str(DTYPES[self.dtype])
        lines.append(f"e, c = e.to({place}{kind}), c.to({place}{kind})")
        if device != "cpu":
            lines.append(f'targets = targets.to("{device}")')
        if self.bias:
            lines.append(f"bias = torch.randn({v}).to({place}{kind}).requires_grad_()")
        if self.strided:
            lines.append("e, c = (torch.stack((x, x), -1)[..., 0] for x in (e, c))  # strides of 2")
        for name in ("e", "c"):
            if self.frozen != name:
                lines.append(f"{name}.requires_grad_()")
        return "\n".join(lines)

    def options(self) -> dict[str, str]:
        """The call's options, as text."""
        given = {}
        if self.bias:
            given["bias"] = "bias"
        if self.softcap is not None:
            given["softcap"] = f"{self.softcap:g}"
        if self.reduction != "mean":
            given["reduction"] = repr(self.reduction)
        return given

    @property
    def upstream_text(self) -> str:
        """The gradient of the loss; exact in every dtype."""
        if self.upstream is None:
            return "((torch.arange(len(loss)) % 7 - 3) / 4).to(loss)"
        return f"torch.full_like(loss, {self.upstream:g})"

    @property
    def backward_text(self) -> str:
        plain = self.upstream == 1.0 and self.reduction != "none"
        return "loss.backward()" if plain else f"loss.backward({self.upstream_text})"

    @property
    def graded(self) -> tuple[str, ...]:
        """The gradients that are asked for."""
        names = {"dE": self.frozen != "e", "dC": self.frozen != "c", "dbias": self.bias}
        return tuple(name for name, wanted in names.items() if wanted)

    def tensors(self, device: str) -> dict[str, Tensor]:
        space: dict[str, Any] = {"torch": torch}
        exec(_compiled(self.inputs(device)), space)
        return {name: space[name] for name in TENSORS if name in space}

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        special = [
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in changed.items()
            if k not in ("n", "v", "d", "dtype", "seed", "pattern") and v != getattr(Trial, k)
        ]
        return ", ".join([f"N={self.n} V={self.v} D={self.d} {self.dtype} {self.pattern}", *special])


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> Any:
    return compile(text, "<inputs>", "exec")


@dataclass(frozen=True)
class Finding:
    """One number of a trial against what is allowed, in the Frobenius norm; `ratio` > 1 fails."""

    trial: Trial
    quantity: str
    error: float
    allowed: float
    truth: float
    floor: float  # error of the exact result, rounded once to the dtype of what was computed
    ratio: float
    note: str = ""
    assertion: str = ""  # of a snippet, where it is not the comparison with the truth

    @property
    def holds(self) -> bool:
        return self.ratio <= 1

    @property
    def relative(self) -> float:
        return self.error / self.truth if self.truth else self.error


@dataclass(frozen=True)
class Subject:
    """A target on a device."""

    target: Target
    device: str

    @property
    def machine(self) -> Machine:
        if self.device == "cpu":
            return CPU
        return gpu_machine() if self.target.own else gpu_machine().of_others


Outcome = dict[str, Tensor | None]  # "value" and the gradients that were asked for, on the CPU


def run(subject: Subject, trial: Trial, tensors: dict[str, Tensor] | None = None) -> Outcome:
    """The loss and the gradients of a trial; None for a gradient that was asked for and did not come."""
    tensors = trial.tensors(subject.device) if tensors is None else tensors
    loss = subject.target.bind(trial.options())(**tensors)
    loss.backward(eval(trial.upstream_text, {"torch": torch, "loss": loss}))
    grads = {name: tensors[GRADIENTS[name]].grad for name in trial.graded}
    return {"value": loss.detach().cpu()} | {name: None if g is None else g.cpu() for name, g in grads.items()}


def problem(trial: Trial) -> tuple[Problem, Objective]:
    """The trial as the references and the bounds see it, on the CPU."""
    tensors = {name: x.detach() for name, x in trial.tensors("cpu").items()}
    flat = torch.where(tensors["targets"] == IGNORED, -1, tensors["targets"])
    upstream = 1.0 if trial.upstream is None else trial.upstream
    grad_out = (torch.arange(trial.n) % 7 - 3) / 4 if trial.upstream is None else torch.tensor(upstream)
    objective = Objective(trial.reduction, grad_out=grad_out.double())
    return Problem(tensors["e"], tensors["c"], flat, tensors.get("bias"), softcap=trial.softcap), objective


def exact_and_allowed(subject: Subject, trial: Trial, variant: Variant) -> tuple[Truth, Quantities]:
    flat, objective = problem(trial)
    allowed = bound(flat, Plan(variant, trial.softcap), objective, machine=subject.machine)
    return truth(flat, objective), allowed


def finding(
    trial: Trial, name: str, computed: Tensor | None, exact: Tensor, allowed: Tensor, elementwise: bool = False
) -> Finding:
    """One quantity against the truth. `elementwise`: each element within its own bound; else the norms."""
    norm = float(torch.linalg.vector_norm(exact.nan_to_num()))
    if computed is None:
        return Finding(
            trial, name, norm, 0.0, norm, 0.0, math.inf, "the gradient is None", f"assert {_grad(name)} is not None"
        )
    if name == "value":  # a loss that is returned in 16 bits is rounded to them
        allowed = allowed + unit_roundoff(computed.dtype) * exact.abs().nan_to_num()
    c = compare(computed.reshape(exact.shape), exact, allowed)
    floor = float(torch.linalg.vector_norm((exact.to(computed.dtype).double() - exact).nan_to_num()))
    ratio = c.ratio if elementwise else (0.0 if c.error == 0 else c.error / c.bound if c.bound else math.inf)
    return Finding(trial, name, c.error, c.bound, norm, floor, ratio)


def _grad(name: str) -> str:
    return f"{GRADIENTS[name]}.grad"


def findings(
    subject: Subject, trial: Trial, variant: Variant, outcome: Outcome | None = None, elementwise: bool = False
) -> Iterator[Finding]:
    """Every quantity of a trial against the truth, by the bound of `variant`."""
    outcome = run(subject, trial) if outcome is None else outcome
    exact, allowed = exact_and_allowed(subject, trial, variant)
    for name, computed in outcome.items():
        if name == "value" and not bool(exact.value.isfinite().all()):
            continue  # the mean of no token: NaN here, 0 elsewhere
        within = getattr(allowed, name) + getattr(exact.radius, name)
        yield finding(trial, name, computed, getattr(exact, name), within, elementwise)


def plainer(t: Trial) -> SearchStrategy[Trial]:
    """The trials from the plainest to `t`, as a strategy of Hypothesis: each of its options is often that of `t`."""
    from hypothesis import strategies

    def until(size: int) -> SearchStrategy[int]:
        return strategies.integers(1, 9 * size).map(lambda x: min(x, size))

    values: dict[str, tuple[Any, ...]] = {f.name: (f.default, getattr(t, f.name)) for f in dataclasses.fields(Trial)}
    values["pattern"] = ("flat", "exact" if t.pattern == "gaussian" else t.pattern, t.pattern)
    for name in ("dtype", "reduction", "complement", *(["upstream"] if t.reduction == "none" else [])):
        values[name] = (getattr(t, name),)  # stays
    options = {name: strategies.sampled_from([*dict.fromkeys(x), *x[-1:] * 9]) for name, x in values.items()}

    def trial(**options: Any) -> Trial:
        if options["pattern"] != t.pattern:  # without what only that pattern has
            options |= {"scale": Trial.scale, "complement": Trial.complement}
        return Trial(**options)

    return strategies.builds(trial, **options | {"n": until(t.n), "v": until(t.v), "d": until(t.d)})
