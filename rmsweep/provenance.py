"""What computed a cell: digests of the code of its stages, and versions of the libraries that make numbers.

Recorded beside every result, and part of its key where `reuse` is strict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from rmsweep import source

REUSE = ("versions", "strict")
LIBRARIES = ("rmsweep", "torch", "numpy", "scipy", "scikit-learn", "lightgbm", "pyarrow")
# What a stage runs whatever the cell, and the groups of components it uses. "!": that definition alone, not what it
# names. The bank has no stage module of its own: its dataset writes it.
ROOTS = {
    "generate": ("rmsweep.bank:Bank", "rmsweep.datasets:Dataset"),
    "annotate": ("rmsweep.stages.annotate:annotate", "rmsweep.rng:streams"),
    "train": ("rmsweep.stages.train:train", "rmsweep.rng:streams"),
    "evaluate": (
        "rmsweep.stages.evaluate:evaluate",
        "rmsweep.pipeline:run_cell!",
        "rmsweep.pipeline:_evaluated!",
        "rmsweep.runner:run_cell!",
        "rmsweep.runner:one_thread!",
        "rmsweep.parts:table_of!",
        "rmsweep.parts:_plain!",
        "rmsweep.cell:build_cell!",
        "rmsweep.cell:_number!",
        "rmsweep.cell:_sized!",
    ),  # fmt: skip  what every number passes through on its way in and out belongs to the last stage
}
GROUPS = {
    "generate": ("dataset", "base_llm", "embedder"),
    "annotate": ("candidates", "pairing", "annotator"),
    "train": ("reward_model", "protocol"),
    "evaluate": ("annotator",),
}
# Components that the stage calls another way than by their own file: networks that are fitted in one stack on a GPU.
ALSO = {
    "rmsweep.reward_models.mlp:MLP": (
        "rmsweep.stages.train:train_together",
        "rmsweep.reward_models._groups:stack_key",
        "rmsweep.pipeline:_Together!",
    )
}


def code_of(spec: Any, code: source.Code | None = None) -> dict[str, str]:
    """Stage -> digest of the code that a cell (cell.CellSpec) runs there, through its helpers."""
    code = code or source.own()
    return {
        stage: code.digest((*ROOTS[stage], *(root for group in groups for root in roots(getattr(spec, group)))))
        for stage, groups in GROUPS.items()
    }


def roots(thing: Any) -> Iterator[str]:
    """Where the code of a component, and of those nested in it, begins."""
    yield from roots_of(type(thing))
    for f in dataclasses.fields(thing):
        if "component" in f.metadata:
            yield from roots(getattr(thing, f.name))


def roots_of(cls: type) -> tuple[str, ...]:
    """Where the code of one component class begins."""
    own = f"{cls.__module__}:{cls.__qualname__}"
    return (own, *ALSO.get(own, ()))


@functools.cache
def installed() -> dict[str, str]:
    """Versions of Python and of the libraries that make numbers; none of them is imported."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def versions() -> str:
    """`installed` as JSON."""
    return json.dumps(installed(), sort_keys=True)


def strict_libraries(found: Mapping[str, str] | None = None) -> dict[str, str]:
    """The versions that count where reuse is strict: Python without its patch level; for rmsweep there are digests.

    found: as `installed`, of another time; null: today's.
    """
    found = {name: version for name, version in (installed() if found is None else found).items() if name != "rmsweep"}
    return {**found, **({"python": found["python"].rpartition(".")[0]} if "python" in found else {})}
