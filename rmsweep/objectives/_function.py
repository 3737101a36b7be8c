"""An objective out of a plain Python function: for notebooks, where a loss is ten lines and no file."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from rmsweep.component import component
from rmsweep.errors import ConfigError

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def objective_from_function(name: str, function: LossFunction) -> type:
    """Register `function(reward_a [C], reward_b [C], preference [C]) -> loss [C]` as objective `name`.

    Its source, defaults and closure enter the fingerprint of every cell that uses it; global variables that it reads
    do not, so pass constants as defaults.
    """
    if not callable(function):
        raise ConfigError(f"objective {name!r} is {function!r}; needed: a function(reward_a, reward_b, preference)")

    @dataclass(frozen=True)
    class FunctionObjective:
        """A loss given as a function."""

        pointwise: ClassVar[bool] = False
        code_digest: ClassVar[str] = _digest(function)

        def __call__(self, reward_a: torch.Tensor, reward_b: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
            """Loss [C]."""
            return function(reward_a, reward_b, preference)

    return component("objective", name)(FunctionObjective)


def _digest(function: LossFunction) -> str:
    """sha256 of what the function is: source (bytecode where there is none), defaults, closure."""
    try:
        body = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        body = repr(function) if code is None else repr((code.co_code, code.co_consts, code.co_names))
    cells = [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    parts = (body, repr(getattr(function, "__defaults__", None)), *cells)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
