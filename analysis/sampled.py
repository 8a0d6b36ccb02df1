"""Exact errors of a full-size batch from a random sample of its rows, with confidence intervals.

    measured = measure(e, c, targets, dE=e.grad, dC=c.grad, loss=loss)
    print(measured.dE.rel)          # 0.00177 [0.00176, 0.00178]

What is exact and what is estimated:

    dE rows    of sampled tokens, computed in fp64 over the whole vocabulary: exact (to some 1e-13)
    dC rows    of sampled vocabulary entries, summed over all tokens in fp64. They need every token's log-sum-exp over
               the columns but its target. `lse="fp64"` computes it exactly, one whole product in fp64. `lse="fp32"`
               takes it from an fp32 pass (tensor cores, where the operands have 16 bits), in which no entry of dZ is
               off by more than the factor exp(delta): delta is the largest difference to the exact ones found on the
               sampled tokens. Its effect on each row is bounded elementwise, shown as `radius`, and part of every
               interval. With the stated confidence at most the share `beyond` of the other tokens is off by more.
    the rest   totals, quantiles and strata are estimates from the sample, with intervals (`sampled_statistics`)

A third of the rows is drawn uniformly, a third in proportion to the squared norm of the gradient under test, and a
third through the targets: each distinct target alike for tokens, each token's target for vocabulary rows. A row that
none of the three reaches for can still hide an error; the uniform third bounds how many do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from cce_precision.analysis.cases import Case, find, from_file
from cce_precision.analysis.metrics import COUNT_EDGES, errors
from cce_precision.analysis.sampled_rows import fast_rest, target_logits, token_rows, vocabulary_rows
from cce_precision.analysis.sampled_statistics import Interval, Sample, draw
from cce_precision.interface import linear_cross_entropy
from cce_precision.numerics import Path, Variant
from cce_precision.problem import Problem
from cce_precision.variants import ALL, DEFAULT, get

__all__ = [
    "ExactRows",
    "Interval",
    "LossError",
    "Measured",
    "Sampled",
    "impls",
    "load",
    "measure",
    "measure_impl",
    "table",
]

LEVELS = (0.5, 0.9, 0.99)
LSE = ("auto", "fp32", "fp64")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Measured:
    """The error of one gradient. Intervals hold at the confidence of the `Sampled` that this belongs to."""

    population: int  # rows that count: tokens that are not ignored, or the vocabulary
    rows: int  # of them looked at
    rel: Interval  # |out - exact| / |exact|, Euclidean norms of the whole
    floor: float  # estimate of the same for the exact value rounded once to the dtype of `out`
    quantiles: Mapping[float, Interval]  # of the rows' own relative errors
    strata: Mapping[str, tuple[int, Interval]]  # by occurrences of the target: rows looked at, rel there
    worst: tuple[int, float]  # index and relative error of the worst row looked at
    radius: float  # what the fp32 log-sum-exps can move `rel` by; contained in the intervals
    nonfinite: int  # rows of the whole gradient with a NaN or an infinity


@dataclass(frozen=True)
class LossError:
    """The loss against the exact one; `radius` is the doubt of the exact one, 0 with lse="fp64"."""

    out: float
    exact: float
    rel: float
    radius: float


@dataclass(frozen=True)
class Sampled:
    """What `measure` found; None for what was not given."""

    n: int
    v: int
    d: int
    dtype: str
    confidence: float
    dE: Measured | None
    dC: Measured | None
    loss: LossError | None
    ignored_nonzero: int  # rows of dE of ignored tokens that are not 0; all are looked at
    lse: str  # "fp32" or "fp64"
    delta: float  # largest error of an fp32 log-sum-exp on the sampled tokens
    beyond: float  # share of the other tokens that may be off by more
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, for JSON; keys are strings."""
        plain = asdict(self)
        for name in ("dE", "dC"):
            if plain[name]:
                plain[name]["quantiles"] = {f"{k:g}": x for k, x in plain[name]["quantiles"].items()}
                plain[name]["strata"] = {k: {"rows": n, **x} for k, (n, x) in plain[name]["strata"].items()}
        return plain


