"""The checkout itself: style, types, README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH = (
    "_decomp", "_dynamo", "_export", "_functorch", "_guards", "_higher_order_ops", "_inductor", "_library", "_numpy",
    "_prims", "_refs", "_subclasses", "_weights_only_unpickler", "ao", "compiler", "cuda.graphs", "distributed",
    "distributions", "export", "func", "fx", "jit", "masked", "mtia", "multiprocessing", "nested", "onnx", "package",
    "profiler", "quantization", "sparse", "testing", "utils.data", "utils.tensorboard", "xpu",
)  # fmt: skip
AFAR = ("transformers", "rich", "httpx2", "httpcore2", "anyio", "truststore", "idna", *(f"torch.{m}" for m in TORCH))


def tool(*command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_check():
    """Lint rules of pyproject.toml."""
    tool("ruff", "check", "rmsweep", "tests", "scripts")


def test_ruff_format():
    """One formatting."""
    tool("ruff", "format", "--check", "rmsweep", "tests", "scripts")


def test_mypy(tmp_path):
    """Types of the whole package by the rules of pyproject.toml, without reading what is AFAR: half the time.

    No type in the package depends on that (`mypy --any-exprs-report` counts the same), but for calls of transformers.
    """
    rules = (ROOT / "pyproject.toml").read_text().partition("[tool.mypy]")
    skipped = f"\n[[tool.mypy.overrides]]\nmodule = {[f'{name}.*' for name in AFAR]}\nfollow_imports = 'skip'\n"
    (tmp_path / "pyproject.toml").write_text("".join(rules[1:]) + skipped)
    tool("mypy", "--config-file", str(tmp_path / "pyproject.toml"), "--cache-dir", ".mypy_cache/near")


@pytest.mark.slow
def test_mypy_with_all_libraries():
    """The same with every library read: calls of transformers too."""
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
