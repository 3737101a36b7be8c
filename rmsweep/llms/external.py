"""A base LLM whose responses already lie in files: the user's table, or released embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from rmsweep.component import component


@component("base_llm", version=1)
@dataclass(frozen=True)
class ExternalLLM:
    """Name of the LLM as its files spell it (`released`: embd_{name}_{embedder}_{task}_{split}.npy)."""

    name: str = ""