# -- the sample --------------------------------------------------------------------------------------------------------


def _sizes(gradient: Tensor) -> Tensor:
    """(M,) squared norms of the rows on the CPU, a row that is not finite as large as the largest."""
    norm = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32).cpu().double()
    bad = ~norm.isfinite()
    largest = norm[~bad].max() if bool((~bad).any()) else torch.ones((), dtype=torch.float64)
    scaled = torch.where(bad, largest, norm) / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return scaled.square()


def _nonfinite(gradient: Tensor) -> int:
    return int((~gradient.isfinite()).any(1).sum())


def _measured(
    sample: Sample, out: Tensor, exact: Tensor, radius: Tensor | None, counts: Tensor, confidence: float, bad: int
) -> Measured:
    """The error of the sampled rows `out` against `exact` (B, D); `radius` of exact, counts (B,) of the target."""

    def squares(x: Tensor) -> Tensor:
        return x.square().sum(1).cpu()

    wrong, right = squares(errors(out, exact)), squares(exact.nan_to_num(0.0, 0.0, 0.0))
    lost = squares(errors(exact.to(out.dtype), exact))
    doubt = torch.zeros_like(right) if radius is None else squares(radius)

    def rel(part: Tensor) -> tuple[Interval, float]:
        inside = sample.where(part)
        r = inside.ratio(wrong[part], right[part], confidence)
        total = inside.total(right[part])
        moved = math.sqrt(inside.total(doubt[part]) / total) if total > 0 else 0.0
        return Interval(math.sqrt(r.value), math.sqrt(r.low), math.sqrt(r.high)).widened(moved), moved

    def share(x: Tensor) -> Tensor:
        """(B,) norms relative to the exact rows'; 0/0 is 0."""
        return torch.where(x == 0, 0.0, (x / right).sqrt())

    own, blur = share(wrong), share(doubt)
    everything = torch.ones(len(own), dtype=torch.bool)
    whole, moved = rel(everything)
    if bad:
        whole = Interval(math.inf, math.inf, math.inf)
    strata = {}
    for low, high, name in COUNT_EDGES:
        part = (counts >= low) & (counts <= high)
        if bool(part.any()):
            strata[name] = (int(part.sum()), rel(part)[0])
    quantiles = {
        level: sample.quantile(own, level, confidence, (own - blur).clamp(min=0), own + blur) for level in LEVELS
    }
    at = int(own.argmax())
    floor = math.sqrt(sample.ratio(lost, right, confidence).value)
    return Measured(
        sample.population,
        len(own),
        whole,
        floor,
        quantiles,
        strata,
        (int(sample.index[at]), float(own[at])),
        moved,
        bad,
    )


# -- the public function -----------------------------------------------------------------------------------------------


