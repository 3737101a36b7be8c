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
from rmsweep.cli import interrupt, upkeep
from rmsweep.errors import ConfigError, RmsweepError, StoreError, unknown
from rmsweep.paths import user_path
from rmsweep.presets import Presets


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


# -- run, plan ---------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    request, presets_plan = _planned(args, need_data=True)
    if request is None:
        return 0
    from rmsweep.cli import compose, render
    from rmsweep.cli.terminal import work_without_a_reader

    compose.check_against_hydra(request)
    work_without_a_reader()
    plan, root, engine = presets_plan, request.root, request.engine
    _check_detach(args, engine)
    states = _states(root, plan)
    print(render.plan_text(plan, states, short=True), flush=True)
    needed, free = _disk(root, plan, states)
    if needed > free:
        raise StoreError(
            f"{render.disk_text(needed, free)}; free some space, or take another root=DIR or a smaller size"
        )
    interrupt.check()
    return _driven(plan, root, engine, detach=args.detach)


def _check_detach(args: argparse.Namespace, engine: Any) -> None:
    if args.detach and engine.kind != "slurm":
        raise ConfigError("--detach: only jobs of a cluster go on by themselves; it needs engine=slurm")


def _driven(plan: Any, root: Path, engine: Any, retry: frozenset[str] = frozenset(), detach: bool = False) -> int:
    """Run a plan on its engine, here or on the cluster; the exit code."""
    from rmsweep import execute

    if engine.kind != "slurm":
        return _finish(plan, execute.run(plan, root, engine, retry=retry))
    from rmsweep import cluster

    summary = cluster.run(plan, root, engine, retry=retry, detach=detach)
    if summary is not None:
        return _finish(plan, summary)
    print(f"the slots of sweep {plan.name} are submitted or at work; `rmsweep status {plan.name}` looks at them, the "
          f"same command without --detach watches them, `rmsweep cancel {plan.name}` stops them")  # fmt: skip
    return 0


def _plan(args: argparse.Namespace) -> int:
    request, plan = _planned(args, need_data=False)
    if request is None:
        return 0
    from rmsweep import cost_model
    from rmsweep.cli import compose, render

    compose.check_against_hydra(request)
    if args.why is not None:
        from rmsweep import why

        print(why.explain(plan, request.root, args.why))
        return 0
    states = _states(request.root, plan)
    print(render.plan_text(plan, states))
    if plan.unknown is None:
        print(render.disk_text(*_disk(request.root, plan, states)))
    forecast = cost_model.estimate(plan, request.root, states)
    print(render.cost_text(plan, states, forecast, request.root))
    if request.engine.kind == "slurm":
        print(render.slots_text(request.engine, plan, states, forecast))
    return 0


def _planned(args: argparse.Namespace, need_data: bool) -> tuple[Any, Any]:
    """Request and plan of `run` and `plan`; (None, None) after --cfg, which only prints."""
    from rmsweep import plan as planning
    from rmsweep import planner, plugins
    from rmsweep.cli import compose

    for file in args.plugin:
        plugins.load(file)
    request = compose.read(args.words, Presets(args.config_dir))
    if args.cfg:
        print(compose.first_cell_yaml(request), end="")
        return None, None
    name = planner.sweep_name(request.sweep, args.plugin)
    folder = planning.sweep_folder(request.root, name)
    pinned = planning.pinned_compute(folder)
    plan = planner.make(
        request.sweep,
        request.presets,
        compute=_compute(request, pinned, need_data),
        keep=request.keep,
        plugins=[str(file.resolve()) for file in args.plugin],
        need_data=need_data,
        reuse=args.reuse or planning.pinned_reuse(folder) or "versions",
    )
    if plan.reuse == "strict":
        print("reuse strict: a stored result counts only with today's code and libraries (--reuse versions goes back)")
    return request, plan


