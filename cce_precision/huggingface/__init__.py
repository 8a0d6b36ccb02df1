"""`cce_patch` for every causal language model of transformers: one mechanism at the head, no copied forwards.

`patch` wraps the forward of a class and prepares its head, `head` leaves the head's product to whoever needs it, and
`logits` holds the object that stands for the logits until then. None of them imports transformers before it is named a
model type or a config.
"""

from .head import Counts
from .patch import cce_counts, cce_patch, uncce_patch

__all__ = ["Counts", "cce_counts", "cce_patch", "uncce_patch"]