def _check(problem: Problem, lse: str, confidence: float) -> None:
    if problem.targets.shape != problem.e.shape[:1]:
        raise ValueError(f"targets must have shape ({problem.n},), got {tuple(problem.targets.shape)}")
    if lse not in LSE:
        raise ValueError(f"lse must be one of {', '.join(map(repr, LSE))}, got {lse!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    if not bool((problem.targets >= 0).any()):
        raise ValueError("targets ignore every token, so there is nothing to measure")


class ExactRows:
    """The sampled rows of the exact gradients of sum_i g_i nll_i, and the exact loss: what results are compared with.

    `problem`: targets -1 where ignored. `like`: gradients (dE, dC) whose rows' sizes guide the draw, those under test
    or others of the same problem; None: the sizes play no part. `sides`: whether dE, dC and the loss will be compared.
    The other arguments are those of `measure`.
    """

    @torch.no_grad()
    def __init__(
        self,
        problem: Problem,
        like: tuple[Tensor | None, Tensor | None] = (None, None),
        *,
        sides: tuple[bool, bool, bool] = (True, True, True),
        upstream: Tensor | float | None = None,
        rows: int = 256,
        columns: int = 256,
        seed: int = 0,
        confidence: float = 0.95,
        lse: str = "auto",
    ) -> None:
        _check(problem, lse, confidence)
        if lse == "auto":
            lse = "fp32" if problem.operand_dtype.itemsize == 2 else "fp64"
        self.problem, self.lse, self.confidence = problem, lse, confidence
        device = problem.e.device
        self.valid = (problem.targets >= 0).nonzero()[:, 0]  # (M,)
        self.g = _upstream(upstream, self.valid)  # (M,)
        targets = problem.targets[self.valid].cpu()
        self.counts = torch.bincount(targets, minlength=problem.v)  # (V,) occurrences as a target
        self.of_token = self.counts[targets]  # (M,)
        self.tokens = self._draw(None if like[0] is None else like[0][self.valid], 1 / self.of_token, rows, seed)
        self.chosen = self.valid[self.tokens.index.to(device)]
        exact_rest, self.d_e = token_rows(problem, self.chosen, self.g[self.tokens.index.to(device)], sides[0])
        self.delta, self.exact_loss, self.loss_radius = 0.0, math.nan, math.nan
        if not (sides[1] or sides[2]):
            return
        if lse == "fp64":
            rest = token_rows(problem, self.valid, self.g, gradients=False)[0]
        else:
            rest = fast_rest(problem, self.valid)
            self.delta = float(errors(rest[self.tokens.index.to(device)], exact_rest).max())
            rest[self.tokens.index.to(device)] = exact_rest
        if sides[2]:
            self._loss(rest)
        if sides[1]:
            self.vocabulary = self._draw(like[1], self.counts, columns, seed)
            picked = self.vocabulary.index.to(device)
            self.d_c, size = vocabulary_rows(problem, picked, self.valid, rest, self.g)
            self.d_c_radius = size * math.expm1(min(self.delta, 700.0))

    @staticmethod
    def _draw(like: Tensor | None, through_targets: Tensor, size: int, seed: int) -> Sample:
        weights = [torch.ones(len(through_targets)), through_targets]
        if like is not None and len(like):
            weights.append(_sizes(like.detach()))
        return draw(weights, size, seed)

    def _loss(self, rest: Tensor) -> None:
        """sum_i g_i nll_i: nll = log(1 + exp(rest - z_t)), whose slope in `rest` is 1 - P_t."""
        gap = rest - target_logits(self.problem, self.valid)
        nll = torch.logaddexp(gap, torch.zeros_like(gap))
        self.exact_loss = float((self.g * nll).sum())
        self.loss_radius = self.delta * float((self.g.abs() * torch.sigmoid(gap)).sum())

    @torch.no_grad()
    def compare(
        self, dE: Tensor | None = None, dC: Tensor | None = None, loss: Tensor | float | None = None
    ) -> Sampled:
        """The errors of gradients (N, D), (V, D) and of a loss that belong to this problem; see `measure`."""
        started = time.perf_counter()
        problem = self.problem
        if dE is None and dC is None and loss is None:
            raise ValueError("nothing to measure: give at least one of dE, dC and loss")
        for name, x, like in (("dE", dE, problem.e), ("dC", dC, problem.c)):
            if x is not None and x.shape != like.shape:
                raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(x.shape)}")
            if x is not None and x.device != problem.e.device:
                raise ValueError(f"{name} must be on the device of e, {problem.e.device}, got {x.device}")
        of_dE = of_dC = found = None
        leaks = 0
        if dE is not None:
            dE = dE.detach()
            counts = self.of_token[self.tokens.index]
            bad = _nonfinite(dE[self.valid])
            of_dE = _measured(self.tokens, dE[self.chosen], self.d_e, None, counts, self.confidence, bad)
            of_dE = replace(of_dE, worst=(int(self.valid[of_dE.worst[0]]), of_dE.worst[1]))
            leaks = int((dE[problem.targets < 0] != 0).any(1).sum())
        if dC is not None:
            dC = dC.detach()
            counts, bad = self.counts[self.vocabulary.index], _nonfinite(dC)
            out = dC[self.vocabulary.index.to(dC.device)]
            of_dC = _measured(self.vocabulary, out, self.d_c, self.d_c_radius, counts, self.confidence, bad)
        if loss is not None:
            out = torch.as_tensor(loss).detach().double().cpu()
            off = float(errors(out, torch.tensor(self.exact_loss, dtype=torch.float64)))
            relative = off / abs(self.exact_loss) if self.exact_loss else off
            found = LossError(float(out), self.exact_loss, relative, self.loss_radius)
        return Sampled(
            problem.n, problem.v, problem.d, str(problem.operand_dtype).removeprefix("torch."), self.confidence,
            of_dE, of_dC, found, leaks, self.lse, self.delta,
            0.0 if self.lse == "fp64" else self.tokens.unseen(self.confidence), time.perf_counter() - started,
        )  # fmt: skip


