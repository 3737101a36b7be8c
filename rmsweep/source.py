"""Digests of source code: what a definition does, through all that it names, whatever its comments and layout.

Nothing is imported or run: files are parsed. The unit is a top-level definition, not a file, so that a module which
many share does not tie them together. What a definition names is followed through its module and the imports of its
package, names in annotations included (methods are called on what an annotation names). Not followed: other packages,
and PLUMBING.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rmsweep import component

PACKAGE = Path(__file__).resolve().parent
# Modules that check, build or identify: what they make of a config, or of a file, is in the identity by value
PLUMBING = {
    f"rmsweep.{name}"
    for name in (
        "component",
        "errors",
        "fingerprint",
        "paths",
        "versions",
        "plugins",
        "problems",
        "text",
    )
}
DIGITS = 16
ALL, LOOSE = "*", ""  # as names in a module: all of it; its statements that define nothing
UNWRITTEN = ("ctx", "kind", "type_comment")  # fields of nodes without meaning
Functions = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    """A top-level name of a module; LOOSE and ALL are names too."""

    module: str
    name: str


@dataclass
class _Module:
    """texts: name -> what defines it; uses: name -> what it names, as (name, attribute or None).

    imports: local name -> the module, or the name in a module, that it stands for.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    uses: dict[str, set[tuple[str, str | None]]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)


class Code:
    """The definitions of a package tree and of modules outside it that were imported, each file parsed once.

    package: the folder of `rmsweep` (tests give a copy).
    """

    def __init__(self, package: Path = PACKAGE) -> None:
        self._package = package
        self._modules: dict[str, _Module | None] = {}
        self._closures: dict[str, frozenset[Definition]] = {}
        self._hashes: dict[Definition, str] = {}
        self._digests: dict[Any, str] = {}

    def digest(self, roots: Iterable[str], without: Iterable[str] = ()) -> str:
        """Digest of all that `roots` reach and `without` do not; roots are "module:name" or "module:*"."""
        key = tuple(roots), tuple(without)
        if key not in self._digests:
            reached, known = (set().union(*map(self.closure, names)) for names in key)
            lines = sorted(f"{d.module}:{d.name} {self._hash(d)}" for d in reached - known)
            self._digests[key] = _sha("\n".join(lines))
        return self._digests[key]

    def closure(self, root: str) -> frozenset[Definition]:
        """Every definition that a root reaches, itself included; "module:name!" is that definition alone."""
        if root not in self._closures:
            module, _, name = root.rstrip("!").partition(":")
            start = set(self._expanded(Definition(module, name)))
            self._closures[root] = frozenset(start if root.endswith("!") else self._reached(start))
        return self._closures[root]

    def _reached(self, start: set[Definition]) -> set[Definition]:
        seen, todo = set(start), list(start)
        while todo:
            for found in self._named(todo.pop()):
                if found not in seen:
                    seen.add(found)
                    todo.append(found)
        return seen

    def _named(self, definition: Definition) -> Iterator[Definition]:
        """What a definition names, in its module or imported from the package."""
        module = self._module(definition.module)
        if module is None:
            return
        for name, attribute in module.uses.get(definition.name, ()):
            if name in module.texts:
                yield from self._expanded(Definition(definition.module, name))
            elif name in module.imports:
                yield from self._imported(*module.imports[name], attribute)

    def _imported(self, module: str, name: str | None, attribute: str | None) -> Iterator[Definition]:
        """Definitions behind an imported name, or behind an attribute of an imported module."""
        if name is None:
            yield from self._resolved(module, attribute or ALL, None)
        else:
            yield from self._resolved(module, name, attribute)

    def _resolved(self, where: str, name: str, attribute: str | None) -> Iterator[Definition]:
        module = self._module(where)
        if module is None:
            return
        if name in module.imports and name not in module.texts:  # passed on
            yield from self._imported(*module.imports[name], attribute)
        elif name not in module.texts and self._file(f"{where}.{name}") is not None:
            yield from self._resolved(f"{where}.{name}", attribute or ALL, None)
        else:
            yield from self._expanded(Definition(where, name))

    def _expanded(self, definition: Definition) -> Iterator[Definition]:
        """The definition and its module's loose statements; the whole module for ALL and for a name not found."""
        module = self._module(definition.module)
        if module is None:
            yield definition  # without source, such as a loss from a notebook: its name alone
            return
        names = [definition.name] if definition.name in module.texts else list(module.texts)
        for name in {*names, LOOSE}:
            yield Definition(definition.module, name)

    def _hash(self, definition: Definition) -> str:
        """Digest of one definition's text and of what its imported names stand for."""
        if definition not in self._hashes:
            module = self._module(definition.module) or _Module()
            used = {name for name, _ in module.uses.get(definition.name, ())} & module.imports.keys()
            lines = [*module.texts.get(definition.name, ()), *(f"{n}={module.imports[n]}" for n in sorted(used))]
            self._hashes[definition] = _sha("\n".join(lines))
        return self._hashes[definition]

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            path = None if name in PLUMBING else self._file(name)
            self._modules[name] = None if path is None else _parsed(path.read_bytes(), name, path.stem == "__init__")
        return self._modules[name]

    def _file(self, name: str) -> Path | None:
        """The source of a module of this package, or of one that is imported and registers components."""
        top, *rest = name.split(".")
        if top == "rmsweep":
            return _existing(self._package.joinpath(*rest))
        if top not in component_packages():
            return None
        file = getattr(sys.modules.get(name), "__file__", None)
        return Path(file) if file and Path(file).suffix == ".py" and Path(file).is_file() else None


