"""The driver: plan -> tasks -> engine -> assembled tables.

It decides what is pending (the store says what is done), claims it, has it computed, and assembles the tables whatever
happened. It never loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rmsweep import hardware, results, runner, units
from rmsweep.cell import PlannedCell
from rmsweep.claims import Claims
from rmsweep.engines.local import Local
from rmsweep.errors import DataError, StoreError
from rmsweep.fingerprint import digest, file_sha256
from rmsweep.parts import again
from rmsweep.plan import Overtaken, Plan, sweep_folder
from rmsweep.progress import Progress
from rmsweep.runner import Job
from rmsweep.schedule import BANK, Limits, Schedule
from rmsweep.store import State, Store

WARM = "rmsweep.runner:warm"
TABLE_TRIES = 3


@dataclass(frozen=True)
class Summary:
    """What a run leaves: rows of results.parquet by status, and what happened on the way.

    n_computed: cells computed by this run. n_missing: planned cells without a row, of earlier grids of that name as
    well. n_left: cells that this run was to compute and did not. interrupted: the signal that stopped it. notes:
    corrupt artefacts that were set aside, and anything else worth a warning.
    """

    name: str
    counts: dict[str, int]
    n_computed: int
    n_missing: int
    results: Path
    interrupted: int | None = None
    notes: tuple[str, ...] = ()
    n_left: int = 0


def run(
    plan: Plan,
    root: Path,
    engine: Local,
    *,
    progress: bool = True,
    retry: frozenset[str] = frozenset(),
    work: str = runner.PIPELINE,
) -> Summary:
    """Compute the cells of `plan` that have no record, and write the sweep's tables.

    retry: fingerprints of cells that are not done and are to be run again. A plan under a name that exists makes that
    sweep the union. Raises StoreError when the store cannot be written: before any work where that can be seen.
    """
    root = Path(root).resolve()
    with begun(plan, root) as (store, claims, folder, cells, notes):
        pending = pending_cells(cells, store, retry, plan.keep)
        bar = Progress(plan.name, len({cell.fingerprint for cell in pending}), folder, show=progress)
        todo = units.split(pending, max(1, engine.n_workers(len(pending), _gpus(plan))))
        schedule = Schedule(_job(plan, root, claims.owner, work), store, claims, todo, bar, _limits(engine))
        stopped = _computed(schedule, engine, plan, work) if pending else None
        tables = write_tables(plan.name, folder, store, claims)
        notes = [*notes, *schedule.notes]
        return summarised(plan, store, tables, notes, schedule.n_computed, schedule.n_left(), stopped)


class Begun(NamedTuple):
    """A sweep that is about to run: the cells that can be, and notes on its plan."""

    store: Store
    claims: Claims
    folder: Path
    cells: list[PlannedCell]
    notes: list[str]


@contextlib.contextmanager
def begun(plan: Plan, root: Path) -> Iterator[Begun]:
    """Write the plan, and tidy what runs before have left; holds claims inside. Raises as `run` does."""
    folder, store = sweep_folder(root, plan.name), Store(root, heal=True)
    store.prepare()
    cells = [cell for cell in plan.cells if cell.reason is None]
    if not all(cell.fingerprint for cell in cells):
        raise DataError(plan.unknown or f"sweep {plan.name}: the data are not here, so nothing can be computed")
    with _claims(store) as claims:
        notes = write_plan(plan, folder, claims)
        results.mark_last(root, plan.name)
        store.merge(cell.fingerprint for cell in cells)
        yield Begun(store, claims, folder, cells, notes)


@contextlib.contextmanager
def _claims(store: Store) -> Iterator[Claims]:
    """Of a run: what dead ones had finished is published when it begins, or before it takes their claims over."""

    def bury(dead: str) -> None:
        store.recover(lambda owner, unit: owner == dead)

    with Claims(store.folder / "claims", on_death=bury) as claims:  # first of all: who beats is alive
        is_gone = functools.cache(claims.is_gone)
        store.recover(lambda owner, unit: is_gone(owner))
        yield claims


class Share(NamedTuple):
    """Which of how many slots work through a plan together; patience, told: as in Schedule."""

    part: int
    of: int
    patience: float
    told: Callable[[Collection[str]], object]


class Helped(NamedTuple):
    """What became of a share. given_up: everything failed alike; stopped: the signal that ended it; n_missing: cells
    of the plan without a record.
    """

    n_computed: int
    n_missing: int
    notes: tuple[str, ...]
    given_up: bool
    stopped: int | None


def help_with(
    plan: Plan, root: Path, engine: Local, share: Share, *, retry: frozenset[str], work: str = runner.PIPELINE
) -> Helped:
    """Compute cells of a plan that others compute too, its own share first; the last one writes the tables.

    The plan is not written anywhere. Raises as `run` does.
    """
    folder, store = sweep_folder(root, plan.name), Store(root, heal=True)
    store.prepare()
    cells = [cell for cell in plan.cells if cell.reason is None]
    with _claims(store) as claims:
        pending = pending_cells(cells, store, retry, plan.keep, blameless=False)
        todo = units.split(pending, max(1, engine.n_workers(len(pending), _gpus(plan))) * share.of)
        begin = len(todo) * (share.part % share.of) // share.of
        bar = Progress(plan.name, len({cell.fingerprint for cell in pending}), None, show=True)
        todo = [*todo[begin:], *todo[:begin]]  # own share first, then whatever nobody holds
        schedule = Schedule(
            _job(plan, root, claims.owner, work), store, claims, todo, bar, _limits(engine), share.patience, share.told
        )
        stopped = _computed(schedule, engine, plan, work) if pending else None
        keys = {cell.fingerprint for cell in cells}
        n_missing = len(keys - set(store.done_and_kept(keys, plan.keep)))
        if stopped is None and not n_missing:
            write_tables(plan.name, folder, store, claims)
    return Helped(schedule.n_computed, n_missing, (*schedule.notes, *store.corrupt), schedule.given_up, stopped)


def _job(plan: Plan, root: Path, owner: str, work: str) -> Job:
    folder = sweep_folder(root, plan.name)
    return Job(root, folder / "logs", owner, plan.compute, plan.keep, _digests(plan.plugins), work)


def _limits(engine: Local) -> Limits:
    return Limits(engine.cell_seconds, engine.bank_seconds)


def _computed(schedule: Schedule, engine: Local, plan: Plan, work: str) -> int | None:
    """Have the schedule's tasks run; the signal that stopped it. What workers that were killed had finished counts."""

    def recover() -> None:
        schedule.store.recover(lambda owner, unit: owner == schedule.claims.owner)

    with schedule.bar:
        try:
            stopped = engine.run(schedule, schedule.n_tasks, WARM if work == runner.PIPELINE else None, _gpus(plan))
        except BaseException:
            with contextlib.suppress(StoreError):  # the first error is the one to report
                recover()
            raise
        recover()
        return stopped


