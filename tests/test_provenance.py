"""Keys and code digests: what must change them and what must not, and that code and declared versions move together."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PRESETS, cell_config, make_spec, random_bank
from fake_pipeline import fake_plan, fake_run

from rmsweep import cell, component, plan, planner, provenance, source, versions
from rmsweep.cell import KEY, build_cell, cell_parts
from rmsweep.cli import compose
from rmsweep.errors import ConfigError
from rmsweep.fingerprint import digest, joined
from rmsweep.grid import describe
from rmsweep.presets import Presets
from rmsweep.reward_models import Compute
from rmsweep.source import PACKAGE, Code
from rmsweep.store import Store

ROOT = Path(__file__).resolve().parents[1]
KEYS = json.loads((ROOT / "tests" / "golden" / "keys.json").read_text(encoding="utf-8"))
GOLDEN_CODE = ROOT / "tests" / "golden" / "code.json"
STAGES = tuple(provenance.ROOTS)
RUNNING = {"store", "parts", "plan", "grid", "runner", "execute", "schedule", "engines", "results", "cli", "status"}


@pytest.fixture(scope="module")
def pin_code():
    spec = importlib.util.spec_from_file_location("pin_code", ROOT / "scripts" / "pin_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- keys --------------------------------------------------------------------------------------------------


def components_of(identity):
    """(group, node) of every component in an identity."""
    for name, node in identity.items():
        if isinstance(node, dict) and name in component.PACKAGES:
            yield name, node
        if isinstance(node, dict):
            yield from components_of(node)


@pytest.mark.parametrize("name", KEYS["cells"])
def test_keys_are_those_of_the_golden_file(name, monkeypatch):
    """Catches a change of the key algorithm, which would orphan every stored result.

    The file is never written anew: where this fails, the algorithm is to be mended, or all results are given up.
    Versions are those of the file, so raising one is not in the way.
    """
    row = KEYS["cells"][name]
    for stage, version in KEYS["stages"].items():
        monkeypatch.setitem(versions.STAGES, stage, version)
    for group, node in components_of(row["identity"]):
        monkeypatch.setattr(component.get(group, node["kind"]), "version", node["version"])
    spec, compute, strict = build_cell(row["config"]), Compute(*row["compute"]), row.get("strict", {})
    assert json.loads(joined(cell_parts(spec, row["inputs"]))) == row["identity"]
    found = cell.cell_id(spec, row["inputs"])
    assert (found, cell.fingerprint(found, compute, strict)) == (row["cell_id"], row["fingerprint"])
    bank_strict = {**strict, "code": strict["code"]["generate"]} if strict else {}
    assert cell.bank_id(spec, row["inputs"], bank_strict) == row["bank_id"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Plans one cell on a bank of the user's own in tmp_path/bank, by command-line words."""
    monkeypatch.chdir(tmp_path)
    random_bank(np.random.default_rng(0), p=30, n=6, q=5, m=7, d=4).write(tmp_path / "bank")

    def plan_of(*words, path=tmp_path / "bank", presets=PRESETS, compute=Compute(), **options):  # noqa: B008
        given = ["dataset=folder", "base_llm=table", f"dataset.path='{path}'", "n_annotations=20"]
        keys = {word.partition("=")[0] for word in words}
        request = compose.read([*(w for w in given if w.partition("=")[0] not in keys), *words], presets)
        (planned,) = planner.make(request.sweep, presets, compute=compute, **options).cells
        return planned

    plan_of.folder = tmp_path
    return plan_of


CHANGES = {
    "parameter": lambda world, patch: world("reward_model.hidden=[8]"),
    "seed": lambda world, patch: world("seed=1"),
    "beta": lambda world, patch: world("beta=3"),
    "evaluation": lambda world, patch: world("evaluate.n_noisy_pairs=7"),
    "component": lambda world, patch: world("reward_model=bt_linear"),
    "a byte of the data": lambda world, patch: (flip(world.folder / "bank" / "golden_train.npy"), world())[1],
    "device": lambda world, patch: world(compute=Compute("cuda", "fp32")),
    "precision": lambda world, patch: world(compute=Compute("cpu", "bf16")),
    "stage version": lambda world, patch: (patch.setitem(versions.STAGES, "train", 99), world())[1],
    "component version": lambda world, patch: (patch.setattr(type(make_spec().annotator), "version", 99), world())[1],
    "nested component version": lambda world, patch: (
        patch.setattr(type(make_spec().reward_model.objective), "version", 99), world())[1],
}  # fmt: skip


