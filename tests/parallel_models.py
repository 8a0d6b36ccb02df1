"""Patched models of transformers in two processes: what tests/test_parallel.py starts under gloo and
tests/test_parallel_gpu.py under NCCL."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group: its functions' defaults would hold it for ever
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map_only

from cce_precision import VocabParallelOptions, cce_counts, cce_patch, linear_cross_entropy
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
    _start(rank, WORLD, folder, device)
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


# -- ZeRO-3 ------------------------------------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    """A loss of one's own in a module's forward, of a head that is another module's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.model.model(input_ids=input_ids, **rest).last_hidden_state
        return CausalLMOutput(loss=linear_cross_entropy(hidden, self.model.lm_head.weight, labels, shift=True))


def _engine(model: nn.Module) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def _zero_steps(engine: Any, batch: dict[str, Tensor]) -> list[tuple[float, dict[str, Tensor]]]:
    """Two training steps: the loss, whole gradients and weights. In the second ZeRO-3 follows the first."""
    import deepspeed

    steps = []
    for _ in range(2):
        loss = engine(**batch).loss
        engine.backward(loss)
        inner = engine.module.model if isinstance(engine.module, OwnLoss) else engine.module
        named = list(inner.named_parameters())
        found = {f"{name} gradient": deepspeed.utils.safe_get_full_grad(p).clone() for name, p in named}
        engine.step()
        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            found |= {name: p.detach().clone() for name, p in named}
        steps.append((loss.item(), found))
    return steps


def _evaluated(engine: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    engine.eval()
    with torch.no_grad():
        output = engine(**batch)
    engine.train()
    return output.loss, output.logits


def zero_models(rank: int, folder: str) -> None:
    """Two steps of a model under ZeRO-3, and of its copies patched before and after; its evaluation; refusals."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    import deepspeed

    _start(rank, WORLD, folder)
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    start = build("llama").train()
    batch = {name: x[rank : rank + 1] for name, x in inputs("llama", start).items() if isinstance(x, Tensor)}
    results: dict[str, Any] = {}
    engine = _engine(copy.deepcopy(start))
    plain = _evaluated(engine, batch)
    results["unpatched"] = _zero_steps(engine, batch)
    results["own loss"] = _zero_steps(_engine(OwnLoss(copy.deepcopy(start))), batch)
    for order in ("patch first", "shard first"):
        engine = _engine(cce_patch(copy.deepcopy(start)) if order == "patch first" else copy.deepcopy(start))
        if order == "shard first":
            cce_patch(engine)
        results[f"{order}, evaluated"] = (plain, _evaluated(engine, batch))
        before = copy.deepcopy(cce_counts(engine))
        results[order] = _zero_steps(engine, batch)
        counts = cce_counts(engine)
        results[f"{order}, counts"] = (counts.fused - before.fused, counts.materialised - before.materialised)
    head = engine.module.lm_head
    hidden = torch.ones(2, head.in_features)
    try:
        linear_cross_entropy(hidden, head.weight, torch.zeros(2, dtype=torch.int64))
    except ValueError as error:
        results["outside"] = str(error)
    torch.save(results, Path(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def judge_zero_models(stored: list[dict[str, Any]]) -> None:
    """Raises unless ZeRO-3 did with the patched models and with a loss of one's own what it did with the unpatched."""
    for found in stored:
        assert "c must have its values, got a ZeRO-3 shard of shape" in found["outside"]
        for name in ("own loss", "patch first", "shard first"):
            for (loss, ours), (their_loss, theirs) in zip(found[name], found["unpatched"], strict=True):
                assert abs(loss - their_loss) <= GRADIENT_ALLOWED * their_loss
                for kind in (True, False):
                    one, other = (
                        {k: x for k, x in d.items() if k.endswith("gradient") == kind} for d in (ours, theirs)
                    )
                    assert difference(one, other) <= GRADIENT_ALLOWED  # 1 for a zero gradient
            if name != "own loss":
                assert found[f"{name}, counts"] == (2, 0)
                (plain, logits), (loss, computed) = found[f"{name}, evaluated"]
                assert abs(loss - plain) <= GRADIENT_ALLOWED * plain
                assert type(computed) is Tensor and torch.equal(computed, logits)
