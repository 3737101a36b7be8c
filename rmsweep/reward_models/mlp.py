"""A multi-layer perceptron on frozen embeddings: the papers' reward model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.bank import Floats, Split
from rmsweep.component import component, nested
from rmsweep.datasets import BankShape
from rmsweep.reward_models import Compute, TrainingData, score_in_chunks
from rmsweep.reward_models._training import Loss, forward, train_network

PAPER_HIDDEN = (1024, 512)
ACTIVATIONS: dict[str, type[torch.nn.Module]] = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "tanh": torch.nn.Tanh}


@component("reward_model", version=1)
@dataclass(frozen=True)
class MLP:
    """d -> 1024 -> 512 -> 1 with ReLU, no regularisation, inputs as they are (paper A, appendix; released networks.py).

    objective: the loss it minimises. hidden: layer widths, null for the paper's (or the simulated size's own).
    """

    objective: Any = nested("objective", "bradley_terry")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    activation: Literal["relu", "gelu", "tanh"] = "relu"

    def skip(self, shape: BankShape) -> str | None:
        """Runs on every bank."""
        return None

    def fit(self, data: TrainingData) -> FittedMLP:
        """Train under the protocol's split and schedule; raises Diverged."""
        examples = data.protocol.split(data.split, data.preferences, self.objective.pointwise, data.streams("split"))
        schedule = data.protocol.schedule(len(examples.train), self.objective.pointwise)
        widths = (data.split.dim, *(PAPER_HIDDEN if self.hidden is None else self.hidden), 1)
        network = build_network(widths, self.activation, data.streams("init")).to(data.compute.device)
        loss = Loss(network, self.objective, data.split, data.compute, schedule.clamped_sigmoid)
        history = train_network(loss, examples, schedule, data.streams("order"))
        return FittedMLP(network, data.compute, history.summary(examples))


@dataclass(frozen=True, eq=False)
class FittedMLP:
    """A trained network."""

    network: torch.nn.Module
    compute: Compute
    history: Mapping[str, float | int | None]

    def score(self, split: Split) -> NDArray[np.float32]:
        """Proxy rewards [P, N] (logits)."""
        self.network.eval()
        return score_in_chunks(split, self.score_rows, dtype=None)

    @torch.no_grad()
    def score_rows(self, embedding: Floats) -> Floats:
        """Proxy rewards [R] of embeddings [R, D]."""
        return np.asarray(forward(self.network, embedding, self.compute).cpu().numpy())

    def state(self) -> dict[str, NDArray[Any]]:
        """Weights and biases by layer."""
        return {name: tensor.cpu().numpy() for name, tensor in self.network.state_dict().items()}


def build_network(widths: Sequence[int], activation: str, rng: np.random.Generator) -> torch.nn.Sequential:
    """Linear layers of the given widths with `activation` between; PyTorch's default initialisation from `rng`.

    Weights and biases ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the last layer has no activation.
    """
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = torch.nn.utils.skip_init(torch.nn.Linear, fan_in, fan_out)
        bound = 1 / math.sqrt(fan_in)
        with torch.no_grad():
            for parameter in (linear.weight, linear.bias):
                draw = rng.random(tuple(parameter.shape), dtype=np.float32)
                parameter.copy_(torch.from_numpy((2 * draw - 1) * np.float32(bound)))
        layers += [linear, ACTIVATIONS[activation]()]
    return torch.nn.Sequential(*layers[:-1])