def flip(path):
    """Change the last bit of a golden reward's mantissa."""
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", CHANGES)
def test_what_can_change_numbers_changes_the_fingerprint(change, world, monkeypatch):
    """Catches a stale result served for another config, input, version, device or precision."""
    before = world()
    assert CHANGES[change](world, monkeypatch).fingerprint != before.fingerprint


def reordered(value):
    return {k: reordered(value[k]) for k in reversed(value)} if isinstance(value, dict) else value


def own_option(world):
    """The option bt_mlp written otherwise: comments, blank lines, other order of keys."""
    text = "# mine\n\nobjective: bradley_terry   # as shipped\nkind: mlp\n"
    (world.folder / "conf" / "reward_model").mkdir(parents=True)
    (world.folder / "conf" / "reward_model" / "mine.yaml").write_text(text)
    return world("reward_model=mine", presets=Presets([world.folder / "conf"]))


def moved(world, patch):
    (world.folder / "other").mkdir()
    (world.folder / "bank").rename(world.folder / "other" / "place")
    patch.chdir(world.folder / "other")
    return world(path="place")


SAME = {
    "path and working directory": moved,
    "comments and order in YAML": lambda world, patch: own_option(world),
    "workers, root, name": lambda world, patch: world("engine.workers=7", "root=elsewhere", "sweep.name=other"),
    "keep": lambda world, patch: world(keep="scores"),
    "defaults spelled out": lambda world, patch: world(
        "pairs_per_prompt=1", "protocol.patience=2", "reward_model.objective=bradley_terry"),
    "1 and 1.0": lambda world, patch: world("beta=1"),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME)
def test_what_cannot_change_numbers_leaves_the_keys(change, world, monkeypatch):
    """Catches finished work thrown away for a path, a comment, a worker count or a spelling."""
    before, after = world(), SAME[change](world, monkeypatch)
    assert (after.cell_id, after.fingerprint, after.bank_id) == (before.cell_id, before.fingerprint, before.bank_id)


def test_the_order_of_keys_does_not_matter():
    """Catches a hash of the config as it happens to be written."""
    config = cell_config(size="tiny", error_rate={"value": 0.2, "reference": "this_design"})
    assert list(reordered(config)) != list(config)
    assert cell.cell_id(build_cell(reordered(config)), {}) == cell.cell_id(build_cell(config), {})


# -- strict ------------------------------------------------------------------------------------------------


def test_strict_adds_code_and_libraries_to_the_keys(world, monkeypatch):
    """Catches --reuse=strict that serves results of another library or code, or that moves cell_id."""
    plain, strict = world(), world(reuse="strict")
    assert strict.cell_id == plain.cell_id and strict.fingerprint != plain.fingerprint
    assert strict.bank_id != plain.bank_id and strict.code == plain.code
    monkeypatch.setitem(provenance.installed(), "numpy", "0.0.1")
    assert world(reuse="strict").fingerprint != strict.fingerprint
    assert world(reuse="strict").bank_id != strict.bank_id
    assert (world().fingerprint, world().bank_id) == (plain.fingerprint, plain.bank_id)
    monkeypatch.undo()
    other = dict.fromkeys(provenance.ROOTS, "0" * 16)
    monkeypatch.setattr(provenance, "code_of", lambda spec: other)
    assert world(reuse="strict").fingerprint != strict.fingerprint
    assert (world().fingerprint, world().bank_id) == (plain.fingerprint, plain.bank_id)


def test_strict_libraries(monkeypatch):
    """Catches a patch release of Python, or our own version beside the digests of our code, that count."""
    monkeypatch.setattr(provenance, "installed", lambda: {"python": "3.12.7", "rmsweep": "9", "numpy": "2.1.0"})
    assert provenance.strict_libraries() == {"python": "3.12", "numpy": "2.1.0"}


