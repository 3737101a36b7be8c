"""rmsweep plan --why: the part of an identity that makes a cell new is named, with the stored and the planned value."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import PRESETS, random_bank
from fake_pipeline import fake_run

from rmsweep import provenance, versions, why
from rmsweep.cli.verbs import call
from rmsweep.errors import ConfigError, DataError
from rmsweep.grid import describe
from rmsweep.planner import make
from rmsweep.reward_models import Compute
from rmsweep.store import Store

BASE = {"size": "tiny", "reward_model": "bt_linear"}


def plan_of(axes=None, *, compute=Compute(), reuse="versions", need_data=True, **changes):  # noqa: B008
    sweep = describe({"name": "s", "set": {**BASE, **changes}, "axes": axes or {"seed": [0]}})
    return make(sweep, PRESETS, compute=compute, reuse=reuse, need_data=need_data)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Four cells in a store."""
    root = tmp_path_factory.mktemp("root")
    fake_run(plan_of({"seed": [0, 1], "beta": [1, 3]}), root)
    return root


def only(plan):
    (cell,) = plan.cells
    return cell.cell_id


def test_a_stored_cell(stored):
    """Catches a stored cell called new; the beginning of its id is enough."""
    cell = only(plan_of())
    text = why.explain(plan_of(), stored, cell[:8])
    assert text == f"cell {cell}: stored, done\n  libraries: as today\n  code: as today"


def test_a_stored_cell_of_other_code_and_libraries(stored, monkeypatch):
    """Catches a result of an older numpy or of older code that is said to be of today's."""
    now = json.dumps({**provenance.installed(), "numpy": "9.9.9"})
    monkeypatch.setattr(provenance, "versions", lambda: now)
    plan = plan_of()
    code = {**json.loads(plan.cells[0].code), "train": "f" * 16}
    plan.cells[0] = plan.cells[0]._replace(code=json.dumps(code))
    text = why.explain(plan, stored, only(plan))
    assert re.search(r"libraries: other than today's: numpy \S+ -> 9\.9\.9\n", text)
    assert re.search(r"code: other than today's: train [0-9a-f]{16} -> f{16}$", text)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"seed": 7}, [r"seed: 1 -> 7"]),
        ({"beta": 2.0}, [r"beta: (default \(1\.0\)|3\.0) -> 2\.0"]),
        ({"pairs_per_prompt": 2}, [r"pairs_per_prompt: default \(1\) -> 2"]),
        ({"evaluate.n_noisy_pairs": 5}, [r"evaluate\.n_noisy_pairs: default \(20000\) -> 5"]),
        ({"dataset.seed": 9}, [r"dataset\.seed: 1 -> 9"]),
        ({"size.P": 300}, [r"bank\.size\.P: 500 -> 300"]),
        ({"reward_model.l2": 0.5, "seed": 1}, [r"reward_model\.l2: default \(.+\) -> 0\.5"]),
        ({"reward_model": "clf_lgb"}, [r"reward_model\.kind: linear -> lgb"]),
        ({"candidates": "similar", "seed": 5}, [r"candidates\.kind: random -> similar", r"seed: 1 -> 5"]),
        ({"error_rate.value": 0.2}, [r"error_rate\.value: absent -> 0\.2"]),
    ],
    ids=str,
)
def test_what_changed(changes, lines, stored):
    """Catches a wrong, missing or superfluous part, and a neighbour that is not the nearest."""
    plan = plan_of({"seed": [changes.get("seed", 0)]}, **{k: v for k, v in changes.items() if k != "seed"})
    head, *found = why.explain(plan, stored, only(plan)).split("\n")
    assert re.fullmatch(rf"cell {only(plan)}: new; the nearest stored result is of cell \w+ \(done\), which .*", head)
    assert len(found) == len(lines)
    for line, pattern in zip(found, lines, strict=True):
        assert re.fullmatch(f"  {pattern}", line.replace("seed: default (0)", "seed: 1")), line


