"""GRPO (Shao et al., arXiv 2402.03300) with PPO's clipped ratio: per-token log-probabilities and their entropy.

One call gives both for every token of the samples, differentiable, and no logits: minus the loss with
`reduction="none"` is the log-probability, and `return_entropy=True` brings the entropy for a bonus.

    python examples/policy_gradient.py
"""

import copy

import torch
from torch import Tensor, nn

from cce_precision import linear_cross_entropy

V, D, LENGTH, GROUP = 64, 48, 8, 16
WANTED = 7  # the reward is the share of this token


class LanguageModel(nn.Module):
    """An embedding, a recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.GRU(D, D, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to the head's input (B, T, D)."""
        return self.body(self.embedding(ids))[0]

    @torch.no_grad()
    def sample(self, prompt: Tensor) -> Tensor:
        """Prompts (B, 1) with LENGTH sampled tokens, (B, 1 + LENGTH); a step needs one token's logits alone."""
        ids = prompt
        for _ in range(LENGTH):
            logits = self.head(self(ids)[:, -1])
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        return ids


def log_probabilities(model: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies), (B, T - 1) each, of the tokens after the first."""
    found = linear_cross_entropy(model(ids), model.head.weight, ids, shift=1, reduction="none", return_entropy=True)
    return -found.loss, found.entropy


def policy_loss(
    own: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, clip: float = 0.2, kl: float = 0.01
) -> Tensor:
    """Clipped surrogate with an estimate of the divergence from the reference. advantage: (B, 1), others (B, T)."""
    ratio = (own - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    away = (reference - own).exp() - (reference - own) - 1  # not negative, and unbiased
    return -(surrogate - kl * away).mean()


def main(steps: int = 40) -> list[float]:
    """Mean reward of each step's samples."""
    torch.manual_seed(0)
    policy = LanguageModel()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    rewards = []
    for _ in range(steps):
        ids = policy.sample(torch.randint(V, (4, 1)).repeat_interleave(GROUP, 0))
        reward = (ids[:, 1:] == WANTED).float().mean(1)
        groups = reward.view(4, GROUP)
        advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        with torch.no_grad():
            old, base = log_probabilities(policy, ids)[0], log_probabilities(reference, ids)[0]
        for _ in range(2):  # more than one step from the same samples is what the ratio is for
            own, entropy = log_probabilities(policy, ids)
            loss = policy_loss(own, old, base, advantage.view(-1, 1)) - 1e-3 * entropy.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward.mean().item())
    print(f"mean reward {rewards[0]:.3f} at the start, {rewards[-1]:.3f} after {steps} steps")
    return rewards


if __name__ == "__main__":
    main()
