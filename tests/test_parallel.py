"""The options of a classifier spread over processes. No variant runs with them yet, and the interface says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from torch import distributed

from cce_precision import VocabParallelOptions


def _share(rank: int, world: int, folder: str, vocab_size: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    options = VocabParallelOptions.from_vocab(vocab_size)
    Path(folder, str(rank)).write_text(f"{options.start} {options.stop}")
    distributed.destroy_process_group()


def test_processes_share_every_row_once(tmp_path: Path) -> None:
    multiprocessing.spawn(_share, args=(2, str(tmp_path), 7), nprocs=2)
    runs = [tuple(map(int, (tmp_path / str(rank)).read_text().split())) for rank in range(2)]
    assert runs == [(0, 3), (3, 7)]


def test_from_vocab_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        VocabParallelOptions.from_vocab(100)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 2)])
def test_empty_or_negative_runs_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="start and stop"):
        VocabParallelOptions(start, stop)
