"""`LazyLogits`: the output of a head that nobody has computed yet, and what models do to it before the loss.

A plain object, no subclass of Tensor, so that `torch.compile` traces it as Python: every function of torch that is
given one comes to `__torch_function__`, every method and operator of a tensor comes there too. What models put between
head and loss is remembered (`HANDLERS`): casts and views, leading indices (applied to the hidden states at once),
`[..., :n]`, products with a positive number, tanh, the sum with a vector over the vocabulary. Together they are
z = cap(e c^T + bias) / temperature, which `linear_cross_entropy` computes, and `F.cross_entropy` or `F.nll_loss` of
them is that call. Everything else computes the logits, by the head itself, and then is what it always was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .head import Loss, Request

__all__ = ["LazyLogits", "deferred", "fused", "materialise"]

SELF = object()  # stands for the logits in a remembered call


class Formula(NamedTuple):
    """z = cap(y + sum of the biases) / divisor over the first `columns` classes, y being the head's output."""

    columns: int
    softcap: float | None = None
    divisor: float = 1.0
    biases: tuple[tuple[Tensor, float], ...] = ()  # (vector over the columns, its factor)
    normalised: bool = False  # the log-softmax of z


class LazyLogits:
    """The (..., V) logits of `hidden` (..., D) under `request`'s head; shape, dtype and device are known, values not.

    Reading values computes them, with the head's weight as it then is: RuntimeError where it has changed since.
    """

    _left = False  # the model: from then on it passes for a tensor

    def __init__(
        self,
        request: Request,
        hidden: Tensor,
        dtype: torch.dtype,
        formula: Formula,
        steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...] = (),
        autocast: torch.dtype | None = None,
        weight: tuple[Tensor, int] | None = None,
    ) -> None:
        self._request = request
        self._hidden = hidden
        self._dtype = dtype
        self._formula = formula
        self._steps = steps  # what happened to the values since the head, for those who need them
        self._autocast = autocast
        self._weight = weight  # the head's, and its version, while nobody has changed it
        self._real: Tensor | None = None

    def _with(self, **changes: Any) -> LazyLogits:
        new = LazyLogits(
            self._request,
            changes.get("hidden", self._hidden),
            changes.get("dtype", self._dtype),
            changes.get("formula", self._formula),
            changes.get("steps", self._steps),
            changes.get("autocast", self._autocast),
            self._weight,
        )
        if self._left:
            new._left = True
        return new

    def _after(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **changes: Any) -> Any:
        """These logits after one more call, which is remembered."""
        step = (func, tuple(SELF if a is self else a for a in args), kwargs)
        return self._with(steps=(*self._steps, step), **changes)

    # -- what is known without values --

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._formula.columns))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return self._hidden.ndim

    @property
    def requires_grad(self) -> bool:
        return self._hidden.requires_grad or self._request.head.weight.requires_grad

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """Tensor once the model has returned it: what gathers or detaches tensors then sees one, as with any proxy."""
        return Tensor if self._left else LazyLogits

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self._dtype}, device={self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return materialise, (self._materialise("pickle").detach(),)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"logits have no attribute {name!r}")
        return getattr(self._materialise(name), name)

    # -- values --

    def _materialise(self, operation: str) -> Tensor:
        """The values, computed at the first call and kept; `operation` is what wants them."""
        if self._real is None:
            request = self._request
            weight = request.head.weight
            if self._weight is not None and weight is self._weight[0] and weight._version != self._weight[1]:
                raise RuntimeError(
                    "these logits were never computed, and the head's weight has changed since the model returned "
                    "them (an optimizer step?): read them before that, or call the model again"
                )
            request.count(operation)
            real = request.run(self._hidden, None, self._autocast)
            for func, args, kwargs in self._steps:
                real = func(*(real if a is SELF else a for a in args), **kwargs)
            self._real = real
        return self._real

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        lazy = next((a for a in args if isinstance(a, LazyLogits)), None)
        if lazy is None:
            lazy = kwargs.get("input")
        if type(lazy) is LazyLogits and lazy._real is None and (not lazy._left or name in KEPT):
            handler = HANDLERS.get(name)
            result = None if handler is None else handler(lazy, func, args, kwargs)
            if result is not None:
                return result
        values = lambda x: materialise(x, name)  # noqa: E731
        return func(*tree_map(values, args), **tree_map(values, kwargs))


