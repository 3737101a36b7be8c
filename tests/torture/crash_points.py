"""SIGKILL at every named point of the commit protocol: first, second and last time, and once more during the resume."""

import itertools
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep import crash
from rmsweep.store import Store
from torture import scene

Point = tuple[str, str]


class Scenario(NamedTuple):
    """A root to start from (None: nothing), what its sweep must come to, and how often a run there reaches a point."""

    name: str
    template: Path | None
    truth: scene.Truth
    reached: Counter[Point]
    damaged: bool


class Case(NamedTuple):
    """Crash at the n-th time that a run of `scenario` is at stage:point."""

    scenario: Scenario
    stage: str
    point: str
    n: int

    @property
    def where(self) -> str:
        return f"{self.stage}:{self.point}:{self.n}"


def run(
    base: Path,
    seed: int,
    *,
    every: bool = True,
    show: Callable[[list[Any]], Iterable[Any]] = iter,
) -> scene.Report:
    """Every registered point. every: at each the first, second and last time, then cleanly on and then crashing again.

    Otherwise each point once, the times and what follows in turn. counts: points reached of those registered, kills.
    """
    rng, report = random.Random(seed), scene.Report("crash-points", seed)
    with scene.quick():
        scenarios = _scenarios(base)
        cases = list(_cases(scenarios))
        unreached = _unreached(scenarios)
        report.add({"case": "meta"}, [f"no run reaches {stage}:{point}" for stage, point in unreached])
        rounds = list(itertools.product(cases, (False, True)) if every else _in_turn(cases, seed))
        for i, (case, second) in enumerate(show(rounds)):
            other = rng.choice([c for c in cases if c.scenario is case.scenario and c[1:3] != case[1:3]])
            kills, problems = _try(base / f"case{i}", case, other.where if second else None)
            report.counts["kills"] = report.counts.get("kills", 0) + kills
            report.add({"case": case.where, "then": second and other.where, "of": case.scenario.name}, problems)
            shutil.rmtree(base / f"case{i}", ignore_errors=True)
        points = {case[1:3] for case, _ in rounds}
        report.counts["points"] = f"{len(points)} of {len(points) + len(unreached)}"
    return report


def _try(folder: Path, case: Case, then: str | None) -> tuple[int, list[str]]:
    """Crash, perhaps crash again while going on, then go on to the end: kills, problems."""
    folder.mkdir()
    root, truth = folder / "root", case.scenario.truth
    if case.scenario.template is not None:
        scene.copied(case.scenario.template, root)
    else:
        root.mkdir()
    computed = Counter[str]()
    first = crashed(truth, root, case.where, computed)
    problems = [] if first.code == -signal.SIGKILL else [f"no crash: ended with {first.code}\n{first.error}"]
    kills = 1
    if then is not None:
        second = crashed(truth, root, then, computed)  # need not come there any more
        kills += second.code == -signal.SIGKILL
        if second.code not in (0, -signal.SIGKILL):
            problems.append(f"the second run ended with {second.code}\n{second.error}")
    ended = scene.settle(root, truth, damaged=case.scenario.damaged, before=computed, in_flight=kills)
    return kills, problems + ended


def crashed(truth: scene.Truth, root: Path, where: str, computed: Counter[str]) -> scene.End:
    """A run in a process of its own, with a crash where it is told; adds to `computed` what it computed."""

    def act() -> None:
        crash.arm(where)
        scene.run(truth.plan, root)

    ends = list[scene.End]()
    computed.update(scene.ledger(lambda: ends.append(scene.forked(act, root.parent)), root))
    return ends[0]


# -- which points a run comes to ---------------------------------------------------------------------------


def _scenarios(base: Path) -> list[Scenario]:
    """Nothing there; many small parts to merge; journals of a killed run; damaged artefacts to set aside."""
    plan, bigger = scene.small(), scene.small(scene.SEEDS + 1)
    truth = scene.truth_of(plan, base / "truth")
    truth_bigger = scene.truth_of(bigger, base / "bigger")
    many = scattered(plan, base / "truth", base / "scattered")
    (killed := base / "killed" / "root").mkdir(parents=True)
    crashed(truth, killed, "journal:written:2", Counter())
    return [
        _rehearsed("fresh", None, truth, base, damaged=False),
        _rehearsed("merge", many, truth, base, damaged=False),
        _rehearsed("killed", killed, truth, base, damaged=False),
        _rehearsed("heal", _damaged(base / "truth", base / "damaged"), truth_bigger, base, damaged=True),
    ]


def _rehearsed(name: str, template: Path | None, truth: scene.Truth, base: Path, *, damaged: bool) -> Scenario:
    """A scenario with the points that an undisturbed run of it reaches."""
    root = base / f"rehearsal-{name}"
    if template is not None:
        scene.copied(template, root)
    crash.arm(None)
    scene.run(truth.plan, root)
    return Scenario(name, template, truth, Counter(crash.reached), damaged)


def scattered(plan: Any, source: Path, root: Path) -> Path:
    """A root with a part to each cell, as after many kills."""
    scene.copied(source / "store" / "banks", root / "store" / "banks")
    whole, store = Store(source), Store(root)
    store.prepare()
    costs = {row["fingerprint"]: row for row in whole.costs(scene.fingerprints(plan)).to_pylist()}
    for record in whole.records(scene.fingerprints(plan)).to_pylist():
        key = record["fingerprint"]
        kept = {f"{key}/{name}": array for name, array in whole.kept(key).items()}
        store.publish_part(key, [record], [costs[key]], kept)
    return root


def _damaged(source: Path, root: Path) -> Path:
    """A copy with one file of every kind damaged, so that several moves to quarantine come."""
    scene.copied(source, root)
    for kind in ("results", "costs", "kept"):
        flip(sorted((root / "store" / kind).iterdir())[0])
    flip(next((root / "store" / "banks").glob("*/golden.npy")))
    return root


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _cases(scenarios: Iterable[Scenario]) -> Iterable[Case]:
    """First, second and last time at every point, in the first scenario that comes there."""
    seen = set[Point]()
    for scenario in scenarios:
        for (stage, point), n in sorted(scenario.reached.items()):
            if (stage, point) not in seen:
                seen.add((stage, point))
                yield from (Case(scenario, stage, point, i) for i in sorted({1, min(2, n), n}))


def _in_turn(cases: Iterable[Case], seed: int) -> Iterable[tuple[Case, bool]]:
    """One case of each point: its first, second or last time, followed by another crash every other time."""
    times: dict[Point, list[Case]] = {}
    for case in cases:
        times.setdefault(case[1:3], []).append(case)
    for i, same in enumerate(times.values(), seed):
        yield same[i % len(same)], bool(i // 3 % 2)


def _unreached(scenarios: Iterable[Scenario]) -> list[Point]:
    """Registered points that no scenario comes to; the claims of runs count once any of theirs is reached."""
    reached = {point for scenario in scenarios for point in scenario.reached}
    used = {stage for stage, _ in reached} | (set(crash.POINTS) - {"claim"})
    return [(s, p) for s, points in crash.POINTS.items() for p in points if s in used and (s, p) not in reached]
