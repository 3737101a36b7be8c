"""The simulated world: a known golden reward over a latent, seen through a warped, noisy embedding.

Prompt p and response i of a base LLM with `skill` and `diversity`:

    mu_p ~ N(0, (1 - rho) I_L),     z = mu_p + skill * w + diversity * sqrt(rho) * eps,     eps ~ N(0, I_L)
    golden g(z) = c [ sqrt(1 - nu) w.z + sqrt(nu) sum_k a_k sin(omega_k.z + phi_k) ],       |w| = 1
    embedding e = tanh( warp * [y ; n] U + b ),     y = z + sigma * eta,  n nuisance,  U [L + R, D]

rho = within_share, nu = nonlinearity, sigma = observation_noise. c makes sd(g(z) - g(z')) of two responses to one
prompt equal `golden_sd` at skill 0 and diversity 1, in closed form; at the default 1.3 the papers' betas 0.5 ... 10
give error rates of about 37 % ... 4 %. E[g | y] has a closed form too (Gaussian prior, Gaussian noise): it is the
best score that any function of the embedding can reach (where D >= L + R, so that y can be read off e), stored as
the bank's `ceiling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.bank import SPLITS, NpyWriter, write_notes, write_prompts
from rmsweep.component import component, downstream, silent
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.errors import ConfigError
from rmsweep.rng import stream
from rmsweep.size import Size

Array = NDArray[np.float64]
Count = Annotated[int, Field(ge=1)]
MOST = {"P": 10_000_000, "Q": 10_000_000, "N": 100_000, "M": 100_000, "D": 100_000}
MOST_DIMS = {"n_latent": 10_000, "n_nuisance": 10_000, "n_waves": 100_000}
CHUNK_ROWS = 8192  # part of the algorithm: each chunk of responses has its own random stream


@component("dataset", version=1)
@dataclass(frozen=True)
class SimulatedWorld:
    """A data set of the simulated world (formulas: module docstring).

    seed: of the world, its prompts and responses. n_latent L, n_nuisance R, n_waves K: dimensions. nonlinearity nu,
    frequency sd(omega.z), warp, observation_noise sigma: difficulty of the map from embedding to golden reward.
    within_share rho: share of latent variance within a prompt. golden_sd: unit of the golden reward (see above).
    """

    uses_size: ClassVar[bool] = True
    default_embedder: ClassVar[str] = "native"

    seed: Annotated[int, Field(ge=0)] = 0
    n_latent: Count = 16
    n_nuisance: Count = 16
    n_waves: Count = 32
    nonlinearity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    frequency: Annotated[float, Field(gt=0)] = 1.5
    within_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    observation_noise: Annotated[float, Field(ge=0)] = 0.3
    warp: Annotated[float, Field(gt=0)] = 1.0
    golden_sd: Annotated[float, Field(gt=0)] = 1.3
    reward_scale: RewardScale = downstream(1.0)
    base_llms: tuple[str, ...] = silent(())

    def inputs(self, llm: Any, embedder: Any) -> dict[str, Path]:
        """No files: the world is a function of its config."""
        return {}

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Counts per prompt as the size says; no texts."""
        if llm.kind != "simulated":
            raise ConfigError(f"base_llm.kind={llm.kind} has no place in the simulated world; needed: simulated")
        _check_size(self, size)
        return BankShape(np.full(size.P, size.N), np.full(size.Q, size.M), has_texts=False)

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Write the bank chunk by chunk; memory stays at a few chunks whatever P, N, Q, M, D."""
        world = _World.draw(self, size.D)
        notes: dict[str, Any] = {}
        for name, n_prompts, n_responses in zip(SPLITS, (size.P, size.Q), (size.N, size.M), strict=True):
            notes[name] = _write_split(self, world, llm, folder, name, (n_prompts, n_responses, size.D))
            write_prompts(folder, name, [f"{name}-{i}" for i in range(n_prompts)])
        write_notes(folder, seed=self.seed, **notes)


def _check_size(config: SimulatedWorld, size: Size) -> None:
    """Refuse sizes whose mere counts would fill the memory."""
    sizes = {f"size.{k}": (getattr(size, k), most) for k, most in MOST.items()}
    for key, (n, most) in {**sizes, **{f"dataset.{k}": (getattr(config, k), m) for k, m in MOST_DIMS.items()}}.items():
        if n > most:
            raise ConfigError(f"{key}={n}: allowed are at most {most:,}")


class GoldenReward(NamedTuple):
    """g(z) = linear.z + sum_k amplitude_k sin(omega_k.z + phase_k); linear [L], omega [K, L], amplitude, phase [K]."""

    linear: Array
    omega: Array
    amplitude: Array
    phase: Array

    @classmethod
    def draw(cls, config: SimulatedWorld) -> GoldenReward:
        """The world's function, scaled to `golden_sd` (module docstring)."""
        rng = stream(config.seed, "world", "golden")
        linear = rng.standard_normal(config.n_latent)
        omega = rng.standard_normal((config.n_waves, config.n_latent))
        omega *= config.frequency / np.sqrt(config.n_latent)
        phase = rng.uniform(0, 2 * np.pi, config.n_waves)
        waves = cls(np.zeros(config.n_latent), omega, rng.standard_normal(config.n_waves), phase)
        amplitude = waves.amplitude * np.sqrt(config.nonlinearity / waves.variance(1.0))
        raw = cls(np.sqrt(1 - config.nonlinearity) * linear / np.linalg.norm(linear), omega, amplitude, phase)
        within, between = config.within_share, 1 - config.within_share
        difference = 2 * (raw.variance(1.0) - raw.smoothed(within).variance(between))
        scale = config.golden_sd / np.sqrt(difference)
        return cls(scale * raw.linear, omega, scale * amplitude, phase)

    def __call__(self, z: Array) -> Array:
        """G [R] of latents z [R, L]."""
        return z @ self.linear + np.sin(z @ self.omega.T + self.phase) @ self.amplitude

    def smoothed(self, variance: float) -> GoldenReward:
        """M -> E[g(m + sqrt(variance) eps)]: every wave shrinks by exp(-variance |omega|^2 / 2)."""
        return self._replace(amplitude=self.amplitude * np.exp(-variance * (self.omega**2).sum(axis=1) / 2))

    def variance(self, v: float) -> float:
        """Var g(z) under z ~ N(0, v I), in closed form."""
        norm = (self.omega**2).sum(axis=1)
        mean = np.exp(-v * norm / 2) * np.sin(self.phase)
        plus, minus = (_pair_norms(self.omega, sign) for sign in (1, -1))
        cos_minus = np.cos(self.phase[:, None] - self.phase) * np.exp(-v * minus / 2)
        cos_plus = np.cos(self.phase[:, None] + self.phase) * np.exp(-v * plus / 2)
        waves = (cos_minus - cos_plus) / 2 - np.outer(mean, mean)
        cross = v * (self.omega @ self.linear) * np.exp(-v * norm / 2) * np.cos(self.phase)
        linear = v * self.linear @ self.linear
        return float(linear + self.amplitude @ waves @ self.amplitude + 2 * self.amplitude @ cross)


