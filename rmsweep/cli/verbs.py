"""The verbs of the command line, each a short function from its words to an exit code."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rmsweep.cli import help as texts
from rmsweep.errors import ConfigError, StoreError, unknown
from rmsweep.presets import Presets

SETTING_VERBS = ("run", "plan")


def call(verb: str, argv: Sequence[str]) -> int:
    """Run one verb on its own words."""
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    parser = _Parser(prog=f"rmsweep {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    for flag, options in FLAGS[verb].items():
        parser.add_argument(*flag.split(), **options)
    args = parser.parse_intermixed_args(list(argv))
    if args.help:
        print(texts.verb_help(verb, Presets(getattr(args, "config_dir", ()))))
        return 0
    return VERBS[verb](args)


class _Parser(argparse.ArgumentParser):
    """argparse exits with 2 on bad input; here that is exit code 1."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


# -- run, plan --------------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    request, presets_plan = _planned(args, need_data=True)
    if request is None:
        return 0
    from rmsweep import execute
    from rmsweep.cli import compose, render

    compose.check_against_hydra(request)
    plan, root, engine = presets_plan, request.root, request.engine
    states = _states(root, plan)
    print(render.plan_text(plan, states, short=True), flush=True)
    needed, free = _disk(root, plan, states)
    if needed > free:
        raise StoreError(f"{render.disk_text(needed, free)}; free some space, or take another root=DIR or a smaller size")
    return _finish(plan, execute.run(plan, root, engine))


def _plan(args: argparse.Namespace) -> int:
    request, plan = _planned(args, need_data=False)
    if request is None:
        return 0
    from rmsweep.cli import compose, render

    compose.check_against_hydra(request)
    states = _states(request.root, plan)
    print(render.plan_text(plan, states))
    if plan.unknown is None:
        print(render.disk_text(*_disk(request.root, plan, states)))
    print(render.cost_text(plan, states, _mean_seconds(request.root)))
    return 0


def _planned(args: argparse.Namespace, need_data: bool) -> tuple[Any, Any]:
    """Request and plan of `run` and `plan`; (None, None) after --cfg, which only prints."""
    from rmsweep import plan as planning
    from rmsweep import plugins
    from rmsweep.cli import compose
    from rmsweep.cli.device import resolve_compute

    for file in args.plugin:
        plugins.load(file)
    request = compose.read(args.words, Presets(args.config_dir))
    if args.cfg:
        print(compose.first_cell_yaml(request), end="")
        return None, None
    name = planning.sweep_name(request.sweep, args.plugin)
    folder = sweep_folder(request.root, name)
    pinned = planning.pinned_compute(folder)
    plan = planning.make(
        request.sweep,
        request.presets,
        compute=resolve_compute(request.device, request.precision, pinned),
        keep=request.keep,
        plugins=[str(file) for file in args.plugin],
        need_data=need_data,
    )
    return request, plan


def _finish(plan: Any, summary: Any) -> int:
    """Print what a run gave; its exit code."""
    from rmsweep.cli import render

    print(_table(plan, summary.results))
    print(", ".join(f"{n:,} {state}" for state, n in summary.counts.items() if n) + f"; {summary.n_computed:,} computed")
    print(f"results: {summary.results}")
    if summary.interrupted:
        print("interrupted; the same command again continues", file=sys.stderr)
        return 128 + int(summary.interrupted)
    return 2 if summary.counts.get("failed") or summary.counts.get("diverged") else 0


def sweep_folder(root: Path, name: str) -> Path:
    """Folder of a sweep's plan, logs and tables."""
    return root / "sweeps" / name


def _states(root: Path, plan: Any) -> Mapping[str, str]:
    """fingerprint -> status of every cell that the store holds; nothing is created where there is no store."""
    from rmsweep.store import Store

    if not (root / "store").is_dir():
        return {}
    return dict.fromkeys(Store(root).done([c.fingerprint for c in plan.cells if c.fingerprint]), "done")


def _disk(root: Path, plan: Any, states: Mapping[str, str]) -> tuple[int, int]:
    """Bytes that the new cells' banks and `keep` take, and bytes free where root lies."""
    new = [c for c in plan.cells if c.reason is None and c.fingerprint not in states]
    banks = {c.bank_id for c in new}
    needed = sum(n for bank, n in plan.bank_bytes.items() if bank in banks)
    kept = plan.kept_bytes * len(new) // max(1, sum(c.reason is None for c in plan.cells))
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    return needed + kept, shutil.disk_usage(there).free


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
}
