"""`cce_patch` and `uncce_patch`: which models leave their loss to `linear_cross_entropy`.

The class's forward is replaced by one that looks for labels; what it does is decided by the `Patch` that the class or
the instance carries, so that copies, pickles and models made later carry it too.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..interface import linear_cross_entropy
from ..variants import DEFAULT, get
from .head import KEY, Counts, HeadHook, Options, Request, install, remove
from .logits import LazyLogits, deferred
from .trl import KEYWORD, answer, fused_head

__all__ = ["cce_counts", "cce_patch", "uncce_patch"]

ATTRIBUTE = "_cce_patch"
ORIGINALS = "_cce_originals"  # a wrapped class's own functions
INNER = "_cce_inner_forwards"  # an instance's own forwards, which others have given it and the wrapper stands before
# What the model itself decides, call by call.
DECIDED = {
    "ignore_index", "softcap", "shift", "temperature", "label_smoothing", "class_weight",
    "return_lse", "return_entropy", "return_argmax", "return_stats",
}  # fmt: skip


class Patch:
    """How a class, or one instance of it, computes its loss."""

    living: weakref.WeakKeyDictionary[type, weakref.WeakSet[Patch]] = weakref.WeakKeyDictionary()

    def __init__(self, cls: type[nn.Module], options: Options) -> None:
        self.cls = cls
        self.options = options
        self.counts = Counts()
        self.reached = False  # by the forward that runs now
        self.told = False  # that the loss is somebody else's
        _wrap_class(cls)
        Patch.living.setdefault(cls, weakref.WeakSet()).add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Patch, (self.cls, self.options)  # a copy patches its class too, in whatever process it is made

    def foreign(self, model: nn.Module, why: str) -> None:
        """Says, once, that a loss is none of ours."""
        if not (self.told or torch.compiler.is_compiling()):
            self.told = True
            warnings.warn(
                f"cce_patch: {why}, so the loss of {type(model).__name__} is not that of linear_cross_entropy; "
                "a library that brings a loss of its own (Liger) has to leave it out",
                stacklevel=2,
            )

    def retire(self) -> None:
        """The class gets its own forward back when no patch of it lives."""
        others = Patch.living[self.cls]
        others.discard(self)
        if not others and ORIGINALS in self.cls.__dict__:
            _unwrap_class(self.cls)


def _wrapper(original: Callable[..., Any] | int, signature: inspect.Signature, fused: Any = None) -> Callable[..., Any]:
    """A forward that asks the head for a loss where labels are given.

    `original`: the class's own forward, or the place of an instance's own among its `INNER`; `fused`: what that one
    computes for TRL.
    """
    names = list(signature.parameters)
    position = names.index("labels") - 1 if "labels" in names else len(names)  # without self

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = self.__dict__[INNER][original] if isinstance(original, int) else functools.partial(original, self)
        patch = getattr(self, ATTRIBUTE, None)
        if patch is not None:
            patch.reached = True
        labels = kwargs.get("labels")
        if labels is None and len(args) > position:
            labels = args[position]
        if patch is None or (patch.options.train_only and not self.training):
            return inner(*args, **kwargs)
        if kwargs.get(KEYWORD):
            return _for_trl(self, patch, fused, inner, args, kwargs)
        return inner(*args, **kwargs) if labels is None else _with_labels(self, patch, labels, inner, args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _with_labels(
    model: nn.Module, patch: Patch, labels: Tensor, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    head, hook = _prepared_here(model)
    if hook.task is not None:  # a subclass's forward inside that of its base
        return inner(*args, **kwargs)
    if patch.options.reduction != "mean":
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
    request = Request(
        type(model).__name__, head, labels, kwargs.get("shift_labels") is None, patch.options, patch.counts
    )
    output = _deferring(request, hook, inner, args, kwargs)
    if not request.called:
        patch.foreign(model, "its forward does not call the head")
    return leave(output, model.training, patch.options)


def _for_trl(
    model: nn.Module, patch: Patch, fused: Any, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """What TRL's own forward would return, which then sees an ordinary call without labels."""
    if fused is None:
        raise RuntimeError("cce_patch came too late for TRL's trainer: patch the model before trainer.train()")
    if patch.options.reduction != "mean":
        raise ValueError(f"under TRL's trainer cce_patch needs reduction='mean', got {patch.options.reduction!r}")
    asked: dict[str, Any] = {name: kwargs.get(name) for name in ("labels", "shift_labels", "num_items_in_batch")}
    rest = {name: value for name, value in kwargs.items() if name not in asked and name != KEYWORD}
    head, hook = _prepared_here(model)
    request = Request(type(model).__name__, head, asked["labels"], False, patch.options, patch.counts)
    output = _deferring(request, hook, inner, args, rest | {"use_cache": False})
    return answer(model, fused, output, asked)


