"""`baseline`: what a user of PyTorch writes: the logits in memory in the input dtype, then `F.cross_entropy` on their
fp32 copy.

It is here to be compared with, so it keeps the field's traps: logits rounded to the input dtype, and p_t - 1 formed by
subtraction."""

from cce_precision.numerics import Path, Variant

VARIANT = Variant(
    name="baseline",
    summary="logits stored in the input dtype, F.cross_entropy",
    path=Path.PLAIN,
    label_apart=False,
)
