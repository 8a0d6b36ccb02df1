"""What the device decides, and the host may come to know without waiting.

A sparse pass has two ways, and only the device knows which one counts. The host launches both. On a small head that is
what takes longest; but there the device is also soon done with what was launched before, so that its answer has arrived
when the host comes to the way that does not count, which it then leaves out. Nothing else depends on the answer's
having arrived.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["Answer", "met_before"]


_met: set[Hashable] = set()


def met_before(kind: Hashable) -> bool:
    """Whether this was called with this kind of call before. The first one should launch both ways: kernels compile
    when they are first launched, and a training run should not stop for that in its middle.
    """
    known = kind in _met
    _met.add(kind)
    return known


class Answer:
    """A yes (1) or no (0) that the device works out: `flag`, 0-dim int32; never known to the host where not `asked`."""

    def __init__(self, flag: Tensor, asked: bool = True) -> None:
        self.flag = flag
        self._known: bool | None = None
        self._arrived: torch.cuda.Event | None = None
        if asked and flag.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._copy = torch.empty((), dtype=torch.int32, pin_memory=True)
            self._copy.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def known(self) -> bool | None:
        """The answer if it has arrived, else None, as always while a CUDA graph is captured. Does not wait."""
        if self._known is None and self._arrived is not None and self._arrived.query():
            self._known = bool(self._copy)
        return self._known
