"""Named, independent random streams: the only source of chance in the project.

A stream is a function of a seed and a name, never of a worker, an order, a fingerprint or the clock. Two cells
that differ in beta thus compare the same pairs under the same uniform draws (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Streams = Callable[..., np.random.Generator]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Generator of the stream called `names` under `seed`; equal arguments give equal draws."""
    label = "/".join(str(name) for name in names).encode()
    return np.random.default_rng(np.random.SeedSequence([seed, *label]))


def streams(seed: int) -> Streams:
    """`streams(seed)("annotation")` is `stream(seed, "annotation")`."""
    return lambda *names: stream(seed, *names)
