"""Shell completion: verbs, groups and options, keys, names of sweeps. Reads conf/ only, loads no method."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rmsweep
from rmsweep.cli.help import VERBS
from rmsweep.component import PACKAGES
from rmsweep.errors import ConfigError
from rmsweep.presets import PLAIN_GROUPS, Presets, read_yaml

BASH = r"""_rmsweep() {
    local line="${COMP_LINE:0:COMP_POINT}" word words found
    read -ra words <<< "$line"
    [[ "$line" == *" " ]] && words+=("")
    word="${words[-1]}"
    mapfile -t found < <(rmsweep complete "${words[@]:1}" 2>/dev/null)
    # bash splits words at "=": offer only what comes after it
    [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && found=("${found[@]#"${word%%=*}="}")
    COMPREPLY=("${found[@]}")
    [[ ${#found[@]} -eq 1 && "${found[0]}" == *[=.] ]] && compopt -o nospace
    [[ -z "${found[0]}" ]] && COMPREPLY=()
}
complete -o bashdefault -o default -F _rmsweep rmsweep"""

ZSH = r"""#compdef rmsweep
_rmsweep() {
    local -a found
    found=("${(@f)$(rmsweep complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    [[ -n "$found" ]] && compadd -Q -S '' -- "${found[@]}"
}
compdef _rmsweep rmsweep"""

SCRIPTS = {"bash": BASH, "zsh": ZSH}
FLAGS = {
    "run": ("--cfg", "--config-dir", "--detach", "--plugin", "--reuse", "--help"),
    "plan": ("--cfg", "--config-dir", "--plugin", "--reuse", "--why", "--help"),
    "status": ("--json", "--help"),
    "log": ("--help",),
    "cancel": ("--help",),
    "results": ("--sql", "--csv", "--schema", "--help"),
    "retry": ("--cause", "--detach", "--plugin", "--help"),
    "verify": ("--sample", "--seed", "--plugin", "--help"),
    "gc": ("--dry-run", "--unreferenced", "--quarantine", "--help"),
    "completion": ("--help",),
}
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "keep": ("none", "scores", "models"),
    "error_rate.reference": ("random_same_prompt", "this_design"),
}


def candidates(words: Sequence[str]) -> list[str]:
    """What may stand in place of the last of `words` (all after `rmsweep`); [] where nothing is known."""
    *before, word = words or [""]
    if not before:
        return _starting(VERBS, word)
    verb = before[0]
    if word.startswith("-"):
        return _starting(FLAGS.get(verb, ()), word)
    if verb == "completion":
        return _starting(SCRIPTS, word)
    if verb == "gc":
        return _starting(["root="], word)
    if verb in ("status", "log", "cancel", "results", "retry", "verify"):
        return _starting([*_sweeps(before), "root="], word)
    return _overrides(word, Presets(_folders(before)), before) if verb in ("run", "plan") else []


def _overrides(word: str, presets: Presets, before: Sequence[str]) -> list[str]:
    key, equals, value = word.partition("=")
    sign = key[:1] if key[:1] in "+~" else ""
    key = key[len(sign) :]
    if equals:
        options = presets.options(key) if key in presets.groups else CHOICES.get(key, ())
        done, comma, _ = value.rpartition(",")
        used = done.split(",")
        return _starting((f"{sign}{key}={done}{comma}{o}" for o in options if o not in used), word)
    end = "" if sign == "~" else "="
    return _starting((f"{sign}{k}{end}" for k in _keys(key, presets, before)), word)


def _keys(key: str, presets: Presets, before: Sequence[str]) -> list[str]:
    group, dot, _ = key.partition(".")
    if dot:
        return sorted(f"{group}.{name}" for name in _fields(group, presets, before))
    top = [k for k, v in presets.baseline.items() if k != "defaults" and not isinstance(v, dict)]
    nested = [f"{k}.{name}" for k, v in presets.baseline.items() if isinstance(v, dict) for name in v]
    return [*presets.groups, *top, "error_rate", *nested, "sweep.name", "sweep.exclude"]


def _fields(group: str, presets: Presets, before: Sequence[str]) -> set[str]:
    """Keys of a group's node: as its chosen options write them, and the fields of their components."""
    if isinstance(presets.baseline.get(group), dict):
        return set(presets.baseline[group])
    if group not in presets.groups:
        return set()
    given = next((w.partition("=")[2].split(",") for w in before if w.startswith(f"{group}=")), None)
    chosen = given or [presets.baseline_choices[group]]
    found: set[str] = set()
    for option in chosen:
        node = _raw(presets, group, option)
        found |= set(node) - {"kind"}
        if group not in PLAIN_GROUPS and "kind" in node:
            found |= set(_dataclass_fields(group, str(node["kind"])))
    return found


def _raw(presets: Presets, group: str, option: str) -> dict[str, Any]:
    for folder in reversed(presets.folders):
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            return read_yaml(path)
    return {}


def _dataclass_fields(group: str, kind: str) -> list[str]:
    """Field names of the component `kind`, read from its file's text: importing it could load torch."""
    path = Path(rmsweep.__file__).parent / PACKAGES[group].rpartition(".")[2] / f"{kind}.py"
    if not path.is_file():
        return []
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    chosen = [c for c in classes if any("component(" in ast.unparse(d) for d in c.decorator_list)]
    return [
        field.target.id
        for cls in chosen
        for field in cls.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and "ClassVar" not in ast.unparse(field.annotation)
    ]


def _sweeps(before: Sequence[str]) -> list[str]:
    root = next((w[5:] for w in before if w.startswith("root=")), "outputs")
    return sorted(p.parent.name for p in Path(root).glob("sweeps/*/plan.json"))


def _folders(before: Sequence[str]) -> list[Path]:
    pairs = itertools.pairwise(before)
    return [Path(value) for flag, value in pairs if flag == "--config-dir" and Path(value).is_dir()]


def _starting(names: Iterable[str], word: str) -> list[str]:
    return [name for name in names if name.startswith(word)]


def script(shell: str) -> str:
    """The completion script of `shell`."""
    if shell not in SCRIPTS:
        raise ConfigError(f"completion {shell!r}: allowed are {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]
