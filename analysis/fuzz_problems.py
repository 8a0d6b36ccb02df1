"""Random problems of every kind: `Knobs` say what one is like, `build` makes the tensors and the call.

The tests draw knobs with Hypothesis (`tests/strategies.py`), the campaign of `fuzz` with `random_knobs`; both build
the same problems.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce_precision.analysis.references import Objective
from cce_precision.numerics import Path
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL

__all__ = ["CHOICES", "DTYPES", "EDGES", "PATTERNS", "Call", "Knobs", "build", "random_knobs", "sensible"]

EDGES = (1, 2, 15, 16, 17, 127, 128, 129, 255, 257)  # around vector lengths and tile sizes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PATTERNS = (
    "gaussian",  # independent entries
    "ties",  # few distinct values: many logits are equal
    "duplicates",  # every classifier row twice
    "zero-e",
    "zero-c",
    "huge",  # e up to the largest finite fp16 (2^15 in other dtypes), c small: logits of order 1
    "subnormal",  # c in the subnormal range of its dtype
    "same-sign",  # e and c positive: sums without cancellation, accumulation at its worst
    "hot",  # one logit of one token stands out
    "straddle",  # P within an ulp or so of eps
    "offset",  # a common offset on all logits of a token
    "masked",  # a bias of -inf on some columns
    "exact",  # multiples of 1/8 of at most 4: products and sums are exact in fp32
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "pattern": PATTERNS,
    "e_dtype": ("bf16", "fp16", "fp32", "fp64"),
    "c_dtype": ("same", "bf16", "fp16", "fp32"),
    "bias": (None, "same", "fp32"),
    "reduction": ("mean", "sum", "none"),
    "filter_eps": ("auto", None, 2.0**-4, 2.0**-8, 2.0**-14, 2.0**-20),
    "scale": (0.25, 1.0, 3.0, 8.0, 20.0),
    "margin": (0.0, 4.0, 12.0, 25.0, 60.0),
    "softcap": (None, 0.5, 5.0, 30.0),
    "temperature": (1.0, 0.5, 0.7, 3.0),
    "label_smoothing": (0.0, 0.1, 1.0),
    "ignored": ("none", "some", "all"),
    "upstream": ("one", "random", "tiny", "large"),
    "ignore_index": (-100, -1, 0),
    "shift": (0, 1, 2),
    "tolerance": (1e-9, 3e-2, 0.5, 1e3),
}


# What the one-pass mode takes: a plain loss of bf16.
PLAIN: dict[str, Any] = {
    "one_pass": True, "e_dtype": "bf16", "c_dtype": "same", "bias": None, "softcap": None, "temperature": 1.0,
    "label_smoothing": 0.0, "class_weight": False, "use_lse": False, "use_entropy": False, "z_loss": False,
}  # fmt: skip


@dataclass(frozen=True)
class Knobs:
    """What a problem is like. The seed fills in all else."""

    seed: int = 0
    n: int = 4
    v: int = 8
    d: int = 4
    batch: int = 1  # e is (batch, n / batch, d) where n is a multiple, else (n, d)
    impl: str = "cce_exact"
    e_dtype: str = "bf16"
    c_dtype: str = "same"
    bias: str | None = None
    pattern: str = "gaussian"
    scale: float = 1.0  # standard deviation of the logits, roughly
    margin: float = 0.0  # added to the target's logit, roughly: tokens of confidence
    softcap: float | None = None
    temperature: float = 1.0
    label_smoothing: float = 0.0
    class_weight: bool = False
    reduction: str = "mean"
    upstream: str = "one"
    ignored: str = "none"
    ignore_index: int = -100
    nan_ignored: bool = False  # whether ignored rows of e hold NaN
    shift: int = 0
    filter_eps: float | str | None = "auto"
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    accum_fp32: bool = False
    use_lse: bool = False
    use_entropy: bool = False
    z_loss: bool = False
    strided: bool = False  # e and c are views with other strides
    crowded: bool = False  # the kernels' lists of entries are made too short for what a filter keeps
    tolerance: float | None = None  # the pass filters where it can promise that error, else not at all
    one_pass: bool = False  # the workspace and the call allow kernels the one-pass mode

    def to_json(self) -> str:
        return json.dumps(
            {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}
        )

    @staticmethod
    def from_json(text: str) -> Knobs:
        return Knobs(**json.loads(text))


COMPILED = (
    Knobs(n=16, v=33, d=8, impl="torch_compile", e_dtype="bf16"),
    Knobs(n=16, v=33, d=8, impl="torch_compile", e_dtype="fp16", bias="same", label_smoothing=0.1, reduction="sum"),
    Knobs(n=16, v=33, d=8, impl="torch_compile", e_dtype="fp32", softcap=5.0, temperature=0.7, use_entropy=True),
)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `linear_cross_entropy`, the gradients that arrive at its outputs, and the same flat, for the truth."""

    knobs: Knobs
    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict[str, Any]
    grads: dict[str, Tensor]  # upstream of "loss", "lse", "entropy", "z_loss"
    problem: Problem
    plan: Plan
    objective: Objective
    counted: Tensor  # (N,) bool: tokens whose place exists in an unreduced output
    device: str = "cpu"  # where it runs; all tensors that `build` makes lie on the CPU

    def there(self) -> Call:
        """The call with what is passed to the function, and the gradients that arrive, where it runs."""

        def place(x: Any) -> Any:
            return None if x is None else moved(x, self.device)

        changes: dict[str, Any] = {name: place(getattr(self, name)) for name in ("e", "c", "targets", "bias")}
        changes["options"] = self.options | {"class_weight": place(self.options["class_weight"])}
        changes["grads"] = {name: place(g) for name, g in self.grads.items()}
        return dataclasses.replace(self, **changes)

    def placed(self) -> Problem:
        """The problem on the device that the call runs on."""
        if self.device == "cpu":
            return self.problem
        p = self.problem
        tensors = {f.name: x for f in dataclasses.fields(p) if isinstance(x := getattr(p, f.name), Tensor)}
        changes: dict[str, Any] = {name: moved(x, self.device) for name, x in tensors.items()}
        return dataclasses.replace(p, **changes)


