"""What a captured head is like: the statistics that decide how a filtered softmax behaves on it.

`head_statistics` takes any e, c, targets (bias, softcap), a user's small head on a CPU or a large one on the GPU where
it was trained. This file imports torch only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
TILE = 128
THRESHOLDS = (12, 14, 16)  # k of 2^-k


@dataclass(frozen=True)
class HeadStatistics:
    """What decides how a filtered softmax behaves on a head; P is the softmax, means are over rows, "2^-k" fields are
    dicts by k.

    loss, entropy: mean, in nats. p_target: mean probability of the target. entries: mean number of P >= 2^-k a row.
    mass_below: mean sum of P < 2^-k. columns: mean share of the vocabulary with an entry in 128 consecutive rows.
    blocks: mean number of 32-column blocks with an entry a row. tiles_by_id, tiles_by_mean_logit: share of 128 x 128
    tiles with |P - onehot| >= 2^-12 somewhere, the vocabulary in its own order and in that of the mean logit. e_max,
    e_rms: largest and root-mean-square entry of e. flushed: share of the entries but for the targets' with
    P < 2^-12 (1 - P_t) / V, which `cce_exact` writes as 0 in bf16 on a GPU.
    """

    tokens: int
    vocabulary: int
    width: int
    loss: float
    entropy: float
    p_target: float
    entries: dict[str, float]
    mass_below: dict[str, float]
    columns: dict[str, float]
    blocks: dict[str, float]
    tiles_by_id: float
    tiles_by_mean_logit: float
    e_max: float
    e_rms: float
    flushed: float = math.nan  # of captures from before it was counted

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, as written to card.json."""
        return asdict(self)


def _logits(e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> Tensor:
    z = e.to(dtype) @ c.T
    if bias is not None:
        z += bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _any_in_blocks(hits: Tensor, width: int) -> Tensor:
    """hits (rows, V), bool: whether each run of `width` columns holds a hit, (rows, ceil(V / width))."""
    padded = nn.functional.pad(hits, (0, -hits.shape[1] % width))
    return padded.unflatten(1, (-1, width)).any(dim=2)


@torch.no_grad()
def head_statistics(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> HeadStatistics:
    """Statistics of a head of any size, on the device of its tensors, 128 rows of logits at a time in `dtype` (float64,
    float32).

    e (N, D), c (V, D), targets (N,) with -100 for rows to leave out, bias (V,) or None. ValueError when no row is left.
    """
    e, targets = e[targets != IGNORED], targets[targets != IGNORED]
    n, v = len(e), len(c)
    if n == 0:
        raise ValueError("targets ignore every row, so there is nothing to measure")
    c, bias = c.to(dtype), None if bias is None else bias.to(dtype)
    chunks = [(e[i : i + TILE], targets[i : i + TILE]) for i in range(0, n, TILE)]
    if softcap is None:
        mean_logit = c @ e.to(dtype).mean(dim=0) + (0 if bias is None else bias)
    else:
        mean_logit = torch.zeros(v, dtype=dtype, device=c.device)
        for rows, _ in chunks:
            mean_logit += _logits(rows, c, bias, softcap, dtype).sum(dim=0) / n
    order = torch.argsort(mean_logit, descending=True, stable=True)
    sums: dict[str, float] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value.double().sum())

    for rows, labels in chunks:
        log_p = torch.log_softmax(_logits(rows, c, bias, softcap, dtype), dim=1)
        target_log_p = log_p.gather(1, labels[:, None])
        p = log_p.exp()
        add("loss", -target_log_p)
        add("p_target", target_log_p.exp())
        add("entropy", -(p * log_p.clamp_min(-1e4)).sum(dim=1))
        for k in THRESHOLDS:
            hits = p >= 2.0**-k
            add(f"entries{k}", hits)
            add(f"mass{k}", (p * ~hits).sum(dim=1))
            add(f"columns{k}", hits.any(dim=0))
            add(f"blocks{k}", _any_in_blocks(hits, 32))
        others = torch.ones_like(p).scatter_(1, labels[:, None], 0)
        add("flushed", others * (p < -torch.expm1(target_log_p) * 2.0**-12 / v))
        survives = (p.scatter_add_(1, labels[:, None], -torch.ones_like(target_log_p)).abs() >= 2.0**-12).any(dim=0)
        add("tiles_by_id", _any_in_blocks(survives[None], TILE))
        add("tiles_by_mean_logit", _any_in_blocks(survives[order][None], TILE))

    tiles = len(chunks) * -(-v // TILE)

    def by_threshold(name: str, count: int) -> dict[str, float]:
        return {f"2^-{k}": sums[f"{name}{k}"] / count for k in THRESHOLDS}

    return HeadStatistics(
        tokens=n,
        vocabulary=v,
        width=c.shape[1],
        loss=sums["loss"] / n,
        entropy=sums["entropy"] / n,
        p_target=sums["p_target"] / n,
        entries=by_threshold("entries", n),
        mass_below=by_threshold("mass", n),
        columns=by_threshold("columns", len(chunks) * v),
        blocks=by_threshold("blocks", n),
        tiles_by_id=sums["tiles_by_id"] / tiles,
        tiles_by_mean_logit=sums["tiles_by_mean_logit"] / tiles,
        flushed=sums["flushed"] / (n * v),
        e_max=float(e.abs().max()),
        e_rms=float(e.double().square().mean().sqrt()),
    )


def statistics_table(by_stage: Mapping[str, HeadStatistics]) -> Any:
    """A `rich` table with one column a stage."""
    from rich.table import Table

    def row(title: str, *values: str) -> None:
        table.add_row(title, *values)

    def powers(name: str, form: str) -> list[str]:
        return [" / ".join(form.format(value) for value in getattr(s, name).values()) for s in heads]

    heads = list(by_stage.values())
    table = Table("", *by_stage)
    row("N, V, D", *(f"{s.tokens:,}, {s.vocabulary:,}, {s.width}" for s in heads))
    row("loss, entropy (nats)", *(f"{s.loss:.2f}, {s.entropy:.2f}" for s in heads))
    row("mean p_t", *(f"{s.p_target:.3g}" for s in heads))
    row("entries a row at 2^-12 / -14 / -16", *powers("entries", "{:.0f}"))
    row("mass below 2^-12 / -14 / -16", *powers("mass_below", "{:.3f}"))
    row("columns in 128 rows at 2^-12 / -14 / -16", *powers("columns", "{:.1%}"))
    row("32-column blocks a row at 2^-12 / -14 / -16", *powers("blocks", "{:.0f}"))
    row(
        "128 x 128 tiles, by id / by mean logit", *(f"{s.tiles_by_id:.1%} / {s.tiles_by_mean_logit:.1%}" for s in heads)
    )
    row("entries that cce_exact flushes in bf16", *(f"{s.flushed:.1%}" for s in heads))
    row("largest, rms entry of e", *(f"{s.e_max:.3g}, {s.e_rms:.3g}" for s in heads))
    return table