def test_what_a_plan_reuses_is_kept_and_replaced(tmp_path):
    """Catches a sweep whose second run falls back to stale results, or cannot go back; cells must not double."""
    sweep = describe({"name": "s", "set": {"size": "tiny"}, "axes": {"seed": [0, 1]}})
    make = {reuse: planner.make(sweep, PRESETS, reuse=reuse) for reuse in provenance.REUSE}
    keys = {reuse: [c.fingerprint for c in made.cells] for reuse, made in make.items()}
    for reuse in ("versions", "strict", "versions"):
        make[reuse].write(tmp_path)
        back = plan.Plan.read(tmp_path)
        assert plan.pinned_reuse(tmp_path) == back.reuse == reuse
        assert [c.fingerprint for c in back.cells] == keys[reuse]
    with pytest.raises(ConfigError, match="reuse=all: allowed are versions, strict"):
        planner.make(sweep, PRESETS, reuse="all")


def test_a_plan_of_before_there_was_a_choice(tmp_path):
    """Catches plans of older versions that can no longer be read or lose their results."""
    import pyarrow.parquet as pq

    made = planner.make(describe({"name": "s", "set": {"size": "tiny"}}), PRESETS)
    made.write(tmp_path)
    header = json.loads((tmp_path / "plan.json").read_text())
    for later in ("reuse", "table", "digest"):
        del header[later]
    header["format"] = plan.OLD_FORMAT
    (tmp_path / "plan.json").write_text(json.dumps(header))
    table = pq.read_table(tmp_path / "plan.parquet")
    later = [name for name in table.column_names if name == "code" or name.startswith("identity.")]
    pq.write_table(table.drop_columns(later), tmp_path / "plan.parquet")
    old = plan.Plan.read(tmp_path)
    assert old.reuse == "versions" and old.cells == [c._replace(identity=None, code=None) for c in made.cells]
    made.write(tmp_path)
    assert plan.Plan.read(tmp_path).cells == made.cells


# -- what is recorded --------------------------------------------------------------------------------------


def test_every_cost_row_says_what_computed_it(tmp_path):
    """Catches provenance that is lost on the way through plan, worker and store, or that is not what the keys hash."""
    made = fake_plan(2)
    fake_run(made, tmp_path)
    (planned, _), keys = made.cells, [c.fingerprint for c in made.cells]
    rows = {row["fingerprint"]: row for row in Store(tmp_path).costs(keys).to_pylist()}
    row = rows[planned.fingerprint]
    identity = json.loads(row["identity"])
    key = identity.pop(KEY)
    assert digest(identity) == planned.cell_id and digest({"cell": planned.cell_id, **key}) == planned.fingerprint
    assert json.loads(row["code"]) == provenance.code_of(build_cell(planned.config))
    assert json.loads(row["versions"]) == provenance.installed()


# -- code --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, to be edited."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "rmsweep", ignore=shutil.ignore_patterns("__pycache__")))


def replace(tree, file, old, new):
    path = tree / file
    text = path.read_text()
    assert text.count(old) >= 1, f"{file} has changed: this test no longer edits anything"
    path.write_text(text.replace(old, new, 1))


def all_digests(code):
    """Stage -> digest, for cells of several reward models."""
    models = ("bt_mlp", "clf_lgb", "bt_linear")
    return {(m, s): d for m in models for s, d in provenance.code_of(make_spec(reward_model=m), code).items()}


