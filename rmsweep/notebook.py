"""The same functions without command line or files, for a notebook: bank -> annotate -> fit -> score -> best_of_n."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rmsweep import component, hardware
from rmsweep.bank import Bank, Split
from rmsweep.cell import GROUPS, CellSpec, build_cell
from rmsweep.errors import ConfigError
from rmsweep.fingerprint import digest, file_sha256
from rmsweep.preferences import Preferences
from rmsweep.presets import Presets
from rmsweep.reward_models import Compute, FittedModel
from rmsweep.rng import streams

if TYPE_CHECKING:
    import pandas as pd

    from rmsweep.objectives._function import LossFunction


def annotate(
    bank: Bank,
    n_annotations: int | None = None,
    *,
    beta: float | None = None,
    error_rate: float | None = None,
    cross_beta_factor: float = 1.0,
    candidates: str | dict[str, Any] = "random",
    pairing: str | dict[str, Any] = "same_prompt",
    annotator: str | dict[str, Any] = "bradley_terry",
    pairs_per_prompt: int = 1,
    reward_scale: float | str = 1.0,
    protocol: str | dict[str, Any] = "clean",
    seed: int = 0,
) -> Preferences:
    """Preferences of a simulated annotator over the bank's training responses.

    n_annotations: null for 10,000 or what the bank can give. beta: annotation quality, null for 1, inf for none wrong;
    error_rate: solved for beta instead, not beside it. cross_beta_factor: times beta in cross-prompt comparisons.
    reward_scale: the unit of golden differences, a number, "sd" or "within_prompt_sd".
    candidates, pairing, annotator, protocol: an option of conf/ or a node with `kind`.
    """
    from rmsweep.stages import annotate as stage

    if beta is not None and error_rate is not None:
        raise ConfigError("beta and error_rate exclude each other: error_rate is solved for beta; give one of them")
    spec = _spec(
        candidates=candidates, pairing=pairing, annotator=annotator, protocol=protocol, reward_scale=reward_scale,
        beta=1.0 if beta is None else beta, error_rate={"value": error_rate}, n_annotations=n_annotations,
        pairs_per_prompt=pairs_per_prompt, cross_beta_factor=cross_beta_factor, seed=seed,
    )  # fmt: skip
    return stage.annotate(spec, bank, streams(seed), {})


def fit(
    bank: Bank,
    preferences: Preferences,
    reward_model: str | dict[str, Any] = "bt_mlp",
    *,
    objective: LossFunction | None = None,
    protocol: str | dict[str, Any] = "clean",
    seed: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    **fields: Any,
) -> FittedModel:
    """Train a reward model on preferences.

    reward_model: an option of conf/reward_model or a node with `kind`; `fields` change its fields (hidden=[64, 32]).
    objective: your own loss function(reward_a, reward_b, preference) -> loss [C] in place of the model's. device: cpu
    or cuda. precision: fp32 or bf16, where the device multiplies that in hardware.
    """
    from rmsweep.stages.train import train

    if device not in ("cpu", "cuda") or precision not in ("fp32", "bf16"):
        raise ConfigError(f"device={device!r}, precision={precision!r}: allowed are cpu and cuda, fp32 and bf16")
    if trouble := hardware.problem(device, precision):
        raise ConfigError(trouble)
    node = {**_node("reward_model", reward_model), **fields}
    if objective is not None:
        node["objective"] = _register("notebook_objective", objective)
    spec = _spec(reward_model=node, protocol=protocol, seed=seed)
    return train(spec, bank, preferences, streams(seed), Compute(device, precision), {})


def score(model: FittedModel, embedding: ArrayLike | Split) -> NDArray[np.float32]:
    """Proxy rewards [P, N] of a split, or of embeddings [P, N, D] (or [R, D], giving [R])."""
    if isinstance(embedding, Split):
        return model.score(embedding)
    array = np.asarray(embedding, dtype=np.float32)
    block = array if array.ndim == 3 else array[None]
    split = Split(np.zeros(block.shape[:2], np.float32), block, [str(i) for i in range(len(block))])
    scores = model.score(split)
    return scores if array.ndim == 3 else scores[0]


def best_of_n(scores: ArrayLike, golden: ArrayLike) -> NDArray[np.float64]:
    """Expected golden reward of the best of N by score, for N = 1..M, exact over subsets: [M].

    scores, golden: [Q, M]; NaN golden pads prompts with fewer responses.
    """
    from rmsweep.metrics.best_of_n import best_of_n as curve

    return curve(np.asarray(scores), np.asarray(golden))


def sweep(
    axes: Mapping[str, Iterable[Any]],
    *,
    objectives: Mapping[str, LossFunction] | None = None,
    bank: Bank | None = None,
    set: Mapping[str, Any] | None = None,
    name: str | None = None,
    root: str | Path = "outputs",
    workers: int | None = None,
    config_dirs: Iterable[str | Path] = (),
    progress: bool = True,
) -> pd.DataFrame:
    """Run the grid of `axes` (key -> values, as on the command line) and return its results table.

    objectives: name -> your own loss; each becomes a reward model of that name (an MLP) on the axis `reward_model`,
    beside bt_mlp and clf_mlp where the axes name none. bank: your own bank in place of a dataset. Functions cannot be
    sent to worker processes by name, so a sweep with `objectives` runs in this process. In a script, call this below
    `if __name__ == "__main__":` (worker processes import the script), or with workers=0.
    """
    from rmsweep import execute, results
    from rmsweep.engines.local import Local
    from rmsweep.grid import check_name, derived_name, describe
    from rmsweep.planner import make

    axes = {key: _values(key, values) for key, values in axes.items()}
    taken = Presets([Path(folder) for folder in config_dirs]).options("reward_model")
    for own_name in objectives or {}:
        if own_name in taken:
            raise ConfigError(f"objective {own_name!r}: a reward model of that name exists; choose another name")
    own = {name: {"kind": "mlp", "objective": _register(name, loss)} for name, loss in (objectives or {}).items()}
    if own:
        named = axes.get("reward_model", ["bt_mlp", "clf_mlp"])
        axes["reward_model"] = [*named, *(name for name in own if name not in named)]
    presets = Presets([Path(folder) for folder in config_dirs], extra={"reward_model": own})
    departures = dict(set or {})
    if bank is not None:
        departures = {"dataset": "folder", "dataset.path": str(_imported(bank, Path(root))), **departures}
    digests = [component.get("objective", own_name).code_digest for own_name in own]  # type: ignore[attr-defined]
    grid = describe({"set": departures, "axes": axes})
    grid = replace(grid, name=check_name(name) if name else derived_name(grid, digests))
    plan = make(grid, presets)
    summary = execute.run(plan, Path(root), Local(workers=0 if own else workers), progress=progress)
    return results.load(summary.results)


def load(path: str | Path = "outputs") -> pd.DataFrame:
    """The results table of a results.parquet, a sweep's folder, or the last sweep under a root."""
    from rmsweep import results

    return results.load(Path(path))


