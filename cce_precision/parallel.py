"""The options of a classifier whose rows are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabParallelOptions"]


@dataclass(frozen=True)
class VocabParallelOptions:
    """This process holds the rows [start, stop) of the classifier; `group` holds the others."""

    start: int
    stop: int
    group: ProcessGroup | None = None
    reduce_e_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start and stop must satisfy 0 <= start < stop, got {self.start!r} and {self.stop!r}")
