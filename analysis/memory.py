"""Memory of one training step by model, with and without the logits, and the batch that fits: Figure 1 of arXiv
2411.09009.

For B tokens in all, with the model sharded over the GPUs (FSDP), activations checkpointed at every layer, 16-bit
weights and a 16-bit AdamW:

    weights      8 bytes a parameter: weight, gradient and the optimizer's two moments, 2 bytes each
    activations  2 B D L bytes: one 16-bit hidden state a token and layer
    logits       4 B V bytes: fp32 log-probabilities

A GPU keeps `RESERVE` of its memory for everything else (buffers of communication, recomputed layers, fragmentation).
The largest batch is (GPUs (memory - reserve) - weights) / (bytes a token); without the logits their bytes a token fall
away. A variant's own scratch (a few hundred MiB a GPU whatever the batch) belongs to the reserve.
"""

from __future__ import annotations

import difflib
from typing import Any

from cce_precision.analysis.shapes import MODELS, Model

__all__ = ["RESERVE", "row", "rows", "table"]

GIB, MIB = 2**30, 2**20
RESERVE = 5.0  # GiB a GPU
BYTES_PER_PARAMETER = 8
BYTES_PER_ACTIVATION = 2
BYTES_PER_LOGIT = 4


def row(model: Model, gpus: int = 16, gigabytes: float = 80.0, tokens: int = 65536) -> dict[str, Any]:
    """MiB of logits, activations and weights at `tokens`, the largest batch with and without logits, and their
    ratio."""
    weights = BYTES_PER_PARAMETER * model.parameters
    activations = BYTES_PER_ACTIVATION * model.width * model.layers  # a token
    logits = BYTES_PER_LOGIT * model.vocabulary  # a token
    room = gpus * (gigabytes - RESERVE) * GIB - weights
    before, after = (max(0, int(room // per_token)) for per_token in (activations + logits, activations))
    return {
        "model": model.name,
        "logits_mib": tokens * logits / MIB,
        "activations_mib": tokens * activations / MIB,
        "weights_mib": weights / MIB,
        "logits_share": logits * tokens / ((logits + activations) * tokens + weights),
        "batch_with_logits": before,
        "batch_without_logits": after,
        "increase": after / before if before else float("nan"),
    }


def rows(model: str = "all", gpus: int = 16, gigabytes: float = 80.0, tokens: int = 65536) -> list[dict[str, Any]]:
    """The rows of one model or of all. Raises ValueError for an unknown name, listing the known ones."""
    if model != "all" and model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{model!r} is no known model; known: all, {', '.join(MODELS)}{hint}")
    chosen = list(MODELS.values()) if model == "all" else [MODELS[model]]
    return [row(one, gpus, gigabytes, tokens) for one in chosen]


def table(rows: list[dict[str, Any]], gpus: int, gigabytes: float, tokens: int) -> Any:
    """The rows as a rich table."""
    from rich.table import Table

    drawn = Table(
        title=f"memory of a step with {tokens:,} tokens (MiB over all GPUs), "
        f"and the largest batch on {gpus} GPUs of {gigabytes:g} GiB",
        title_justify="left",
        caption=f"{BYTES_PER_PARAMETER} bytes a parameter (16-bit weight, gradient, moments), a 16-bit hidden state "
        f"a token and layer, fp32 log-probabilities; {RESERVE:g} GiB a GPU held back. "
        "Source: arXiv 2411.09009, Figure 1.",
        caption_justify="left",
    )
    drawn.add_column("model")
    for heading in (
        "logits",
        "activations",
        "weights + optimizer",
        "logits' share",
        "batch with logits",
        "without",
        "increase",
    ):
        drawn.add_column(heading, justify="right")
    for one in rows:
        drawn.add_row(
            one["model"],
            *(f"{one[key]:,.0f}" for key in ("logits_mib", "activations_mib", "weights_mib")),
            f"{one['logits_share']:.0%}",
            *(f"{one[key]:,}" for key in ("batch_with_logits", "batch_without_logits")),
            f"{one['increase']:.1f}x",
        )
    return drawn
