"""Patched models of transformers in two processes: what tests/test_parallel.py starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cce_precision import VocabParallelOptions, cce_counts, cce_patch
from cce_precision.analysis.census_configs import build, inputs
from tests.parallel_cases import _start

WORLD = 2


def _step(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the whole gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), {name: getattr(g, "full_tensor", lambda g=g: g)().clone() for name, g in whole.items()}


def _sharded(model: Any) -> Any:
    """By FSDP2, the head apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model.lm_head, *model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def patched_models(rank: int, folder: str) -> None:
    """(loss, gradients) of a model beside its patched copies: sharded, with tokens of its own on each process; and with
    a head of which each process has its rows, with the same tokens."""
    torch.set_num_threads(1)
    _start("gloo", rank, WORLD, folder)
    torch.manual_seed(0)
    start = build("llama").train()
    batch = {name: x for name, x in inputs("llama", start).items() if isinstance(x, Tensor)}
    own = {name: x[rank : rank + 1] for name, x in batch.items()}
    results: dict[str, Any] = {"whole": _step(copy.deepcopy(start), batch)}
    results["sharded"] = _step(_sharded(copy.deepcopy(start)), own)
    model = _sharded(cce_patch(copy.deepcopy(start)))
    results["sharded, patched"] = _step(model, own)
    counts = [cce_counts(model)]

    share = VocabParallelOptions.from_vocab(start.config.vocab_size)
    model = copy.deepcopy(start)
    head = nn.Linear(model.config.hidden_size, share.stop - share.start, bias=False)
    head.weight.data.copy_(start.lm_head.weight[share.start : share.stop])
    model.lm_head = head
    model.config.vocab_size = model.vocab_size = head.out_features
    cce_patch(model, vocab_parallel_options=share)
    results["shared head"] = _step(model, batch)
    counts.append(cce_counts(model))
    results |= {"share": (share.start, share.stop), "counts": [(c.fused, c.materialised) for c in counts]}
    torch.save(results, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()