def _compute(request: Any, pinned: Any, need_data: bool) -> Any:
    """Device and precision; those of a cluster's nodes are not seen from here: what its slots ask for decides."""
    from rmsweep.cli.device import resolve_compute

    device, precision, engine = request.device, request.precision, request.engine
    if engine.kind != "slurm":
        return resolve_compute(device, precision, pinned, here=need_data)
    if pinned is None:
        device = device if device != "auto" else "cuda" if engine.gpus_per_slot else "cpu"
        precision = precision if precision != "auto" else "fp32"
    found = resolve_compute(device, precision, pinned, here=False)
    if found.device == "cuda" and not engine.gpus_per_slot:
        raise ConfigError("device=cuda with engine=slurm: engine.gpus_per_slot=N says how many GPUs a slot asks for")
    return found


def _finish(plan: Any, summary: Any) -> int:
    """Print what a run gave; its exit code."""
    print(_table(plan, summary.results))
    print(
        ", ".join(f"{n:,} {state}" for state, n in summary.counts.items() if n) + f"; {summary.n_computed:,} computed"
    )
    print(f"results: {summary.results}")
    if summary.interrupted and summary.n_left:
        print("interrupted; the same command again continues", file=sys.stderr)
        return 128 + int(summary.interrupted)
    return 2 if summary.counts.get("failed") or summary.counts.get("diverged") or summary.n_left else 0


def _table(plan: Any, results: Path) -> str:
    """The table of golden improvements; rows of results.parquet are joined to the plan's cells."""
    import pyarrow.parquet as pq

    from rmsweep.cli import render

    rows = pq.read_table(results, columns=["cell_id", "golden_improvement"]).to_pylist()
    value = {row["cell_id"]: row["golden_improvement"] for row in rows}
    return render.improvement_table([{"golden_improvement": value.get(c.cell_id)} for c in plan.cells], plan.cells)


def _states(root: Path, plan: Any) -> Mapping[str, str]:
    """Status by fingerprint of every cell that the store holds; creates nothing where there is no store."""
    if not (root / "store").is_dir():
        return {}
    from rmsweep.store import Store

    return Store(root).done_and_kept((c.fingerprint for c in plan.cells if c.reason is None), plan.keep)


def _disk(root: Path, plan: Any, states: Mapping[str, str]) -> tuple[int, int]:
    """Bytes that the new cells' banks and `keep` take, and bytes free where root lies."""
    new = [c for c in plan.cells if c.reason is None and c.fingerprint not in states]
    banks = {c.bank_id for c in new}
    needed = sum(n for bank, n in plan.bank_bytes.items() if bank in banks)
    kept = plan.kept_bytes * len(new) // max(1, sum(c.reason is None for c in plan.cells))
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    return needed + kept, shutil.disk_usage(there).free


# -- status, results, retry, completion --------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    from rmsweep import status

    root, name = _named_only(args.words)
    summary = status.summarise(root, name)
    if args.json:
        print(json.dumps(summary, indent=1, default=str))
    else:
        print(status.render(summary))
    return 0


def _log(args: argparse.Namespace) -> int:
    from rmsweep import history, why
    from rmsweep.plan import Plan, sweep_folder

    given = [word for word in args.words if "=" not in word]
    if not given:
        raise ConfigError("log needs the first digits of a cell_id: `rmsweep status` and `rmsweep results` show them")
    root, name = _named_only([word for word in args.words if word != given[0]])
    plan = Plan.read(sweep_folder(root, name))
    print(history.tell(plan, root, why.find(plan, given[0])))
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from rmsweep import cluster

    root, name = _named_only(args.words)
    n_slots, problem = cluster.cancel(root, name)
    if problem is not None:
        raise RmsweepError(f"scancel: {problem}")
    what = f"{n_slots} slots cancelled" if n_slots else "no slot in the queue"
    print(f"sweep {name}: {what}; what is stored stays, and the same `rmsweep run` continues")
    return 0


