"""Random hostile configs and data sets through the real command line, in this process, under an audit hook.

Zero tracebacks, zero files outside the folder, zero executions. The examples come from hypothesis with a fixed seed and
no database; one that breaks a promise is saved as `<folder>/found-*.txt`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from rmsweep.cli import main
from rmsweep.text import CONTROL
from torture import hostile
from torture.watch import watch

CELL = ("size=tiny", "reward_model=bt_linear", "n_annotations=8", "device=cpu", "precision=fp32")
BASE = (*CELL, "engine.workers=0")
FEW = 3  # cells of a config that is run


@dataclass
class Report:
    """What a fuzzer found. n: examples; tracebacks, escapes, executions: the promises broken, each with its example."""

    seed: int
    n: int = 0
    refused: int = 0
    accepted: int = 0
    tracebacks: list[str] = field(default_factory=list)
    escapes: list[str] = field(default_factory=list)
    executions: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def broken(self) -> list[str]:
        """Every promise broken."""
        return [*self.tracebacks, *self.escapes, *self.executions]

    def __str__(self) -> str:
        counts = f"{len(self.tracebacks)} tracebacks, {len(self.escapes)} escapes, {len(self.executions)} executions"
        return f"seed {self.seed}: {self.n} examples, {self.refused} refused, {self.accepted} accepted; {counts}"


@dataclass
class Call:
    """How a command line ended: exit code (None: a traceback), and what it printed."""

    words: list[str]
    code: int | None
    out: str
    err: str


One = Callable[[Any, Path, Report], Call]


def call(words: list[str], folder: Path, report: Report) -> Call:
    """Run the command line `words`; what it must not do goes into the report."""
    out, err, trace = io.StringIO(), io.StringIO(), None
    guard = watch()
    before = len(guard.escapes), len(guard.executions)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), guard.armed(folder):
        try:
            code: int | None = main(words)
        except BaseException:
            code, trace = None, traceback.format_exc()
    found = Call(words, code, out.getvalue(), err.getvalue())
    if trace is not None:
        report.tracebacks.append(f"{words!r}\n{trace}")
    report.escapes += [f"{words!r}: {text}" for text in guard.escapes[before[0] :]]
    report.executions += [f"{words!r}: {text}" for text in guard.executions[before[1] :]]
    if CONTROL.search((found.out + found.err).replace("\r", "")):
        report.escapes.append(f"{words!r}: control characters reach the terminal: {found.out + found.err!r}"[:2000])
    if code == 1 and not found.err.startswith("rmsweep: "):
        report.tracebacks.append(f"{words!r}: refused without a message: {found.err!r}")
    return found


def _fuzz(one: One, strategy: st.SearchStrategy[Any], n: int, seed: int, folder: Path) -> Report:
    """Run `one` on `n` examples."""
    report = Report(seed)

    @seeded(seed)
    @settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(strategy)
    def examples(example: Any) -> None:
        _noted(report, folder, example, one)

    with _inside(folder):
        examples()
    return report


def _noted(report: Report, folder: Path, example: Any, one: One) -> None:
    """Run one example, count how it ended, and save it where it broke a promise."""
    before = set(report.broken)
    found = one(example, folder, report)
    report.n += 1
    report.refused += found.code in (1, 3)
    report.accepted += found.code in (0, 2)
    report.ends[f"{found.words[0]} {found.code}"] += 1
    if new := [text for text in report.broken if text not in before]:
        text = "\n\n".join([repr(example), *new])
        (folder / f"found-{report.n}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, with what the first command loads loaded before anything is watched."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert _quiet(["run", *BASE, "sweep.name=warm", f"root={folder / 'root'}"]) == 0
        yield
    finally:
        os.chdir(before)


def _quiet(words: list[str]) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(words)


# -- configs -----------------------------------------------------------------------------------------------


def fuzz_configs(n: int, seed: int, folder: Path) -> Report:
    """`n` hostile configs: words, YAML files of --config-dir, plans on the disk; sound ones of cheap keys are run."""
    return _fuzz(_config, hostile.configs(), n, seed, folder)


def _config(config: hostile.Config, folder: Path, report: Report) -> Call:
    if config.plan is not None:
        return _plan_on_disk(config.plan, folder, report)
    words = [*config.words, *_own_groups(config.files, folder, report.n)]
    found = call(["plan", *_beside(words, folder)], folder, report)
    if found.code not in (0, 1):
        report.tracebacks.append(f"{words!r}: plan ends with {found.code}")
    if found.code == 0 and config.run and _cells(found.out) <= FEW:
        found = call(["run", *_beside(words, folder)], folder, report)
        if found.code not in (0, 1, 2, None):
            report.tracebacks.append(f"{words!r}: run ends with {found.code}: {found.err}")
    return found


def _beside(words: list[str], folder: Path) -> list[str]:
    """`words` after those of a small cell that they do not give themselves."""
    given = {word.lstrip("+~").partition("=")[0] for word in words}
    base = [word for word in BASE if word.partition("=")[0] not in given]
    return [*base, f"root={folder / 'root'}", *words]


def _cells(out: str) -> int:
    return int(out.partition(": ")[2].partition(" cell")[0].replace(",", "") or 0)


def _own_groups(files: dict[str, bytes], folder: Path, number: int) -> list[str]:
    """Write the YAML files into a folder of config groups; the word that names it."""
    if not files:
        return []
    own = folder / f"conf-{number}"
    for name, content in files.items():
        path = own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return ["--config-dir", str(own)]


def _plan_on_disk(plan: hostile.PlanFiles, folder: Path, report: Report) -> Call:
    """A sweep's folder as a stranger may have sent it, read by a verb."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = folder / "root"
    source, target = root / "sweeps" / "warm", root / "sweeps" / "stranger"
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    header = {**json.loads((source / "plan.json").read_text()), "name": "stranger", **plan.header}
    for seal in ("digest", "table"):  # a stranger would make their own
        header.pop(seal, None)
    (target / "plan.json").write_bytes(plan.text if plan.text is not None else json.dumps(header).encode())
    table = pq.read_table(source / "plan.parquet").to_pydict()
    table.update({name: [value] for name, value in plan.columns.items()})
    pq.write_table(pa.table(table), target / "plan.parquet")
    if plan.running is not None:
        (target / "running.json").write_bytes(plan.running)
    return call([plan.verb, "stranger", f"root={root}"], folder, report)


