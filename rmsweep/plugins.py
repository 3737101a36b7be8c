"""Out-of-tree components from a user's Python file: named on the command line, never in a config."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rmsweep import component
from rmsweep.errors import ConfigError
from rmsweep.fingerprint import file_sha256
from rmsweep.paths import user_path


def load(path: str | Path) -> str:
    """Import the file at `path` and return its sha256; components it registers carry it in their identity.

    Only for a path that the user gave: what a file on the disk names is never imported. Raises ConfigError where the
    file is missing, is no Python file or does not import.
    """
    file = user_path(path, "--plugin")
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--plugin {path}: no such Python file; it takes a FILE.py that registers components")
    sha = file_sha256(file)
    name = f"_rmsweep_plugin_{sha[:16]}.{file.stem}"  # a component's default kind is its file's name
    if name in sys.modules:
        return sha
    before = dict(component._REGISTRY)
    _import(file, name)
    for (group, kind), cls in component._REGISTRY.items():
        if cls.__module__ == name:
            _refuse_taken(file, group, kind, before)
            cls.code_digest = sha  # type: ignore[attr-defined]
    return sha


def _refuse_taken(file: Path, group: str, kind: str, before: dict[tuple[str, str], type]) -> None:
    """A plug-in adds kinds; it must not stand in for one that exists, whose results would change meaning."""
    shipped = importlib.util.find_spec(f"{component.PACKAGES[group]}.{kind}") is not None
    if shipped or (group, kind) in before:
        raise ConfigError(f"--plugin {file}: {group} kind {kind!r} exists already; choose another kind=...")


def _import(file: Path, name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {file}: cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, ConfigError | KeyboardInterrupt):
            raise
        raise ConfigError(f"--plugin {file}: {type(error).__name__}: {error}") from error
