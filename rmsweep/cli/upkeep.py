"""The verbs that look after what is on the disk: verify and gc."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmsweep.errors import ConfigError, unknown
from rmsweep.paths import user_path
from rmsweep.presets import Presets

MISMATCH = 4  # exit code


def verify(args: argparse.Namespace) -> int:
    """Check everything under root, recompute a sample where asked to; 4 where anything is wrong."""
    from rmsweep import recompute, verify
    from rmsweep.cli import render

    root, name = _root_and_sweep(args.words)
    if args.sample < 0 or args.seed < 0:
        raise ConfigError(f"--sample {args.sample} --seed {args.seed}: allowed are whole numbers from 0")
    report = verify.verify(root, name, show=True)
    if args.sample:
        plugins = _plugins(args.plugin, [*report.plans])
        recompute.recompute(root, report, args.sample, seed=args.seed, show=True, plugins=plugins)
    for kind, found in (("note", report.notes), ("warning", report.warnings), ("MISMATCH", report.problems)):
        for text in found:
            print(f"{kind}: {text}")
    again = f", {report.n_recomputed:,} cells computed again" if args.sample else ""
    n = len(report.problems)
    checked = f"{report.n_files:,} files, {render.size(report.n_bytes)}"
    print(f"verify: {checked}{again}: {n:,} mismatch{'' if n == 1 else 'es'}")
    return MISMATCH if report.problems else 0


def gc(args: argparse.Namespace) -> int:
    """Remove what killed processes left behind, and what else is asked for."""
    from rmsweep import collect

    root, name = _root_and_sweep(args.words)
    if name is not None:
        raise ConfigError(f"{name}: gc looks after a whole root; only root=DIR goes here")
    watch = collect.Watch(root / "store" / "claims", told=lambda text: print(f"rmsweep: {text}", file=sys.stderr))
    found = collect.collect(
        root, dry_run=args.dry_run, unreferenced=args.unreferenced, quarantine=args.quarantine, watch=watch
    )
    hints = {collect.UNREFERENCED: "--unreferenced", collect.QUARANTINE: "--quarantine"}
    for what, items in found.removed.items():
        _print_items(f"{'would remove' if found.dry else 'removed'} {what}", items)
    for what, items in found.left.items():
        _print_items(f"left {what} ({hints[what]} removes them)", items)
    for note in found.notes:
        print(f"note: {note}")
    if not found.removed:
        print("nothing to remove")
    return 0


def _print_items(title: str, items: Sequence[Any]) -> None:
    from rmsweep.cli import render

    print(f"{title}: {len(items):,}, {render.size(sum(item.size for item in items))}")
    for item in items:
        print(f"  {render.size(item.size):>8}  {item.path}")


def _plugins(given: Sequence[Path], folders: Sequence[Path]) -> list[str]:
    """Import the plug-ins of the sweeps that are recomputed, which the user must name."""
    from rmsweep.cli import verbs
    from rmsweep.plan import read_header

    planned: dict[str, str] = {}
    for folder in folders:
        planned |= read_header(folder)["plugins"]
    verbs.load_plugins(given, planned, ", ".join(folder.name for folder in folders))
    return [*planned]


def _root_and_sweep(words: Sequence[str]) -> tuple[Path, str | None]:
    """The root and the sweep, if any, that the words of a verb name."""
    from rmsweep.verify import sweep_folders

    roots = [word[5:] for word in words if word.startswith("root=")]
    names = [word for word in words if not word.startswith("root=")]
    if len(names) > 1 or len(roots) > 1:
        raise ConfigError(f"{' '.join(words)}: only root=DIR and one sweep's name go here")
    root = user_path(roots[0] if roots else Presets().baseline["root"], "root")
    known = [folder.name for folder in sweep_folders(root)]
    if names and names[0] not in known:
        raise unknown(f"sweep under root={root}", names[0], known)
    return root, names[0] if names else None