def test_the_same_cell_under_another_fingerprint(stored, monkeypatch):
    """Catches a stage version, device or precision that changed and is not named, or another cell named instead."""
    text = why.explain(plan_of(compute=Compute("cuda", "bf16")), stored, only(plan_of()))
    assert "is of this cell (done)" in text
    assert text.split("\n")[1:] == ["  device: cpu -> cuda", "  precision: fp32 -> bf16"]
    monkeypatch.setitem(versions.STAGES, "train", 99)
    text = why.explain(plan_of(), stored, only(plan_of()))
    assert text.split("\n")[1:] == ["  versions.train: 1 -> 99 (the version of stage train was raised)"]


def test_a_component_version(stored, monkeypatch):
    """Catches a raised version of a component that is not named."""
    from rmsweep.pairings.same_prompt import SamePrompt

    monkeypatch.setattr(SamePrompt, "version", 99)
    assert "  pairing.version: 1 -> 99 (the version of this pairing was raised)" in why.explain(
        plan_of(), stored, only(plan_of())
    )


def test_a_file_that_changed(tmp_path):
    """Catches data that changed and are not named; digests are cut short."""
    random_bank(np.random.default_rng(0), p=30, n=6, q=5, m=7, d=4).write(tmp_path / "bank")
    changes = {"dataset": "folder", "base_llm": "table", "dataset.path": str(tmp_path / "bank"), "n_annotations": 20}
    fake_run(plan_of(**changes), tmp_path)
    other = random_bank(np.random.default_rng(1), p=30, n=6, q=5, m=7, d=4)
    np.save(tmp_path / "bank" / "golden_train.npy", other.train.golden)
    lines = why.explain(plan_of(**changes), tmp_path, only(plan_of(**changes))).split("\n")[1:]
    (line,) = lines
    pattern = r"  bank\.inputs\.golden_train\.npy: [0-9a-f]{12}\.\.\. -> [0-9a-f]{12}\.\.\. \(the file changed\)"
    assert re.fullmatch(pattern, line)


def test_strict(stored, monkeypatch):
    """Catches code or a library that counts under strict and is not named, and one that did not change but is."""
    plan = plan_of(reuse="strict")
    assert why.explain(plan, stored, only(plan)).split("\n")[1:] == ["  reuse: versions -> strict"]
    monkeypatch.setitem(provenance.installed(), "numpy", "9.9.9")
    plan = plan_of(reuse="strict")
    lines = why.explain(plan, stored, only(plan)).split("\n")[1:]
    assert len(lines) == 2 and re.fullmatch(r"  libraries\.numpy: \S+ -> 9\.9\.9", lines[0])


def test_from_strict_to_versions(tmp_path):
    """Catches code and libraries named where they do not count."""
    fake_run(plan_of(reuse="strict"), tmp_path)
    assert why.explain(plan_of(), tmp_path, only(plan_of())).split("\n")[1:] == ["  reuse: strict -> versions"]


def test_all_new_cells(stored):
    """Catches cells that are stored counted as new, and groups mixed up."""
    plan = plan_of({"seed": [0, 1, 2], "beta": [1, 3, 5]})
    head, *lines = why.explain(plan, stored, "new").split("\n")
    assert head == "5 new cells; beside the nearest stored result"
    assert sorted(re.match(r"  (\d) differ in ([\w, ]+), such as \w+: ", line).groups() for line in lines) == [
        ("1", "beta, seed"), ("2", "beta"), ("2", "seed")]  # fmt: skip
    assert why.explain(plan_of(), stored, "new") == "no cell is new"


def test_nothing_to_compare_with(tmp_path):
    """Catches a traceback in a fresh folder, and a folder that is made by asking."""
    assert why.explain(plan_of(), tmp_path, only(plan_of())).endswith("new; nothing is stored here")
    assert why.explain(plan_of(), tmp_path, "new").endswith("1 have none to compare with: nothing is stored here")
    assert list(tmp_path.iterdir()) == []