def sensible(k: Knobs) -> Knobs:
    """The nearest knobs that the library accepts."""
    variant = ALL[k.impl]
    changes: dict[str, Any] = {}
    if k.n % k.batch:
        changes["batch"] = 1
    length = k.n // changes.get("batch", k.batch)
    changes["shift"] = min(k.shift, length - 1)
    if not variant.filtered:
        changes |= {"filter_eps": "auto", "filter_e_grad": True, "filter_c_grad": True}
    if variant.path is not Path.TILED:
        changes["accum_fp32"] = False
    if not variant.filtered or variant.filter_e.by_tile:
        changes["crowded"] = False
    if "fp64" in (k.e_dtype, k.c_dtype):
        changes |= {"e_dtype": "fp64", "c_dtype": "same"}
    if k.ignore_index >= k.v:
        changes["ignore_index"] = -100
    if k.class_weight and k.reduction == "mean":
        changes["z_loss"] = False  # its mean would have another denominator
    if k.pattern in ("straddle", "masked") and k.bias is None:
        changes |= {"bias": "fp32", "one_pass": False}
    if k.pattern == "masked" and k.softcap is None:
        changes["label_smoothing"] = 0.0  # the smoothed loss of a masked class is infinite
    if k.bias == "fp32" and k.e_dtype == "fp64":
        changes["bias"] = "same"
    if k.pattern == "huge":
        changes |= {"reduction": "mean", "upstream": "one"}  # so that the gradients stay finite in fp16
    both = k.filter_e_grad and k.filter_c_grad and k.filter_eps is not None
    if not (variant.by_element and both) or k.use_entropy:
        changes["tolerance"] = None
    changes |= PLAIN if k.one_pass and k.impl == "cce_exact" else {"one_pass": False}
    if changes["one_pass"] and k.reduction == "none":
        changes["reduction"] = "sum"
    return dataclasses.replace(k, **changes)


