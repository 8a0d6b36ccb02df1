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

    @staticmethod
    def from_vocab(
        vocab_size: int, group: ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """The options of this process where the group's processes share `vocab_size` rows in runs as equal as can be.

        Raises RuntimeError where torch.distributed is not initialised, ValueError where a process would get no row.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("VocabParallelOptions.from_vocab needs torch.distributed.init_process_group to have run")
        rank, world = distributed.get_rank(group), distributed.get_world_size(group)
        if vocab_size < world:
            raise ValueError(f"vocab_size must be at least the number of processes, {world}, got {vocab_size!r}")
        return VocabParallelOptions(rank * vocab_size // world, (rank + 1) * vocab_size // world, group, reduce_e_grad)
