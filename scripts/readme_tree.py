"""Write the file tree of README.md from the first docstring line of every file; `--check` only compares."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- tree -->\n```\n", "\n```\n<!-- /tree -->"
WIDTH = 34


def first_line(path: Path) -> str:
    """What a file is for: the first line of its docstring or first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].rstrip(".")
    comments = [line for line in text.split("\n") if line.startswith("#") and not line.startswith("#!")]
    return comments[0].strip("# ").rstrip(".") if comments else ""


def options(folder: Path) -> str:
    """The options of a config group."""
    names = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    return ", ".join(names)


def lines() -> list[str]:
    """The tree, one line per file, config groups with their options."""
    rows = [("conf/", "Hydra groups, data only")]
    rows.append(("  config.yaml", first_line(ROOT / "conf" / "config.yaml")))
    for group in sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir()):
        rows.append((f"  {group.name}/", options(group)))
    for folder in ("docs", "rmsweep", "scripts", "tests"):
        rows += walk(ROOT / folder, 0)
    rows.append((".ci/run", first_line(ROOT / ".ci" / "run")))
    return [f"{name:<{WIDTH}}{text}".rstrip() for name, text in rows]


def walk(folder: Path, depth: int) -> list[tuple[str, str]]:
    """Rows of a package: its own line first, then files, then sub-packages."""
    pad, init = "  " * depth, folder / "__init__.py"
    rows = [(f"{pad}{folder.name}/", first_line(init) if init.exists() else "")]
    files = sorted(p for p in folder.glob("*.*") if p.suffix in (".py", ".md") and p.name != "__init__.py")
    rows += [(f"{pad}  {p.name}", first_line(p)) for p in files]
    packages = sorted(p for p in folder.iterdir() if p.is_dir() and list(p.glob("*.py")))
    return rows + [row for p in packages for row in walk(p, depth + 1)]


def main() -> int:
    """Rewrite README.md, or say that it is stale."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    fresh = f"{before}{START}" + "\n".join(lines()) + f"{END}{after}"
    if "--check" in sys.argv:
        if fresh != text:
            print("README.md's tree is stale: run python scripts/readme_tree.py")
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