def _upstream(upstream: Tensor | float | None, valid: Tensor) -> Tensor:
    """(M,) fp64 gradients that arrive at the nll of the tokens `valid`."""
    if isinstance(upstream, Tensor) and upstream.numel() > 1:
        return upstream.detach().reshape(-1)[valid].double()
    number = 1 / max(1, len(valid)) if upstream is None else float(upstream)
    return torch.full((len(valid),), number, dtype=torch.float64, device=valid.device)


@torch.no_grad()
def measure(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    dE: Tensor | None = None,
    dC: Tensor | None = None,
    loss: Tensor | float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    upstream: Tensor | float | None = None,
    rows: int = 256,
    columns: int = 256,
    seed: int = 0,
    confidence: float = 0.95,
    lse: str = "auto",
) -> Sampled:
    """The error of gradients and loss of one linear cross-entropy against fp64, from a sample of rows.

    Args:
        e: (..., D), c: (V, D), targets: (...) with `ignore_index` or -1 where ignored, bias: (V,); operands of any
            float dtype, taken as exact, on one device. Shapes beyond two dimensions are flattened.
        dE: (..., D), dC: (V, D): the gradients under test. None: not measured.
        loss: the loss under test, a scalar: the mean over the tokens that count, or sum_i upstream_i nll_i.
        upstream: gradient that arrives at each token's nll: (...) or a number; None: that of the mean, 1 / number of
            tokens that count.
        rows, columns: how many tokens and vocabulary rows to look at; all, where there are fewer.
        seed: of the draw. confidence: of the intervals.
        lse: "fp32" or "fp64", see the module; "fp64" costs one whole product in fp64 and leaves no radius. "auto" is
            "fp32" for operands of 16 bits; beside the errors of wider ones the radius would not be small.

    Returns `Sampled`. A zero row of the exact gradient counts as an infinite relative error where it is not met.

    Raises ValueError, naming the argument, for shapes that do not belong together, for nothing to measure, and where
    every token is ignored. Memory: at most 2^27 fp64 logits, and `columns` x D sums.
    """
    started = time.perf_counter()
    d = c.shape[1]
    flat = targets.detach().reshape(-1).to(torch.int64)
    flat = torch.where((flat == ignore_index) | (flat < 0), -1, flat)
    problem = Problem(e.detach().reshape(-1, d), c.detach(), flat, bias, None, softcap, temperature)
    dE = dE if dE is None or dE.shape != e.shape else dE.reshape(-1, d)
    if dE is None and dC is None and loss is None:
        raise ValueError("nothing to measure: give at least one of dE, dC and loss")
    exact = ExactRows(
        problem, (dE, dC), sides=(dE is not None, dC is not None, loss is not None), upstream=upstream, rows=rows,
        columns=columns, seed=seed, confidence=confidence, lse=lse,
    )  # fmt: skip
    return replace(exact.compare(dE, dC, loss), seconds=time.perf_counter() - started)


