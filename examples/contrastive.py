"""CLIP's contrastive loss in both directions, with a learnt temperature and without the similarity matrix.

A pair's image and text are each other's targets among the batch: the texts are the classifier of the images, and the
other way round. With 65,536 pairs the matrix alone would be 16 GiB in fp32; here no more than a block of it exists.

    python examples/contrastive.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cce_precision import linear_cross_entropy


def contrastive_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies of (B, D) features, which are normalised here. log_scale: ()."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    scale, target = log_scale.exp(), torch.arange(len(image), device=image.device)
    # The scale multiplies the features, so that it gets its gradient; `temperature=` is for a constant.
    to_text = linear_cross_entropy(scale * image, text, target)
    to_image = linear_cross_entropy(scale * text, image, target)
    return (to_text + to_image) / 2


@torch.no_grad()
def accuracy(image: Tensor, text: Tensor) -> float:
    """Share of the images whose nearest text is their own."""
    target = torch.arange(len(image))
    found = linear_cross_entropy(F.normalize(image, dim=-1), F.normalize(text, dim=-1), target, return_argmax=True)
    return (found.argmax == target).float().mean().item()


def main(steps: int = 60, pairs: int = 256) -> tuple[list[float], float]:
    """Aligns two linear towers on noisy views of common factors; (losses, accuracy on new pairs)."""
    torch.manual_seed(0)
    factors, image_view, text_view = torch.randn(2 * pairs, 32), torch.randn(32, 96), torch.randn(32, 48)
    images = factors @ image_view + 0.5 * torch.randn(2 * pairs, 96)
    texts = factors @ text_view + 0.5 * torch.randn(2 * pairs, 48)
    image_tower, text_tower = nn.Linear(96, 32), nn.Linear(48, 32)
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.AdamW([*image_tower.parameters(), *text_tower.parameters(), log_scale], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = contrastive_loss(image_tower(images[:pairs]), text_tower(texts[:pairs]), log_scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = accuracy(image_tower(images[pairs:]), text_tower(texts[pairs:]))
    print(f"loss {losses[0]:.2f} to {losses[-1]:.3f}, temperature {(-log_scale).exp().item():.3f}")
    print(f"{found:.0%} of {pairs} new images find their text")
    return losses, found


if __name__ == "__main__":
    main()
