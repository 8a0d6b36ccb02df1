"""Where a measurement comes from: the commit, and of a sweep's table all else."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import cce_precision

__all__ = ["commit", "git", "provenance"]


def git(*args: str) -> str:
    """What git says of this package's checkout; "" where there is no git or no checkout."""
    try:
        return subprocess.run(
            ("git", *args), cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit in short: that of the environment, CCE_COMMIT, for a copy of a checkout, else git's or ""."""
    return os.environ.get("CCE_COMMIT", "")[:7] or git("rev-parse", "--short", "HEAD")


def _device() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def provenance(threads: int, command: str) -> dict[str, str]:
    """Commit, versions, device and its threads a cell, command."""
    found = git("rev-parse", "--short=12", "HEAD")
    if found and git("status", "--porcelain", "--untracked-files=no", "--", ".", "../cce_precision", "../variants"):
        found += " with changes"
    versions = f"cce-precision {cce_precision.__version__}, torch {torch.__version__}, "
    versions += f"Python {platform.python_version()}, {platform.system()}"
    device = f"{_device()}, {threads} thread{'s' * (threads > 1)} a cell"
    return {"commit": found or "no git checkout", "versions": versions, "device": device, "command": command}