def _prepared_here(model: nn.Module) -> tuple[nn.Linear, HeadHook]:
    if getattr(model, "_is_replica", False):
        raise RuntimeError("cce_patch does not work under nn.DataParallel: use DistributedDataParallel (torchrun)")
    return prepared(model)


def _deferring(request: Request, hook: HeadHook, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The output of a forward whose head is left to `request`."""
    hook.task = deferred(request)
    try:
        return inner(*args, **kwargs)
    finally:
        hook.task = None
        request.open = False


def _stand_before(model: nn.Module) -> None:
    """Puts the wrapper before the forward that somebody has given this instance."""
    own = model.__dict__["forward"]
    fused, others = fused_head(own), model.__dict__.setdefault(INNER, [])
    wrapper = _wrapper(len(others), inspect.signature(type(model).forward), fused)
    others.append(own)
    model.__dict__["forward"] = MethodType(wrapper, model)


def prepared(model: Any) -> tuple[nn.Linear, HeadHook]:
    """The model's head, that of the adapter where one trains its own, and its hook, put there if it is missing.

    Raises TypeError for a head that is no plain `nn.Linear`, naming it.
    """
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):  # peft's wrapper
        own = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[head.active_adapters[0]] if own else head.original_module
    if not isinstance(head, nn.Module) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"cce_patch: the head of {type(model).__name__} must be an nn.Linear, got {type(head).__name__}"
            + (", which has a forward of its own" if isinstance(head, nn.Linear) else "")
            + (": merge the adapter, or train the head itself with modules_to_save" if _adapted(head) else "")
        )
    return head, install(head)  # type: ignore[return-value]


def watch(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook: says so where somebody has replaced the forward of a patched model, whose loss then is theirs."""
    patch = getattr(model, ATTRIBUTE, None)
    if patch is None or kwargs.get("labels") is None:
        return
    reached, patch.reached = patch.reached, False
    if not reached:
        patch.foreign(model, "somebody has replaced the forward since")


def _watched(model: Any) -> None:
    model._forward_hooks[KEY] = watch
    model._forward_hooks_with_kwargs[KEY] = True


def _adapted(head: Any) -> bool:
    return hasattr(head, "base_layer")


def leave(output: Any, training: bool, options: Options) -> Any:
    """The model's output as its caller gets it."""
    if type(output) is LazyLogits:
        if not options.return_logits:
            return None
        if not training:
            # ZeRO-3 hands the output to C++, which takes it at its word that it is a tensor.
            if torch.compiler.is_compiling() or validation.is_zero3(output._request.head.weight):
                return output._materialise("evaluation")
            output._left = True
        return output
    if isinstance(output, dict):  # a ModelOutput
        for name, value in list(output.items()):
            if type(value) is LazyLogits:
                output[name] = leave(value, training, options)
        return output
    if isinstance(output, tuple):
        return tuple(leave(x, training, options) if type(x) is LazyLogits else x for x in output)
    return output


def _wrap_class(cls: type[nn.Module]) -> None:
    """Puts the wrapper in place of a class's forward, and prepares the heads of models when they are made."""
    if ORIGINALS in cls.__dict__:
        return
    forward, init, assign = cls.forward, cls.__init__, cls.__setattr__
    wrapper = _wrapper(forward, inspect.signature(forward))
    for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        setattr(wrapper, name, getattr(forward, name, getattr(wrapper, name)))

    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls and getattr(cls, ATTRIBUTE, None) is not None:
            prepared(self)
            _watched(self)

    @functools.wraps(assign)
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        assign(self, name, value)
        if name == "forward" and getattr(self, ATTRIBUTE, None) is not None and fused_head(self.__dict__.get(name)):
            _stand_before(self)  # a trainer of TRL has given it to the patched model

    setattr(cls, ORIGINALS, {name: cls.__dict__.get(name) for name in ("forward", "__init__", "__setattr__")})
    cls.forward = wrapper  # type: ignore[method-assign]
    cls.__init__ = __init__  # type: ignore[method-assign]
    cls.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]


