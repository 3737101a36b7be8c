"""A sweep's description -> its cells: product of axes, paired and conditional axes, exclusions.

A description departs from the baseline cell of conf/config.yaml. `set` holds single departures, `axes` lists
of values (or "@size.quantities": what stands there in the cell's config; "@size.quantities.0": its first),
`paired` axes that advance together, `when` the cells to which an axis applies, `exclude` what is skipped.
Keys are config groups (`reward_model`), their fields (`reward_model.hidden`) and plain values (`beta`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rmsweep import component
from rmsweep.cell import GROUPS
from rmsweep.errors import ConfigError, unknown
from rmsweep.fingerprint import digest
from rmsweep.presets import OPTION, Presets

CELL_GROUPS = (*GROUPS, "size")
VALUES = ("beta", "cross_beta_factor", "n_annotations", "pairs_per_prompt", "seed")
NODES = ("error_rate", "evaluate")  # structured values of conf/config.yaml that are no groups
NOT_AXES = ("root", "sweep", "engine", "keep", "device", "precision")
ALIASES = {"error_rate": "error_rate.value"}  # error_rate=0.2 says error_rate.value=0.2
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_CELLS = 1_000_000
ABSENT = object()


@dataclass(frozen=True)
class Sweep:
    """What a sweep is: departures from the baseline cell, and axes; fields: see the module's docstring."""

    name: str | None = None
    note: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    paired: tuple[dict[str, list[Any]], ...] = ()
    when: dict[str, dict[str, Any]] = field(default_factory=dict)
    exclude: tuple[dict[str, Any], ...] = ()

    @property
    def keys(self) -> list[str]:
        """Every key that the sweep sets or varies, axes in grid order."""
        return [*self.set, *self.axes, *(k for pair in self.paired for k in pair)]


class Setting(NamedTuple):
    """One override: `values` of `key`, several where it is an `axis`; `reset` puts it back to its default."""

    key: str
    values: tuple[Any, ...] = ()
    axis: bool = False
    reset: bool = False


class GridCell(NamedTuple):
    """One point of the grid.

    choices: group -> option. config: what build_cell takes; its nodes are shared between cells, so read-only.
    parts: hashable key of every node, equal for equal nodes. settings: the departures that apply here.
    varied: value of every key that the sweep sets or varies, at its default where the axis does not apply.
    reason: why it is excluded. error: why its config cannot be composed (a key that its choices do not have).
    """

    choices: dict[str, str]
    config: dict[str, Any]
    parts: dict[str, Any]
    settings: dict[str, Any]
    varied: dict[str, Any]
    reason: str | None = None
    error: ConfigError | None = None


class _Block(NamedTuple):
    """Axes that advance together: rows of values, or the path ("size.quantities") where they stand."""

    keys: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] | str
    condition: dict[str, Any] | None = None


def describe(node: Mapping[str, Any], where: str = "sweep") -> Sweep:
    """The description in a preset's plain data, every field checked; `where` prefixes messages."""
    fields = [f.name for f in dataclasses.fields(Sweep)]
    for key in node:
        if key not in fields:
            raise unknown(f"key of {where}", key, fields)
    given = {k: v for k, v in node.items() if v is not None}
    name, note = given.get("name"), given.get("note", "")
    return Sweep(
        name=None if name is None else check_name(str(name)),
        note=str(note),
        set=_aliased(_mapping(given.get("set", {}), f"{where}.set")),
        axes={k: _axis(f"{where}.axes.{k}", v) for k, v in _aliased(given.get("axes", {}), f"{where}.axes").items()},
        paired=tuple(_paired(f"{where}.paired", p) for p in _list(given.get("paired", []), f"{where}.paired")),
        when={k: _aliased(v, f"{where}.when.{k}") for k, v in _aliased(given.get("when", {}), f"{where}.when").items()},
        exclude=tuple(
            _aliased(rule, f"{where}.exclude") for rule in _list(given.get("exclude", []), f"{where}.exclude")
        ),
    )


