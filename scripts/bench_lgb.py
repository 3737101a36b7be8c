"""What `clf_lgb_fast` saves against `clf_lgb`, and what it costs in quality: paired over seeds, one bank, one run.

    python scripts/bench_lgb.py                      # n_annotations 5,000 and 40,000 at D=2048, five seeds
    python scripts/bench_lgb.py --D 256 --n 5000 --json lgb.json

Both presets see the same preferences in turn and share one binned bank each, as the cells of a unit do. Seconds are
process CPU seconds of whole cells in one thread, the binning of each preset's first cell left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from _bench import cell_config, print_table, simulated_bank, write_json

MODELS = ("clf_lgb", "clf_lgb_fast")
METRICS = ("golden_improvement", "spearman", "agreement")


def main() -> None:
    """Run all cells, print a table per number of annotations."""
    from rmsweep.runner import one_thread

    options = arguments()
    size = {"P": max(options.n), "N": 10, "Q": options.Q, "M": options.M, "D": options.D}
    found: dict[str, Any] = {"options": vars(options) | {"bank_dir": str(options.bank_dir), "json": str(options.json)}}
    with one_thread():
        bank = simulated_bank(size, options.bank_dir)
        for n in options.n:
            rows = cells(options, size, bank, n)
            found[str(n)] = {"cells": rows, "summary": summary(rows)}
            print_table(f"n_annotations {n:,}, {options.seeds} seeds", found[str(n)]["summary"])
    write_json(options.json, found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[5_000, 40_000], help="n_annotations")
    parser.add_argument("--D", type=int, default=2048)
    parser.add_argument("--Q", type=int, default=200, help="test prompts (for quality; scoring is not the matter here)")
    parser.add_argument("--M", type=int, default=100)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=None, help="trees, library default 100")
    parser.add_argument("--bank-dir", type=Path, default=None, help="where the bank is kept [a folder in /tmp]")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def cells(options: argparse.Namespace, size: dict[str, int], bank: Any, n: int) -> list[dict[str, Any]]:
    """One row per model and seed; one cell of each model is run before, and not counted: it bins the bank."""
    from tqdm import tqdm

    from rmsweep.cell import build_cell
    from rmsweep.pipeline import run_cell
    from rmsweep.reward_models import Compute

    rows = []
    caches: dict[str, dict[Any, Any]] = {model: {} for model in MODELS}
    for seed in tqdm(range(-1, options.seeds), desc=f"n={n:,}", unit="seed"):
        for model in MODELS:
            changes = {"reward_model": model, "beta": options.beta, "n_annotations": n, "seed": max(seed, 0)}
            config = cell_config(size, **changes, **{"reward_model.rounds": options.rounds})
            start = time.process_time()
            outcome = run_cell(build_cell(config), bank, Compute(), caches[model])
            row = {"model": model, "seed": seed, "seconds": time.process_time() - start}
            rows.append(row | {name: float(outcome.metrics[name]) for name in METRICS})
    return [row for row in rows if row["seed"] >= 0]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds and their paired ratio; means of the metrics and their paired difference."""
    import numpy as np

    def columns(name: str) -> list[Any]:
        return [np.array([row[name] for row in rows if row["model"] == model]) for model in MODELS]

    plain, fast = columns("seconds")
    medians = {"plain": float(np.median(plain)), "fast": float(np.median(fast))}
    found = [{"what": "seconds", **medians, "ratio": float(np.median(plain / fast))}]
    for name in METRICS:
        plain, fast = columns(name)
        difference = fast - plain
        error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else None
        found.append({"what": name, "plain": float(plain.mean()), "fast": float(fast.mean())})
        found[-1] |= {"difference": float(difference.mean()), "standard_error": error}
    names = ("what", "plain", "fast", "ratio", "difference", "standard_error")
    return [{name: row.get(name) for name in names} for row in found]


if __name__ == "__main__":
    main()