def deferred(request: Request) -> Callable[[Tensor, Tensor, Tensor | None], LazyLogits]:
    """What to do in place of the head's product while a model's forward runs: nothing yet."""

    def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
        request.called = True
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        counted = not (torch.compiler.is_compiling() or weight.is_inference())
        known = (weight, weight._version) if counted else None
        return LazyLogits(
            request, hidden, autocast or hidden.dtype, Formula(weight.shape[0]), autocast=autocast, weight=known
        )

    return product


def materialise(x: Any, operation: str = "read") -> Any:
    """The values of x where it is lazy, else x."""
    return x._materialise(operation) if type(x) is LazyLogits else x


# -- what stays lazy: handler(logits, func, args, kwargs) -> result, or None where values are needed -------------------


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda x, func, args, kwargs: x._after(func, args, kwargs, dtype=dtype)


def _to(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    dtype = x._dtype
    for wanted in (*args[1:], kwargs.get("dtype"), kwargs.get("device"), kwargs.get("other")):
        if isinstance(wanted, Tensor):
            dtype, wanted = wanted.dtype, wanted.device
        if isinstance(wanted, torch.dtype):
            dtype = wanted
        elif isinstance(wanted, (torch.device, str, int)) and not isinstance(wanted, bool):
            device = torch.device(wanted)
            if device.type == x.device.type == "cuda" and device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            if device != x.device:
                return None
    return x._after(func, args, kwargs, dtype=dtype) if dtype.is_floating_point else None


def _same(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    return x._with()


def _factor(x: LazyLogits, args: Any, kwargs: Any) -> float | None:
    """The other operand of a product, where it is a positive number."""
    if len(args) != 2 or kwargs or x._formula.normalised:
        return None
    other = args[1] if args[0] is x else args[0]
    number = isinstance(other, (int, float)) and not isinstance(other, bool)
    return float(other) if number and 0 < other < math.inf else None


def _mul(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    factor = _factor(x, args, kwargs)
    if factor is None:
        return None
    return x._after(func, args, kwargs, formula=x._formula._replace(divisor=x._formula.divisor / factor))


def _div(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    factor = _factor(x, args, kwargs) if args[0] is x else None
    if factor is None:
        return None
    return x._after(func, args, kwargs, formula=x._formula._replace(divisor=x._formula.divisor * factor))


def _tanh(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    if x._formula.softcap is not None or x._formula.normalised or kwargs:
        return None
    # tanh(y / s) is cap(y) / s with s as the softcap
    return x._after(func, args, kwargs, formula=x._formula._replace(softcap=x._formula.divisor))


def _add(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    other = args[1] if args[0] is x else args[0]
    formula = x._formula
    fits = (
        type(other) is not LazyLogits
        and isinstance(other, Tensor)
        and other.ndim >= 1
        and other.shape[-1] == other.numel() == formula.columns
        and other.ndim <= x.ndim
    )
    if not fits or kwargs or formula.softcap is not None or formula.normalised:
        return None
    biases = (*formula.biases, (other.reshape(-1), formula.divisor))
    dtype = torch.promote_types(x._dtype, other.dtype)
    return x._after(func, args, kwargs, formula=formula._replace(biases=biases), dtype=dtype)


def _index(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(type(item) is LazyLogits or isinstance(item, (list, range)) for item in index):
        return None
    taken = sum(
        item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        for item in index
        if item is not None and item is not Ellipsis
    )
    free = x.ndim - taken
    if free < 0:
        return None
    gap = next((i for i, item in enumerate(index) if item is Ellipsis), len(index))
    leading = (*index[:gap], *(slice(None),) * free, *index[gap + 1 :])
    last = leading[-1]
    if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
        return None
    hidden = x._hidden[(*leading[:-1], slice(None))]
    if last.stop is None or last.stop >= x._formula.columns:
        return x._with(hidden=hidden)
    formula = x._formula
    if last.stop <= 0 or formula.biases or formula.normalised:
        return None
    columns = (SELF, (Ellipsis, slice(None, last.stop)))
    return x._with(
        hidden=hidden,
        formula=formula._replace(columns=last.stop),
        steps=(*x._steps, (Tensor.__getitem__, columns, {})),
    )


def _view(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    shape = args[1:] or (kwargs.get("shape", kwargs.get("size")),)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or not all(isinstance(n, (int, torch.SymInt)) for n in shape):
        return None
    *leading, last = shape
    if last != x._formula.columns:
        known = math.prod(leading) == math.prod(x._hidden.shape[:-1])
        if last != -1 or -1 in leading or not known:
            return None
    return x._with(hidden=x._hidden.reshape(*leading, x._hidden.shape[-1]))


def _flatten(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    start = args[1] if len(args) > 1 else kwargs.get("start_dim", 0)
    end = args[2] if len(args) > 2 else kwargs.get("end_dim", -1)
    if end % x.ndim == x.ndim - 1:
        return None
    return x._with(hidden=x._hidden.flatten(start % x.ndim, end % x.ndim))


def _squeeze(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int) or dim % x.ndim == x.ndim - 1:
        return None
    return x._with(hidden=x._hidden.squeeze(dim % x.ndim))


def _transpose(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 3 or kwargs or any(dim % x.ndim == x.ndim - 1 for dim in args[1:]):
        return None
    return x._with(hidden=x._hidden.transpose(args[1] % x.ndim, args[2] % x.ndim))


def _size(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return x.shape if dim is None else x.shape[dim]


def _is_contiguous(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    return not x._left  # outside, who needs memory asks for a contiguous copy and gets the values


def _log_softmax(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    dtype = kwargs.get("dtype") or x._dtype
    if len(args) > 2 or dim not in (-1, x.ndim - 1) or x._formula.normalised or not dtype.is_floating_point:
        return None
    return x._after(func, args, kwargs, formula=x._formula._replace(normalised=True), dtype=dtype)


def _cross_entropy(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    return None if x._formula.normalised else _loss(x, args, kwargs)


def _nll_loss(x: LazyLogits, func: Any, args: Any, kwargs: Any) -> Any:
    return _loss(x, args, kwargs) if x._formula.normalised else None


PARAMETERS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def _loss(x: LazyLogits, args: Any, kwargs: Any) -> Any:
    """The loss without the logits, where `linear_cross_entropy` can compute it."""
    given = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0} | dict(zip(PARAMETERS, args)) | kwargs
    target, weight = given["target"], given.get("weight")
    indices = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == x.shape[:-1]
    if x.ndim != 2 or not indices or given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    weight = None if weight is None else weight.detach()
    return fused(x, target, given["ignore_index"], given["reduction"], float(given["label_smoothing"]), weight)


def fused(
    x: LazyLogits,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    returns: tuple[str, ...] = (),
) -> Any:
    """`linear_cross_entropy` of these logits over `temperature`, with what the names in `returns` make it return."""
    formula = x._formula
    loss = Loss(
        target,
        ignore_index,
        reduction,
        label_smoothing,
        class_weight,
        formula.columns,
        formula.softcap,
        formula.divisor * temperature,
        formula.biases,
        returns,
    )
    return x._request.run(x._hidden, loss, x._autocast)


HANDLERS: dict[str, Callable[..., Any]] = {
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "to": _to,
    "type_as": _to,
    "contiguous": _same,
    "clone": _same,
    "is_contiguous": _is_contiguous,
    "size": _size,
    "dim": lambda x, func, args, kwargs: x.ndim,
    "numel": lambda x, func, args, kwargs: math.prod(x.shape),
    "is_floating_point": lambda x, func, args, kwargs: True,
    "mul": _mul,
    "multiply": _mul,
    "__mul__": _mul,
    "__rmul__": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "__truediv__": _div,
    "add": _add,
    "__add__": _add,
    "__radd__": _add,
    "tanh": _tanh,
    "__getitem__": _index,
    "view": _view,
    "reshape": _view,
    "flatten": _flatten,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "log_softmax": _log_softmax,
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
}
# What stays lazy outside the model too: questions about it, casts, and the loss.
KEPT = {"float", "to", "type_as", "size", "dim", "numel", "is_contiguous", "is_floating_point", "cross_entropy"}
OPERATORS = (
    "sub", "rsub", "rtruediv", "floordiv", "rfloordiv", "mod", "pow", "rpow", "matmul", "rmatmul", "neg", "abs",
    "invert", "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne", "setitem", "len", "iter", "bool", "int", "float",
    "contains", "array",
)  # fmt: skip


def _method(name: str) -> Callable[..., Any]:
    func = getattr(Tensor, name)

    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return LazyLogits.__torch_function__(func, (LazyLogits,), (self, *args), kwargs)

    method.__name__ = name
    return method


for _name in (*HANDLERS, *(f"__{name}__" for name in OPERATORS)):
    if hasattr(Tensor, _name):
        setattr(LazyLogits, _name, _method(_name))
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
