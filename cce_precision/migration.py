"""For those who come from another implementation: their keyword names lead to ours, and the original's enum of impls.

`docs/migration.md` has the table of calls.
"""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from .variants import ALL

__all__ = ["HINTS", "LinearCrossEntropyImpl", "suggests", "unknown_keyword"]

P = ParamSpec("P")
R = TypeVar("R")

# A variant by its name in capitals, as cut-cross-entropy lets one write it: impl=LinearCrossEntropyImpl.CCE.
LinearCrossEntropyImpl = enum.Enum(  # type: ignore[misc]
    "LinearCrossEntropyImpl",
    {
        name.upper().replace("-", "_"): name
        for variant in ALL.values()
        for name in dict.fromkeys((variant.name, *variant.aliases))
    },
    type=str,
    module=__name__,
)
LinearCrossEntropyImpl.__doc__ = "The variants by name; a member is its variant's name, and does wherever that does."

_EMBEDDINGS = "e, the (..., D) embeddings"
_CLASSIFIER = "c, the (V, D) classifier"
_TARGETS = "targets (with shift=1 where token i predicts token i + 1)"
_BIAS = "bias, (V,)"
_CLASS_WEIGHT = "class_weight, (V,)"
_Z_LOSS = "return_lse=True, and add coefficient * compute_z_loss(lse, targets) to the loss"
_SOFTCAP = "softcap"
_CHUNKS = "workspace_mb, the most scratch memory in MiB: blocks follow from it"
_SUMS = "accum_e_fp32 and accum_c_fp32; the default impl sums in fp32 anyway"
_ARGMAX = "return_argmax=True: the predicted class of each token"
_SCALE = "temperature, which divides the logits: 1 / scale"
_COUNT = "reduction='sum', and divide the loss by that number"
_SHARDED = "vocab_parallel_options, or DTensors, whose placements say it"

# Keyword names of Liger, quack, torchtune, PyTorch's F.linear_cross_entropy, Megatron, FLA, Unsloth and of models'
# configs.
HINTS = {
    "input": _EMBEDDINGS,
    "_input": _EMBEDDINGS,
    "x": _EMBEDDINGS,
    "hidden_states": _EMBEDDINGS,
    "embeddings": _EMBEDDINGS,
    "outputs": _EMBEDDINGS,
    "weight": f"{_CLASSIFIER}, or class_weight, (V,), where it weighs classes",
    "linear_weight": _CLASSIFIER,
    "lin_weight": _CLASSIFIER,
    "lm_head_weight": _CLASSIFIER,
    "classifier": _CLASSIFIER,
    "target": _TARGETS,
    "labels": _TARGETS,
    "linear_bias": _BIAS,
    "lin_bias": _BIAS,
    "ce_weight": _CLASS_WEIGHT,
    "lce_weight": _CLASS_WEIGHT,
    "class_weights": _CLASS_WEIGHT,
    "lse_square_scale": _Z_LOSS,
    "return_z_loss": _Z_LOSS,
    "z_loss": _Z_LOSS,
    "z_loss_scale": _Z_LOSS,
    "z_loss_multiplier": _Z_LOSS,
    "z_loss_weight": _Z_LOSS,
    "logit_softcapping": _SOFTCAP,
    "final_logit_softcapping": _SOFTCAP,
    "logits_soft_cap": _SOFTCAP,
    "soft_cap": _SOFTCAP,
    "softcapping": _SOFTCAP,
    "chunk_size": _CHUNKS,
    "num_chunks": _CHUNKS,
    "num_output_chunks": _CHUNKS,
    "chunk_mem_const": _CHUNKS,
    "batch_chunk_size": _CHUNKS,
    "chunking_method": _CHUNKS,
    "options": f"impl for the numerics, and {_CHUNKS}",
    "accum_dtype": _SUMS,
    "acc_dtype": _SUMS,
    "acc_policy": _SUMS,
    "accumulate_grad_in_fp32": _SUMS,
    "use_kahan": "impl='cce_kahan'",
    "kahan": "impl='cce_kahan'",
    "compiled": "impl='torch_compile'",
    "return_token_accuracy": _ARGMAX,
    "return_predicted_tokens": _ARGMAX,
    "return_predictions": _ARGMAX,
    "use_token_scaling": "reduction='none', and multiply each token's loss by what it shall weigh",
    "logit_scale": _SCALE,
    "logits_scaling": _SCALE,
    "inverse_temperature": _SCALE,
    "num_items_in_batch": _COUNT,
    "n_items": _COUNT,
    "tp_group": _SHARDED,
    "tp_enabled": _SHARDED,
    "size_average": "reduction",
    "reduce": "reduction",
    "eps": "filter_eps",
    "shift_labels": "shift",
    "inplace_backward": "nothing: e and c are never overwritten",
    "tuned": "nothing: launch settings are fixed, so that results repeat",
}


def unknown_keyword(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that a function does not have: what it is called here, or the nearest name."""
    known = sorted(known)
    if name in HINTS:
        advice = f"here that is {HINTS[name]}" if not HINTS[name].startswith("nothing") else f"it needs {HINTS[name]}"
    elif near := difflib.get_close_matches(name, known, n=1):
        advice = f"did you mean {near[0]!r}?"
    else:
        advice = f"allowed: {', '.join(known)}"
    return TypeError(f"{function} got an unknown option {name!r}; {advice}")


def suggests(function: Callable[P, R]) -> Callable[P, R]:
    """The function or method, whose error for a keyword that it does not have says what to write instead."""
    known = frozenset(inspect.signature(function).parameters) - {"self"}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise unknown_keyword(function.__qualname__, name, known)
        return function(*args, **kwargs)

    return call