def check_name(name: str) -> str:
    """`name` if it may name a sweep (and its folder); ConfigError otherwise."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"sweep.name={name!r}: allowed are letters, digits, '.', '_' and '-', at most 128, "
            "beginning with a letter or digit"
        )
    return name


def override(sweep: Sweep, settings: Iterable[Setting]) -> Sweep:
    """`sweep` with settings applied in order: each replaces that axis or departure, the others stay."""
    for setting in settings:
        sweep = _applied(sweep, setting._replace(key=_alias(setting.key, setting.values)))
    return sweep


def _applied(sweep: Sweep, setting: Setting) -> Sweep:
    key, gone = setting.key, {setting.key, _rival(setting.key)}
    paired = tuple({k: v for k, v in pair.items() if k not in gone} for pair in sweep.paired)
    departures = {k: v for k, v in sweep.set.items() if k not in gone}
    axes = {k: v for k, v in sweep.axes.items() if k != _rival(key)}
    if setting.reset:
        axes.pop(key, None)
    elif setting.axis or key in axes:
        axes[key] = _distinct(setting.values)  # an axis of the preset keeps its place
    else:
        departures[key] = setting.values[0]
    when = {k: v for k, v in sweep.when.items() if k in axes}
    kept = tuple(pair for pair in paired if pair)
    return dataclasses.replace(sweep, set=departures, axes=axes, paired=kept, when=when)


def _rival(key: str) -> str | None:
    """Beta and error_rate exclude each other: giving one replaces the other."""
    return {"beta": "error_rate.value", "error_rate.value": "beta"}.get(key)


def derived_name(sweep: Sweep, extra: Sequence[str] = ()) -> str:
    """A readable name out of the departures and axes, ending in 8 hex digits of the grid (and of `extra`)."""
    words = [f"{k}-{v}" for k, v in sweep.set.items() if isinstance(v, str | int | float) and "/" not in str(v)]
    words += [f"{k}{len(v)}" if isinstance(v, list) else k for k, v in sweep.axes.items()]
    words += [str(k) for pair in sweep.paired for k in pair]
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", "_".join(words)).strip("-._")[:80].rstrip("-._") or "baseline"
    grid = {
        "set": {k: _plain_number(v) for k, v in sweep.set.items()},
        "axes": {k: sorted(map(repr, _plain_number(v))) if isinstance(v, list) else v for k, v in sweep.axes.items()},
        "paired": [_plain_number(p) for p in sweep.paired],
        "when": _plain_number(sweep.when),
        "exclude": _plain_number(list(sweep.exclude)),
        "extra": list(extra),
    }
    return f"{readable}-{digest(grid)[:8]}"


class Grid:
    """The cells of `sweep` over the options of `presets`; every key and option is checked on construction."""

    def __init__(self, sweep: Sweep, presets: Presets) -> None:
        self.sweep, self.presets = sweep, presets
        if "beta" in sweep.keys and {"error_rate", "error_rate.value"} & set(sweep.keys):
            raise ConfigError("beta and error_rate exclude each other: error_rate is solved for beta; give one of them")
        twice = [k for k in sweep.keys if sweep.keys.count(k) > 1]
        if twice:
            raise ConfigError(f"{twice[0]!r} stands twice among set, axes and paired; give it once")
        self._check_keys()
        keys = sweep.keys
        self._inside = {g: [k for k in keys if k.startswith(g + ".")] for g in (*CELL_GROUPS, *NODES)}
        self._static, self._deferred = self._blocks()

    @property
    def n_upper(self) -> int:
        """Cells of the unconditional axes."""
        return math.prod(len(block.rows) for block in self._static)

    def cells(self) -> Iterator[GridCell]:
        """All cells in grid order: the first axis varies slowest, conditional axes fastest."""
        if self.n_upper > MAX_CELLS:
            raise ConfigError(f"this grid has {self.n_upper:,} cells; allowed are {MAX_CELLS:,}: split the sweep")
        for rows in itertools.product(*(block.rows for block in self._static)):
            point = {
                k: v
                for block, row in zip(self._static, rows, strict=True)
                for k, v in zip(block.keys, row, strict=True)
            }
            for full in self._expand(point, self._deferred):
                yield self._cell(full)

    def _blocks(self) -> tuple[list[_Block], list[_Block]]:
        """Blocks that every cell has, and those that depend on it (`when`, or "@" into a varied group)."""
        static: list[_Block] = []
        deferred: list[_Block] = []
        for key in self.sweep.when:
            if key not in self.sweep.axes:
                raise unknown("axis of sweep.when", key, self.sweep.axes)
        for key, values in self.sweep.axes.items():
            rows = values[1:] if isinstance(values, str) else tuple((v,) for v in values)
            block = _Block((key,), rows, self.sweep.when.get(key))
            (deferred if block.condition is not None else static).append(block)
        for pair in self.sweep.paired:
            static.append(_Block(tuple(pair), tuple(zip(*pair.values(), strict=True))))
        varied = {k.partition(".")[0] for block in (*static, *deferred) for k in block.keys}
        fixed: list[_Block] = []
        for block in static:
            if isinstance(block.rows, str) and block.rows.partition(".")[0] in varied:
                deferred.insert(0, block)
            else:
                fixed.append(block._replace(rows=self._rows(block, {})))
        return fixed, deferred

    def _expand(self, point: dict[str, Any], blocks: list[_Block]) -> Iterator[dict[str, Any]]:
        if not blocks:
            yield point
            return
        block, *rest = blocks
        if block.condition is not None and not self._matches(block.condition, point):
            yield from self._expand(point, rest)
            return
        for row in self._rows(block, point):
            yield from self._expand({**point, **dict(zip(block.keys, row, strict=True))}, rest)

    def _rows(self, block: _Block, point: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
        if not isinstance(block.rows, str):
            return block.rows
        values = self._lookup(block.rows, point)
        if values is ABSENT or values is None or values == [] or isinstance(values, dict):
            raise ConfigError(f"axis {block.keys[0]}=@{block.rows}: no values stand there in the config")
        return tuple((v,) for v in _distinct(values if isinstance(values, list) else [values]))

    def _cell(self, point: dict[str, Any]) -> GridCell:
        merged = {**self.sweep.set, **point}
        choices = self._choices(merged)
        varied = {key: merged[key] if key in merged else self._lookup(key, point) for key in self.sweep.keys}
        values = {k: merged.get(k, self.presets.baseline[k]) for k in VALUES}
        config: dict[str, Any] = dict(values)
        parts: dict[str, Any] = {"values": tuple(map(repr, values.values()))}
        error = None
        for group in (*CELL_GROUPS, *NODES):
            settings = tuple((k, repr(merged[k])) for k in self._inside[group] if k in merged)
            if group in NODES and group in merged:
                settings = ((group, repr(merged[group])), *settings)
            parts[group] = (choices.get(group), settings)
            node = self._node(group, parts[group], lambda key: merged[key])
            error = error or (node if isinstance(node, ConfigError) else None)
            config[group] = node
        rule = next((r for r in self.sweep.exclude if self._matches(r, point)), None)
        words = ", ".join(f"{k}={v}" for k, v in (rule or {}).items())
        reason = f"excluded by sweep.exclude: {words}" if rule else None
        varied = {key: None if value is ABSENT else value for key, value in varied.items()}
        return GridCell(choices, {} if error else config, parts, merged, varied, reason, error)

    def _choices(self, merged: Mapping[str, Any]) -> dict[str, str]:
        """Group -> option; a base LLM that nobody asked for follows the dataset."""
        choices = {g: str(merged.get(g, self.presets.baseline_choices[g])) for g in CELL_GROUPS}
        if "base_llm" not in merged:
            settings = tuple((k, repr(merged[k])) for k in self._inside["dataset"] if k in merged)
            own = self._base_llms((choices["dataset"], settings), merged)
            if own and choices["base_llm"] not in own:
                choices["base_llm"] = own[0]
        return choices

    def _base_llms(self, part: Any, merged: Mapping[str, Any]) -> tuple[str, ...]:
        """Options of base_llm that go with the dataset; none where its config is not sound."""
        if part not in self._known_llms:
            node = self._node("dataset", part, lambda key: merged[key])
            try:
                own = () if isinstance(node, ConfigError) else tuple(component.build("dataset", node).base_llms)
            except ConfigError:
                own = ()
            self._known_llms[part] = own
        return self._known_llms[part]

    @functools.cached_property
    def _known_llms(self) -> dict[Any, tuple[str, ...]]:
        return {}

    @functools.cached_property
    def _nodes(self) -> dict[Any, dict[str, Any] | ConfigError]:
        return {}

    def _node(self, group: str, part: Any, value: Callable[[str], Any]) -> dict[str, Any] | ConfigError:
        """The node of `group` for one distinct choice and its settings; made once, shared by its cells."""
        if (group, part) not in self._nodes:
            option, settings = part
            node: Any = self.presets.baseline[group] if group in NODES else self.presets.node(group, option)
            try:
                for key, _ in settings:
                    node = with_value(node, key.split(".")[1:], value(key), f"{group} {option or ''}".strip(), key)
            except ConfigError as error:
                node = error
            self._nodes[group, part] = node
        return self._nodes[group, part]

    def _lookup(self, key: str, point: Mapping[str, Any]) -> Any:
        """Value of `key` in the cell at `point`: as set, else as its option has it, else ABSENT."""
        merged = {**self.sweep.set, **point}
        if key in merged:
            return merged[key]
        group, _, rest = key.partition(".")
        if group in CELL_GROUPS:
            option = self._choices(merged)[group]
            return option if not rest else _at(self.presets.node(group, option), rest)
        return _at(self.presets.baseline, key)

    def _matches(self, rule: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
        return all(_equal(self._lookup(key, point), wanted) for key, wanted in rule.items())

    # -- checks --------------------------------------------------------------------------------------------

    def _check_keys(self) -> None:
        """Refuse unknown keys and options before any cell is made."""
        pairs = {k: v for pair in self.sweep.paired for k, v in pair.items()}
        for key, values in {
            **{k: [v] for k, v in self.sweep.set.items()},
            **self.sweep.axes,
            **pairs,
        }.items():
            self.check_key(key, [] if isinstance(values, str) else values)
        rules = [(k, v) for rule in (*self.sweep.exclude, *self.sweep.when.values()) for k, v in rule.items()]
        for key, wanted in rules:
            self.check_key(key, wanted if isinstance(wanted, list) else [wanted])

    def check_key(self, key: str, values: Sequence[Any] = ()) -> None:
        """Refuse an unknown key, and values that are no options of a group."""
        group, _, rest = key.partition(".")
        if group in NOT_AXES:
            raise ConfigError(f"{key} is no axis of a sweep; give one value for the whole run, {key}=VALUE")
        if group not in (*CELL_GROUPS, *VALUES, *NODES) or (rest and group in VALUES):
            raise unknown("key", key, self.known_keys())
        for value in values:
            if _has_nan(value):
                raise ConfigError(f"{key}={value}: NaN is no setting; allowed are numbers, and inf for some keys")
        if group in CELL_GROUPS and not rest:
            for option in values:
                check_option(self.presets, group, option)
        elif rest and not any(_at(node, rest) is not ABSENT for node in self._chosen(group)):
            raise unknown("key", key, self.known_keys(group))

    def _chosen(self, group: str) -> list[dict[str, Any]]:
        """The nodes of every option of `group` that the sweep names."""
        if group in NODES:
            return [self.presets.baseline[group]]
        named = [self.sweep.set.get(group, self.presets.baseline_choices[group])]
        axis = self.sweep.axes.get(group, [])
        named += [] if isinstance(axis, str) else axis
        named += [option for pair in self.sweep.paired for option in pair.get(group, [])]
        return [self.presets.node(group, option) for option in dict.fromkeys(named)]

    def known_keys(self, group: str | None = None) -> list[str]:
        """Keys that can be set: all, or those of the chosen options of one group."""
        if group is None:
            return [*CELL_GROUPS, *VALUES, *NODES, *NOT_AXES]
        return sorted({f"{group}.{path}" for node in self._chosen(group) for path in paths(node)} - {f"{group}.kind"})


def check_option(presets: Presets, group: str, option: Any) -> None:
    """Refuse what is no option of `group`: unknown names, paths, lists and mappings."""
    if isinstance(option, list | tuple | dict) or option is None:
        raise ConfigError(
            f"{group}={option}: needs the name of an option, several separated by commas; "
            f"valid: {', '.join(presets.options(group))}"
        )
    if not OPTION.fullmatch(str(option)):
        raise ConfigError(
            f"{group}={option}: an option is a name (letters, digits, '.', '_', '-'), never a path; "
            f"valid: {', '.join(presets.options(group))}"
        )
    presets.node(group, str(option))


def with_value(node: dict[str, Any], path: Sequence[str], value: Any, where: str, key: str) -> dict[str, Any]:
    """A copy of `node` with `value` at `path`; a mapping merges into a mapping, as Hydra does it."""
    if not path:
        return _merged(node, value, key)
    head, *rest = path
    if head not in node:
        raise ConfigError(f"{key}: {where} has no such key; it has {', '.join(sorted(set(node) - {'kind'})) or 'none'}")
    old = node[head]
    if rest and not isinstance(old, dict):
        raise ConfigError(f"{key}: {key.split('.')[-len(rest) - 1]} of {where} is the value {old!r}, it has no keys")
    new = with_value(old, rest, value, where, key) if rest else _merged(old, value, key)
    return {**node, head: new}


def paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all values in a nested mapping, mappings included."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")


def _merged(old: Any, new: Any, key: str) -> Any:
    if isinstance(new, dict) and any("_target_" in str(k) for k in new):
        raise ConfigError(f"{key}: '_target_' is not allowed; configs name no code")
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{k: _merged(old.get(k), v, key) for k, v in new.items()}}
    if isinstance(old, dict):
        raise ConfigError(f"{key}={new!r}: needs a mapping of {', '.join(old) or 'names'}; write {key}.NAME=VALUE")
    return new


def _at(node: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return ABSENT
    return node


def _has_nan(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_has_nan, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isnan(value)


def _equal(value: Any, wanted: Any) -> bool:
    if value is ABSENT:
        return False
    return value == wanted or (isinstance(wanted, list) and any(value == w for w in wanted))


def _alias(key: str, values: Sequence[Any]) -> str:
    return key if any(isinstance(v, dict) for v in values) else ALIASES.get(key, key)


def _aliased(node: Any, where: str = "sweep") -> dict[str, Any]:
    return {_alias(k, [v]): v for k, v in _mapping(node, where).items()}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where}={value!r}: needs a mapping of keys to values")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}={value!r}: needs a list")
    return list(value)


def _axis(where: str, values: Any) -> Any:
    if isinstance(values, str) and values.startswith("@"):
        return values
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"{where}={values!r}: needs a list of values, or '@size.quantities'")
    return _distinct(values)


def _paired(where: str, pair: Any) -> dict[str, list[Any]]:
    lists = {k: _list(v, f"{where}.{k}") for k, v in _aliased(pair, where).items()}
    if len({len(v) for v in lists.values()}) != 1 or not next(iter(lists.values())):
        lengths = ", ".join(f"{k}: {len(v)}" for k, v in lists.items())
        raise ConfigError(f"{where}: paired axes need equally many values, at least one; got {lengths or 'no axis'}")
    return lists


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Values without repetitions, in order; 1 and 1.0 are one value."""
    kept: dict[str, Any] = {}
    for value in values:
        kept.setdefault(repr(_plain_number(value)), value)
    return list(kept.values())


def _plain_number(value: Any) -> Any:
    """One spelling for numbers (1.0 is 1) and for nan, in nested plain data: what the grid's digest sees."""
    if isinstance(value, dict):
        return {k: _plain_number(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_number(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else (value if math.isfinite(value) else str(value))
    return value
