"""A training loop of ten lines: the head's weight goes into the loss, and the logits are never made.

python examples/training_loop.py
"""

import torch
from torch import nn

from cce_precision import linear_cross_entropy

V, D, CONTEXT = 1000, 64, 32


class LanguageModel(nn.Module):
    """An embedding, a recurrent layer, and a head that `linear_cross_entropy` applies."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.GRU(D, D, batch_first=True)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to the head's input (B, T, D)."""
        return self.body(self.embedding(ids))[0]


def main(steps: int = 60) -> list[float]:
    """Trains on sequences that count upwards; the losses."""
    torch.manual_seed(0)
    model, losses = LanguageModel(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = (torch.randint(V, (16, 1)) + torch.arange(CONTEXT)) % V
        e = model(ids)  # (16, 32, 64), and not (16, 32, 1000)
        loss = linear_cross_entropy(e, model.head.weight, ids, shift=1)  # token i predicts token i + 1
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} at the start, {losses[-1]:.2f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
