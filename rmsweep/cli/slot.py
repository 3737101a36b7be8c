"""What an array task of engine=slurm starts: `python -m rmsweep.cli.slot ROOT SWEEP ...`; not for use by hand.

Exit codes: 0 nothing is left to claim, 75 interrupted with work left, 1 and 3 as everywhere.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rmsweep.diary import Diary
from rmsweep.engines._slot import LEFT, TELL
from rmsweep.errors import RmsweepError, StoreError
from rmsweep.slots import Order, Slots

PATIENCE = 150.0  # seconds: longer than the lease of a claim, so that what a dead slot held is taken over


def main(argv: Sequence[str] | None = None) -> int:
    """Work through a sweep's snapshot beside other slots."""
    told = list[int]()

    def leave(number: int, frame: object) -> None:
        told.append(number)
        sys.exit(LEFT)

    for number in TELL.values():
        signal.signal(number, leave)  # until the engine listens
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # goes to the whole job; a second signal would end us at once
    args = _parser().parse_args(argv)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    files = Slots(args.root, args.sweep)
    with Diary(files.notes_folder, args.task, args.restart, Order(args.plan, args.retry)) as diary:
        try:
            if files.cancelled:  # before this slot began; the driver asks for others where that is no longer so
                print(f"rmsweep: slot {args.task}: the sweep was cancelled", flush=True)
                diary.ended("stopped")
                return 0
            return _work(args, files, diary)
        except RmsweepError as error:
            print(f"rmsweep: {error}", file=sys.stderr, flush=True)
            diary.ended("store" if isinstance(error, StoreError) else "refused", message=str(error))
            return error.exit_code
        except SystemExit:
            diary.ended("time" if told == [TELL["time"]] else "stopped")
            raise
        except Exception as error:
            diary.ended("bug", message=f"{type(error).__name__}: {error}")
            raise


def _work(args: argparse.Namespace, files: Slots, diary: Diary) -> int:
    from rmsweep import execute
    from rmsweep.cli.verbs import load_plugins
    from rmsweep.engines.local import Local
    from rmsweep.plan import Plan, read_header

    folder = files.folder / "plans" / args.plan
    load_plugins(args.plugin, read_header(folder)["plugins"], args.sweep)
    plan = Plan.read(folder)
    engine = Local(workers=args.workers, cell_minutes=args.cell_minutes, bank_minutes=args.bank_minutes)
    index = args.first + int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    share = execute.Share(index, args.of, PATIENCE, diary.told)
    print(f"rmsweep: slot {args.task}, turn {args.restart + 1}: share {index % args.of + 1} of {args.of}", flush=True)
    helped = execute.help_with(plan, args.root, engine, share, retry=_retry(args, files), work=args.work)
    for note in helped.notes:
        print(f"rmsweep: {note}", file=sys.stderr)
    print(f"rmsweep: slot {args.task}: {helped.n_computed:,} cells computed, {helped.n_missing:,} left", flush=True)
    if helped.stopped is not None:
        diary.ended("time" if helped.stopped == TELL["time"] else "stopped", helped.n_computed)
        return LEFT
    diary.ended("given_up" if helped.given_up else "done", helped.n_computed, "\n".join(helped.notes[-1:]))
    return 0


def _retry(args: argparse.Namespace, files: Slots) -> frozenset[str]:
    """Cells to run again: those of the list that no other slot has tried since."""
    from rmsweep.store import Store

    if not args.retry:
        return frozenset()
    before = files.read_retry(args.retry)
    now = Store(args.root).attempts(before)
    return frozenset(key for key, n in before.items() if now.get(key, 0) <= n)


def _watch_parent(parent: int) -> None:
    """A slot whose parent is gone was killed in part: it must not compute on beside its job."""
    from rmsweep.engines._worker import ORPHAN_GRACE, ORPHAN_POLL

    over = threading.Event()
    while os.getppid() == parent:
        over.wait(ORPHAN_POLL)
    os.kill(os.getpid(), TELL["leave"])
    over.wait(2 * ORPHAN_GRACE)
    os._exit(LEFT)


def _minutes(text: str) -> float | None:
    return None if text == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rmsweep.cli.slot", allow_abbrev=False)
    parser.add_argument("root", type=Path)
    parser.add_argument("sweep")
    for flag, kind in {"plan": str, "of": int, "first": int, "task": str, "restart": int, "work": str}.items():
        parser.add_argument(f"--{flag}", type=kind, required=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--cell-minutes", type=_minutes, default=None)
    parser.add_argument("--bank-minutes", type=_minutes, default=None)
    parser.add_argument("--retry", default="")
    parser.add_argument("--plugin", action="append", default=[], type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
