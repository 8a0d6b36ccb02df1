"""Image classification with many classes: a head with a bias, label smoothing and class weights.

The kernels do not care that the classes are no tokens: faces, products or species by the hundred thousand have the
same head. `return_argmax` gives the prediction in the same pass.

    python examples/image_classification.py
"""

import torch
from torch import nn

from cce_precision import LinearCrossEntropy

CLASSES = 2000


def main(steps: int = 60) -> tuple[list[float], float]:
    """Learns 2,000 classes of noisy 16 x 16 images, the rare ones weighing more; (losses, accuracy on new images)."""
    torch.manual_seed(0)
    prototypes = torch.randn(CLASSES, 1, 16, 16)
    frequency = 1 / torch.arange(1, CLASSES + 1).float().sqrt()  # few classes are common
    body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 128))
    head = nn.Linear(128, CLASSES)
    with torch.no_grad():
        head.bias.copy_(frequency.log())
    weight = (frequency.mean() / frequency).clamp(max=4)
    loss_of = LinearCrossEntropy(label_smoothing=0.1, class_weight=weight, return_argmax=True)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)
    losses, share = [], 0.0
    for _ in range(steps):
        labels = torch.multinomial(frequency, 512, replacement=True)
        images = prototypes[labels] + 0.3 * torch.randn(len(labels), 1, 16, 16)
        found = loss_of(body(images), head.weight, labels, head.bias)
        share = (found.argmax == labels).float().mean().item()  # of images not seen before
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.loss.item())
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, {share:.0%} of new images right among {CLASSES:,} classes")
    return losses, share


if __name__ == "__main__":
    main()