def _results(args: argparse.Namespace) -> int:
    from rmsweep import results
    from rmsweep.cli.terminal import spreadsheet_safe
    from rmsweep.plan import sweep_folder

    if args.schema:
        print(results.schema_text())
        return 0
    root, name = _named_only(args.words)
    folder = sweep_folder(root, name)
    frame = results.query(folder, args.sql) if args.sql else results.load(folder)
    if args.csv:
        lists = [
            c for c in frame.columns if frame[c].map(lambda v: hasattr(v, "tolist") and hasattr(v, "__len__")).any()
        ]
        for column in lists:  # JSON, not the shortened text of an array
            frame[column] = [None if v is None else json.dumps(_plain(v.tolist())) for v in frame[column]]
        spreadsheet_safe(frame).to_csv(sys.stdout, index=False)
    else:
        print(frame.to_string(index=False, max_colwidth=40))
    return 0


def _plain(values: list[Any]) -> list[Any]:
    """A list whose null entries, NaN where pandas holds numbers, are None again: JSON has no NaN."""
    return [None if value != value else value for value in values]


def _retry(args: argparse.Namespace) -> int:
    from rmsweep.cli.terminal import work_without_a_reader
    from rmsweep.plan import Plan, read_header, sweep_folder

    root, name, words = _named(args.words)
    folder = sweep_folder(root, name)
    load_plugins(args.plugin, read_header(folder)["plugins"], name)
    plan = Plan.read(folder)
    engine, wanted = _engine_and_filter(words, plan)
    _check_detach(args, engine)
    work_without_a_reader()
    chosen = _to_retry(root, plan, wanted, args.cause.split(",") if args.cause else None)
    if not chosen:
        print(f"sweep {name}: no failed cell{' matches' if wanted or args.cause else ''}")
        return 0
    plan = _as_of_today(plan, root)
    interrupt.check()
    return _driven(plan, root, engine, chosen, args.detach)


def _as_of_today(plan: Any, root: Path) -> Any:
    """The plan with today's code; ConfigError where what is not done was planned with other versions or defaults."""
    from rmsweep.planner import as_of_today

    states = _states(root, plan)
    todo = {c.fingerprint for c in plan.cells if c.reason is None and states.get(c.fingerprint) != "done"}
    today = as_of_today(plan, todo)
    if changed := [old.cell_id for old, new in zip(plan.cells, today.cells, strict=True) if old[:3] != new[:3]]:
        raise ConfigError(
            f"{len(changed):,} cells of sweep {plan.name}, such as {changed[0]}, were planned with other versions or "
            "defaults of rmsweep than today's; the `rmsweep run` of this sweep plans and computes them anew"
        )
    return today


def _to_retry(root: Path, plan: Any, wanted: Mapping[str, Sequence[Any]], of: Sequence[str] | None) -> frozenset[str]:
    """Fingerprints of the failed cells with these labels, or of those that ended for one of these causes."""
    from rmsweep.causes import CAUSES
    from rmsweep.store import Store

    for cause in of or ():
        if cause not in CAUSES:
            raise unknown("cause", cause, CAUSES)
    cells = [c for c in plan.cells if c.reason is None and all(c.labels.get(k) in v for k, v in wanted.items())]
    states = Store(root).states(c.fingerprint for c in cells)
    return frozenset(
        key for key, state in states.items() if (state.status == "failed" if of is None else state.cause in of)
    )


def load_plugins(given: Sequence[Path], planned: Mapping[str, str], name: str) -> None:
    """Import a sweep's plug-ins, only where the user names them again: a plan is data and must not name code."""
    from rmsweep import plugins
    from rmsweep.fingerprint import file_sha256

    here = {str(file.resolve()): file for file in given}
    if missing := [path for path in planned if path not in here]:
        words = " ".join(f"--plugin {path}" for path in missing)
        raise ConfigError(f"sweep {name} was planned with plug-ins; if you trust these files, add {words}")
    for path, file in here.items():
        if not file.is_file() or planned.get(path) != file_sha256(file):
            raise ConfigError(
                f"{path} is not the file that sweep {name} was planned with; run it under another sweep.name=NAME"
            )
    for file in here.values():
        plugins.load(file)


