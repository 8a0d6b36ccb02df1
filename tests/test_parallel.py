"""Processes that share a vocabulary, under gloo: every variant against the truth, within bounds for every share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_precision import VocabParallelOptions, linear_cross_entropy
from cce_precision.analysis.bounds import CPU, INTERPRETER
from cce_precision.analysis.parallel_bench import PAGE, ROWS, page
from cce_precision.variants import ALL
from tests.parallel_cases import (
    CASES,
    INTERPRETED,
    WORLD,
    compiled,
    judge_kernels,
    problems,
    run,
    run_kernels,
    start,
    verdict_of,
)
from tests.parallel_placements import (
    ONE_DIMENSION,
    SHARDED,
    judge_features,
    judge_placements,
    judge_sharded_head,
    judge_unknown_placements,
    placements_of,
)
from tests.strategies import EAGER, TILED


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each case returned in each process."""
    folder = tmp_path_factory.mktemp("parallel")
    start(run, str(folder), list(CASES), processes=WORLD)
    stored = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [results[name] for results in stored] for name in CASES}


@pytest.mark.parametrize("world", [2, WORLD])
@pytest.mark.parametrize("impl", EAGER)
def test_every_variant(impl: str, world: int, ran: dict[str, list[Any]]) -> None:
    """Loss, heads and gradients within the bounds, the same bits on every process, own rows of dC and dbias alone."""
    telling = set()
    for i, k in enumerate(problems(impl)):
        parts = [results[impl, i, world] for results in ran["every_variant"] if (impl, i, world) in results]
        assert len(parts) == world
        verdict = verdict_of(parts, k)
        assert verdict.holds, str(verdict)
        telling |= {name for name, q in verdict.quantities.items() if q.tells and q.truth > 0}
    assert {"value", "dE", "dC", "dbias"} <= telling  # a zero would have been rejected


@pytest.mark.parametrize("name", placements_of(WORLD))
def test_placements(name: str, ran: dict[str, list[Any]]) -> None:
    """DTensors placed in every way that has a meaning give what one process gives; gradients are placed alike."""
    judge_placements(ran["placements"], name)


@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_placements_on_two_processes(name: str, ran: dict[str, list[Any]]) -> None:
    judge_placements(ran["placements_of_pairs"], name, world=2)
    first, *others = (results[name] for results in ran["placements_of_pairs"])
    assert all(torch.equal(x[quantity], first[quantity]) for x in others for quantity in first)


def test_placed_features(ran: dict[str, list[Any]]) -> None:
    """Shift, smoothing, class weights, entropy, softcap, temperature, unreduced, under placements."""
    judge_features(ran["placed_features"])


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_head_has_the_mean_gradient(name: str, ran: dict[str, list[Any]]) -> None:
    """A head of fully_shard, or sharded like one, beside plain tokens: as data parallelism reduces it."""
    judge_sharded_head(ran["sharded_head"], name)


def test_unknown_placements(ran: dict[str, list[Any]]) -> None:
    judge_unknown_placements(ran["unknown_placements"])


def test_from_vocab(ran: dict[str, list[Any]]) -> None:
    assert [few for few, _ in ran["shares_of_from_vocab"]] == [[0, 0], [0, 1], [1, 2], [2, 3]]
    assert [many for _, many in ran["shares_of_from_vocab"]] == [[0, 3], [3, 7], [0, 3], [3, 7]]


def test_differentiated_again(ran: dict[str, list[Any]]) -> None:
    for results in ran["differentiated_again"]:
        for once, twice in zip(results["once"], results["twice"]):
            assert once.any() and torch.equal(twice, 2 * once)
        assert "differentiable once" in results["second"]


def test_largest_logit(ran: dict[str, list[Any]]) -> None:
    for results in ran["largest_logit"]:
        assert torch.equal(results["whole"], results["shared"])


def test_parts_of_e_gradient(ran: dict[str, list[Any]]) -> None:
    for results in ran["parts_of_e_gradient"]:
        assert torch.equal(results["whole"], results["sum"])
        assert results["part"].any() and not torch.equal(results["whole"], results["part"])


