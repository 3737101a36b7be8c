"""The training loop of iterative reward models: batches, epochs, early stopping, as a Schedule says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy

from rmsweep.bank import Floats, Ints, Split
from rmsweep.errors import Diverged
from rmsweep.objectives import Objective
from rmsweep.protocols import Examples, Schedule, SplitExamples
from rmsweep.reward_models import Compute

VALIDATION_ROWS = 8192


@dataclass
class History:
    """Losses per epoch and the epoch whose weights are kept (from 1; 0: none)."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    kept: int = 0

    def summary(self, examples: SplitExamples) -> dict[str, float | int | None]:
        """Columns of results.parquet."""
        best = int(np.argmin(self.validation)) + 1 if self.validation else None
        return {
            "n_train": len(np.unique(examples.train.comparison)),
            "n_validation": len(np.unique(examples.validation.comparison)),
            "epochs": len(self.train),
            "best_epoch": best,
            "train_loss": self.train[self.kept - 1],
            "validation_loss": self.validation[self.kept - 1] if self.validation else None,
            "l2": None,
        }


@dataclass(frozen=True)
class Loss:
    """Mean loss of a network on examples: rows gathered from the bank, scored, handed to the objective."""

    network: torch.nn.Module
    objective: Objective
    split: Split
    compute: Compute
    clamped_sigmoid: bool

    def __call__(self, examples: Examples) -> torch.Tensor:
        """Scalar mean loss over the examples."""
        target = torch.from_numpy(examples.target).to(self.compute.device)
        if examples.second is None:
            reward = self.reward(examples.first)
            return self._binary(reward, target) if self.clamped_sigmoid else self._rows(reward, target)
        reward_a, reward_b = self.reward(np.concatenate([examples.first, examples.second])).chunk(2)
        if self.clamped_sigmoid and getattr(self.objective, "kind", "") == "bradley_terry":
            return self._binary(reward_a - reward_b, target)
        return self.objective(reward_a, reward_b, target).mean()

    def reward(self, rows: Ints) -> torch.Tensor:
        """Proxy rewards [len(rows)] of flat bank rows."""
        return forward(self.network, self.split.gather(rows, dtype=None), self.compute)

    def _rows(self, reward: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.objective.row_loss(reward, target).mean()  # type: ignore[attr-defined]

    @staticmethod
    def _binary(logit: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of sigma(logit) with log clamped at -100, as released."""
        return binary_cross_entropy(torch.sigmoid(logit), target)


def forward(network: torch.nn.Module, embedding: Floats, compute: Compute) -> torch.Tensor:
    """Proxy rewards [R], float32, of embeddings [R, D]: products in fp32, or in bf16 with fp32 weights and sums."""
    low = compute.precision == "bf16"
    rows = torch.from_numpy(np.require(embedding, requirements=["C", "W"])).to(
        compute.device
    )  # memory maps are read-only
    with torch.autocast(compute.device, torch.bfloat16, enabled=low):
        reward: torch.Tensor = network(rows.to(torch.bfloat16 if low else torch.float32))
    return reward.squeeze(-1).float()


def train_network(loss: Loss, examples: SplitExamples, schedule: Schedule, rng: np.random.Generator) -> History:
    """Train `loss.network` in place with Adam; raises Diverged on a loss that is not finite."""
    optimizer = torch.optim.Adam(
        loss.network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    history, weights = History(), loss.network.state_dict()
    for epoch in range(1, schedule.max_epochs + 1):
        history.train.append(_train_epoch(loss, examples.train, schedule, optimizer, rng))
        if len(examples.validation):
            history.validation.append(_validate(loss, examples.validation))
        _check(history, epoch)
        if not schedule.restore_best or not history.validation or np.argmin(history.validation) == epoch - 1:
            history.kept, weights = epoch, _snapshot(loss.network, schedule.restore_best)
        if _stops(history.validation, schedule):
            break
    loss.network.load_state_dict(weights)
    return history


def batches(n: int, schedule: Schedule, rng: np.random.Generator) -> Iterator[Ints]:
    """Indices of the batches of one epoch over n examples."""
    if schedule.epoch == "pass":
        order = rng.permutation(n)
        yield from np.split(order, range(schedule.batch, n, schedule.batch))
    else:
        for _ in range(-(-n // schedule.batch)):
            yield rng.permutation(n)[: schedule.batch]


def _train_epoch(
    loss: Loss, examples: Examples, schedule: Schedule, optimizer: torch.optim.Optimizer, rng: np.random.Generator
) -> float:
    """One epoch of steps; returns the mean training loss over its batches."""
    losses = []
    loss.network.train()
    for index in batches(len(examples), schedule, rng):
        optimizer.zero_grad(set_to_none=True)
        value = loss(examples.take(index))
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return float(np.mean(losses))


@torch.no_grad()
def _validate(loss: Loss, examples: Examples) -> float:
    """Mean validation loss, in chunks."""
    loss.network.eval()
    starts = range(0, len(examples), VALIDATION_ROWS)
    parts = [np.arange(s, min(s + VALIDATION_ROWS, len(examples))) for s in starts]
    return sum(float(loss(examples.take(p))) * len(p) for p in parts) / len(examples)


def _stops(validation: list[float], schedule: Schedule) -> bool:
    if schedule.stop == "each_previous":
        return len(validation) > schedule.patience and validation[-1] > max(validation[-schedule.patience - 1 : -1])
    return bool(validation) and len(validation) - 1 - int(np.argmin(validation)) >= schedule.patience


def _snapshot(network: torch.nn.Module, copied: bool) -> dict[str, Any]:
    return copy.deepcopy(network.state_dict()) if copied else network.state_dict()


def _check(history: History, epoch: int) -> None:
    if not np.isfinite([history.train[-1], *history.validation[-1:]]).all():
        raise Diverged(f"loss is not finite at epoch {epoch}")
