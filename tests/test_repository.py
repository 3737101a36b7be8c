"""The checkout itself: style, types, README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tool(*command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_check():
    """Lint rules of pyproject.toml."""
    tool("ruff", "check", "rmsweep", "tests", "scripts")


def test_ruff_format():
    """One formatting."""
    tool("ruff", "format", "--check", "rmsweep", "tests", "scripts")


def test_mypy():
    """Types of the whole package."""
    tool("mypy")


def test_readme_tree_is_the_disk():
    """A tree nobody checks rots."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_tree.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_readme_names_only_what_exists():
    """Every `rmsweep VERB` and every group=option of the README is real."""
    from rmsweep.cli.verbs import VERBS
    from rmsweep.presets import Presets

    text, presets = (ROOT / "README.md").read_text(), Presets()
    for verb in re.findall(r"^\s*(?:\.venv/bin/)?rmsweep ([a-z]+)", text, flags=re.M):
        assert verb in VERBS, verb
    for group, values in re.findall(r"\b([a-z_]+)=([a-z0-9_,/]+)", text):
        if group in presets.groups:
            for option in values.strip(",").split(","):
                assert option in presets.options(group), f"{group}={option}"


@pytest.mark.parametrize("folder", ["rmsweep", "conf", "scripts", "tests"])
def test_no_field_terms_to_avoid(folder):
    """Names are the field's: no query, completion, oracle, siamese (design glossary)."""
    for path in (ROOT / folder).rglob("*"):
        if path.suffix not in {".py", ".yaml"} or path == Path(__file__).resolve():
            continue
        words = set(re.findall(r"\b(?:oracle|siamese|consider_first_n)\b", path.read_text(), flags=re.I))
        assert not words, f"{path}: {words}"


def test_every_test_module_says_what_it_is_for():
    """Tests are read: each file begins with a docstring."""
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.read_text().startswith('"""'), path.name
