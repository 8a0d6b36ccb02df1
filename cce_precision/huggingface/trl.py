"""What TRL's trainers (from 1.16) ask of a model in place of its loss, answered by one call of `linear_cross_entropy`.

They give the model a forward that, called with `fused_lm_head=True`, returns a `FusedCausalLMOutput`: log-probabilities
by token, from a product of its own with the head's weight. Here the model's own forward runs, its head deferred, so
that scales, softcaps and biases are the model's, and its lazy logits are asked for the same fields.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor

from ..interface import IGNORE_INDEX
from .logits import LazyLogits, fused

__all__ = ["KEYWORD", "FusedHead", "answer", "fused_head"]

KEYWORD = "fused_lm_head"
FIELDS = {"log_probs": None, "entropy": "return_entropy", "is_top1": "return_argmax"}


class FusedHead(NamedTuple):
    """What a trainer told TRL's `add_fused_lm_head`."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]


def fused_head(forward: Any) -> FusedHead | None:
    """What a forward made by `add_fused_lm_head` computes; None for any other.

    Raises NotImplementedError where `linear_cross_entropy` cannot compute it.
    """
    function = getattr(forward, "__func__", forward)
    if not inspect.isfunction(function) or KEYWORD not in function.__code__.co_varnames:
        return None
    told = inspect.getclosurevars(function).nonlocals
    unknown = [name for name in FusedHead._fields if name not in told]
    if unknown:
        raise NotImplementedError(f"cce_patch does not know the fused head of this TRL, which has no {unknown}")
    head = FusedHead(*(told[name] for name in FusedHead._fields))
    others = [name for name in head.outputs if name not in FIELDS]
    if others:
        raise NotImplementedError(
            f"cce_patch: this trainer of TRL needs {', '.join(others)} from its fused head, which linear_cross_entropy "
            "does not compute: leave its model unpatched (uncce_patch)"
        )
    return head


def answer(model: Any, head: FusedHead, output: Any, asked: dict[str, Any]) -> Any:
    """TRL's output from that of the model's own forward; `asked`: labels, shift_labels and num_items_in_batch.

    Raises RuntimeError where the logits are computed already.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    if type(output.logits) is not LazyLogits:
        raise RuntimeError(
            f"cce_patch: TRL's loss of this {type(model).__name__} cannot be fused, because its forward computes the "
            "logits: leave it unpatched (uncce_patch); of a copy made after the trainer, it is the original's forward"
        )
    logits: Any = output.logits
    labels, count = asked["shift_labels"], asked["num_items_in_batch"]
    if labels is None:
        logits, labels = logits[:, :-1], asked["labels"][:, 1:]
    labels = labels.to(logits.device)
    mask = labels != IGNORE_INDEX  # (B, T), the shape of all that follows
    if head.cast_lm_head_to_fp32:
        logits = logits._with(hidden=logits._hidden.float(), autocast=None)
    returns = tuple(flag for name in head.outputs if (flag := FIELDS[name]))
    result = fused(logits, labels, IGNORE_INDEX, "none", temperature=head.temperature, returns=returns)
    nll: Tensor = result.loss if returns else result
    loss = nll.sum() / (mask.sum().clamp(min=1) if count is None else count)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=-nll,
        entropy=result.entropy if "entropy" in head.outputs else None,
        is_top1=(result.argmax == labels) & mask if "is_top1" in head.outputs else None,
        label_mask=mask,
        aux_loss=aux_loss,
    )
