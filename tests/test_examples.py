"""The examples run by themselves, learn what they say they learn, and compute what their papers define."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cce_precision.analysis.bounds import bound
from cce_precision.analysis.references import Objective, truth
from cce_precision.problem import Plan, Problem
from cce_precision.variants import ALL, DEFAULT

ULP = torch.finfo(torch.float32).eps
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of(
    e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, reduction: str = "none"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact loss, what an fp32 call may be off by), fp64, (N,) or () reduced, of these targets; -1: ignored."""
    problem, objective = Problem(e.detach(), c.detach(), targets, None, None, None, 1.0), Objective(reduction)
    exact, allowed = truth(problem, objective), bound(problem, Plan(ALL[DEFAULT], None, 1.0), objective)
    return exact.value, allowed.value + exact.radius.value


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_tested_and_says_how_it_is_run(path: Path) -> None:
    assert f"python examples/{path.name}" in path.read_text()
    assert re.search(rf"\b{path.stem}\b", Path(__file__).read_text())


@pytest.mark.slow
def test_an_example_runs_as_a_script() -> None:
    command = [sys.executable, str(EXAMPLES / "training_loop.py")]
    root = str(EXAMPLES.parent)
    done = subprocess.run(command, env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"loss 6\.\d+ at the start, 0\.\d+ after 60 steps", done.stdout)


def test_training_loop_is_ten_lines() -> None:
    text = (EXAMPLES / "training_loop.py").read_text()
    loop = text[text.index("    for _ in range(steps):") : text.index("    print(")]
    assert len(loop.splitlines()) <= 10


def test_contrastive_finds_the_pairs_and_is_the_mean_of_both_directions() -> None:
    module = example("contrastive")
    losses, found = module.main(steps=30)
    assert losses[-1] < losses[0] / 4 and found > 0.9
    image, text, log_scale = torch.randn(12, 5), torch.randn(12, 5), torch.tensor(2.0, requires_grad=True)
    loss = module.contrastive_loss(image, text, log_scale)
    x, y = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    target, scale = torch.arange(12), log_scale.exp()
    exact, allowed = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for e, c in ((scale * x, y), (scale * y, x)):
        one, off = losses_of(e, c, target, "mean")
        exact, allowed = exact + one / 2, allowed + off / 2
    assert abs(loss.detach().double() - exact) <= allowed + ULP * exact  # one sum of two
    (slope,) = torch.autograd.grad(loss, log_scale)
    assert slope.abs() > 0


def test_image_classification_learns_its_classes() -> None:
    losses, right = example("image_classification").main(steps=40)
    assert losses[-1] < losses[0] and right > 0.5


def test_preference_learns_to_rank_and_its_log_probabilities_are_those_of_the_answers() -> None:
    module = example("preference")
    losses, right = module.main(steps=25)
    assert abs(losses[0] - math.log(2)) <= ULP and losses[-1] < losses[0] and right > 0.75
    model = module.LanguageModel()
    prompt, answer = torch.randint(module.V, (3, 4)), torch.randint(module.V, (3, 5))
    found = module.log_probability(model, prompt, answer)
    ids = torch.cat((prompt, answer), 1)
    targets = torch.full((3, 8), -1)
    targets[:, 3:] = answer  # the prompt's last token predicts the answer's first
    exact, allowed = losses_of(model(ids)[:, :-1].reshape(24, -1), model.head.weight, targets.flatten())
    rounding = answer.shape[1] * ULP * exact.view(3, 8).sum(1)  # of the sum over an answer
    assert bool(
        ((-found.detach().double() - exact.view(3, 8).sum(1)).abs() <= allowed.view(3, 8).sum(1) + rounding).all()
    )


def test_dpo_is_indifferent_at_the_reference_and_prefers_what_gained() -> None:
    loss = example("preference").dpo_loss
    base = torch.randn(2, 6)
    assert abs(loss(base, base).item() - math.log(2)) <= ULP
    gained = base.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(gained, base), gained)
    assert bool((slope[0] < 0).all()) and torch.equal(slope[0], -slope[1])


def test_policy_gradient_raises_the_reward() -> None:
    rewards = example("policy_gradient").main(steps=25)
    assert rewards[0] < 0.1 and rewards[-1] > 0.5


def test_policy_gradients_heads_and_loss_are_what_they_are_called() -> None:
    module = example("policy_gradient")
    model = module.LanguageModel()
    ids = torch.randint(module.V, (2, 6))
    own, entropy = module.log_probabilities(model, ids)
    assert own.shape == entropy.shape == (2, 5)
    exact, allowed = losses_of(model(ids)[:, :-1].reshape(10, -1), model.head.weight, ids[:, 1:].reshape(-1))
    assert bool(((-own.detach().flatten().double() - exact).abs() <= allowed).all())
    assert bool((entropy <= math.log(module.V) * (1 + torch.finfo(torch.float32).eps)).all())
    # At the old policy the ratio is 1, so the surrogate's slope is the advantage; nothing moves beyond the clip.
    advantage = torch.tensor([[1.0], [-2.0]])
    base = own.detach()
    fresh = base.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module.policy_loss(fresh, base, base, advantage), fresh)
    assert torch.equal(slope, (-advantage / 10).expand(2, 5))
    moved = (base + torch.tensor([[1.0], [-1.0]])).requires_grad_()
    (slope,) = torch.autograd.grad(module.policy_loss(moved, base, base, advantage, kl=0.0), moved)
    assert torch.equal(slope, torch.zeros(2, 5))


def test_perplexity_counts_every_token_once() -> None:
    pytest.importorskip("transformers")
    module = example("perplexity")
    found = module.main(["--characters", "300", "--context", "300"])
    windows = module.main(["--characters", "300", "--context", "64", "--stride", "32"])
    assert 200 < found < 400 and 200 < windows < 400  # about 256 bytes, all alike to random weights

    class Counting(torch.nn.Module):
        """Stands for a patched model: a loss of 1 for each label that counts."""

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            seen.append(int((labels[0, 1:] != -100).sum()))
            return type("Output", (), {"loss": (labels[:, 1:] != -100).float()})

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cce_patch", lambda model, **_: None)
        assert module.perplexity(Counting(), torch.arange(100), 32, 16) == math.e
    assert sum(seen) == 99
