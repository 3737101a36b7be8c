"""Device and precision: resolved once per sweep, without loading torch."""

from __future__ import annotations

from rmsweep import hardware
from rmsweep.errors import ConfigError
from rmsweep.reward_models import Compute

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_compute(device: str, precision: str, pinned: Compute | None = None, *, here: bool = True) -> Compute:
    """Device and precision of a sweep.

    `auto` is what its existing plan has `pinned`, else a GPU if there is any, and bf16 where that device multiplies it
    in hardware. here: the sweep is to be computed on this machine; raises ConfigError where it cannot be.
    """
    if device not in DEVICES:
        raise ConfigError(f"device={device}: allowed are {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: allowed are {', '.join(PRECISIONS)}")
    if device == "auto":
        device = pinned.device if pinned else ("cuda" if hardware.has_cuda() else "cpu")
    if precision == "auto":
        own = "bf16" if hardware.has_bf16(device) else "fp32"
        precision = pinned.precision if pinned and pinned.device == device else own
    found = Compute(device, precision)
    trouble = hardware.problem(*found) if here else None
    if trouble is not None:
        pin = ", as this sweep is pinned; another sweep.name=NAME computes it anew" if pinned == found else ""
        raise ConfigError(trouble + pin)
    return found
