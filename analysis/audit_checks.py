"""The checks of an audit: what each asks, on which trials, and how it measures.

A finding is a number against what is allowed. Where a target has a variant's promise (one of ours, or a package that
implements a published one), what exceeds a check's allowance but stays within the bound of that variant is a limit of
the method, not a defect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cce_precision.analysis.audit_snippets import Form, held, related
from cce_precision.analysis.audit_targets import CAREFUL, Target
from cce_precision.analysis.audit_trials import (
    GRADIENTS,
    STALE,
    Finding,
    Outcome,
    Subject,
    Trial,
    exact_and_allowed,
    finding,
    findings,
    run,
)
from cce_precision.analysis.bench_job import MIB, allocated
from cce_precision.analysis.fuzz_problems import DTYPES
from cce_precision.numerics import unit_roundoff

__all__ = ["ALLOWANCES", "CHECKS", "Check", "NotOffered", "missing"]

ALLOWANCES = {
    "careful": "fp32 logits, 1 - P of the target in complement form, dZ rounded once to the input dtype, sums in fp32, "
    "each output rounded once: the rigorous bound of such a call",
    "promise": "the rigorous bound of the variant that the target promises; for one that promises none, of logits "
    "stored in the input dtype (F.cross_entropy on e c^T), as PyTorch users write it",
    "same": "the same bits",
    "logits": "the memory of the logits in the input dtype",
}


REPEATS = 20  # of a call in a snippet: two of them may agree by chance


class NotOffered(Exception):
    """The target cannot do what a check asks; the message says why."""


Measure = Callable[[Subject, Trial], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    name: str
    question: str
    allowance: str  # a key of ALLOWANCES
    trials: tuple[Trial, ...]
    measure: Measure
    limit: str = ""  # what a finding above the allowance means, where it is a known cost and no defect
    minimal: bool = True  # whether its failures can be made small
    form: Form = Form()  # of its snippets


# Measures.


def _excused(subject: Subject, trial: Trial, found: list[Finding], outcome: Outcome) -> Iterator[Finding]:
    """Findings above the allowance marked where the bound of the promised variant covers them."""
    if subject.target.promise is None or all(f.holds for f in found):
        yield from found
        return
    own = {f.quantity: f for f in findings(subject, trial, subject.target.variant, outcome, subject.target.own)}
    for f in found:
        excused = not f.holds and f.quantity in own and own[f.quantity].holds
        yield dataclasses.replace(f, note=f"within the bound of {subject.target.promise}") if excused else f


def careful(subject: Subject, trial: Trial) -> Iterator[Finding]:
    outcome = run(subject, trial)
    yield from _excused(subject, trial, list(findings(subject, trial, CAREFUL, outcome)), outcome)


def promised(subject: Subject, trial: Trial) -> Iterator[Finding]:
    yield from findings(subject, trial, subject.target.variant, elementwise=subject.target.own)


def meant(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """As `promised`, but a loss may be off by 16 roundings to its dtype: how exact it is, other checks ask."""
    outcome = run(subject, trial)
    value = outcome["value"]
    for f in findings(subject, trial, subject.target.variant, outcome, subject.target.own):
        if f.quantity == "value" and value is not None and not f.holds:
            allowed = f.allowed + 16 * unit_roundoff(value.dtype) * f.truth
            f = dataclasses.replace(f, allowed=allowed, ratio=f.error / allowed if allowed else f.ratio)
        yield f


def _equal(trial: Trial, first: Outcome, second: Outcome, again: str) -> Iterator[Finding]:
    """Every quantity of two outcomes, bit by bit; `again` is the text that computes the second gradients."""
    for name, a in first.items():
        b = second[name]
        if a is None or b is None:
            yield Finding(trial, name, math.inf, 0.0, 0.0, 0.0, math.inf, "the gradient is None")
            continue
        same = torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        error = 0.0 if same else float(torch.linalg.vector_norm(a.double() - b.double()))
        size = float(torch.linalg.vector_norm(a.double()))
        checked = "loss" if name == "value" else f"{GRADIENTS[name]}.grad"
        lines = [f"first = {checked}.detach().clone()", f"for _ in range({REPEATS}):", "    e.grad = c.grad = None"]
        lines += [f"    {line}" for line in (*again.splitlines(), f"second = {checked}.detach()")]
        lines.append('    assert torch.equal(first, second), f"they differ by {(first - second).abs().max():.2e}"')
        yield Finding(trial, name, error, 0.0, size, 0.0, 0.0 if same else math.inf, assertion="\n".join(lines))


def repeated(subject: Subject, trial: Trial) -> Iterator[Finding]:
    first = run(subject, trial)
    if subject.device != "cpu":
        exec(STALE, {"torch": torch})
    again = f"loss = {subject.target.text(trial.options())}\n{trial.backward_text}"
    for _ in range(3):
        yield from _equal(trial, first, run(subject, trial), again)


def second_backward(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """The gradients of a second backward pass through the same graph."""
    tensors = trial.tensors(subject.device)
    loss = subject.target.bind(trial.options())(**tensors)
    upstream = torch.ones_like(loss)
    outcomes = []
    for last in (False, True):
        try:
            loss.backward(upstream, retain_graph=not last)
        except RuntimeError as error:
            if last:
                raise NotOffered(f"the second backward pass raises: {_first_line(error)}") from None
            raise
        grads = {name: tensors[GRADIENTS[name]].grad for name in trial.graded}
        outcomes.append({name: None if g is None else g.cpu() for name, g in grads.items()})
        for name in trial.graded:
            tensors[GRADIENTS[name]].grad = None
    call = f"loss = {subject.target.text(trial.options())}"
    again = f"{call}\nloss.backward(retain_graph=True)\ne.grad = c.grad = None\nloss.backward()"
    yield from _equal(trial, outcomes[0], outcomes[1], again)


def contained(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """The gradients of all rows of e but the first, which holds NaN."""
    outcome, clean = run(subject, trial), dataclasses.replace(trial, nan=False)
    exact, allowed = exact_and_allowed(subject, clean, subject.target.variant)
    got = outcome["dE"]
    f = finding(trial, "dE", None if got is None else got[1:], exact.dE[1:], (allowed.dE + exact.radius.dE)[1:])
    yield dataclasses.replace(f, assertion='assert e.grad[1:].isfinite().all(), "NaN has spread to other tokens"')


def compiled(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """The call under torch.compile, in one graph if it can be."""
    backend = "aot_eager" if subject.device == "cpu" else "inductor"
    target, note = subject.target, "in one graph"
    outcome: Outcome = {}
    for whole in (True, False):
        torch._dynamo.reset()
        tensors = trial.tensors(subject.device)
        if subject.device != "cpu":
            exec(STALE, {"torch": torch})
        try:
            loss = torch.compile(target.bind(trial.options()), fullgraph=whole, backend=backend)(**tensors)
            loss.backward()
        except Exception:
            if not whole:
                raise
            note = "with a graph break"
            continue
        outcome = {"value": loss.detach().cpu()}
        for name in trial.graded:
            g = tensors[GRADIENTS[name]].grad
            outcome[name] = None if g is None else g.cpu()
        break
    torch._dynamo.reset()
    for f in findings(subject, trial, target.variant, outcome, target.own):
        yield dataclasses.replace(f, note=note if f.holds else f"{note}; {f.note}".strip("; "))


def memory(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """The most memory of a forward and backward pass beyond the inputs and the gradients."""
    small = dataclasses.replace(trial, n=8, v=16)
    run(subject, small)  # what is only allocated once
    tensors = trial.tensors(subject.device)
    _, peak, _ = allocated(lambda: run(subject, trial, tensors), torch.device(subject.device))
    gradients = sum(tensors[GRADIENTS[name]].nbytes for name in trial.graded) / MIB
    logits = trial.n * trial.v * tensors["e"].element_size() / MIB
    peak = max(0.0, peak - gradients)
    text = "" if subject.device == "cpu" else held(subject, trial, logits)
    yield Finding(trial, "MiB", peak, logits, logits, 0.0, peak / logits, assertion=text)


def _halves(trial: Trial, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    cut = trial.n // 2
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        e, c = tensors["e"].detach()[rows].clone(), tensors["c"].detach().clone()
        parts.append({"e": e.requires_grad_(), "c": c.requires_grad_(), "targets": tensors["targets"][rows]})
    return parts


def relations(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """Negated operands, a batch in two parts, classes in another order; and columns of dC that sum to zero."""
    whole = run(subject, trial)
    exact, allowed = exact_and_allowed(subject, trial, subject.target.variant)

    def judged(name: str, quantity: str, other: Tensor | None) -> Finding:
        mine, within = whole[quantity], 2 * (getattr(allowed, quantity) + getattr(exact.radius, quantity))
        if mine is None or other is None:
            return Finding(trial, f"{name}: {quantity}", math.inf, 0.0, 0.0, 0.0, math.inf, "the gradient is None")
        if quantity == "value":  # both are rounded to the dtype of the loss
            within = within + 2 * unit_roundoff(mine.dtype) * mine.abs().double()
        f = finding(trial, quantity, other, mine.double(), within)
        text = related(subject, trial, name, quantity, f.allowed)
        return dataclasses.replace(f, quantity=f"{name}: {quantity}", assertion=text)

    tensors = trial.tensors(subject.device)
    negated = {name: tensors[name].detach().neg().requires_grad_() for name in ("e", "c")}
    other = run(subject, trial, negated | {"targets": tensors["targets"]})
    yield judged("negated", "value", other["value"])
    for name in ("dE", "dC"):
        g = other[name]
        yield judged("negated", name, None if g is None else -g)

    first, second = (run(subject, trial, part) for part in _halves(trial, tensors))
    values, d_e, d_c = ([part[name] for part in (first, second)] for name in ("value", "dE", "dC"))
    yield judged("in two parts", "value", values[0].double() + values[1].double())  # type: ignore[union-attr]
    if None not in d_e and None not in d_c:
        yield judged("in two parts", "dE", torch.cat(d_e))  # type: ignore[arg-type]
        total = d_c[0].double() + d_c[1].double()  # type: ignore[union-attr]
        yield judged("in two parts", "dC", total)

    order = torch.randperm(trial.v, generator=torch.Generator().manual_seed(1)).to(subject.device)
    moved = {"e": tensors["e"].detach(), "c": tensors["c"].detach()[order]}
    moved = {name: x.clone().requires_grad_() for name, x in moved.items()}
    other = run(subject, trial, moved | {"targets": torch.argsort(order)[tensors["targets"]]})
    yield judged("classes in another order", "value", other["value"])
    yield judged("classes in another order", "dE", other["dE"])

    got = whole["dC"]
    if got is not None:
        zero = torch.zeros(trial.d, dtype=torch.float64)
        f = finding(trial, "dC", got.double().sum(0), zero, (allowed.dC + exact.radius.dC).sum(0))
        text = f"assert c.grad.double().sum(0).norm() <= {f.allowed:.3g}"
        yield dataclasses.replace(f, quantity="sum of dC over classes", assertion=text)


def mutants(subject: Subject, trial: Trial) -> Iterator[Finding]:
    """Whether the allowance of the accuracy cases rejects defects put into this target's own outputs."""
    outcome = run(subject, trial)
    exact, allowed = exact_and_allowed(subject, trial, subject.target.variant)
    d_e, d_c, value = outcome["dE"], outcome["dC"], outcome["value"]
    if d_e is None or d_c is None or value is None:
        raise NotOffered("a gradient is None")
    tensors = trial.tensors("cpu")
    onehot = torch.nn.functional.one_hot(tensors["targets"], trial.v).double()
    changed = {
        "zero dE": ("dE", torch.zeros_like(d_e)),
        "zero dC": ("dC", torch.zeros_like(d_c)),
        "dC without 1/N": ("dC", d_c.double() * trial.n),
        "dE without the target": ("dE", d_e.double() + tensors["c"].detach().double()[tensors["targets"]] / trial.n),
        "dC without the target": ("dC", d_c.double() + onehot.T @ tensors["e"].detach().double() / trial.n),
        "loss off by 10 %": ("value", value.double() * 1.1),
    }
    for name, (quantity, wrong) in changed.items():
        within = getattr(allowed, quantity) + getattr(exact.radius, quantity)
        seen = not finding(trial, quantity, wrong, getattr(exact, quantity), within).holds
        yield Finding(trial, name, 0.0 if seen else 1.0, 0.0, 1.0, 0.0, 0.0 if seen else math.inf)


