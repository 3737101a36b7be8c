"""Memory of this machine and of single processes, as Linux tells it; None where it does not (macOS)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FILES = {  # cgroup version -> limit, use, and what of the use is cached files, which the kernel takes back at need
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


class Memory(NamedTuple):
    """Bytes that are left, of how many there are."""

    left: int
    total: int


def available() -> Memory | None:
    """What the machine has, or a control group (container, Slurm job) that this process is in and that has less."""
    fields = _fields(PROC / "meminfo")
    if "MemAvailable" not in fields:
        return None
    machine = Memory(fields["MemAvailable"] * 1024, fields["MemTotal"] * 1024)
    return min([machine, *_groups()])


def used_by(pid: int) -> int | None:
    """Bytes that a process alone holds: mapped files, such as a bank's, belong to everybody."""
    kib = _fields(PROC / str(pid) / "status").get("RssAnon")
    return None if kib is None else kib * 1024


def n_kills() -> int | None:
    """How many processes the kernel has killed so far because memory ran out."""
    return _fields(PROC / "vmstat").get("oom_kill")


def _groups() -> Iterator[Memory]:
    """Every control group with a limit, from our own upwards."""
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version, top = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
        folder = top / path.lstrip("/")
        while folder.is_relative_to(top):
            if (found := _group(folder, version)) is not None:
                yield found
            folder = folder.parent


def _group(folder: Path, version: int) -> Memory | None:
    limit, use, cached = FILES[version]
    with contextlib.suppress(ValueError):  # "max": no limit; "": no such file
        total, stat = int(_text(folder / limit)), _fields(folder / "memory.stat")
        return Memory(total - int(_text(folder / use)) + sum(stat.get(name, 0) for name in cached), total)
    return None


def _fields(path: Path) -> dict[str, int]:
    """`name[:] number` lines of a file."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
