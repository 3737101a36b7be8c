"""What `clf_lgb_fast` saves against `clf_lgb`, and what it costs in quality: paired over seeds, one bank, one run.

    python scripts/bench_lgb.py                      # n_annotations 5,000 and 40,000 at D=2048, five seeds
    python scripts/bench_lgb.py --D 256 --n 5000 --json lgb.json

Both presets see the same preferences in turn and share one binned bank each, as the cells of a unit do. Seconds are
process CPU seconds of one thread: training (with the losses of its history) and evaluation; binning is apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rmsweep.bank import Bank
from rmsweep.cell import GROUPS, CellSpec, build_cell
from rmsweep.pipeline import run_cell
from rmsweep.presets import Presets
from rmsweep.reward_models import Compute
from rmsweep.runner import one_thread

MODELS = ("clf_lgb", "clf_lgb_fast")
METRICS = ("golden_improvement", "spearman", "agreement")


def main() -> None:
    """Run all cells, print a table per number of annotations."""
    options = arguments()
    found = []
    with one_thread(), tempfile.TemporaryDirectory(dir=options.bank_dir) as folder:
        bank = make_bank(options, Path(folder))
        for n in options.n:
            rows = cells(options, bank, n)
            found.append(summary(n, rows))
            show(found[-1])
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "n": found}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[5_000, 40_000], help="n_annotations")
    parser.add_argument("--D", type=int, default=2048)
    parser.add_argument("--Q", type=int, default=200, help="test prompts (quality; evaluation is not what is measured)")
    parser.add_argument("--M", type=int, default=100)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=None, help="trees, library default 100")
    parser.add_argument("--bank-dir", type=Path, default=None, help="where the temporary bank goes")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def spec(options: argparse.Namespace, n: int, model: str, seed: int) -> CellSpec:
    presets = Presets()
    choices = {**presets.baseline_choices, "reward_model": model}
    config: dict[str, Any] = {group: presets.node(group, choices[group]) for group in (*GROUPS, "size")}
    config |= {key: presets.baseline[key] for key in ("pairs_per_prompt", "error_rate", "evaluate")}
    config |= {"beta": options.beta, "n_annotations": n, "seed": seed}
    config["size"] |= {"P": max(options.n), "N": 10, "Q": options.Q, "M": options.M, "D": options.D, "quantities": [n]}
    config["reward_model"] |= {"rounds": options.rounds}
    return build_cell(config)


def make_bank(options: argparse.Namespace, folder: Path) -> Bank:
    cell = spec(options, options.n[0], MODELS[0], 0)
    cell.dataset.generate(cell.base_llm, cell.size, cell.embedder, folder)
    return Bank.read(folder)


def cells(options: argparse.Namespace, bank: Bank, n: int) -> list[dict[str, Any]]:
    """One row per model and seed; the first cell of each model bins the bank and is run once before."""
    rows = []
    caches: dict[str, dict[Any, Any]] = {model: {} for model in MODELS}
    for seed in tqdm(range(-1, options.seeds), desc=f"n={n:,}", unit="seed"):
        for model in MODELS:
            start = time.process_time()
            outcome = run_cell(spec(options, n, model, max(seed, 0)), bank, Compute(), caches[model])
            spent = time.process_time() - start
            values = {name: float(outcome.metrics[name]) for name in METRICS}
            rows.append({"model": model, "seed": seed, "seconds": spent, "train": outcome.seconds["train"], **values})
    return [row for row in rows if row["seed"] >= 0]


def summary(n: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the seconds, means of the metrics, paired differences with standard errors."""

    def column(model: str, name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if row["model"] == model])

    plain, fast = MODELS
    found: dict[str, Any] = {"n": n, "seeds": len(column(plain, "seed")), "rows": rows}
    found["seconds"] = {model: float(np.median(column(model, "seconds"))) for model in MODELS}
    found["ratio"] = float(np.median(column(plain, "seconds") / column(fast, "seconds")))
    for name in METRICS:
        difference = column(fast, name) - column(plain, name)
        error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else None
        found[name] = {
            **{model: float(column(model, name).mean()) for model in MODELS},
            "difference": float(difference.mean()),
            "standard_error": error,
        }
    return found


def show(found: dict[str, Any]) -> None:
    plain, fast = MODELS
    seconds = found["seconds"]
    print(f"n_annotations {found['n']:,}, {found['seeds']} seeds")
    print(f"  seconds a cell      {seconds[plain]:8.2f} {seconds[fast]:8.2f}   ratio {found['ratio']:.2f}")
    for name in METRICS:
        row = found[name]
        error = "" if row["standard_error"] is None else f" +- {row['standard_error']:.4f}"
        print(f"  {name:19} {row[plain]:8.4f} {row[fast]:8.4f}   difference {row['difference']:+.4f}{error}")


if __name__ == "__main__":
    main()