def measure_impl(
    problem: Problem,
    impl: str | Variant = DEFAULT,
    workspace_mb: int | None = None,
    impl_seed: int = 0,
    **options: Any,
) -> Sampled:
    """Loss and gradients of the mean nll by one variant, measured; `options` are those of `measure`.

    problem: targets -1 where ignored. `impl_seed` is for variants that sample.
    """
    e, c = (x.detach().clone().requires_grad_() for x in (problem.e, problem.c))
    shared: dict[str, Any] = {
        "bias": problem.bias, "softcap": problem.softcap, "temperature": problem.temperature, "ignore_index": -1,
    }  # fmt: skip
    loss = linear_cross_entropy(
        e, c, problem.targets, impl=impl, workspace_mb=workspace_mb, seed=impl_seed, validate=False, **shared
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    return measure(e, c, problem.targets, dE=e.grad, dC=c.grad, loss=loss.detach(), **shared, **options)


def table(results: Mapping[str, Sampled], title: str = "") -> Any:
    """A rich table with one row for each result and gradient."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(results.values()))
    caption = (
        f"In brackets: the {first.confidence:.0%} confidence interval. Strata: tokens by the number of times their "
        "target occurs, vocabulary rows by the number of times they are a target."
    )
    if first.lse == "fp32":
        caption += (
            f" Log-sum-exps of the unsampled tokens from an fp32 pass, off by at most {first.delta:.1e} on the sampled "
            f"ones (and by more on at most {first.beyond:.1%} of all, at that confidence); what this can do is in the "
            "intervals."
        )
    drawn = Table(title=title or None, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE)
    for heading in ("impl", "loss error", "gradient", "rows", "relative error", "floor", "row 50 %", "90 %", "99 %"):
        drawn.add_column(heading, justify="left" if heading in ("impl", "gradient") else "right", no_wrap=True)
    drawn.add_column("relative error by occurrences of the target", overflow="fold")
    for name, one in results.items():
        loss = "-" if one.loss is None else f"{one.loss.rel:.2g}"
        for quantity, m in (("dE", one.dE), ("dC", one.dC)):
            if m is None:
                continue
            strata = ", ".join(f"{k}: {x.value:.2g}" for k, (_, x) in m.strata.items())
            levels = (f"{m.quantiles[level].value:.2g}" for level in LEVELS)
            rows = f"{m.rows} of {m.population:,}"
            drawn.add_row(name, loss, quantity, rows, escape(str(m.rel)), f"{m.floor:.2e}", *levels, strata)
            name = loss = ""
        if one.dE is None and one.dC is None:
            drawn.add_row(name, loss)
        if one.ignored_nonzero:
            drawn.add_row("", "", "dE", f"{one.ignored_nonzero} rows of ignored tokens are not 0")
    return drawn


# -- the command -------------------------------------------------------------------------------------------------------


def impls(text: str) -> list[str]:
    """Variants by name, separated by commas; "all": each that needs no compiler. Raises ValueError for unknown ones."""
    if text == "all":
        return [name for name, variant in ALL.items() if variant.path is not Path.COMPILED]
    found = [get(part.strip()).name for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError(f"impl must name at least one variant; known: {', '.join(ALL)}")
    return list(dict.fromkeys(found))


def device_of(device: str) -> str:
    """ "cpu" or "cuda"; "auto" is a GPU where there is one. Raises ValueError for what is not there."""
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be auto, cpu or cuda (where PyTorch sees one), got {device!r}")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(dtype: str) -> torch.dtype | None:
    """The dtype called bf16, fp16 or fp32; None for "auto". Raises ValueError for another name."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES.get(dtype)


def load(head: str, dtype: str = "auto", tokens: int | None = None, device: str = "auto", seed: int = 0) -> Case:
    """A head in a safetensors file, or a case by name, on a device. Raises ValueError for what is not there."""
    place, kind = device_of(device), dtype_of(dtype)
    if head.endswith(".safetensors"):
        if not FilePath(head).is_file():
            raise ValueError(f"there is no file {head!r}")
        return from_file(head, tokens, kind, place)
    if head == "captured":
        return find(head)(n=tokens, dtype=kind, device=place)
    given = {} if tokens is None else {"n": tokens}
    return find(head)(dtype=kind or torch.bfloat16, seed=seed, device=place, **given)
