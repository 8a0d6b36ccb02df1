"""`python -m cce_precision`: the same as `cce-precision`."""

from .cli import main

main()
