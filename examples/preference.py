"""DPO (Rafailov et al., arXiv 2305.18290): preferences from the log-probabilities of whole answers.

`reduction="none"` gives each token's loss, so a sequence's log-probability is minus their sum; prompt tokens are
ignored by their target. Memory is what matters here: four sequences' worth of logits for each pair are never made.

    python examples/preference.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_precision import linear_cross_entropy

V, D, PROMPT, ANSWER = 500, 64, 4, 8
IGNORED = -100


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


def log_probability(model: LanguageModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """(B,) log-probabilities of answers (B, A) after prompts (B, P)."""
    ids = torch.cat((prompt, answer), dim=1)
    labels = torch.cat((torch.full_like(prompt, IGNORED), answer), dim=1)
    per_token = linear_cross_entropy(model(ids), model.head.weight, labels, shift=1, reduction="none")
    return -per_token.sum(1)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Mean DPO loss from log-probabilities (2, B): of the chosen answers, and of the rejected ones."""
    margin = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return -F.logsigmoid(margin).mean()


def main(steps: int = 40) -> tuple[list[float], float]:
    """Learns to prefer answers that repeat the prompt's last token; (losses, share of new pairs ranked rightly)."""
    torch.manual_seed(0)
    policy = LanguageModel()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)

    def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        prompt = torch.randint(V, (count, PROMPT))
        return prompt, prompt[:, -1:].expand(-1, ANSWER), torch.randint(V, (count, ANSWER))

    losses = []
    for _ in range(steps):
        prompt, chosen, rejected = pairs(32)
        own = torch.stack([log_probability(policy, prompt, a) for a in (chosen, rejected)])
        with torch.no_grad():
            base = torch.stack([log_probability(reference, prompt, a) for a in (chosen, rejected)])
        loss = dpo_loss(own, base)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        prompt, chosen, rejected = pairs(200)
        gains = [log_probability(policy, prompt, a) - log_probability(reference, prompt, a) for a in (chosen, rejected)]
    right = (gains[0] > gains[1]).float().mean().item()
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {right:.0%} of new pairs ranked rightly")
    return losses, right


if __name__ == "__main__":
    main()
