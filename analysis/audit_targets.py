"""What an audit can be pointed at: functions of other packages, of a user, and every variant of this one.

A call is text, `target(e, c, targets, reduction='sum')`: what the audit runs is what its snippets print.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cce_precision.numerics import Variant
from cce_precision.variants import ALL, get

__all__ = ["CAREFUL", "FAMILIES", "STORED", "STYLES", "TARGETS", "Style", "Target", "Unavailable", "targets"]

# What an implementation is measured by where it makes no promise of its own.
STORED = dataclasses.replace(ALL["baseline"], name="stored")
CAREFUL = Variant("careful", "fp32 logits, complement form, dZ rounded once, fp32 sums rounded once", label_apart=False)


class Unavailable(Exception):
    """A target that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Style:
    """How a function takes e, c and targets, and what it calls the options."""

    arguments: str = "e, c, targets"
    keywords: Mapping[str, str] = field(default_factory=dict)  # of "bias", "softcap", "reduction": the function's names


STYLES = {
    "ours": Style(keywords={"bias": "bias", "softcap": "softcap", "reduction": "reduction"}),
    "functional": Style(keywords={"bias": "linear_bias", "reduction": "reduction"}),  # torch.nn.functional
    "fla": Style("e, targets, c", {"bias": "bias", "softcap": "logit_softcapping", "reduction": "reduction"}),
    "weight-first": Style("c, e, targets", {"bias": "bias", "softcap": "softcap", "reduction": "reduction"}),
}


@dataclass(frozen=True)
class Target:
    """A function with the text of its call. `promise`: the variant whose bound it must keep; None: none of its own."""

    name: str
    function: str  # module:attribute
    style: str = "ours"
    extra: str = ""  # more arguments, as text
    package: str = "torch"  # whose version the card gives
    promise: str | None = None
    reductions: tuple[str, ...] = ("mean", "sum", "none")
    logits: bool = False  # whether it is documented to hold the logits

    @property
    def own(self) -> bool:
        return self.promise is not None and self.package == "cce-precision"

    @property
    def variant(self) -> Variant:
        """The numerics whose bound is allowed in the accuracy cases."""
        return STORED if self.promise is None else ALL[self.promise]

    @property
    def setup(self) -> str:
        """The import of a snippet."""
        module, _, name = self.function.partition(":")
        return f"from {module} import {name} as target"

    def text(self, given: Mapping[str, str]) -> str:
        """The call with options, each the text of a value."""
        style = STYLES[self.style]
        options = "".join(f", {style.keywords[name]}={value}" for name, value in given.items())
        return f"target({style.arguments}{options}{self.extra})"

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        module, _, name = self.function.partition(":")
        try:
            return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from None
        except AttributeError:
            raise Unavailable(f"{module} ({self.version}) has no {name}") from None
        except Exception as error:  # a package may fail in its own ways while it is imported
            raise Unavailable(f"{module}: {type(error).__name__}: {error}") from None

    @functools.cached_property
    def offers(self) -> frozenset[str]:
        """Options that the function has. Raises Unavailable."""
        keywords = STYLES[self.style].keywords
        try:
            parameters = inspect.signature(self._function).parameters
        except (TypeError, ValueError):  # no signature: it may take anything
            return frozenset(keywords)
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return frozenset(name for name, theirs in keywords.items() if anything or theirs in parameters)

    @functools.cached_property
    def version(self) -> str:
        if self.package == "torch":
            return torch.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            module = importlib.import_module(self.function.partition(":")[0].partition(".")[0])
            return str(getattr(module, "__version__", "unknown"))

    def bind(self, given: Mapping[str, str]) -> Callable[..., Tensor]:
        """The function (e, c, targets, bias=None) -> loss that a call with these options is. Raises Unavailable."""
        return _bound(self.text(given), self._function)


@functools.lru_cache(maxsize=256)
def _bound(text: str, function: Callable[..., Any]) -> Callable[..., Tensor]:
    space: dict[str, Any] = {"torch": torch, "target": function}
    exec(f"def call(e, c, targets, bias=None):\n    return {text}\n", space)
    return space["call"]  # type: ignore[no-any-return]


def _ours(name: str) -> Target:
    extra = f", impl={name!r}" + (", seed=0" if ALL[name].random else "")
    logits = ALL[name].path.value != "tiled"
    function = "cce_precision:linear_cross_entropy"
    return Target(name, function, extra=extra, package="cce-precision", promise=name, logits=logits)


TARGETS = {
    target.name: target
    for target in (
        *map(_ours, ALL),
        Target("torch", "torch.nn.functional:linear_cross_entropy", "functional", logits=True),
        Target(
            "torch-chunked",
            "torch.nn.functional:linear_cross_entropy",
            "functional",
            ", options=torch.nn.LinearCrossEntropyOptions()",
        ),
        Target(
            "torch-chunked-accurate",
            "torch.nn.functional:linear_cross_entropy",
            "functional",
            ", options=torch.nn.LinearCrossEntropyOptions(acc_policy='accurate')",
        ),
        Target(
            "cut:cce",
            "cut_cross_entropy:linear_cross_entropy",
            extra=", impl='cce'",
            package="cut-cross-entropy",
            promise="cce",
        ),
        Target(
            "liger",
            "liger_kernel.transformers.functional:liger_fused_linear_cross_entropy",
            package="liger-kernel",
        ),
        Target(
            "fla",
            "fla.modules.fused_linear_cross_entropy:fused_linear_cross_entropy_loss",
            "fla",
            package="fla-core",
            reductions=("mean", "sum"),
        ),
        Target(
            "quack",
            "quack.linear_cross_entropy:chunked_linear_cross_entropy",
            extra=", tuned=False",  # its tuner would time 44 tilings of a product for every shape here
            package="quack-kernels",
            reductions=("mean", "sum"),
        ),
    )
}
FAMILIES = {
    "torch": ("torch", "torch-chunked", "torch-chunked-accurate"),
    "cut-cross-entropy": ("cut:cce",),
    "variants": tuple(ALL),
}


def targets(text: str, style: str = "ours") -> list[Target]:
    """The targets that a name stands for, or the one at module:function, which takes its arguments in `style`.

    Raises ValueError for an unknown name or style, listing the known ones.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if text in FAMILIES:
        return [TARGETS[name] for name in FAMILIES[text]]
    if text in TARGETS:
        return [TARGETS[text]]
    module, _, name = text.partition(":")
    if module and name.isidentifier():
        return [Target(text, text, style, package=module.partition(".")[0])]
    try:
        return [TARGETS[get(text).name]]  # an alias
    except ValueError:
        known = [*FAMILIES, *TARGETS]
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{text!r} is no known target; known: {', '.join(dict.fromkeys(known))}, and module:function{hint}"
        ) from None
