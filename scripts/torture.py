"""Break small sweeps on purpose and count what is wrong afterwards: nothing must be.

    python scripts/torture.py all --out torture.json
    python scripts/torture.py kills --n 200 --seed 7

One line to a harness: cases, violations, seconds. Exit code 1 where there is a violation; the failing cases, with the
seed and what led to them, are then in the file of --out (torture.json without it).
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY)]

from torture import clock, corruption, crash_points, disk, kills, mutants, power_loss, scene  # noqa: E402
from tqdm import tqdm  # noqa: E402

SEED = 20261121
RUNNERS = ((1000, 2, 0), (1000, 4, 12))  # cells, runs at once, kills


def runners(base: Path, seed: int, **_: Any) -> scene.Report:
    """Several runs of one sweep at once, without and with kills."""
    from torture.runners import share

    report = scene.Report("runners", seed)
    for n_cells, n_runners, n_kills in RUNNERS:
        folder = base / f"{n_runners}"
        folder.mkdir()
        found = share(folder, n_cells, n_runners, n_kills, seed)
        report.add({"runs": n_runners, "kills": found.kills}, found.violations)
        report.counts[f"computed twice by {n_runners}"] = found.twice
    return report


def fuzz(base: Path, seed: int, *, n: int, **_: Any) -> scene.Report:
    """Hostile configs, and data sets with defects, a quarter as many."""
    from torture.fuzz import fuzz_configs, fuzz_data

    report = scene.Report("fuzz", seed)
    for name, act, count in (("configs", fuzz_configs, n), ("data sets", fuzz_data, max(1, n // 4))):
        folder = base / name.replace(" ", "-")
        folder.mkdir()
        found = act(count, seed, folder)
        report.add({"fuzzed": name}, found.broken)
        report.counts[name] = found.n
    return report


HARNESSES: dict[str, tuple[Callable[..., scene.Report], int | None]] = {  # name -> harness, how many where it counts
    "crash-points": (crash_points.run, None),
    "kills": (kills.run, 1000),
    "power-loss": (power_loss.run, 1000),
    "disk": (disk.run, None),
    "corruptions": (corruption.run, 500),
    "clock": (clock.run, None),
    "mutants": (mutants.run, None),
    "runners": (runners, None),
    "fuzz": (fuzz, 2000),
}


def run(name: str, seed: int, n: int | None) -> dict[str, Any]:
    """One harness in a folder of its own; prints its line."""
    act, full = HARNESSES[name]
    n = full if n is None else n
    options = {"n": n} if n is not None and (full is not None or name == "disk") else {}
    show = functools.partial(tqdm, desc=name, unit="case", file=sys.stderr, disable=not sys.stderr.isatty())
    start = time.monotonic()
    with scene.workplace() as base:
        report = act(base, seed, **options, show=show)
    seconds = time.monotonic() - start
    counts = ", ".join(f"{key} {value}" for key, value in report.counts.items())
    print(f"{name}: {report.cases} cases, {len(report.violations)} violations, {seconds:.0f} s ({counts})", flush=True)
    return {"seconds": round(seconds, 1), **vars(report)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("harness", choices=[*HARNESSES, "all"])
    parser.add_argument("--n", type=int, help="how many kills, states, damaged files, configs; disk: of each call")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, help="write counts and violations there, as JSON")
    args = parser.parse_args()
    names = list(HARNESSES) if args.harness == "all" else [args.harness]
    reports = [run(name, args.seed, args.n) for name in names]
    failed = any(report["violations"] for report in reports)
    if args.out or failed:
        out = args.out or Path("torture.json")
        out.write_text(json.dumps(reports, indent=1, default=str) + "\n")
        print(f"written: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