class _World(NamedTuple):
    """Golden reward and embedding map: mixing U [L + R, D], bias b [D]."""

    reward: GoldenReward
    mixing: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def draw(cls, config: SimulatedWorld, dim: int) -> _World:
        rng, inputs = stream(config.seed, "world", "embedding"), config.n_latent + config.n_nuisance
        mixing = rng.standard_normal((inputs, dim)) * config.warp / np.sqrt(inputs)
        return cls(GoldenReward.draw(config), mixing.astype(np.float32), rng.uniform(-1, 1, dim).astype(np.float32))


class _Chunk(NamedTuple):
    golden: Array
    ceiling: Array
    embedding: NDArray[np.float16]


def _write_split(
    config: SimulatedWorld, world: _World, llm: Any, folder: Path, name: str, shape: tuple[int, int, int]
) -> dict[str, float]:
    """Write golden, ceiling and embedding of one split; returns its summary for bank.json."""
    n_prompts, n_responses, _ = shape
    rng = stream(config.seed, "world", "prompts", name)
    prompt_latent = rng.standard_normal((n_prompts, config.n_latent)) * np.sqrt(1 - config.within_share)
    prompt_nuisance = rng.standard_normal((n_prompts, config.n_nuisance))
    golden, ceiling = np.empty((2, n_prompts, n_responses), dtype=np.float32)
    step = max(1, CHUNK_ROWS // n_responses)
    with NpyWriter(folder / f"embedding_{name}.npy", np.float16, shape) as embedding:
        for index, start in enumerate(range(0, n_prompts, step)):
            part = slice(start, min(start + step, n_prompts))
            chance = stream(config.seed, "responses", llm.name, name, index)
            chunk = _respond(config, world, llm, prompt_latent[part], prompt_nuisance[part], n_responses, chance)
            golden[part], ceiling[part] = chunk.golden, chunk.ceiling
            embedding.append(chunk.embedding)
    np.save(folder / f"golden_{name}.npy", golden)
    np.save(folder / f"ceiling_{name}.npy", ceiling)
    return _summary(golden, ceiling)


def _respond(
    config: SimulatedWorld,
    world: _World,
    llm: Any,
    prompt_latent: Array,
    prompt_nuisance: Array,
    n: int,
    chance: np.random.Generator,
) -> _Chunk:
    """Draw n responses to each of p prompts: golden [p, n], ceiling [p, n], embedding [p, n, D]."""
    p, latent = prompt_latent.shape
    direction = world.reward.linear / max(float(np.linalg.norm(world.reward.linear)), 1e-300)
    spread = llm.diversity * np.sqrt(config.within_share)
    z = prompt_latent[:, None] + llm.skill * direction + spread * chance.standard_normal((p, n, latent))
    y = z + config.observation_noise * chance.standard_normal((p, n, latent))
    nuisance = prompt_nuisance[:, None] + chance.standard_normal((p, n, config.n_nuisance))
    seen = np.concatenate([y, nuisance / np.sqrt(2)], axis=2).astype(np.float32)
    embedding = np.tanh(seen.reshape(p * n, -1) @ world.mixing + world.bias)
    return _Chunk(
        world.reward(z.reshape(-1, latent)).reshape(p, n),
        _posterior_mean(config, world, llm, y.reshape(-1, latent), direction).reshape(p, n),
        embedding.astype(np.float16).reshape(p, n, -1),
    )


def _posterior_mean(config: SimulatedWorld, world: _World, llm: Any, y: Array, direction: Array) -> Array:
    """E[g(z) | y] for the prior z ~ N(skill w, tau2 I) and y = z + sigma eta."""
    tau2 = 1 - config.within_share + llm.diversity**2 * config.within_share
    weight = tau2 / (tau2 + config.observation_noise**2)
    mean = llm.skill * direction + weight * (y - llm.skill * direction)
    return world.reward.smoothed(weight * config.observation_noise**2)(mean)


def _summary(golden: NDArray[np.float32], ceiling: NDArray[np.float32]) -> dict[str, float]:
    """What can be reached at best: by chance, by the best function of the embedding, by the golden reward itself."""
    pick = np.take_along_axis(golden, ceiling.argmax(axis=1)[:, None], axis=1)
    values = {
        "golden_random": golden.mean(dtype=np.float64),
        "golden_ceiling": pick.mean(dtype=np.float64),
        "golden_best": golden.max(axis=1).mean(dtype=np.float64),
        "golden_sd_within_prompt": np.sqrt(golden.var(axis=1, ddof=1, dtype=np.float64).mean()),
    }
    return {name: float(value) for name, value in values.items()}


def _pair_norms(omega: Array, sign: int) -> Array:
    """|omega_j + sign omega_k|^2 for all j, k, [K, K]."""
    return ((omega[:, None] + sign * omega[None]) ** 2).sum(axis=2)