# Trials.

PLAIN = Trial()
CASES = (
    Trial(),
    Trial(scale=8.0),
    Trial(pattern="exact", d=16),
    Trial(pattern="confident", complement=0.05),
    Trial(n=200, v=1000, d=32, scale=4.0),
)
ODD = tuple(
    Trial(n=n, v=v, d=d, dtype=t) for n, v, d in ((7, 13, 5), (129, 257, 33), (1, 2, 1)) for t in ("bf16", "fp32")
)


def each(dtypes: Iterable[str], *trials: Trial) -> tuple[Trial, ...]:
    return tuple(dataclasses.replace(trial, dtype=dtype) for dtype in dtypes for trial in trials)


def fuzzed(target: Target, count: int = 40, seed: int = 0) -> tuple[Trial, ...]:
    """Random trials over what a target offers."""
    rng = random.Random(seed)
    sizes = (1, 2, 3, 8, 15, 16, 17, 40, 64, 127, 128, 129, 200)
    reductions = [r for r in target.reductions if r == "mean" or "reduction" in target.offers]
    drawn = []
    for index in range(count):
        pattern = rng.choice(("gaussian", "gaussian", "gaussian", "exact", "confident", "flat"))
        reduction = rng.choice(reductions)
        trial = Trial(
            seed=index,
            n=rng.choice(sizes),
            v=rng.choice(sizes[1:]),
            d=rng.choice(sizes[3:9]),
            dtype=rng.choice(tuple(DTYPES)[:3]),
            pattern=pattern,
            scale=rng.choice((0.5, 1.0, 3.0, 8.0)),
            bias="bias" in target.offers and rng.random() < 0.3,
            softcap=rng.choice((2.0, 20.0)) if "softcap" in target.offers and rng.random() < 0.3 else None,
            reduction=reduction,
            upstream=None if reduction == "none" else rng.choice((1.0, 1.0, -2.0, 0.25)),
            ignored=rng.choice(("none", "none", "some")),
            strided=rng.random() < 0.2,
            frozen=rng.choice(("", "", "", "e", "c")),
        )
        drawn.append(trial)
    return tuple(drawn)


