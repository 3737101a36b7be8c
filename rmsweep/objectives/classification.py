"""The classification objective: is this response a chosen one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from rmsweep.component import component


@component("objective", version=1)
@dataclass(frozen=True)
class Classification:
    """Cross-entropy of "chosen" against "rejected", response by response.

    ``[bce(r_a, p) + bce(r_b, 1 - p)] / 2``, bce(r, y) = -y log sigma(r) - (1 - y) log sigma(-r)   (paper A, L_clf)
    """

    pointwise: ClassVar[bool] = True

    def __call__(self, reward_a: torch.Tensor, reward_b: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """Loss [C] from rewards [C] (logit units) and preference [C] in [0, 1]."""
        return (self.row_loss(reward_a, preference) + self.row_loss(reward_b, 1 - preference)) / 2

    def row_loss(self, reward: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss [E] of single responses with target 1 (chosen) or 0 (rejected)."""
        return binary_cross_entropy_with_logits(reward, target, reduction="none")