def _gpus(plan: Plan) -> list[str]:
    return hardware.gpus() if plan.compute.device == "cuda" else []


def write_tables(name: str, folder: Path, store: Store, claims: Claims) -> results.Tables:
    """The tables of a sweep; one driver after the other."""
    with claims.held(f"tables-{digest(name)}"):
        return _tables(folder, store)


def write_plan(plan: Plan, folder: Path, claims: Claims) -> list[str]:
    """Write the plan, or its union with what stands under its name; one driver after the other."""
    while True:
        with contextlib.suppress(Overtaken), claims.held(f"plan-{digest(plan.name)}") as is_mine:
            return plan.write(folder, is_mine)


def _tables(folder: Path, store: Store) -> results.Tables:
    """The tables of the whole sweep, this plan and what stood under its name; again where another run came between."""
    tables = results.current(folder, store)
    for _ in range(TABLE_TRIES):
        if tables is not None:
            return tables
        made = assembled(folder, store)
        tables = results.current(folder, store)
    return made


def summarised(
    plan: Plan,
    store: Store,
    tables: results.Tables,
    notes: Sequence[str],
    n_computed: int,
    n_left: int,
    stopped: int | None,
    told: Sequence[str] = (),
) -> Summary:
    """What the run leaves; its notes are printed, but for those that were `told` already."""
    notes = [*notes, *store.corrupt]
    if tables.n_missing:
        notes.append(f"{tables.n_missing:,} cells of sweep {plan.name} have no result yet")
    if store.conflicts:
        notes.append(
            f"{len(store.conflicts)} cells have two different results, such as {min(store.conflicts)}: "
            "something is not deterministic"
        )
    for note in notes:
        print(f"rmsweep: {note}", file=sys.stderr)
    return Summary(
        plan.name, tables.counts, n_computed, tables.n_missing, tables.results, stopped, (*told, *notes), n_left
    )


def assembled(folder: Path, store: Store) -> results.Tables:
    """The tables of the plan in `folder`, made anew; many small parts are merged first."""
    cells = Plan.read(folder).cells
    store.merge(cell.fingerprint for cell in cells if cell.reason is None)
    sealed = again(lambda: results.seal(folder, store))
    return results.assemble(cells, store, folder, sealed)


def pending_cells(
    cells: Sequence[PlannedCell], store: Store, retry: frozenset[str], keep: str, *, blameless: bool = True
) -> list[PlannedCell]:
    """Cells without a record or without what `keep` asks for, and those to retry that are not done.

    blameless: also those that failed for no fault of theirs: preempted, or without a bank.
    """
    keys = [cell.fingerprint for cell in cells]
    has, states = store.done_and_kept(keys, keep), store.states(keys)
    failed = {key: state for key, state in states.items() if state.status != "done"}
    again = {key for key, state in failed.items() if key in retry or (blameless and _is_blameless(state))}
    return [cell for cell in cells if cell.fingerprint not in has or cell.fingerprint in again]


def _is_blameless(state: State) -> bool:
    return state.cause == "preempted" or (state.reason or "").startswith(BANK)


def _digests(plugins: Iterable[str]) -> dict[str, str]:
    return {str(path): file_sha256(Path(path)) for path in plugins}