def missing(target: Target, trial: Trial) -> str:
    """The option that a trial needs and a target lacks; empty if there is none."""
    wanted = {"bias": trial.bias, "softcap": trial.softcap is not None, "reduction": trial.reduction != "mean"}
    lacks = [name for name, needed in wanted.items() if needed and name not in target.offers]
    if not lacks and trial.reduction not in target.reductions:
        lacks = [f"reduction {trial.reduction!r}"]
    return ", ".join(lacks)


ALL_DTYPES = ("bf16", "fp16", "fp32")
SUM = dataclasses.replace(PLAIN, reduction="sum")
NONE = dataclasses.replace(PLAIN, reduction="none", upstream=None)
CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check(
            "accuracy", "Are loss and gradients as exact as promised?", "promise", each(ALL_DTYPES, *CASES), promised
        ),
        Check("odd sizes", "Also at sizes that fill no tile?", "promise", ODD, promised),
        Check("random calls", "Also on random calls over all that it offers?", "promise", (), promised),
        Check("reductions", "Are sum and none what they say?", "promise", each(("bf16", "fp32"), SUM, NONE), meant),
        Check(
            "upstream gradient",
            "Is the gradient that arrives at the loss used, whatever it is?",
            "promise",
            (
                dataclasses.replace(PLAIN, upstream=-3.0),
                dataclasses.replace(PLAIN, upstream=0.125),
                dataclasses.replace(PLAIN, dtype="fp16", upstream=1024.0),
                dataclasses.replace(SUM, upstream=0.25),
                NONE,
            ),
            meant,
        ),
        Check(
            "second backward",
            "Does a second backward pass through the same graph give the same gradients?",
            "same",
            (Trial(), Trial(dtype="fp32")),
            second_backward,
            form=Form(backward="loss.backward(retain_graph=True)"),
        ),
        Check("bias", "Is a bias added, once?", "promise", each(("bf16", "fp32"), Trial(bias=True, d=512)), meant),
        Check(
            "softcap",
            "Is a softcap applied?",
            "promise",
            each(("bf16", "fp32"), Trial(softcap=5.0, scale=4.0)),
            meant,
        ),
        Check("strides", "Are strides followed?", "promise", each(("bf16", "fp32"), Trial(strided=True)), meant),
        Check(
            "one gradient alone",
            "Is the other gradient right where e or c is frozen?",
            "promise",
            (Trial(frozen="e"), Trial(frozen="c")),
            meant,
        ),
        Check(
            "ignored rows",
            "Do ignored rows count nowhere?",
            "promise",
            each(("bf16", "fp32"), Trial(ignored="some")) + (dataclasses.replace(SUM, ignored="some"),),
            meant,
        ),
        Check(
            "NaN in ignored rows",
            "Do ignored rows count nowhere even where they hold NaN?",
            "promise",
            each(("bf16", "fp32"), Trial(ignored="some", poison=True)),
            meant,
        ),
        Check(
            "all ignored",
            "Are the gradients zero where every row is ignored?",
            "promise",
            each(("bf16", "fp32"), Trial(ignored="all")) + (dataclasses.replace(SUM, ignored="all"),),
            meant,
        ),
        Check(
            "NaN containment",
            "Does NaN in a row that counts stay in its row of dE?",
            "promise",
            each(("bf16", "fp32"), Trial(nan=True, reduction="sum")),
            contained,
        ),
        Check(
            "confident rows",
            "Is the relative accuracy kept where the target is nearly certain, 1 - p from 1e-2 to 1e-8?",
            "careful",
            (
                *each(("bf16", "fp32"), *(Trial(pattern="confident", complement=10.0**-k) for k in (2, 4, 6, 8))),
                Trial(pattern="confident", complement=1e-6, dtype="fp16", stretch=10),
            ),
            careful,
        ),
        Check(
            "fp16 underflow",
            "Does the mean over many tokens keep small gradients in fp16?",
            "careful",
            tuple(Trial(n=n, v=40, d=8, dtype="fp16", pattern="flat", stretch=6) for n in (4096, 65536)),
            careful,
        ),
        Check(
            "fp16 sums",
            "Is a summed loss beyond 65504 finite in fp16?",
            "careful",
            (Trial(n=32768, v=16, d=8, dtype="fp16", pattern="flat", reduction="sum"),),
            careful,
        ),
        Check(
            "growth with the batch",
            "Do the errors of the loss and of dC stay put while tokens and chunks grow?",
            "careful",
            tuple(Trial(n=n, v=1008, d=8, pattern="flat") for n in (64, 512, 4096)),
            careful,
        ),
        Check(
            "common offset",
            "Does an offset common to all logits of a token cancel?",
            "careful",
            tuple(Trial(pattern="exact", d=16, dtype="fp32", offset=x) for x in (1024.0, 2.0**18)),
            careful,
        ),
        Check(
            "16-bit logits",
            "Do logits keep more than the 8 bits of bf16?",
            "careful",
            (Trial(pattern="exact", d=16, offset=256.0), Trial(scale=20.0)),
            careful,
            limit="logits are rounded to the input dtype",
        ),
        Check("determinism", "Do four runs give the same bits?", "same", (Trial(n=512, v=1000),), repeated),
        Check("relations", "Do exact relations between calls hold?", "promise", each(("bf16", "fp32"), SUM), relations),
        Check(
            "torch.compile",
            "Is the compiled call right, ignored rows included?",
            "promise",
            (Trial(ignored="some"),),
            compiled,
            form=Form(compiled=True),
        ),
        Check(
            "memory",
            "Does it do without the memory of the logits?",
            "logits",
            (Trial(n=4096, v=8192, d=8),),
            memory,
            limit="it holds the logits, or as much",
            minimal=False,  # a smaller head has other shares of what is needed once
        ),
        Check(
            "mutants",
            "Would the allowance for accuracy reject gross defects of this target? (a check of the audit)",
            "promise",
            each(ALL_DTYPES, Trial(n=32, v=64, d=32)),
            mutants,
            limit="the promise is too wide to tell",
            minimal=False,
        ),
    )
}


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:160]
    return ""
