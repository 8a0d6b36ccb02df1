"""`huggingface` under the name that users of cut-cross-entropy import: `from cce_precision.transformers import
cce_patch`."""

from .huggingface import cce_patch, uncce_patch

__all__ = ["cce_patch", "uncce_patch"]
