"""A small sweep of the fake pipeline, what an uninterrupted run of it gives, and the checks of a root against that."""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from fake_pipeline import fake_plan, fake_run

from rmsweep import claims, journals, results, runner
from rmsweep import store as stores
from rmsweep.plan import Plan
from rmsweep.store import Store

SEEDS, BETAS, WORLDS = 3, (0.5, 1.0), (0, 1)
TABLES = ("results", "prompts")  # costs differ between runs
NO_PROCESS = 2**22 + 1  # above what Linux numbers
TRACED = 137  # exit code of a child that raised


@dataclass
class Report:
    """What a harness found. cases: how many were tried; violations: case and problem; counts: what else it counts."""

    harness: str
    seed: int
    cases: int = 0
    violations: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    def add(self, case: Mapping[str, Any], problems: Iterable[str]) -> None:
        """One more case and what was wrong."""
        self.cases += 1
        self.violations += [{**case, "problem": problem} for problem in problems]

    def assert_sound(self) -> None:
        """AssertionError that shows the first violations."""
        text = "\n".join(json.dumps(v, default=str)[:2000] for v in self.violations[:5])
        assert not self.violations, f"{self.harness}: {len(self.violations)} violations, seed {self.seed}\n{text}"
        assert self.cases, f"{self.harness}: no case was tried"


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder in memory where there is such a disk; what it holds is gone afterwards."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory) as folder:
        yield Path(folder).resolve()


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Merging begins at few small parts, and no library is searched for threads: nothing here computes."""
    with (
        mock.patch.multiple(stores, MANY_SMALL=3, MERGE_BELOW=3, MERGE_TO=4),
        mock.patch.object(runner, "one_thread", contextlib.nullcontext),
    ):
        yield


def small(n_seeds: int = SEEDS) -> Plan:
    """Two banks, 2 cells to a seed on each, scores kept."""
    return fake_plan(n_seeds, BETAS, worlds=WORLDS, keep="scores")


def run(plan: Plan, root: Path, **options: Any) -> Any:
    """fake_run in this process, without its words."""
    with contextlib.redirect_stderr(io.StringIO()):
        return fake_run(plan, root, **options)


# -- what is true ------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What an uninterrupted run left. versions: table -> the contents that a reader may ever meet.

    records: fingerprint -> text of its record; problems: where the run itself is wrong by an independent count.
    """

    plan: Plan
    tables: dict[str, bytes]
    versions: dict[str, set[bytes]]
    records: dict[str, str]
    kept: dict[str, bytes]
    banks: dict[str, dict[str, bytes]]
    problems: list[str]


def truth_of(plan: Plan, root: Path, before: Truth | None = None) -> Truth:
    """Run `plan` whole at `root`; `before`: of the smaller sweep that it follows in the torture."""
    run(plan, root)
    store, keys = Store(root), fingerprints(plan)
    now = tables(root)
    return Truth(
        plan,
        now,
        {name: {data, *(before.versions[name] if before else ())} for name, data in now.items()},
        {row["fingerprint"]: repr(row) for row in store.records(keys).to_pylist()},
        {key: _bytes(store.kept(key)) for key in keys},
        {bank: _files(store.bank(bank)) for bank in {cell.bank_id for cell in plan.cells}},
        _miscounted(plan, root),
    )


def fingerprints(plan: Plan) -> list[str]:
    """Of the cells that run."""
    return [cell.fingerprint for cell in plan.cells]


def tables(root: Path) -> dict[str, bytes]:
    """The bytes of the tables that are a pure function of plan and records."""
    return {name: (root / "sweeps" / "s" / f"{name}.parquet").read_bytes() for name in TABLES}


def _bytes(arrays: Mapping[str, Any]) -> bytes:
    return b"".join(name.encode() + array.tobytes() for name, array in sorted(arrays.items()))


def _files(folder: Path | None) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder else {}


def _miscounted(plan: Plan, root: Path) -> list[str]:
    """Rows against the grid and the fake's arithmetic, without the fingerprints or the store."""
    n_seeds = len({cell.labels["seed"] for cell in plan.cells})
    wanted = sorted((s, b, w, _golden(s, b)) for w in WORLDS for b in BETAS for s in range(n_seeds))
    names = ["seed", "beta", "dataset.seed", "golden_improvement"]
    table = pq.read_table(root / "sweeps" / "s" / "results.parquet", columns=names)
    found = sorted(zip(*(table[name].to_pylist() for name in names), strict=True))
    return [] if found == wanted else [f"{len(set(wanted) - set(found))} of {len(wanted)} cells have a wrong row"]


def _golden(seed: int, beta: float) -> float:
    return float(np.random.default_rng([seed, int(beta * 1000)]).random())


# -- checks ------------------------------------------------------------------------------------------------


