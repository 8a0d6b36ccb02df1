"""Patched models of transformers in two processes: what tests/test_parallel.py starts under gloo and
tests/test_parallel_gpu.py under NCCL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from cce_precision import VocabParallelOptions, cce_counts, cce_patch
from cce_precision.analysis.census import GRADIENT_ALLOWED, difference
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


def _sharded(model: Any, device: str) -> Any:
    """By FSDP2, the head apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (WORLD,))
    for module in (model.lm_head, *model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def patched_models(rank: int, folder: str, device: str = "cpu") -> None:
    """(loss, gradients) of a model beside its patched copies: sharded, with tokens of its own on each process; and with
    a head of which each process has its rows, with the same tokens."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(rank)
    _start("gloo" if device == "cpu" else "nccl", rank, WORLD, folder)
    torch.manual_seed(0)
    start = build("llama").train().to(device)
    batch = {name: x.to(device) for name, x in inputs("llama", start).items() if isinstance(x, Tensor)}
    own = {name: x[rank : rank + 1] for name, x in batch.items()}
    results: dict[str, Any] = {"whole": _step(copy.deepcopy(start), batch)}
    results["sharded"] = _step(_sharded(copy.deepcopy(start), device), own)
    model = _sharded(cce_patch(copy.deepcopy(start)), device)
    results["sharded, patched"] = _step(model, own)
    counts = [cce_counts(model)]

    share = VocabParallelOptions.from_vocab(start.config.vocab_size)
    model = copy.deepcopy(start)
    head = nn.Linear(model.config.hidden_size, share.stop - share.start, bias=False, device=device)
    head.weight.data.copy_(start.lm_head.weight[share.start : share.stop])
    model.lm_head = head
    model.config.vocab_size = model.vocab_size = head.out_features
    cce_patch(model, vocab_parallel_options=share)
    results["shared head"] = _step(model, batch)
    counts.append(cce_counts(model))
    results |= {"share": (share.start, share.stop), "counts": [(c.fused, c.materialised) for c in counts]}
    torch.save(tree_map_only(Tensor, Tensor.cpu, results), Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def judge_patched_models(stored: list[dict[str, Any]]) -> None:
    """Raises unless the patched models gave what the unpatched ones did, without logits."""
    for found in stored:
        assert found["counts"] == [(1, 0), (1, 0)]
        first, stop = found["share"]
        loss, gradients = found["whole"]
        gradients["lm_head.weight"] = gradients["lm_head.weight"][first:stop]
        for theirs, ours in (((loss, gradients), found["shared head"]), (found["sharded"], found["sharded, patched"])):
            assert abs(ours[0] - theirs[0]) <= GRADIENT_ALLOWED * theirs[0]
            assert difference(ours[1], theirs[1]) <= GRADIENT_ALLOWED  # 1 for a zero gradient
