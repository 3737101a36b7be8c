"""A simulated base LLM: where its responses lie around a prompt's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rmsweep.component import component


@component("base_llm", version=1)
@dataclass(frozen=True)
class SimulatedLLM:
    """Response latent z = prompt mean + skill * w / |w| + diversity * s_within * epsilon (see datasets/simulated.py).

    skill: shift along the golden reward's linear direction, in latent sd. diversity: factor on the within-prompt
    spread; supervised fine-tuning raises the first and lowers the second. name: what separates the draws of two LLMs.
    """

    name: str
    skill: float = 0.0
    diversity: Annotated[float, Field(gt=0)] = 1.0