def _values(key: str, values: Any) -> list[Any]:
    """The values of an axis as plain Python values."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"axes[{key!r}]={values!r}: needs a list of values, such as [{values!r}]")
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _imported(bank: Bank, root: Path) -> Path:
    """Write the bank to root/imported/DIGEST: the same bank gives the same path, so the sweep continues."""
    parent = root.resolve() / "imported"
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=parent))
    try:
        bank.write(temporary)
        path = parent / digest({file.name: file_sha256(file) for file in temporary.iterdir()})
        if not path.exists():
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _register(name: str, loss: LossFunction) -> str:
    from rmsweep.objectives._function import objective_from_function

    if not component.KIND.fullmatch(name):
        raise ConfigError(f"objective {name!r}: a name has lower-case letters, digits and _ only")
    objective_from_function(name, loss)
    return name


def _node(group: str, option: str | dict[str, Any]) -> dict[str, Any]:
    return dict(option) if isinstance(option, dict) else Presets().node(group, option)


def _spec(reward_scale: float | str = 1.0, **changes: Any) -> CellSpec:
    """The baseline cell with changes, over a bank in memory."""
    presets = Presets()
    config: dict[str, Any] = {g: _node(g, changes.pop(g, presets.baseline_choices[g])) for g in GROUPS}
    config["dataset"] = {"kind": "folder", "reward_scale": reward_scale}
    config["size"] = presets.node("size", presets.baseline_choices["size"])
    return build_cell({**config, **changes})