def _unwrap_class(cls: type[nn.Module]) -> None:
    for name, own in cls.__dict__[ORIGINALS].items():
        if own is None:  # inherited
            delattr(cls, name)
        else:
            setattr(cls, name, own)
    delattr(cls, ORIGINALS)


# -- the public functions ----------------------------------------------------------------------------------------------


def cce_patch(
    model_type_or_model_or_config: Any,
    impl: Any = DEFAULT,
    reduction: str = "mean",
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
    *,
    return_logits: bool = True,
    **options: Any,
) -> Any:
    """Makes a causal language model of transformers compute its loss by `linear_cross_entropy`, without logits.

    Args:
        model_type_or_model_or_config: a model type ("llama"), a config or a model class, whose class is patched, so
            that all its models are, those made later by `from_pretrained` or `from_config` too; or a model, which alone
            is patched (inside `PeftModel`, `torch.compile` or DistributedDataParallel as well).
        impl, filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: as `linear_cross_entropy`.
        reduction: "mean" leaves the reduction to the model (mean, or the sum over `num_items_in_batch`); "sum" and
            "none" override it. Of (B, T) labels that the model shifts, "none" gives a (B, T - 1) loss.
        train_only: True leaves a model in eval mode as it was.
        return_logits: False leaves None in the output where the logits would be, whenever labels are given.
        options: further options of `linear_cross_entropy`: backend, workspace_mb, seed, validate, ...;
            vocab_parallel_options where the head holds this process's rows alone and `config.vocab_size` is their
            number (labels are those of the whole vocabulary).

    Returns:
        The model, or the class that was patched.

    The model's own code runs unchanged: the shift, `shift_labels`, `ignore_index`, `num_items_in_batch`, softcap,
    scales, biases and auxiliary losses are whatever it makes of them. Only a forward with labels differs: its logits
    stay uncomputed until something reads them (then the real ones are computed, counted, and a warning names the
    operation), and `F.cross_entropy` of them is one fused call. The logits that such a forward returns are computed
    when they are read; RuntimeError if the head's weight has changed by then (which `torch.compile` and ZeRO-3 do not
    notice). Under DeepSpeed's ZeRO-3 all processes must read them, and those of a model in eval mode are computed.
    `generate` and calls without labels are what they were. `cce_counts(model)` tells how many losses were fused, and by
    which variant (what impl="auto" took). TRL's SFTTrainer, which from 1.16 asks for log-probabilities, entropies and
    top-1 hits by token instead of a loss, gets them from one such call as well, whether the model is patched before the
    trainer is made or between that and `train()` (a class only before its model is made). Another library that replaces
    the whole forward afterwards brings its own loss: a warning says so.

    Raises:
        TypeError: for a model whose head is no plain `nn.Linear`, naming it (a list of heads, a quantised head, an
            adapter on the head: train it with `modules_to_save`, or merge it); for arguments of the wrong type.
        ValueError: for an unknown model type or option.
        NotImplementedError: where a trainer of TRL wants of the patched model what `linear_cross_entropy` does not
            compute (mean logits: DPO, KTO).

    Error guarantee: that of `linear_cross_entropy` with this `impl`.
    """
    validation.check_reduction(reduction)
    allowed = validation.option_names(linear_cross_entropy) - DECIDED
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"cce_patch got an unknown option {name!r}; allowed beside its own: {', '.join(sorted(allowed))}"
            )
    loss = {
        "impl": impl,
        "filter_eps": filter_eps,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
        **options,
    }
    _check(loss)
    chosen = Options(reduction, bool(train_only), bool(return_logits), loss)
    if not isinstance(model_type_or_model_or_config, nn.Module):
        cls = _class_of(model_type_or_model_or_config)
        old = cls.__dict__.get(ATTRIBUTE)
        setattr(cls, ATTRIBUTE, Patch(cls, chosen))
        if old is not None:
            old.retire()
        return cls
    model = _unwrapped(model_type_or_model_or_config)
    prepared(model)  # raises before anything is changed, as this does:
    fused_head(model.__dict__.get("forward"))
    uncce_patch(model)
    prepared(model)
    _watched(model)
    setattr(model, ATTRIBUTE, Patch(type(model), chosen))
    if "forward" in model.__dict__:  # accelerate's, that of a model spread over devices, or TRL's
        _stand_before(model)
    return model_type_or_model_or_config


