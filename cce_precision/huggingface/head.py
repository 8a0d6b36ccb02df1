"""The head of a patched model: its product, left to whoever needs it.

A forward pre-hook (`HeadHook`) hands the head an input that stands for the hidden states; `nn.Linear.forward` passes it
to `F.linear`, whose arguments then are known: the weight as it is inside the head's own call, gathered, moved or cast
by whatever hooks others have put there. So a loss without logits is one more call of the head, with a `Loss` to do in
place of the product.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import choosing
from ..interface import linear_cross_entropy
from ..variants import DEFAULT, get

__all__ = ["Counts", "HeadHook", "Loss", "Options", "Request", "install", "remove"]

KEY = "cce_precision"  # of the hook among the head's


@dataclass(frozen=True)
class Options:
    """What `cce_patch` was told."""

    reduction: str = "mean"
    train_only: bool = False
    return_logits: bool = True
    loss: dict[str, Any] = field(default_factory=dict)  # of linear_cross_entropy


@dataclass
class Counts:
    """Losses computed without logits; logits computed after all, and by which operation they were wanted.

    Calls inside `torch.compile` do not count.
    """

    fused: int = 0
    materialised: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    impls: Counter[str] = field(default_factory=Counter)  # fused losses by variant: what impl="auto" took


@dataclass(frozen=True)
class Loss:
    """One call of F.cross_entropy, to be done inside the head's call."""

    targets: Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    class_weight: Tensor | None
    columns: int
    softcap: float | None
    temperature: float
    biases: tuple[tuple[Tensor, float], ...]
    returns: tuple[str, ...] = ()  # options of linear_cross_entropy that make it return more

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any], counts: Counts
    ) -> Any:
        if self.columns != weight.shape[0]:
            weight = weight[: self.columns]
            bias = None if bias is None else bias[: self.columns]
        for vector, factor in self.biases:
            bias = vector * factor if bias is None else bias + vector * factor
        options = self.resolved(hidden, weight, bias, options)
        loss = linear_cross_entropy(
            hidden,
            weight,
            self.targets,
            bias,
            self.ignore_index,
            self.softcap,
            self.reduction,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            **options,
            **dict.fromkeys(self.returns, True),  # type: ignore[arg-type]
        )
        if not torch.compiler.is_compiling():
            counts.fused += 1
            counts.impls[get(options.get("impl", DEFAULT)).name] += 1
        return loss

    def resolved(self, e: Tensor, c: Tensor, bias: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
        """The options with impl="auto" replaced by what `linear_cross_entropy` takes for it, so that it can be told."""
        if options.get("impl") != choosing.AUTO or type(c) not in (Tensor, nn.Parameter):
            return options  # what processes share is refused by the function itself
        kind, dtypes = e.device.type, (e.dtype, c.dtype)
        if torch.is_autocast_enabled(kind) and torch.float64 not in dtypes:
            dtypes = (torch.get_autocast_dtype(kind),) * 2
        plain = bias is None and self.class_weight is None and self.softcap is None and self.temperature == 1
        plain = plain and self.reduction != "none" and not self.label_smoothing
        names = ("filter_eps", "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad")
        wanted = choosing.Options(
            options.get("tolerance"), options.get("workspace_mb"), plain, *(options[name] for name in names)
        )
        (v, d), where = c.shape, choosing.backend_of(e.device, *dtypes, options.get("backend", "auto"))
        found = choosing.resolve(e.numel() // d, v, d, torch.promote_types(*dtypes), where, wanted)
        return options | {"impl": found.impl, "workspace_mb": found.workspace_mb, "tolerance": None}


class HeadInput:
    """Stands for the hidden states on their way into `F.linear`."""

    def __init__(self, hidden: Tensor, task: Callable[[Tensor, Tensor, Tensor | None], Any]) -> None:
        self.hidden = hidden
        self.task = task

    def to(self, *args: Any, **kwargs: Any) -> HeadInput:
        return HeadInput(self.hidden.to(*args, **kwargs), self.task)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.__name__ != "linear":
            raise TypeError(f"the head is no plain F.linear of its input: it calls {func.__name__} on it")
        given = dict(zip(("input", "weight", "bias"), args)) | (kwargs or {})
        return given["input"].task(given["input"].hidden, given["weight"], given.get("bias"))


def _asking(linear: Callable[..., Any]) -> Callable[..., Any]:
    """An F.linear that somebody has put in place of torch's, as ZeRO-3 of DeepSpeed does for the whole process, made to
    know a `HeadInput`, which torch's own would have asked for its `__torch_function__`."""

    @functools.wraps(linear)
    def asks(input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
        if type(input) is HeadInput:
            return input.task(input.hidden, weight, bias)
        return linear(input, weight, bias)

    asks._cce_asks = True  # type: ignore[attr-defined]
    return asks


class HeadHook:
    """The forward pre-hook of a head. Idle unless `task` says what to do in place of the product."""

    def __init__(self) -> None:
        self.task: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.task is None:
            return None
        (hidden,) = args  # nn.Linear takes one
        return (HeadInput(hidden, self.task),)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeadHook, ()


def install(head: nn.Module) -> HeadHook:
    """The hook of a head, put there if it is missing, and behind all others, which so see real hidden states."""
    hooks: Any = head._forward_pre_hooks
    if KEY not in hooks:
        hooks[KEY] = HeadHook()
    if not (isinstance(F.linear, types.BuiltinFunctionType) or hasattr(F.linear, "_cce_asks")):
        F.linear = _asking(F.linear)
    return hooks[KEY]


def remove(head: nn.Module) -> None:
    """The head without its hook."""
    hooks: Any = head._forward_pre_hooks
    hooks.pop(KEY, None)


class Request:
    """One forward of a model with labels, and what it asks of its head."""

    def __init__(
        self,
        model: str,
        head: nn.Linear,
        labels: Tensor,
        shift: bool,
        options: Options,
        counts: Counts,
    ) -> None:
        self.model = model
        self.head = head
        self.labels = labels
        self.shift = shift  # the model may shift them
        self.options = options
        self.counts = counts
        self.open = True  # the model's forward has not returned
        self.called = False  # the head, by it

    def run(self, hidden: Tensor, loss: Loss | None, autocast: torch.dtype | None) -> Any:
        """The head's own call on (..., D) hidden states, its product or the loss in its place, under the autocast that
        it was first called under."""
        kind = hidden.device.type
        if autocast == (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None):
            return self._run(hidden, loss)
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            return self._run(hidden, loss)

    def _run(self, hidden: Tensor, loss: Loss | None) -> Any:
        hook = install(self.head)
        before = hook.task
        if loss is None:
            hook.task = None
        else:
            override = self.open and self.options.reduction != "mean"
            if override:
                loss = dataclasses.replace(loss, reduction=self.options.reduction)
            hook.task = lambda e, c, bias: loss(e, c, bias, self.options.loss, self.counts)
        try:
            result = self.head(hidden)
        finally:
            hook.task = before
        if loss is not None and override and loss.reduction == "none":
            result = self.unflattened(result, loss)
        return result

    def unflattened(self, losses: Tensor, loss: Loss) -> Tensor:
        """(N,) losses in the shape of the labels, without the last column where the model has shifted them."""
        labels = self.labels
        if labels.ndim < 2 or losses.numel() % max(labels[..., 0].numel(), 1):
            return losses
        rows = losses.view(*labels.shape[:-1], -1)
        if rows.shape[-1] != labels.shape[-1]:
            return rows if rows.shape[-1] == labels.shape[-1] - 1 else losses
        if not self.shift:
            return rows
        targets = loss.targets.view(rows.shape).to(labels.device)
        shifted = torch.equal(targets[..., :-1], labels[..., 1:]) and bool(
            (targets[..., -1] == loss.ignore_index).all()
        )
        return rows[..., :-1] if shifted else rows

    def count(self, operation: str) -> None:
        """Logits are computed because `operation` wants them; said once for each operation."""
        if torch.compiler.is_compiling():
            return
        self.counts.materialised += 1
        self.counts.operations[operation] += 1
        if self.counts.operations[operation] == 1:
            where = "the model" if self.open else "something after the model"
            warnings.warn(
                f"cce_patch: {where} needs the logits of {self.model} for {operation!r}, so they are computed "
                "(said once; cce_counts(model) counts)",
                stacklevel=2,
            )