MLP, LGB, LINEAR = (("bt_mlp", "train"), ("clf_lgb", "train"), ("bt_linear", "train"))
EVALUATE = {(m, "evaluate") for m in ("bt_mlp", "clf_lgb", "bt_linear")}
EDITS = [
    ("metrics/ties.py", "def average_ranks(", "LIMIT = 3\n\n\ndef average_ranks(", set()),
    ("metrics/tilt.py", "check_finite(", "print(), check_finite(", EVALUATE),
    ("objectives/bradley_terry.py", "return ", "return 1 * ", {MLP, LINEAR}),  # a component of a component
    ("reward_models/lgb.py", "DEFAULT_ROUNDS = ", "DEFAULT_ROUNDS = 1 + ", {LGB}),
    ("reward_models/_binning.py", "SAMPLE_ROWS = ", "SAMPLE_ROWS = 1 + ", {LGB}),
    ("reward_models/_convert.py", "ROWS = ", "ROWS = 1 + ", {MLP, LGB, LINEAR}),
    ("reward_models/_training.py", "SCORED_ROWS = ", "SCORED_ROWS = 1 + ", {MLP}),
    ("reward_models/_stack.py", "SCORED_ROWS = ", "SCORED_ROWS = 1 + ", {MLP}),
    ("stages/annotate.py", "import brentq", "import ridder as brentq",
     {(m, "annotate") for m in ("bt_mlp", "clf_lgb", "bt_linear")}),
    ("rng.py", "return np.", "return 1 * np.", {(m, s) for m in ("bt_mlp", "clf_lgb", "bt_linear") for s in STAGES}),
    ("candidates/similar.py", "return ", "return 1 * ", set()),  # not in these cells
    ("metrics/ties.py", "def average_ranks(", "print()\n\n\ndef average_ranks(", EVALUATE),
    ("rng.py", "def streams(seed: int)", "def streams(seed: float)", set()),
    ("errors.py", "def unknown(", "def unknown(_=0, *, ", set()),
    ("component.py", "def register(", "def register(_=0, *, ", set()),
    ("versions.py", "STAGES = ", "STAGES = 0 or ", set()),
    ("runner.py", "def run_unit(", "def run_unit_(", set()),
    ("cell.py", "def cell_id(", "def cell_id_(", set()),
    ("__init__.py", "0.1", "0.2", set()),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "changed"), EDITS, ids=[f"{e[0]}: {e[1]}" for e in EDITS])
def test_an_edit_changes_the_digests_of_the_cells_that_run_it(file, old, new, changed, tree):
    """Catches a stale result after an edit of a helper's helper, and all results gone after any edit anywhere."""
    before = all_digests(Code(tree))
    replace(tree, file, old, new)
    after = all_digests(Code(tree))
    assert {name for name in before if before[name] != after[name]} == changed


def without_comments(text):
    return ast.unparse(ast.parse(text))


def without_docstrings(text):
    module = ast.parse(text)
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(module)


def imports_reversed(text):
    module = ast.parse(text)
    first = [n for n in module.body if isinstance(n, ast.Import | ast.ImportFrom) and "future" not in ast.unparse(n)]
    rest = [n for n in module.body if n not in first]
    at = next((i for i, n in enumerate(rest) if not isinstance(n, ast.Expr | ast.ImportFrom)), len(rest))
    module.body = [*rest[:at], *reversed(first), *rest[at:]]
    return ast.unparse(module)


def more_text(text):
    return f"# another comment\n{text}\n\ndef not_called(x):\n    return x\n"


@pytest.mark.parametrize("edit", [without_comments, without_docstrings, imports_reversed, more_text])
def test_what_code_looks_like_does_not_matter(edit, tree):
    """Catches results thrown away for a comment, a docstring, a formatter or a new function nobody calls."""
    before = all_digests(Code(tree))
    files = sorted(tree.rglob("*.py"))
    for path in files:
        path.write_text(edit(path.read_text()))
    assert all_digests(Code(tree)) == before


def test_texts_are_equal_on_every_python():
    """Catches digests that hang on how a Python splits f-strings or on fields that it alone has."""
    text, hole = ast.Constant, ast.FormattedValue(value=ast.Name(id="x"), conversion=-1)
    split = ast.JoinedStr(values=[text(value="a"), text(value=""), text(value="b"), hole, text(value="")])
    whole = ast.JoinedStr(values=[text(value="ab"), hole])
    new = ast.FunctionDef(name="f", args=[], body=[ast.Return(value=split)], decorator_list=[], type_params=[])
    old = ast.FunctionDef(name="f", args=[], body=[ast.Return(value=whole)], decorator_list=[], returns=None)
    texts = []
    for node in (new, old):
        writer = source._Writer()
        writer.write(node)
        texts.append(writer.out)
    assert "".join(texts[0]) == "".join(texts[1])


def test_where_the_package_lies_does_not_matter(tree):
    """Catches paths in a digest: the same code in another checkout must reuse results."""
    assert all_digests(Code(tree)) == all_digests(Code())


def test_no_running_code_is_in_a_digest():
    """Catches results that hang on the store, the engines or the command line, which cannot change numbers."""
    code = Code()
    roots = {r for roots in provenance.ROOTS.values() for r in roots if not r.endswith("!")}
    for model in ("bt_mlp", "clf_lgb", "bt_linear", "surface", "clf_sklearn"):
        roots |= set(provenance.roots(make_spec(reward_model=model).reward_model))
    modules = {d.module.removeprefix("rmsweep.").partition(".")[0] for root in roots for d in code.closure(root)}
    assert not modules & RUNNING and {"bank", "stages", "metrics", "rng", "protocols"} <= modules


