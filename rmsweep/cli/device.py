"""Device and precision: resolved once per sweep, without loading torch."""

from __future__ import annotations

import os
import shutil
import subprocess

from rmsweep.errors import ConfigError
from rmsweep.reward_models import Compute

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_compute(device: str, precision: str, pinned: Compute | None = None) -> Compute:
    """Device and precision of a sweep; `auto` is what its existing plan has `pinned`, else a GPU if any, and fp32."""
    if device not in DEVICES:
        raise ConfigError(f"device={device}: allowed are {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: allowed are {', '.join(PRECISIONS)}")
    if device == "auto":
        device = pinned.device if pinned else ("cuda" if has_cuda() else "cpu")
    if device == "cuda" and not has_cuda():
        raise ConfigError("device=cuda but this machine shows no NVIDIA GPU (nvidia-smi -L); allowed here: cpu")
    if precision == "auto":
        precision = pinned.precision if pinned else "fp32"
    return Compute(device, precision)


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is visible; asks nvidia-smi, so that no process holds a CUDA context for it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout
