"""The options of conf/: plain YAML data, read safely, completed with the defaults of the component they name."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rmsweep import component
from rmsweep.errors import ConfigError, unknown

OPTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,127})*")
MAX_BYTES = 1 << 20
PLAIN_GROUPS = ("size", "sweep")  # groups whose options are no components


class _Loader(yaml.SafeLoader):
    """YAML data without aliases (bombs), duplicate keys, or words like `on` read as booleans."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases: a config has no use for them and nested ones grow without bound."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that stands twice."""
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = [k for k in keys if keys.count(k) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(  # 1e-3 is a number, as Hydra reads it
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def conf_dir() -> Path:
    """The shipped conf/: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


class Presets:
    """All options of conf/, of the user's own folders (later ones win), and of `extra`: {group: {option: node}}."""

    def __init__(
        self, folders: Iterable[Path] = (), extra: Mapping[str, Mapping[str, dict[str, Any]]] | None = None
    ) -> None:
        self.folders = [conf_dir(), *folders]
        self.extra = extra or {}
        for folder in self.folders:
            if not folder.is_dir():
                raise ConfigError(f"config folder {folder} does not exist; --config-dir takes a folder like conf/")

    @functools.cached_property
    def groups(self) -> list[str]:
        """Names of all config groups."""
        return sorted({p.name for f in self.folders for p in f.iterdir() if p.is_dir()} & _known_groups())

    def options(self, group: str) -> list[str]:
        """Names of the options of `group`, such as `bt_mlp` or `paper/quality`."""
        return sorted({*self._files(group), *self.extra.get(group, ())})

    def node(self, group: str, option: str) -> dict[str, Any]:
        """The plain data of one option, completed with its component's defaults (a fresh copy)."""
        return _copy(self._node(group, option))

    @functools.cached_property
    def baseline(self) -> dict[str, Any]:
        """conf/config.yaml as written: `defaults` (the baseline's options) and the top-level values."""
        return read_yaml(self.folders[0] / "config.yaml")

    @functools.cached_property
    def baseline_choices(self) -> dict[str, str]:
        """Group -> option of the baseline cell."""
        choices: dict[str, str] = {}
        for entry in self.baseline["defaults"]:
            if isinstance(entry, dict):
                choices.update(entry)
        return choices

    def _files(self, group: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted((folder / group).rglob("*.yaml")):
                found[path.relative_to(folder / group).with_suffix("").as_posix()] = path
        return found

    @functools.cache  # noqa: B019  one Presets lives as long as its process
    def _node(self, group: str, option: str) -> dict[str, Any]:
        if option in self.extra.get(group, ()):
            return complete(group, self.extra[group][option])
        files = self._files(group)
        if not OPTION.fullmatch(str(option)) or option not in files:
            raise unknown(f"{group} option", option, self.options(group))
        node = read_yaml(files[option])
        if group in PLAIN_GROUPS:
            return node
        if "kind" not in node:
            raise ConfigError(f"{files[option]}: needs 'kind', one of {', '.join(component.kinds(group))}")
        return complete(group, node)


def complete(group: str, node: dict[str, Any]) -> dict[str, Any]:
    """`node` with every field its component leaves at the default spelled out."""
    return {**component.defaults(group, node["kind"]), **node}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data: no tags, no aliases, no interpolation; ConfigError names file and line."""
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB; a config file holds settings, not data")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise ConfigError(f"{path}: must be a mapping of names to values")
    refuse_interpolation(data, str(path))
    return data


def refuse_interpolation(value: Any, where: str) -> None:
    """Configs are data: `${...}` (environment, resolvers) is refused wherever it stands."""
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: {value!r}: interpolation ${{...}} is not allowed; write the value itself")
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_interpolation(key, where)
            refuse_interpolation(item, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_interpolation(item, where)


def _known_groups() -> set[str]:
    return {*component.PACKAGES, *PLAIN_GROUPS} - {"objective"}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
