"""The passes in plain PyTorch, tile by tile, with the very roundings that a variant's record names. Any device.

This is what runs where no kernel does, and what the kernels are held against.
"""

from .adaptive import backward
from .forward import forward
from .plain import plain_heads
from .statistics import statistics

__all__ = ["backward", "forward", "plain_heads", "statistics"]
