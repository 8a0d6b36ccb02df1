"""A failure as a program of a few lines, in plain PyTorch: inputs, call, exact result, assertion."""

from __future__ import annotations

from typing import NamedTuple

from cce_precision.analysis.audit_trials import GRADIENTS, IGNORED, STALE, Finding, Subject, Trial

__all__ = ["Form", "held", "related", "snippet"]


class Form(NamedTuple):
    """How a check calls the target, where it is not plainly: the texts of the call and of the backward pass."""

    compiled: bool = False  # under torch.compile
    backward: str = ""  # instead of the trial's own

    def call(self, text: str, trial: Trial, device: str) -> str:
        """The call of text `text`."""
        if not self.compiled:
            return text
        names = ", ".join(("e", "c", "targets", "bias") if trial.bias else ("e", "c", "targets"))
        backend = ', backend="aot_eager"' if device == "cpu" else ""
        return f"torch.compile(lambda {names}: {text}{backend})({names})"


def snippet(
    subject: Subject,
    trial: Trial,
    said: str,
    found: Finding | None = None,
    raising: bool = False,
    form: Form = Form(),
) -> str:
    """A program that fails as the audit says: with AssertionError, or where `raising`, as the call raises."""
    target = subject.target
    head = [f"# {target.name} ({target.package} {target.version}): {said}".replace("\n", " ")]
    head += ["import torch", target.setup, ""]
    call = form.call(target.text(trial.options()), trial, subject.device)
    stale = [STALE] if form.compiled and subject.device != "cpu" else []
    body = [trial.inputs(subject.device), *stale, "", f"loss = {call}", form.backward or trial.backward_text]
    if raising or found is None:
        return "\n".join(head + body) + "\n"
    if found.assertion:
        check = [found.assertion]
    elif found.quantity == "value" or found.quantity in GRADIENTS:
        check = ["", *_exact(trial, found.quantity), *_assertion(found)]
    else:  # a mutant has no program
        return ""
    return "\n".join(head + body + check) + "\n"


# What other calls give, and what the loss and each gradient must be by them.
_RELATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "negated": ("other = again(-e, -c, targets)", {"value": "other[0]", "dE": "-other[1]", "dC": "-other[2]"}),
    "in two parts": (
        "first, second = again(e[:{cut}], c, targets[:{cut}]), again(e[{cut}:], c, targets[{cut}:])",
        {"value": "first[0] + second[0]", "dE": "torch.cat((first[1], second[1]))", "dC": "first[2] + second[2]"},
    ),
    "classes in another order": (
        "order = torch.randperm({v}, generator=torch.Generator().manual_seed(1)).to(c.device)\n"
        "other = again(e, c[order], torch.argsort(order)[targets])",
        {"value": "other[0]", "dE": "other[1]"},
    ),
}


def related(subject: Subject, trial: Trial, name: str, quantity: str, allowed: float) -> str:
    """The assertion of a relation between calls, as `audit_checks.relations` names it, for `Finding.assertion`."""
    mine = {"value": "loss.detach()", "dE": "e.grad", "dC": "c.grad"}[quantity] + ".double()"
    calls, exact = _RELATIONS[name]
    return f"""

def again(e, c, targets):
    e, c = (x.detach().clone().requires_grad_() for x in (e, c))
    loss = {subject.target.text(trial.options())}
    {trial.backward_text}
    return loss.detach().double(), e.grad.double(), c.grad.double()


{calls.format(cut=trial.n // 2, v=trial.v)}
error = ({mine} - ({exact[quantity]})).norm()
print(f"apart by {{error:.3g}}; two careful calls stay below {allowed:.3g}")
assert error <= {allowed:.3g}"""


def held(subject: Subject, trial: Trial, most: float) -> str:
    """The assertion of a second call that it holds at most so many MiB beyond the gradients, for `Finding.assertion`;
    on a GPU.
    """
    return f"""e.grad = c.grad = loss = None
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
loss = {subject.target.text(trial.options())}
{trial.backward_text}
peak = torch.cuda.max_memory_allocated() - before - e.grad.nbytes - c.grad.nbytes
print(f"{{peak / 2**20:.1f}} MiB beyond the gradients; the logits take {most:g}")
assert peak <= {most:g} * 2**20"""


def _exact(trial: Trial, quantity: str) -> list[str]:
    """The loss and the gradients in fp64."""
    names = ("e", "c", "bias") if trial.bias else ("e", "c")
    lines = [
        f"{', '.join(f'{n}64' for n in names)} = (x.detach().double().requires_grad_() for x in ({', '.join(names)}))"
    ]
    e, targets = "e64", "targets"
    if trial.ignored != "none" or trial.poison:
        lines.append(f"keep = targets != {IGNORED}")
        e, targets = "e64[keep]", "targets[keep]"
    if trial.nan:
        lines.append("e64.data[0] = 0  # dE of the other rows does not depend on it")
    lines.append(f"z = {e} @ c64.T" + (" + bias64" if trial.bias else ""))
    if trial.softcap is not None:
        lines.append(f"z = {trial.softcap:g} * torch.tanh(z / {trial.softcap:g})")
    reduction = "sum" if trial.ignored == "all" else trial.reduction
    lines.append(f'exact = torch.nn.functional.cross_entropy(z, {targets}, reduction="{reduction}")')
    if trial.reduction == "none" and trial.ignored != "none":
        lines.append("exact = torch.zeros_like(loss, dtype=torch.float64).masked_scatter(keep, exact)")
    if quantity != "value":
        plain = trial.upstream == 1.0 and trial.reduction != "none"
        lines.append("exact.backward()" if plain else f"exact.backward({trial.upstream_text}.double())")
    return lines


def _assertion(found: Finding) -> list[str]:
    if found.quantity == "value":
        pair = ("loss.detach().double()", "exact.detach()")
    else:
        name = GRADIENTS[found.quantity]
        pair = (f"{name}.grad.double()", f"{name}64.grad")
    allowed = f"{found.allowed:.3g}"
    return [
        f"error = ({pair[0]} - {pair[1]}).norm()",
        f'print(f"error {{error:.3g}} of {{{pair[1]}.norm():.3g}}; a careful implementation stays below {allowed}")',
        f"assert error <= {allowed}",
    ]
