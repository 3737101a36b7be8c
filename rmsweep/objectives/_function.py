"""An objective out of a plain Python function: for notebooks, where a loss is ten lines and no file."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rmsweep.component import component
from rmsweep.errors import ConfigError

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def objective_from_function(name: str, function: LossFunction) -> type:
    """Register `function(reward_a [C], reward_b [C], preference [C]) -> loss [C]` as objective `name`.

    Its source, defaults and closure enter the fingerprint of every cell that uses it, arrays and tensors by content;
    global variables that it reads do not, so pass constants as defaults. ConfigError for what cannot be fingerprinted.
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
    """sha256 of what the function is: its source and everything it holds, by content."""
    return hashlib.sha256("\0".join(_content(function, 0)).encode()).hexdigest()


def _content(value: Any, depth: int) -> Iterator[str]:
    """Words that are equal for equal content: scalars, containers, arrays, tensors, functions and partials."""
    if depth > 20:
        raise ConfigError("this objective holds itself or is nested too deeply to be fingerprinted")
    yield type(value).__name__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
    elif isinstance(value, torch.Tensor | np.ndarray | np.generic):
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.hasobject:
            raise ConfigError("this objective holds an array of objects, which cannot be fingerprinted")
        yield from (str(array.dtype), str(array.shape), hashlib.sha256(array.tobytes()).hexdigest())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield from (*_content(key, depth + 1), *_content(value[key], depth + 1))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content(item, depth + 1)
    elif isinstance(value, functools.partial):
        yield from _content([value.func, value.args, value.keywords], depth + 1)
    elif isinstance(value, torch.nn.Module):
        yield from (inspect.getsource(type(value)), repr(value), *_content(dict(value.state_dict()), depth + 1))
    elif inspect.ismodule(value) or inspect.isbuiltin(value) or inspect.isclass(value):
        yield str(getattr(value, "__module__", "")) + value.__name__
    elif inspect.isfunction(value):
        yield from _function_content(value, depth)
    else:
        raise ConfigError(
            f"an objective that holds a {type(value).__name__} cannot be fingerprinted; pass numbers, strings, arrays, "
            "tensors or functions, as arguments with defaults"
        )


def _function_content(function: Any, depth: int) -> Iterator[str]:
    try:
        yield inspect.getsource(function)
    except (OSError, TypeError):
        code = function.__code__
        yield repr((code.co_code, code.co_names, [c for c in code.co_consts if not inspect.iscode(c)]))
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    yield from _content([function.__defaults__, function.__kwdefaults__, cells], depth + 1)