def random_knobs(rng: random.Random, impls: Sequence[str]) -> Knobs:
    """Knobs of the campaign: mostly small shapes and few unusual features at once."""

    def dim(largest: int, usual: int) -> int:
        return rng.choice([x for x in EDGES if x <= largest]) if rng.random() < 0.3 else rng.randint(1, usual)

    def mostly(usual: Any, name: str, share: float) -> Any:
        return rng.choice(CHOICES[name]) if rng.random() < share else usual

    impl = rng.choice(impls)
    if ALL[impl].path is Path.COMPILED:  # few shapes, because each costs a compilation
        seed, scale, margin = rng.randrange(2**31), rng.choice(CHOICES["scale"]), rng.choice(CHOICES["margin"])
        return dataclasses.replace(rng.choice(COMPILED), seed=seed, scale=scale, margin=margin)
    n, v = dim(257, 24), dim(257, 24)
    d = dim(257 if n * v < 2**12 else 17, 12)
    return sensible(
        Knobs(
            seed=rng.randrange(2**31),
            n=n,
            v=v,
            d=d,
            batch=rng.choice((1, 1, 2, 3)),
            impl=impl,
            e_dtype=rng.choices(("bf16", "fp16", "fp32", "fp64"), (5, 4, 4, 1))[0],
            c_dtype=mostly("same", "c_dtype", 0.2),
            bias=mostly(None, "bias", 0.4),
            pattern=mostly("gaussian", "pattern", 0.5),
            scale=rng.choice(CHOICES["scale"]),
            margin=mostly(0.0, "margin", 0.5),
            softcap=mostly(None, "softcap", 0.3),
            temperature=mostly(1.0, "temperature", 0.2),
            label_smoothing=mostly(0.0, "label_smoothing", 0.3),
            class_weight=rng.random() < 0.2,
            reduction=rng.choice(CHOICES["reduction"]),
            upstream=mostly("one", "upstream", 0.5),
            ignored=rng.choices(("none", "some", "all"), (60, 38, 2))[0],
            ignore_index=mostly(-100, "ignore_index", 0.2),
            nan_ignored=rng.random() < 0.5,
            shift=mostly(0, "shift", 0.2),
            filter_eps=mostly("auto", "filter_eps", 0.5),
            filter_e_grad=rng.random() < 0.9,
            filter_c_grad=rng.random() < 0.9,
            accum_fp32=rng.random() < 0.1,
            use_lse=rng.random() < 0.2,
            use_entropy=rng.random() < 0.2,
            z_loss=rng.random() < 0.15,
            strided=rng.random() < 0.2,
            crowded=rng.random() < 0.3,
            tolerance=mostly(None, "tolerance", 0.3),
            one_pass=rng.random() < 0.3,
        )
    )