def _check(loss: dict[str, Any]) -> None:
    """Raises what `linear_cross_entropy` would for these options, before there is a model."""
    defaults = {name: p.default for name, p in inspect.signature(linear_cross_entropy).parameters.items()}
    values = defaults | loss
    validation.check_options(validation.Options(*(values[name] for name in validation.Options._fields)))
    if values["impl"] != "auto":
        names = ("filter_eps", "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad")
        get(values["impl"]).configure(*(values[name] for name in names))


def uncce_patch(model_type_or_model_or_config: Any) -> Any:
    """Undoes `cce_patch` of the same thing; nothing happens to what is not patched. Returns what `cce_patch` does.

    A model of a patched class is freed of that patch, alone. Raises as `cce_patch` for what is no model.
    """
    if not isinstance(model_type_or_model_or_config, nn.Module):
        cls = _class_of(model_type_or_model_or_config)
        patch = cls.__dict__.get(ATTRIBUTE)
        if patch is not None:
            delattr(cls, ATTRIBUTE)
            patch.retire()
        return cls
    model = _unwrapped(model_type_or_model_or_config)
    patch = model.__dict__.pop(ATTRIBUTE, None)
    if model.__dict__.get(INNER):
        model.__dict__["forward"] = model.__dict__[INNER].pop()
    if patch is not None:
        patch.retire()
    if getattr(type(model), ATTRIBUTE, None) is not None:
        setattr(model, ATTRIBUTE, None)
    else:
        for hooks in (model._forward_hooks, model._forward_hooks_with_kwargs):
            hooks.pop(KEY, None)  # type: ignore[call-overload, attr-defined]
        for module in model.modules():
            remove(module)
    return model_type_or_model_or_config


def cce_counts(model: Any) -> Counts:
    """How often the losses of a patched model (or class) were fused, and its logits computed after all.

    Raises ValueError where nothing is patched.
    """
    thing = _unwrapped(model) if isinstance(model, nn.Module) else _class_of(model)
    patch = getattr(thing, ATTRIBUTE, None)
    if patch is None:
        raise ValueError(f"{model!r} is not patched: call cce_patch first")
    return patch.counts


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside what others have put around it. Raises TypeError where there is none."""
    inner: Any = model
    while not callable(getattr(type(inner), "get_output_embeddings", None)) or hasattr(inner, "get_base_model"):
        inner = (
            inner.get_base_model()
            if hasattr(inner, "get_base_model")
            else next(
                (
                    getattr(inner, name)
                    for name in ("_orig_mod", "module")
                    if isinstance(getattr(inner, name, None), nn.Module)
                ),
                None,
            )
        )
        if inner is None:
            raise TypeError(
                f"cce_patch needs a model of transformers, with get_output_embeddings, got {type(model).__name__}"
            )
    return inner


def _class_of(thing: Any) -> type[nn.Module]:
    """The causal language model class of a model type, a config or a class."""
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        if not callable(getattr(thing, "get_output_embeddings", None)):
            raise TypeError(f"cce_patch needs a class with get_output_embeddings, got {thing.__name__}")
        return thing
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

    if isinstance(thing, str):
        known = sorted(name for name in CONFIG_MAPPING if name in MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping)
        if thing not in known:
            near = difflib.get_close_matches(thing, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{thing!r} is no model type with a causal language model; known: {', '.join(known)}{hint}"
            )
        config_class: Any = CONFIG_MAPPING[thing]
    elif isinstance(thing, PretrainedConfig):
        config_class = type(thing)
    else:
        raise TypeError(
            "cce_patch needs a model type, a config, a model or its class, "
            f"got {thing!r} of type {type(thing).__name__}"
        )
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config_class.__name__} has no causal language model in transformers")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return found[0] if isinstance(found, (tuple, list)) else found