def test_collectives_are_few_and_small(ran: dict[str, list[Any]]) -> None:
    """Lse and nll of each token with the share's place, dE, and the seed where a variant draws: never logits."""
    n, d = 6, 5
    heads, gradient, seed = ("all_gather_into_tensor", 3 + 2 * n), ("all_reduce", n * d), ("all_gather_into_tensor", 1)
    for sent in ran["collectives"]:
        for impl, calls in sent.items():
            assert calls == [*[seed] * ALL[impl].random, heads, gradient], impl


def test_seed_of_the_first(ran: dict[str, list[Any]]) -> None:
    assert ran["seed_of_the_first"] == [[10, 10], [10, 10], [10, 12], [10, 12]]


def test_refusals(ran: dict[str, list[Any]]) -> None:
    expected = {
        "type": "vocab_parallel_options must be None or VocabParallelOptions, got (0, 3)",
        "rows": "that vocab_parallel_options gives this process",
        "bias": "bias must have shape that of this process's rows of c",
        "short class_weight": "class_weight must have shape (V,), one weight for each row of the whole classifier",
        "long class_weight": "class_weight must have shape (V,) = (33,), got (34,)",
        "return_stats": "return_stats must be False where processes share the vocabulary",
        "auto": "impl='auto' must be a variant's name where processes share the vocabulary",
        "gap": "must hold each row of the vocabulary once",
        "targets": "targets must lie in [0, V) = [0, 33)",
    }
    for messages in ran["refusals"]:
        assert messages.keys() == expected.keys()
        for name, text in expected.items():
            assert text in messages[name], messages[name]


def test_options_need_processes() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        VocabParallelOptions.from_vocab(100)
    e, c = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        linear_cross_entropy(e, c, torch.zeros(2, dtype=torch.int64), vocab_parallel_options=VocabParallelOptions(0, 4))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 2)])
def test_runs_are_not_negative(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="start and stop"):
        VocabParallelOptions(start, stop)


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    """Under torch.compile, in one graph, the same bits."""
    start(compiled, str(tmp_path), processes=2)
    for rank in range(2):
        for impl, (eager, graph) in torch.load(tmp_path / f"{rank}.pt", weights_only=False).items():
            for a, b in zip(eager, graph):
                assert a.any() and torch.equal(a, b), impl


def test_the_committed_page_is_that_of_its_rows() -> None:
    folder = Path(__file__).parents[1] / "reports" / "parallel"
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    assert (folder / PAGE).read_text() == page(rows)


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    """The benchmark under torchrun, at a small size under gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "cce_precision.analysis.parallel_bench", "--shape", "64x700x32", "--rounds", "1"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    rows = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert [row["method"] for row in rows] == ["cce_exact", "cce", "all-reduce of dE"]
    assert (tmp_path / PAGE).read_text() == page(rows)
    for row in rows[:2]:
        assert 0 < row["dE_together"] < 1 and 0 < row["dC_together"] < 1  # a zero gradient is off by 1


def test_patched_models(tmp_path: Path) -> None:
    """Under FSDP2, and with a head that the processes share, no logits are made; beside the unpatched model."""
    pytest.importorskip("transformers")
    from tests.parallel_models import WORLD, judge_patched_models, patched_models

    start(patched_models, str(tmp_path), processes=WORLD)
    judge_patched_models([torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)])


def test_patched_models_under_zero_3(tmp_path: Path) -> None:
    """Of DeepSpeed, on the CPU: beside the unpatched model under the same; and a loss of one's own, in and out."""
    pytest.importorskip("transformers")
    if importlib.util.find_spec("deepspeed") is None:  # not imported here, where it would choose an accelerator
        pytest.skip("DeepSpeed is not installed")
    from tests.parallel_models import WORLD, judge_zero_models, zero_models

    start(zero_models, str(tmp_path), processes=WORLD)
    judge_zero_models([torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)])


@pytest.mark.interpreter
def test_kernels_of_every_variant(tmp_path: Path) -> None:
    """The kernels, interpreted, with targets that the other of two processes holds, beside one process alone."""
    start(run_kernels, str(tmp_path), "cpu", INTERPRETED, processes=2)
    judged = 0
    for impl in INTERPRETED:
        stored = [torch.load(tmp_path / impl / f"{rank}.pt", weights_only=False) for rank in range(2)]
        count, telling = judge_kernels(stored, impl, "cpu", INTERPRETER if impl in TILED else CPU)
        assert {"value", "dE", "dC"} <= telling
        judged += count
    assert judged == len(INTERPRETED)
