"""Identity of configs and files: canonical JSON and sha256."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIGITS = 24  # 96 bits: a collision among 10^9 cells has probability below 10^-11


def canonical(value: Any) -> Any:
    """JSON-able form with one spelling per value: sorted keys, integral floats as floats, inf as "inf"."""
    if isinstance(value, Mapping):
        return {str(k): canonical(value[k]) for k in sorted(value, key=str)}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence):
        return [canonical(v) for v in value]
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("NaN has no canonical form")
        return ("inf" if value > 0 else "-inf") if math.isinf(value) else value
    raise TypeError(f"{type(value).__name__} has no canonical form")


def canonical_json(value: Any) -> str:
    """Canonical JSON text of `value`: equal values give equal text on every machine."""
    return json.dumps(canonical(value), separators=(",", ":"), sort_keys=True, allow_nan=False)


def digest(value: Any) -> str:
    """The first 24 hex digits of sha256 over canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:DIGITS]


def digest_of_parts(parts: Mapping[str, str]) -> str:
    """digest() of a mapping of which every value is given as its canonical JSON text."""
    return hashlib.sha256(joined(parts).encode()).hexdigest()[:DIGITS]


def joined(parts: Mapping[str, str]) -> str:
    """Canonical JSON text of a mapping of which every value is given as its canonical JSON text."""
    return "{" + ",".join(f"{json.dumps(name)}:{parts[name]}" for name in sorted(parts)) + "}"


def file_sha256(path: Path) -> str:
    """Full sha256 of a file's bytes, read in blocks."""
    state = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def sealed(value: Mapping[str, Any]) -> bytes:
    """JSON text of a mapping with a digest of itself in it; `unsealed` reads it."""
    return (json.dumps({**value, "digest": digest(value)}, indent=1, sort_keys=True) + "\n").encode()


def unsealed(data: bytes, *, old: bool = False) -> dict[str, Any]:
    """What `sealed` was given; ValueError where that was changed. old: text without a digest is taken as it is."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a mapping")
    found = value.pop("digest", None)
    if found != digest(value) and not (old and found is None):
        raise ValueError("it fails its checksum")
    return value