def test_results_of_before_identities_were_recorded(tmp_path):
    """Catches results of older versions that are thrown away or break --why."""
    fake_run(plan_of(), tmp_path)
    (part,) = (tmp_path / "store" / "costs").iterdir()
    table = pq.read_table(part).drop_columns(["identity", "code"])
    part.unlink()
    rows = table.to_pylist()
    store = Store(tmp_path)
    store.publish_part("0" * 24, store.records([rows[0]["fingerprint"]]).to_pylist(), rows)
    assert "stored, done" in why.explain(plan_of(), tmp_path, only(plan_of()))
    assert "not recorded" in why.explain(plan_of(), tmp_path, only(plan_of()))
    other = plan_of(compute=Compute("cuda", "fp32"))
    assert "before it was recorded which" in why.explain(other, tmp_path, only(other))
    assert "before their identities were recorded" in why.explain(plan_of(beta=9), tmp_path, only(plan_of(beta=9)))


def test_unknown_and_ambiguous_cells(stored):
    """Catches a guess: the message must name ids to choose from."""
    plan = plan_of({"seed": list(range(40))})
    ids = [c.cell_id for c in plan.cells]
    with pytest.raises(ConfigError, match=rf"'zz' is no cell of this plan; .* such as {ids[0]}, {ids[1]}, .*`new`"):
        why.explain(plan, stored, "zz")
    digit = next(d for d in "0123456789abcdef" if sum(i.startswith(d) for i in ids) > 1)
    first = next(i for i in ids if i.startswith(digit))
    with pytest.raises(ConfigError, match=rf"'{digit}' begins \d+ cells of this plan; .* such as {first}, "):
        why.explain(plan, stored, digit)
    with pytest.raises(ConfigError, match="is no cell"):
        why.explain(plan, stored, "")


def test_without_the_data(tmp_path):
    """Catches an answer about identities that are not known."""
    plan = plan_of(dataset="table", base_llm="table", **{"dataset.path": str(tmp_path / "no.csv")}, need_data=False)
    with pytest.raises(DataError, match=r"not known without the data .*no\.csv"):
        why.explain(plan, tmp_path, "new")


def test_the_command_line(stored, tmp_path, capsys, monkeypatch):
    """Catches flags that are not wired: --why prints and runs nothing, --reuse reaches the plan and is kept."""
    words = ["size=tiny", "reward_model=bt_linear", "seed=0", f"root={stored}", "sweep.name=s", "precision=fp32"]
    assert call("plan", [*words, "--why", "new"]) == 0
    assert capsys.readouterr().out == "no cell is new\n"
    assert call("plan", [*words, "--reuse", "strict", "--why", only(plan_of())]) == 0
    assert "reuse: versions -> strict" in capsys.readouterr().out
    root = tmp_path / "root"
    plan_of(reuse="strict").write(root / "sweeps" / "s")
    assert call("plan", [*words[:3], f"root={root}", *words[4:]]) == 0
    assert capsys.readouterr().out.startswith("reuse strict: ")
    assert call("plan", [*words[:3], f"root={root}", *words[4:], "--reuse", "versions"]) == 0
    assert "reuse strict" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="invalid choice: 'all'"):
        call("plan", [*words, "--reuse", "all"])


def test_the_same_cell_goes_before_a_nearer_one(tmp_path):
    """Catches another seed named where the cell itself is stored, with more that differs."""
    other = make(
        describe({"name": "other", "set": BASE, "axes": {"seed": [1]}}), PRESETS, compute=Compute("cpu", "bf16")
    )
    fake_run(plan_of(reuse="strict"), tmp_path)
    fake_run(other, tmp_path)
    text = why.explain(plan_of(compute=Compute("cpu", "bf16")), tmp_path, only(plan_of()))
    assert text.split("\n")[1:] == ["  precision: fp32 -> bf16", "  reuse: strict -> versions"]
