"""The target's terms of dC, label_i e_i, kept out of the operand: the tokens of a frequent target summed beforehand.

A column's terms are added where its row of dC is finished. There a target of a thousand tokens would hold up one tile
and with it the launch, so a segment of more than `SHORT` tokens becomes one row of fp32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .entry import entry
from .launch import cdiv, next_power_of_2
from .terms import TokensByTarget, is_wanted

__all__ = ["SHORT", "Labels", "sums_size"]

SHORT = 8  # tokens


@entry
@triton.jit
def label_sums_kernel(
    out,  # (slots, D) fp32
    e,  # (N, D) contiguous
    tokens,  # (N,) int64 sorted by target
    starts,  # (V + 1,) int32
    targets,  # (N,) int64, negative where ignored, V or more where another process holds the row
    label,  # (N,) fp32
    active,  # () int32: 0 where nothing is to be done, else 1; or unused
    n,
    v,
    d,
    SHORT: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """A slot's row: sum of label_i e_i over the long segment that begins at one of its `SHORT` places; there is at most
    one. Slots without are left as they are.
    """
    if is_wanted(active, ACTIVE):
        places = tl.program_id(0) * SHORT + tl.arange(0, SHORT)
        token = tl.load(tokens + places, mask=places < n, other=0)
        target = tl.load(targets + token, mask=places < n, other=-1)
        here = (target >= 0) & (target < v)
        first = tl.load(starts + target, mask=here, other=-1)
        last = tl.load(starts + target + 1, mask=here, other=-1)
        long = (first == places) & (last - first > SHORT)
        begin, end = tl.max(tl.where(long, first, -1), 0), tl.max(tl.where(long, last, -1), 0)
        if begin >= 0:
            j = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
            total = tl.zeros((TOKENS, FEATURES), tl.float32)
            for at in range(begin, end, TOKENS):
                place = at + tl.arange(0, TOKENS)
                own = tl.load(tokens + place, mask=place < end, other=0)
                x = tl.load(label + own, mask=place < end, other=0.0)
                inside = (place < end)[:, None] & (j < d)[None, :]
                term = tl.load(e + own[:, None] * d + j[None, :], mask=inside, other=0).to(tl.float32)
                total += x[:, None] * term
            tl.store(out + tl.program_id(0).to(tl.int64) * d + j, tl.sum(total, 0), mask=j < d)


def sums_size(n: int, d: int) -> int:
    """Bytes of `Labels.sums`, a multiple of 256."""
    return cdiv(cdiv(n, SHORT) * d, 64) * 256


@dataclass(frozen=True)
class Labels:
    """The target's terms of dC."""

    e: Tensor  # (N, D) contiguous
    targets: Tensor  # (N,) int64
    label: Tensor  # (N,) fp32
    segments: TokensByTarget
    sums: Tensor  # (slots, D) fp32: row starts[j] // SHORT holds column j's where its segment is longer than SHORT

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """e, targets, label, tokens, starts, sums."""
        return self.e, self.targets, self.label, self.segments.tokens, self.segments.starts, self.sums

    @staticmethod
    def of(
        e: Tensor,
        targets: Tensor,
        label: Tensor,
        segments: TokensByTarget,
        room: Tensor | None = None,  # (sums_size,) uint8: where the sums go
        active: Tensor | None = None,  # () int32: 0 where nothing is to be done, else 1
    ) -> Labels:
        n, d = e.shape
        if room is None:
            room = torch.empty(sums_size(n, d), dtype=torch.uint8, device=e.device)
        slots = cdiv(n, SHORT)
        sums = room.view(torch.float32)[: slots * d].view(slots, d)
        features = min(128, next_power_of_2(d))
        label_sums_kernel[(slots, cdiv(d, features))](
            sums,
            e,
            segments.tokens,
            segments.starts,
            targets,
            label,
            targets if active is None else active,
            n,
            segments.starts.shape[0] - 1,
            d,
            SHORT=SHORT,
            TOKENS=32,
            FEATURES=features,
            ACTIVE=active is not None,
        )
        return Labels(e, targets, label, segments, sums)