def _operands(k: Knobs, dtypes: tuple[torch.dtype, torch.dtype], eps: float, g: torch.Generator) -> tuple[Tensor, ...]:
    """e (N, D), c (V, D), bias (V,) in fp64, the first two to be rounded to their dtypes, and targets (N,)."""
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    e, c, bias = normal(k.n, k.d), normal(k.v, k.d) * (k.scale / math.sqrt(k.d)), normal(k.v)
    targets = torch.randint(0, k.v, (k.n,), generator=g)
    pattern = k.pattern
    if pattern == "ties":
        e, c = e.sign(), (c * 2).sign() / 2
    elif pattern == "duplicates":
        c = c[torch.arange(k.v) // 2]
    elif pattern == "zero-e":
        e = e * 0
    elif pattern == "zero-c":
        c = c * 0
    elif pattern == "huge":
        top = 65504.0 if torch.float16 in dtypes else 2.0**15
        e, c = (e / 4).clamp(-1, 1) * top, c / top
    elif pattern == "subnormal":
        c = c * (
            torch.finfo(dtypes[1]).smallest_normal / max(k.scale, 1.0) if dtypes[1] != torch.float64 else 2.0**-200
        )
    elif pattern == "same-sign":
        e, c = e.abs(), c.abs()
    elif pattern == "hot":
        e, c = e / 8, c / 8
        c[int(targets[0])] = e[0] * 12 / e[0].square().sum()
    elif pattern == "straddle":
        steps = torch.randint(-3, 4, (k.v,), generator=g) * 2.0**-22
        e, c = e / 64, c * (torch.rand(k.v, 1, generator=g) < 0.3) * 2.0**-20
        others = (k.v - 1) * eps
        bias = (math.log(eps) if eps > 0 else -5.0) - math.log1p(-min(others, 0.9)) + steps
        bias[0] = 0.0
    elif pattern == "offset":
        e[:, 0], c[:, 0] = 30.0, 32.0
    elif pattern == "masked":
        bias[torch.rand(k.v, generator=g) < 0.3] = -torch.inf
        bias[targets] = 0.0
        bias[(targets + 1) % k.v] = 1.0  # in place of a target that is the ignored index
    elif pattern == "exact":
        e, c = ((x * 8).round().clamp(-32, 32) / 8 for x in (e, c))
        bias = (bias * 8).round().clamp(-32, 32) / 8
    if k.margin and pattern in ("gaussian", "duplicates", "same-sign", "offset"):
        _add_margin(e, c, targets, k.margin)
    return e, c, bias, targets


def _add_margin(e: Tensor, c: Tensor, targets: Tensor, margin: float) -> None:
    """Moves tokens along their target's classifier row, so that its logit rises by about `margin`, where it can."""
    rows = c[targets]
    length = rows.square().sum(1, keepdim=True)
    e += torch.where(length > 1e-3, margin * rows / length.clamp(min=1e-3), 0.0)


def _view(x: Tensor) -> Tensor:
    """The same numbers with other strides: every second column of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _upstream(kind: str, shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Gradients of `shape` that are exact in `dtype`."""
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    x = {"one": torch.ones_like(x), "random": x, "tiny": x * 2.0**-30, "large": x * 2.0**10}[kind]
    return x.to(dtype).double()


def moved(x: Tensor, device: str) -> Tensor:
    """x on a device, with its strides."""
    if x.device == torch.device(device):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def build(k: Knobs, backend: str = "auto", device: str = "cpu") -> Call:
    """The call that the knobs describe: the same for the same knobs, on any machine with this version of PyTorch.

    `backend` as in `linear_cross_entropy`: "auto" runs the kernels on a GPU and in a process with TRITON_INTERPRET=1.
    """
    k = sensible(k)
    g = torch.Generator().manual_seed(k.seed)
    e_dtype = DTYPES[k.e_dtype]
    c_dtype = e_dtype if k.c_dtype == "same" else DTYPES[k.c_dtype]
    dtype = torch.promote_types(e_dtype, c_dtype)
    compute = torch.promote_types(dtype, torch.float32)
    variant = ALL[k.impl].configure(k.filter_eps, k.accum_fp32, k.accum_fp32, k.filter_e_grad, k.filter_c_grad)
    eps = max(variant.filter_e.threshold(dtype), variant.filter_c.threshold(dtype))
    e64, c64, bias64, flat = _operands(k, (e_dtype, c_dtype), eps, g)
    lead = (k.batch, k.n // k.batch) if k.batch > 1 or k.shift else (k.n,)
    ignored = torch.rand(k.n, generator=g) < {"none": 0.0, "some": 0.4, "all": 1.0}[k.ignored]
    flat = torch.where(ignored, k.ignore_index, torch.where(flat == k.ignore_index, (flat + 1) % k.v, flat))
    targets = flat.view(lead)  # token i of e is paired with targets[..., i + shift]

    paired = torch.full_like(targets, k.ignore_index)
    paired[..., : lead[-1] - k.shift] = targets[..., k.shift :]
    paired = torch.where(paired == k.ignore_index, -1, paired).reshape(-1)
    counted = torch.zeros(lead, dtype=torch.bool)
    counted[..., : lead[-1] - k.shift] = True
    e = e64.to(e_dtype)
    if k.nan_ignored:
        e = torch.where(paired[:, None] < 0, torch.nan, e)
    e, c = e.view(*lead, k.d), c64.to(c_dtype)
    if k.strided:
        e, c = _view(e), _view(c)
    bias = None if k.bias is None else bias64.to(dtype if k.bias == "same" else torch.float32)
    weight = None
    if k.class_weight:
        weight = (torch.randint(0, 9, (k.v,), generator=g) / 4).to(compute)
        valid = paired[paired >= 0]
        weight = weight if valid.numel() and float(weight[valid].sum()) > 0 else torch.ones_like(weight)

    objective, grads = _objective(k, counted.reshape(-1), paired, weight, lead, g, compute)
    options: dict[str, Any] = {
        "impl": k.impl,
        "ignore_index": k.ignore_index,
        "softcap": k.softcap,
        "reduction": k.reduction,
        "shift": k.shift,
        "filter_eps": k.filter_eps,
        "accum_e_fp32": k.accum_fp32,
        "accum_c_fp32": k.accum_fp32,
        "filter_e_grad": k.filter_e_grad,
        "filter_c_grad": k.filter_c_grad,
        "label_smoothing": k.label_smoothing,
        "class_weight": weight,
        "temperature": k.temperature,
        "tolerance": k.tolerance,
        "seed": k.seed,
        "backend": backend,
        "return_lse": not k.one_pass,
        "return_entropy": k.use_entropy,
        "workspace_mb": 1024 if k.one_pass else None,
    }
    smooth_weight = weight if k.label_smoothing else None
    problem = Problem(e.reshape(-1, k.d), c, paired, bias, smooth_weight, k.softcap, k.temperature)
    plan = Plan(variant, k.softcap, k.temperature, k.use_entropy, k.label_smoothing > 0, backend=backend)
    if k.one_pass:
        plan = dataclasses.replace(plan, workspace_mb=1024, one_pass=(True, True, False))
    return Call(k, e, c, targets, bias, options, grads, problem, plan, objective, counted.reshape(-1), device)


def _objective(
    k: Knobs,
    counted: Tensor,  # (N,) bool
    paired: Tensor,  # (N,) targets, -1 where ignored
    weight: Tensor | None,
    lead: tuple[int, ...],
    g: torch.Generator,
    compute: torch.dtype,
) -> tuple[Objective, dict[str, Tensor]]:
    """The objective loss + r lse + s H + q lse^2 with random r, s, q, and the gradients that arrive at each output.

    A gradient is the product of coefficient, upstream and reduction, rounded once.
    """
    per_token = k.reduction == "none"
    upstream = _upstream(k.upstream, (k.n,) if per_token else (), g, compute)
    r = _upstream("random", (k.n,), g, compute) if k.use_lse else torch.zeros(k.n, dtype=torch.float64)
    s = _upstream("random", (k.n,), g, compute) if k.use_entropy else torch.zeros(k.n, dtype=torch.float64)
    q = 0.125 if k.z_loss else 0.0
    valid = paired >= 0
    share = torch.ones((), dtype=torch.float64)
    if k.reduction == "mean" and valid.any():
        share = 1 / (valid.sum().double() if weight is None else weight[paired[valid]].double().sum())

    def reduced(x: Tensor) -> Tensor:
        """(N,) as the gradient of an output: without the tokens that it lacks."""
        return x.to(compute).view(lead)[..., : lead[-1] - k.shift]

    shown = reduced(upstream.expand(k.n)) if per_token else upstream.to(compute)
    grads = {"loss": shown}
    if k.use_lse:
        grads["lse"] = reduced(upstream * r * share)
    if k.use_entropy:
        grads["entropy"] = reduced(upstream * s * share)
    if k.z_loss:
        grads["z_loss"] = shown * q
    return (
        Objective(k.reduction, upstream, k.label_smoothing, weight, z_loss=q, entropy=s, lse=r),
        grads,
    )
