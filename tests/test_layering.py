"""Imports go downwards only, and heavy libraries are imported only where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rmsweep"
LAYERS = [  # a module may import from its own layer (see SIDEWAYS) and from those above it in this list
    {
        "errors",
        "text",
        "paths",
        "problems",
        "crash",
        "rng",
        "fingerprint",
        "hardware",
        "memory",
        "causes",
        "size",
        "versions",
    },
    {"component", "bank", "schemas", "atomic", "plugins"},
    {"preferences", "presets", "parts", "journals", "store", "source", "provenance", "claims"},
    {"datasets", "candidates", "pairings", "annotators", "protocols", "objectives", "llms", "embedders", "metrics"},
    {"reward_models"},
    {"cell", "engines"},
    {"skips"},
    {"stages", "grid"},
    {"pipeline", "plan", "planner", "units"},
    {"runner", "results", "progress", "slots"},
    {"schedule", "diary", "fleet", "rounds", "intake", "todo"},
    {"status", "execute", "cost_model", "verify", "recompute", "collect", "why", "history", "cluster"},
    {"notebook"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
METHODS = LAYERS[3] | {"reward_models"}
ONLY_IN = {  # library -> packages, or single modules of them
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "torch": {"objectives", "reward_models", "runner", "embedders/transformer"},
    "transformers": {"embedders/transformer"},
    "huggingface_hub": {"embedders/_model_files", "datasets/_fetch"},
    "lightgbm": {"reward_models"},
    "sklearn": {"reward_models", "embedders", "metrics"},
    "duckdb": {"results"},
    "pickle": set(),
    "subprocess": {"hardware", "engines"},
    "submitit": {"engines"},
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """(top-level name of the library, or sub-module of rmsweep) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
            if node.module == "rmsweep":
                names = [f"rmsweep.{alias.name}" for alias in node.names]
        yield from names


def part(path):
    relative = path.relative_to(PACKAGE).with_suffix("").parts
    return relative[0]


def module(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    """Catches a cycle in the making, a stage that knows the store, a method that knows another's file."""
    here = part(path)
    if here in ("__init__", "__main__"):
        return
    assert here in LEVEL, f"{here} has no layer: add it to LAYERS in {__file__}"
    for name in imports(path):
        if not name.startswith("rmsweep."):
            continue
        _, target, *rest = name.split(".")
        assert target in LEVEL, f"{path.name} imports {name}, which has no layer"
        assert LEVEL[target] <= LEVEL[here], f"{path.name} ({here}) imports {name}: upwards"
        if here in METHODS and target in METHODS and target != here:
            assert not rest, f"{path.name} imports {name}: method packages share Protocols only"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_where_they_belong(path):
    """Catches torch in the driver, Hydra outside the command line, pickle anywhere."""
    for name in imports(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or {part(path), module(path)} & allowed, (
            f"{path.name} imports {name}; allowed in {allowed or 'no file'}"
        )


def test_no_call_executes_data():
    """No eval, exec, yaml.load without our loader, torch.load, allow_pickle=True anywhere in the package."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load"}, path
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called != "yaml.load" or keywords.get("Loader") == "_Loader", path
            assert keywords.get("allow_pickle", "False") == "False", path
