"""The shape of a simulated bank, and the hyper-parameters that suit it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Size:
    """P training prompts of N responses, Q test prompts of M responses, D embedding dimensions.

    quantities: the annotation quantities of the papers' sweeps at this size. reward_model: kind -> fields used where
    the reward model leaves them null (`hidden` of mlp, `rounds` of lgb).
    """

    P: Positive
    N: Annotated[int, Field(ge=2)]
    Q: Positive
    M: Annotated[int, Field(ge=2)]
    D: Positive
    quantities: tuple[int, ...] = ()
    reward_model: dict[str, dict[str, Any]] = field(default_factory=dict)