def _engine_and_filter(words: Sequence[str], plan: Any) -> tuple[Any, dict[str, list[Any]]]:
    """The engine that `words` name, and label -> values of the cells to retry."""
    from rmsweep.cli import compose

    presets = Presets()
    engine = [w for w in words if w.partition("=")[0].partition(".")[0] == "engine"]
    labels = {name for cell in plan.cells for name in cell.labels}
    wanted = {}
    for word in (w for w in words if w not in engine):
        key = compose.parse(word).key_or_group
        if key not in labels:
            raise unknown("column", key, labels)
        wanted[key] = compose.values_of(word, presets)
    return compose.read(engine, presets).engine, wanted


def _completion(args: argparse.Namespace) -> int:
    from rmsweep.cli.complete import SCRIPTS, script

    if len(args.words) != 1:
        raise ConfigError(f"completion needs the name of a shell: {', '.join(SCRIPTS)}")
    print(script(args.words[0]))
    return 0


def _named_only(words: Sequence[str]) -> tuple[Path, str]:
    """Root and name of a verb that takes nothing else."""
    root, name, rest = _named(words)
    if rest:
        raise ConfigError(f"{' '.join(rest)}: only root=DIR and a sweep's name go here; to select rows use --sql")
    return root, name


def _named(words: Sequence[str]) -> tuple[Path, str, list[str]]:
    """root, the sweep's name (default: the last one) and the other words of a verb that reads a sweep."""
    from rmsweep import results

    names = [w for w in words if "=" not in w]
    root = user_path(next((w[5:] for w in words if w.startswith("root=")), str(Presets().baseline["root"])), "root")
    if len(names) > 1:
        raise ConfigError(f"one sweep at a time; got {', '.join(names)}")
    known = sorted(p.parent.name for p in root.glob("sweeps/*/plan.json"))
    if names and names[0] not in known:
        raise unknown(f"sweep under root={root}", names[0], known)
    name = names[0] if names else results.last_sweep(root)
    return root, name, [w for w in words if "=" in w and not w.startswith("root=")]


_REPEATED: dict[str, Any] = {"action": "append", "default": [], "type": Path}
_DETACH: dict[str, dict[str, Any]] = {"--detach": {"action": "store_true"}}
_COMPOSING: dict[str, dict[str, Any]] = {
    "--cfg": {"action": "store_true"},
    "--config-dir": {**_REPEATED, "metavar": "DIR"},
    "--plugin": {**_REPEATED, "metavar": "FILE.py"},
    "--reuse": {"choices": ("versions", "strict")},
    "-m --multirun": {"action": "store_true"},
}
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "run": {**_COMPOSING, **_DETACH},
    "plan": {**_COMPOSING, "--why": {"metavar": "CELL"}},
    "status": {"--json": {"action": "store_true"}},
    "log": {},
    "cancel": {},
    "results": {
        "--sql": {"metavar": "QUERY"},
        "--csv": {"action": "store_true"},
        "--schema": {"action": "store_true"},
    },
    "retry": {"--plugin": {**_REPEATED, "metavar": "FILE.py"}, "--cause": {"metavar": "CAUSE[,CAUSE]"}, **_DETACH},
    "verify": {
        "--sample": {"type": int, "default": 0, "metavar": "N"},
        "--seed": {"type": int, "default": 0, "metavar": "S"},
        "--plugin": {**_REPEATED, "metavar": "FILE.py"},
    },
    "gc": {flag: {"action": "store_true"} for flag in ("--dry-run", "--unreferenced", "--quarantine")},
    "completion": {},
}
VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "status": _status,
    "log": _log,
    "cancel": _cancel,
    "results": _results,
    "retry": _retry,
    "verify": upkeep.verify,
    "gc": upkeep.gc,
    "completion": _completion,
}