def component_packages() -> set[str]:
    """Top-level packages of the components registered so far: the code that is followed."""
    return {cls.__module__.partition(".")[0] for cls in component._REGISTRY.values()}


@functools.cache
def own() -> Code:
    """The code of this installation."""
    return Code()


def _existing(path: Path) -> Path | None:
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:DIGITS]


# -- parsing -----------------------------------------------------------------------------------------------


def _parsed(source: bytes, name: str, is_package: bool) -> _Module:
    module = _Module(texts={LOOSE: []}, uses={LOOSE: set()})
    for statement in ast.parse(source).body:
        for node in _live(statement):
            for names in _bound(node, name if is_package else name.rpartition(".")[0]):
                module.imports.update(names)
        if isinstance(statement, ast.Import | ast.ImportFrom) or _is_inert(statement) or _is_for_types(statement):
            continue
        writer = _Writer()
        writer.write(statement)
        for defined in _defined(statement) or [LOOSE]:
            module.texts.setdefault(defined, []).append("".join(writer.out))
            module.uses.setdefault(defined, set()).update(writer.uses)
    return module


def _live(statement: ast.stmt) -> Iterator[ast.AST]:
    """All nodes of a statement; nothing of `if TYPE_CHECKING:`."""
    return iter(()) if _is_for_types(statement) else ast.walk(statement)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"


def _is_inert(node: ast.stmt) -> bool:
    """Docstrings, `pass` and `...`."""
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _bound(node: ast.AST, package: str) -> Iterator[dict[str, tuple[str, str | None]]]:
    """What an import statement binds; `package` is where relative ones start."""
    if isinstance(node, ast.Import):
        for a in node.names:
            yield (
                {a.asname: (a.name, None)} if a.asname else {a.name.partition(".")[0]: (a.name.partition(".")[0], None)}
            )
    elif isinstance(node, ast.ImportFrom):
        base = package.rsplit(".", node.level - 1)[0] if node.level else ""
        where = ".".join(filter(None, (base, node.module)))
        for a in node.names:
            yield {a.asname or a.name: (where, a.name)}


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines; none where it does something else as well."""
    if isinstance(node, Functions | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [n.id for n in names if isinstance(n, ast.Name)] if all(isinstance(n, ast.Name) for n in names) else []


class _Writer:
    """A statement as text that is equal for equal meaning, on every Python from 3.10; and what it names.

    Left out: positions, docstrings, imports (what a name stands for is written beside the text), annotations other
    than those of a class's fields, and empty fields, which differ between Pythons.
    """

    def __init__(self) -> None:
        self.out: list[str] = []
        self.uses: set[tuple[str, str | None]] = set()

    def write(self, node: ast.AST, in_class: bool = False) -> None:
        """Append the text of a node; in_class: it stands directly in a class."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            self.uses.add((node.value.id, node.attr))
            self.out.append(f"({node.value.id}.{node.attr})")
            return
        if isinstance(node, ast.Name):
            self.uses.add((node.id, None))
        self.out.append(f"({type(node).__name__}")
        for name, value in ast.iter_fields(node):
            if name in UNWRITTEN or value is None or value == []:
                continue
            if name in ("returns", "annotation") and not in_class:
                self._aside(value)
            elif name == "value" and isinstance(node, ast.Constant):
                self.out.append(f" {type(value).__name__}:{value!r}")
            elif name == "values" and isinstance(node, ast.JoinedStr):
                self._field(name, _joined(value), False)
            else:
                self._field(name, value, isinstance(node, ast.ClassDef) and name == "body")
        if isinstance(node, ast.Constant) and node.value is None:
            self.out.append(" None")
        self.out.append(")")

    def _field(self, name: str, value: Any, in_class: bool) -> None:
        self.out.append(f" {name}=")
        if isinstance(value, ast.AST):
            self.write(value)
        elif isinstance(value, list):
            self.out.append("[")
            for item in value:
                self._item(item, in_class)
            self.out.append("]")
        else:
            self.out.append(repr(value))

    def _item(self, item: Any, in_class: bool) -> None:
        if not isinstance(item, ast.AST):
            self.out.append(repr(item))
        elif not isinstance(item, ast.Import | ast.ImportFrom) and not (isinstance(item, ast.stmt) and _is_inert(item)):
            self.write(item, in_class and isinstance(item, ast.AnnAssign))

    def _aside(self, node: ast.AST) -> None:
        """Note what an annotation names; its text does not matter."""
        aside = _Writer()
        aside.write(node)
        self.uses |= aside.uses


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, neighbouring texts as one: Pythons split them differently."""
    merged: list[ast.expr] = []
    for value in values:
        last = merged[-1] if merged else None
        if isinstance(value, ast.Constant) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(value=str(last.value) + str(value.value))
        elif not (isinstance(value, ast.Constant) and value.value == ""):
            merged.append(value)
    return merged
