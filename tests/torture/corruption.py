"""Damage to files that were committed: every one is noticed, never served, and made good by the next run."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep.store import Store
from torture import scene

WAYS = ("flip", "truncate", "zero", "append", "swap", "empty")
KINDS = {  # what -> files of a finished root
    "bank": "store/banks/*/*.npy",
    "manifest": "store/banks/*/manifest.json",
    "results": "store/results/*.parquet",
    "costs": "store/costs/*.parquet",
    "kept": "store/kept/*.safetensors",
    "table": "sweeps/s/[rpc]*s.parquet",
    "tables.json": "sweeps/s/tables.json",
    "plan.parquet": "sweeps/s/plan.parquet",
    "plan.json": "sweeps/s/plan.json",
}
LONE = ("tables.json", "plan.parquet", "plan.json")  # nothing of their kind to swap them with


class Case(NamedTuple):
    """What is done to which kind of file; grow: the next run wants more cells, so that it opens the banks."""

    kind: str
    way: str
    grow: bool


def run(
    base: Path,
    seed: int,
    n: int,
    *,
    kinds: Iterable[str] = tuple(KINDS),
    show: Callable[[list[Any]], Iterable[Any]] = iter,
) -> scene.Report:
    """`n` damaged files, all kinds and ways in turn, places at random. counts: cases of every kind."""
    rng, report = random.Random(seed), scene.Report("corruptions", seed)
    with scene.quick():
        truth = scene.truth_of(scene.small(), base / "truth")
        bigger = scene.truth_of(scene.small(scene.SEEDS + 1), base / "bigger", truth)
        cases = _cases(kinds, rng, n)
        for i, case in enumerate(show(cases)):
            folder = base / f"case{i}"
            folder.mkdir()
            root = scene.copied(base / "truth", folder / "root")
            problems, done = _try(root, bigger if case.grow else truth, case, rng)
            report.add({**case._asdict(), "file": done}, problems)
            shutil.rmtree(folder)
        report.counts.update(Counter(case.kind for case in cases))
    return report


def _cases(kinds: Iterable[str], rng: random.Random, n: int) -> list[Case]:
    pairs = [(kind, way) for kind in kinds for way in WAYS if not (way == "swap" and kind in LONE)]
    rng.shuffle(pairs)
    chosen = (pairs * (n // len(pairs) + 1))[:n]
    return [Case(kind, way, kind in ("bank", "manifest") or rng.random() < 0.3) for kind, way in chosen]


def _try(root: Path, truth: scene.Truth, case: Case, rng: random.Random) -> tuple[list[str], str]:
    sound = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hurt = _damage(root, case, rng)
    try:
        problems = scene.served(root, truth)
    except Exception as error:
        problems = [f"reading failed: {error!r}"]
    problems += scene.settle(root, truth, damaged=True)
    if "store" in hurt[0].relative_to(root).parts and (missed := len(hurt) - len(scene.quarantined(root))) > 0:
        problems.append(f"{missed} of {len(hurt)} damaged files are not in quarantine")
    elif not case.grow:
        problems += [f"{path.name} was not made good" for path in hurt if path.name != "costs.parquet"
                     and path.exists() and "sweeps" in path.parts and path.read_bytes() != sound[path]]  # fmt: skip
    if Store(root).corrupt:
        problems.append(f"still damaged: {Store(root).corrupt}")
    return problems, ", ".join(str(path.relative_to(root)) for path in hurt)


def _damage(root: Path, case: Case, rng: random.Random) -> list[Path]:
    """Damage one file of the kind, or two that change places; which."""
    path = rng.choice(sorted(root.glob(KINDS[case.kind])))
    data = path.read_bytes()
    if case.way == "swap":
        other = rng.choice([p for p in sorted(root.glob(KINDS[case.kind])) if p.read_bytes() != data])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return [path] if path.parent == other.parent and case.kind == "bank" else [path, other]
    path.write_bytes(_changed(data, case.way, rng))
    return [path]


def _changed(data: bytes, way: str, rng: random.Random) -> bytes:
    """Other bytes than `data`."""
    place = rng.randrange(len(data))
    if way == "flip":
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if way == "truncate":
        return data[:place]
    if way == "append":
        return data + rng.randbytes(rng.randint(1, 5000))
    if way == "empty":
        return b""
    places = [i for i, byte in enumerate(data) if byte]
    start = rng.choice(places)
    end = min(len(data), start + rng.randint(1, 512))
    return data[:start] + bytes(end - start) + data[end:]
