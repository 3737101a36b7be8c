"""The dataset's own embedder: its embeddings where it brings some, else `lsa`."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.component import component


@component("embedder", version=1)
@dataclass(frozen=True)
class Auto:
    """Stands for the dataset's `default_embedder`; replaced before anything is fingerprinted."""
