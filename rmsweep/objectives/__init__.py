"""Objectives: losses over the rewards of a comparison's two responses."""

from __future__ import annotations

from typing import Protocol

import torch


class Objective(Protocol):
    """A loss per comparison. `pointwise` objectives are sums over single responses and train on rows."""

    pointwise: bool

    def __call__(self, reward_a: torch.Tensor, reward_b: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """Loss [C] from rewards [C] and preference p = P(a > b) [C] in [0, 1]."""
        ...