# -- data --------------------------------------------------------------------------------------------------


def fuzz_data(n: int, seed: int, folder: Path) -> Report:
    """`n` data sets with defects: refused by a message that names them, or run to finite metrics or diverged."""
    return _fuzz(_data, hostile.data_sets(), n, seed, folder)


def _data(data: hostile.DataSet, folder: Path, report: Report) -> Call:
    here = folder / f"data-{report.n}"
    here.mkdir()
    words = [*data.write(here), f"sweep.name=d{report.n}"]
    call(["plan", *_beside(words, folder)], folder, report)
    with mock.patch("rmsweep.cli.compose.check_against_hydra"):  # `plan` has composed the same words: half the time
        found = call(["run", *_beside(words, folder)], folder, report)
    if found.code == 1 and here.name not in found.err and "this design gives" not in found.err:
        report.tracebacks.append(f"{data!r}: the message names no file: {found.err}")
    elif found.code in (0, 2):
        _check_metrics(data, folder / "root" / "sweeps" / f"d{report.n}" / "results.parquet", report)
    elif found.code is not None and found.code != 1:
        report.tracebacks.append(f"{data!r}: run ends with {found.code}: {found.err}")
    return found


def _check_metrics(data: hostile.DataSet, results: Path, report: Report) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    for row in pq.read_table(results).to_pylist():
        value = row["golden_improvement"]
        finite = value is not None and np.isfinite(value)
        if row["status"] not in ("done", "diverged", "skipped") or (row["status"] == "done" and not finite):
            report.tracebacks.append(f"{data!r}: {row['status']}, {value}: {row['reason']}")