def served(root: Path, truth: Truth) -> list[str]:
    """What readers would be given at `root` that is not true."""
    store, problems = Store(root), list[str]()
    for row in store.records(truth.records).to_pylist():
        if repr(row) != truth.records[row["fingerprint"]]:
            problems.append(f"the record of {row['fingerprint']} is served with other values")
    for key, wanted in truth.kept.items():
        if (found := _bytes(store.kept(key))) and found != wanted:
            problems.append(f"kept arrays of {key} are served with other values")
    for bank, wanted in truth.banks.items():
        folder = store.bank(bank)
        if folder is not None and _files(folder) != wanted:
            problems.append(f"bank {bank} is served with other bytes")
    for name, versions in truth.versions.items():
        path = root / "sweeps" / "s" / f"{name}.parquet"
        if path.is_file() and results.damage(path) is None and path.read_bytes() not in versions:
            problems.append(f"{path.name} is served with other bytes")
    return problems


def settle(
    root: Path, truth: Truth, *, damaged: bool = False, before: Counter[str] | None = None, in_flight: int = 0
) -> list[str]:
    """Run the sweep to its end, and what is wrong then.

    damaged: something that was committed was damaged, so that quarantine and computing again are right. before: what
    was computed until now, by the ledger; in_flight: how many cells were at most when they were killed.
    """
    try:
        store = Store(root)
        found = store.done_and_kept(fingerprints(truth.plan), truth.plan.keep)
        had = {key for key, status in found.items() if status == "done"} | journalled(root)
        problems = list(truth.problems)
        if not damaged:
            problems += [f"left damaged: {text}" for text in store.corrupt]
        computed = ledger(lambda: run(truth.plan, root), root)
        problems += _ended(root, truth, damaged)
        if computed != _wanted(truth.plan, had):
            problems.append(f"computed {dict(computed)}, although {len(had)} cells were stored")
        twice = sum(((before or Counter()) + computed - _wanted(truth.plan, set())).values())
        if before is not None and not damaged and twice > in_flight:
            problems.append(f"{twice} cells were computed twice, and {in_flight} in flight when they were killed")
        again = ledger(lambda: run(truth.plan, root), root)
        if again or tables(root) != truth.tables:
            problems.append(f"the finished sweep is not at rest: {dict(again)} computed once more")
    except Exception:
        return [f"going on failed: {traceback.format_exc()[-1500:]}"]
    return problems


def journalled(root: Path) -> set[str]:
    """Cells that killed processes had finished, in a sound frame: SIGKILL must not lose them."""
    found = [(path, owner) for path, owner, _ in journals.listed(root / "store" / "journals")]
    cells = [cell for path, owner in found if claims.has_ended(owner) for cell in journals.read(path)]
    return {cell.record["fingerprint"] for cell in cells if cell.record["status"] == "done"}


def _ended(root: Path, truth: Truth, damaged: bool) -> list[str]:
    store, problems = Store(root), served(root, truth)
    missing = set(truth.records) - set(store.done_and_kept(truth.records, truth.plan.keep))
    if missing:
        problems.append(f"{len(missing)} cells are not stored")
    odd = {key: state for key, state in store.states(truth.records).items() if state.status != "done"}
    problems += [f"{name}.parquet differs: {odd}" for name, data in tables(root).items() if data != truth.tables[name]]
    store.costs(truth.records)
    problems += [f"still damaged: {text}" for text in store.corrupt]
    if not damaged and (found := quarantined(root)):
        problems.append(f"in quarantine: {found}")
    return problems


def quarantined(root: Path) -> list[str]:
    """What was set aside, without the temporary files of the proof that the folder can be written."""
    return sorted(name for name in os.listdir(root / "store" / "quarantine") if not name.startswith("."))


def _wanted(plan: Plan, had: set[str]) -> Counter[str]:
    """How often each (seed, beta) has to be computed; the worlds share that name in the ledger."""
    cells = {cell.fingerprint: cell.config for cell in plan.cells if cell.fingerprint not in had}
    return Counter(f"cell-{config['seed']}-{float(config['beta'])}" for config in cells.values())


def ledger(act: Callable[[], Any], root: Path) -> Counter[str]:
    """Names of the cells that were computed during `act`."""
    folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=root.parent))
    with mock.patch.dict(os.environ, FAKE_LEDGER=str(folder)):
        act()
    found = taken_from(folder)
    folder.rmdir()
    return found


def taken_from(folder: Path) -> Counter[str]:
    """Names of the cells in a ledger, which is empty afterwards."""
    names = os.listdir(folder)
    for name in names:
        (folder / name).unlink()
    return Counter(re.sub("-[0-9a-f]{32}$", "", name) for name in names if name.startswith("cell-"))


# -- processes ---------------------------------------------------------------------------------------------


class End(NamedTuple):
    """How a child ended: its exit code, negative for a signal; error: its traceback."""

    code: int
    error: str


def forked(act: Callable[[], Any], base: Path) -> End:
    """Do something in a child forked from this warm process."""
    note = base / f"child-{os.urandom(4).hex()}"
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            note.write_text(traceback.format_exc())
            os._exit(TRACED)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    error = note.read_text() if note.exists() else ""
    note.unlink(missing_ok=True)
    return End(code, error)


def copied(template: Path, root: Path) -> Path:
    """A copy of a prepared root; no hard links, so that damage stays in the copy."""
    shutil.copytree(template, root, symlinks=True)
    return root
