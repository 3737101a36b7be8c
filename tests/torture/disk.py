"""A disk that refuses: the n-th open, write, fsync, link, rename, mkdir, unlink of a sweep fails, for every n."""

import errno
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep import crash
from rmsweep.errors import StoreError
from torture import scene
from torture.calls import Call, intercepted

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
KINDS = {  # kind of call -> the errors that it can meet
    "open": CODES,
    "opendir": (errno.EIO,),
    "write": CODES,
    "fsync": CODES,
    "fsync_dir": CODES,
    "link": CODES,
    "rename": CODES,
    "replace": CODES,
    "mkdir": CODES,
    "symlink": CODES,
    "unlink": (errno.EIO,),
}
FORGIVEN = {"note", "remove_folder", "__exit__", "probe"}  # callers that may pass over a file that cannot be removed
HELPFUL = ("sweeps/s/logs", "store/claims", "store/journals")  # logs, and what only saves work: no result hangs on it


class Case(NamedTuple):
    """The n-th call of a kind fails with `code`."""

    kind: str
    n: int
    code: int


class Full:
    """Hook of `intercepted` that refuses one call; before a refused write, half of the one before it is written."""

    def __init__(self, case: Case | None) -> None:
        self.case, self.counts = case, Counter[str]()
        self.failed: Call | None = None

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        self.counts[call.kind] += 1
        n = self.counts[call.kind]
        if self.case is None or call.kind != self.case.kind or n not in (self.case.n - 1, self.case.n):
            return do()
        if n < self.case.n:
            short = call.kind == "write" and len(call.data) > 1
            return do(call.descriptor, call.data[: len(call.data) // 2]) if short else do()
        self.failed = call
        raise OSError(self.case.code, os.strerror(self.case.code))


def run(
    base: Path, seed: int, *, n: int | None = None, show: Callable[[list[Any]], Iterable[Any]] = iter
) -> scene.Report:
    """Every n-th call with every error; n: of each kind of call at most so many, one error each."""
    rng, report = random.Random(seed), scene.Report("disk", seed)
    with scene.quick():
        plan = scene.small()
        truth = scene.truth_of(plan, base / "truth")
        counter = Full(None)
        (base / "counted").mkdir()
        crash.arm(None)
        with intercepted(base / "counted", counter):
            scene.run(plan, base / "counted")
        points = sorted(crash.reached)
        cases: list[Any] = list(_cases(counter.counts, rng, n))
        named = [f"{stage}:{point}:1" for stage, point in points if point != "tmp_opened"]
        cases += [f"{name}:{action}" for name in named for action in ("enospc", "eio")][:: 1 if n is None else 12]
        for i, case in enumerate(show(cases)):
            root = base / f"disk{i}"
            (root / "root").mkdir(parents=True)
            what = {"case": case} if isinstance(case, str) else case._asdict() | {"code": errno.errorcode[case.code]}
            report.add(what, _try(root / "root", truth, case))
            shutil.rmtree(root)
        report.counts["calls"] = dict(counter.counts)
    return report


def _cases(counts: Counter[str], rng: random.Random, n: int | None) -> Iterable[Case]:
    for kind, codes in KINDS.items():
        every = range(1, counts[kind] + 1)
        if n is None:
            yield from itertools.starmap(Case, itertools.product([kind], every, codes))
        else:
            some = {1, counts[kind], *rng.sample(every, min(n, len(every)))} if counts[kind] else set()
            yield from (Case(kind, i, rng.choice(codes)) for i in sorted(some)[:n])


def _try(root: Path, truth: scene.Truth, case: Any) -> list[str]:
    """Run into the refusal, then go on with a sound disk."""
    hook = Full(case if isinstance(case, Case) else None)
    crash.arm(case if isinstance(case, str) else None)
    error: Exception | None = None
    with intercepted(root, hook):
        try:
            scene.run(truth.plan, root)
        except Exception as raised:
            error = raised
        finally:
            crash.arm(None)
    code = case.code if isinstance(case, Case) else getattr(errno, case.rsplit(":")[-1].upper())
    problems = _said(case, error, hook, code, root, truth) + _left(root, case)
    stuck = isinstance(case, Case) and case.kind == "unlink"  # in a bank's folder, it does not belong there
    return problems + scene.served(root, truth) + scene.settle(root, truth, damaged=stuck)


def _said(case: Any, error: Exception | None, hook: Full, code: int, root: Path, truth: scene.Truth) -> list[str]:
    """A refusal ends the run with the path and the system's words, unless nothing hangs on that call."""
    if isinstance(error, StoreError):
        words = [str(root)] if hook.failed and hook.failed.kind == "unlink" else [str(root), os.strerror(code)]
        wrong = [word for word in words if word not in str(error)]
        return [f"the message does not name {word}: {error}" for word in wrong]
    if error is not None:
        return [f"{type(error).__name__} instead of StoreError: {error}"]
    call = hook.failed
    if isinstance(case, str) and case.startswith(("journal:", "discard:")):  # the first to be removed is a journal
        return [] if scene.tables(root) == truth.tables else ["a refused journal is not made good"]
    if call is None or not (call.caller in FORGIVEN or call.path.startswith(HELPFUL)):
        return [f"the refused {call and call.kind} {call and call.path} in {call and call.caller} was passed over"]
    return [] if scene.tables(root) == truth.tables else ["the run says that all is well, and the tables differ"]


def _left(root: Path, case: Any) -> list[str]:
    """No temporary file stays, unless it was its removal that failed."""
    if isinstance(case, Case) and case.kind == "unlink":
        return []
    return [f"left behind: {path.relative_to(root)}" for path in root.rglob("*.tmp")]
