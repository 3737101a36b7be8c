"""The Bradley-Terry objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from rmsweep.component import component


@component("objective", version=1)
@dataclass(frozen=True)
class BradleyTerry:
    """Negative log-likelihood of the Bradley-Terry model.

    ``-p log sigma(r_a - r_b) - (1 - p) log sigma(r_b - r_a)``      (Bradley & Terry 1952; paper A, eq. of L_bt)
    """

    pointwise: ClassVar[bool] = False

    def __call__(self, reward_a: torch.Tensor, reward_b: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """Loss [C] from rewards [C] (logit units) and preference [C] in [0, 1]."""
        return binary_cross_entropy_with_logits(reward_a - reward_b, preference, reduction="none")