def test_digests_are_quick_and_need_no_torch():
    """Catches a `rmsweep plan` that waits for torch or for seconds of parsing."""
    start = time.process_time()
    all_digests(Code())
    assert time.process_time() - start < 1.5
    program = (
        "import sys; from rmsweep import provenance; from rmsweep.source import Code; c = Code();"
        "[c.digest(r) for r in provenance.ROOTS.values()]; c.digest(['rmsweep.reward_models.mlp:MLP']);"
        "provenance.versions(); print([m for m in ('torch', 'lightgbm', 'sklearn', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_a_plugin_is_followed(tmp_path, monkeypatch):
    """Catches plug-ins whose code is not recorded: a change of what they call in their file must show."""
    from rmsweep import plugins

    monkeypatch.setattr(component, "_REGISTRY", dict(component._REGISTRY))
    text = (
        "from dataclasses import dataclass\nfrom rmsweep.component import component\n\n"
        "def helper(x):\n    return x\n\n@component('annotator', 'mine')\n@dataclass(frozen=True)\nclass Mine:\n"
        "    def probability(self, difference, beta):\n        return helper(difference)\n"
    )
    found = []
    for body in (text, text.replace("return x", "return 2 * x"), f"# again\n{text}"):
        (tmp_path / "mine.py").write_text(body)
        monkeypatch.setattr(component, "_REGISTRY", {k: v for k, v in component._REGISTRY.items() if "mine" not in k})
        plugins.load(tmp_path / "mine.py")
        thing = component.build("annotator", "mine")
        closure = Code().closure(next(provenance.roots(thing)))
        assert {d.name for d in closure} >= {"helper", "Mine"}
        found.append(Code().digest(provenance.roots(thing)))
    assert len(set(found)) == 3  # the whole file is in the identity besides, comments too


# -- versions and code move together -----------------------------------------------------------------------


def test_code_and_versions_move_together(pin_code):
    """Catches code that changed under the same version, whose stored results would be served although stale."""
    pinned, now = json.loads(GOLDEN_CODE.read_text(encoding="utf-8")), pin_code.current()
    bad = [pin_code.refusal(name, pinned[name], now[name]) for name in sorted(pin_code.changed(pinned, now))]
    assert not bad, "\n" + "\n".join(bad)
    plain = {name: {k: pin[k] for k in ("version", "code")} for name, pin in pinned.items()}
    assert plain == now, "tests/golden/code.json is out of date: run `python scripts/pin_code.py` and commit it"


def test_pins(pin_code, tree):
    """Catches a pin that is written without a raised version or a reason, a lost reason, a version that goes back."""
    before = pin_code.current(Code(tree))
    replace(tree, "reward_models/lgb.py", "DEFAULT_ROUNDS = ", "DEFAULT_ROUNDS = 1 + ")
    replace(tree, "stages/annotate.py", "MAX_REFERENCE_PAIRS = ", "MAX_REFERENCE_PAIRS = 1 + ")
    after = pin_code.current(Code(tree))
    assert sorted(pin_code.changed(before, after)) == ["reward_model lgb", "stage annotate"]
    with pytest.raises(
        SystemExit, match=r"raise version= of @component in reward_model lgb(.|\n)*STAGES\['annotate'\]"
    ):
        pin_code.updated(before, after, None)
    reasoned = pin_code.updated(before, after, "a sum")
    assert reasoned["stage annotate"] == {**after["stage annotate"], "same_numbers": ["a sum"]}
    assert pin_code.updated(reasoned, after, None) == reasoned  # kept while the version stands
    raised = {**after, "stage annotate": {**after["stage annotate"], "version": 99}}
    assert pin_code.updated(reasoned, raised, None)["stage annotate"] == raised["stage annotate"]
    assert "same_numbers" in pin_code.updated(reasoned, raised, None)["reward_model lgb"]
    with pytest.raises(SystemExit, match="versions only rise"):
        pin_code.updated(raised, after, "why not")
