"""Embeddings that come with the data: the simulated world's, released files', a table's own column."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.component import component


@component("embedder", version=1)
@dataclass(frozen=True)
class Native:
    """No embedder of ours: the dataset brings its embeddings along."""
