"""Planning: identities, skips, refusals, and the plan's files."""

import dataclasses

import pyarrow.parquet as pq
import pytest
from conftest import PRESETS

from rmsweep import plan as planning
from rmsweep.cell import bank_id, build_cell, cell_id, fingerprint
from rmsweep.errors import ConfigError, DataError, DesignError, StoreError
from rmsweep.fingerprint import sealed
from rmsweep.grid import describe
from rmsweep.plan import Plan
from rmsweep.planner import make
from rmsweep.reward_models import Compute
from rmsweep.schemas import AXES

CPU = Compute()


def plan_of(axes=None, *, need_data=True, compute=CPU, keep="none", **fields):
    node = {"set": {"size": "tiny"}, "axes": axes or {}, **fields}
    return make(describe(node), PRESETS, need_data=need_data, compute=compute, keep=keep)


def test_identities_are_those_of_the_kernel():
    """Catches caches that give a cell its neighbour's identity: each is identified again from its config."""
    plan = plan_of(
        {
            "reward_model": ["bt_mlp", "length"], "reward_model.hidden": [[8], [8, 8]], "beta": [0.5, "inf"],
            "base_llm": ["sim_2b", "sim_8b"], "candidates": ["random", "similar"], "seed": [0, 1],
            "size.P": [500, 499],
            "evaluate.n_noisy_pairs": [10, 20],
        },
        when={"reward_model.hidden": {"reward_model": "bt_mlp"}},
    )  # fmt: skip
    assert len(plan.cells) == 3 * 2 * 2 * 2 * 2 * 2 * 2
    runnable = [c for c in plan.cells if c.reason is None]
    assert len(runnable) == 2 * len(plan.cells) // 3  # length needs texts
    for cell in plan.cells:
        spec = build_cell(cell.config)
        assert cell.cell_id == cell_id(spec, {}) and cell.bank_id == bank_id(spec, {})
        assert cell.fingerprint == fingerprint(cell.cell_id, Compute())
    assert len({c.cell_id for c in plan.cells}) == len(plan.cells)


def test_labels():
    """Catches option names replaced by nodes, untyped numbers, and departures that no column shows."""
    plan = plan_of({"beta": [1, 3]}, set={"size": "tiny", "reward_model.hidden": [8, 8], "evaluate.n_noisy_pairs": 50})
    labels = plan.cells[1].labels
    assert list(labels)[: len(AXES)] == [c.name for c in AXES]
    assert labels["beta"] == 3.0 and isinstance(labels["beta"], float) and labels["reward_model"] == "bt_mlp"
    assert labels["embedder"] == "native" and labels["size"] == "tiny" and labels["error_rate"] is None
    assert labels["reward_model.hidden"] == "[8,8]" and labels["evaluate.n_noisy_pairs"] == 50
    solved = plan_of({"error_rate": [0.2]}).cells[0].labels
    assert solved["error_rate"] == 0.2 and solved["beta"] is None


def test_what_no_cell_can_take_is_bad_input():
    """Catches a misspelling or a bad value that is 'skipped' instead of refused."""
    with pytest.raises(ConfigError, match="beta=-1"):
        plan_of({"beta": [1, -1], "reward_model": ["bt_mlp", "length"]})
    with pytest.raises(ConfigError, match="hidden"):
        plan_of({"reward_model": ["bt_mlp", "length"], "reward_model.hidden": [[8], "x"]})
    with pytest.raises(ConfigError, match="greater than"):
        plan_of({"error_rate": [0.0, 0.2]})
    with pytest.raises(ConfigError, match="allowed are none"):
        plan_of(keep="everything")


def test_a_key_of_some_choices_skips_the_others():
    """Catches a grid refused because one of its reward models lacks a key."""
    plan = plan_of({"reward_model": ["bt_mlp", "clf_lgb"], "reward_model.hidden": [[8], [16]]})
    assert [c.reason is None for c in plan.cells] == [True, True, False, False]
    assert "no such key" in plan.cells[2].reason and plan.cells[2].labels["reward_model.hidden"] == "[8]"
    assert len({c.cell_id for c in plan.cells}) == 4


def test_too_many_annotations():
    """Exit 1 for one cell or where none can run, skipped inside a grid (issue: must hold)."""
    with pytest.raises(DesignError, match=r"n_annotations=999999.*pairs_per_prompt"):
        plan_of(set={"size": "tiny", "n_annotations": 999_999})
    with pytest.raises(DesignError, match="none of the 2 cells"):
        plan_of({"seed": [0, 1]}, set={"size": "tiny", "n_annotations": 999_999})
    plan = plan_of({"n_annotations": [100, 999_999]})
    assert plan.cells[0].reason is None and "n_annotations=999999" in plan.cells[1].reason


def test_base_llm_that_does_not_go_with_the_dataset():
    """Catches data being asked for in a combination that has none; the cell is skipped with the reason."""
    plan = plan_of({"base_llm": ["sim_2b", "table"]})
    assert plan.cells[0].reason is None and "base_llm table does not go" in plan.cells[1].reason


def test_exclusions_and_equal_cells():
    """Excluded cells need no data and have an id; cells equal but for labels keep both rows."""
    plan = plan_of(
        {"candidates": ["random", "similar"], "seed": [0, 1]}, exclude=[{"candidates": "similar", "seed": 1}]
    )
    assert [c.reason is None for c in plan.cells] == [True, True, True, False] and plan.cells[3].cell_id
    equal = plan_of({"reward_model.hidden": [None, [64, 32]]})  # tiny fills null with [64, 32]
    assert len(equal.cells) == 2 and len({c.fingerprint for c in equal.cells}) == 1


def test_missing_data(tmp_path):
    """`plan` counts without the data, a run is refused before anything is computed."""
    settings = {"dataset": "table", "dataset.path": str(tmp_path / "absent.parquet")}
    with pytest.raises(DataError, match=r"absent\.parquet"):
        plan_of(set=settings)
    plan = plan_of({"seed": [0, 1]}, set=settings, need_data=False)
    assert len(plan.cells) == 2 and "absent.parquet" in plan.unknown and plan.cells[0].fingerprint == ""


def test_the_papers_grid():
    """12,960 cells, every one runnable, twelve banks; the file stays small."""
    plan = make(describe(PRESETS.node("sweep", "paper/full")), PRESETS)
    assert len(plan.cells) == 12_960 == len({c.fingerprint for c in plan.cells})
    assert all(c.reason is None for c in plan.cells) and len({c.bank_id for c in plan.cells}) == 12 == len(
        plan.bank_bytes
    )


@pytest.mark.parametrize(
    ("option", "n"),
    [("demo", 54), ("paper/full", 12_960), ("paper/models", 180), ("paper/quality", 1080),
     ("paper/quantity", 720), ("paper/cross_prompt", 360), ("paper/candidates", 720)],
)  # fmt: skip
def test_shipped_sweeps(option, n):
    """Catches a preset that loses an axis of a figure."""
    assert len(make(describe(PRESETS.node("sweep", option)), PRESETS).cells) == n


def test_round_trip(tmp_path):
    """Catches infinity, nulls, lists or reasons lost in the file, and a second write that changes bytes."""
    plan = plan_of(
        {
            "beta": [1, float("inf")],
            "reward_model": ["bt_mlp", "clf_lgb"],
            "reward_model.hidden": [[8], None],
        },
        exclude=[{"beta": 1, "reward_model": "clf_lgb"}],
    )
    plan.write(tmp_path)
    back = Plan.read(tmp_path)
    assert [c._replace(config={}) for c in back.cells] == [c._replace(config={}) for c in plan.cells]
    assert back.cells[4].labels["beta"] == float("inf") and (back.name, back.compute) == (
        plan.name,
        plan.compute,
    )
    for old, new in zip(plan.cells, back.cells, strict=True):
        if old.reason is None:
            assert cell_id(build_cell(new.config), {}) == old.cell_id
    written = (tmp_path / "plan.parquet").read_bytes()
    plan.write(tmp_path)
    assert (tmp_path / "plan.parquet").read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.parquet"]


def test_the_plans_file_is_compact(tmp_path):
    """12,960 cells below 2 MB."""
    make(describe(PRESETS.node("sweep", "paper/full")), PRESETS).write(tmp_path)
    assert (tmp_path / "plan.parquet").stat().st_size < 2e6


def test_a_name_used_again_is_the_union(tmp_path):
    """Catches cells of the first grid lost, or doubled where both grids have them."""
    first, second = plan_of({"seed": [0, 1]}, name="x"), plan_of({"seed": [1, 2]}, name="x")
    first.write(tmp_path)
    second.write(tmp_path)
    assert [c.labels["seed"] for c in Plan.read(tmp_path).cells] == [0, 1, 2]


def test_pinned_compute(tmp_path):
    """Catches two devices mixed under one name."""
    plan_of(name="x").write(tmp_path)
    assert planning.pinned_compute(tmp_path) == Compute() and planning.pinned_compute(tmp_path / "no") is None
    with pytest.raises(ConfigError, match=r"pinned to device=cpu.*sweep\.name"):
        plan_of(name="x", compute=Compute("cuda", "fp32")).write(tmp_path)


def test_plugins_are_pinned(tmp_path):
    """Catches cells of an edited plug-in mixed with those of the old one."""
    file = tmp_path / "p.py"
    file.write_text("")
    sweep = describe({"name": "x", "set": {"size": "tiny"}})
    make(sweep, PRESETS, plugins=[str(file)]).write(tmp_path / "s")
    assert Plan.read(tmp_path / "s").plugins == (str(file),)
    file.write_text("# edited")
    with pytest.raises(ConfigError, match="another"):
        make(sweep, PRESETS, plugins=[str(file)]).write(tmp_path / "s")


def test_the_same_plan_again_writes_nothing(tmp_path):
    """Catches a rewrite of the plan whenever a finished sweep is run again, and a grown plan that is not written."""
    plan_of({"seed": [0, 1]}, name="s").write(tmp_path)
    inode = (tmp_path / "plan.parquet").stat().st_ino
    plan_of({"seed": [0, 1]}, name="s").write(tmp_path)
    assert (tmp_path / "plan.parquet").stat().st_ino == inode
    plan_of({"seed": [2]}, name="s").write(tmp_path)
    assert [c.labels["seed"] for c in Plan.read(tmp_path).cells] == [0, 1, 2]


def test_unreadable_plans(tmp_path):
    """Catches a traceback, or a damaged plan that is served."""
    with pytest.raises(StoreError, match="holds no plan"):
        Plan.read(tmp_path)
    plan_of().write(tmp_path)
    damaged = bytearray((tmp_path / "plan.parquet").read_bytes())
    column = pq.ParquetFile(tmp_path / "plan.parquet").metadata.row_group(0).column(0)
    damaged[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2] ^= 0xFF
    (tmp_path / "plan.parquet").write_bytes(damaged)
    with pytest.raises(StoreError, match="fails its checksum"):
        Plan.read(tmp_path)
    (tmp_path / "plan.json").write_bytes(sealed({"format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        Plan.read(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "plan.parquet"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_plan_is_written_again(tmp_path, name, how):
    """Catches a sweep that cannot go on because of one bad byte; the damaged files are kept for whoever wants them."""
    plan = plan_of({"seed": [0, 1]}, name="x")
    plan.write(tmp_path)
    good, path = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, tmp_path / name
    data = bytearray(good[name])
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": good[name][:-9], "gone": b""}[how])
    if how == "gone":
        path.unlink()
    assert planning.pinned_compute(tmp_path) in (None, Compute())
    notes = plan.write(tmp_path)
    assert "set aside" in notes[0] and plan.write(tmp_path) == []
    assert {n: (tmp_path / n).read_bytes() for n in good} == good
    assert len([p for p in tmp_path.iterdir() if p.name.endswith(".damaged")]) == 1 + (how != "gone")


def test_cells_that_changed_give_way(tmp_path):
    """Catches the result of old data, or of an old default, beside the new one under the same labels."""
    first = plan_of({"seed": [0, 1]}, name="x")
    old = [cell._replace(cell_id=f"{i:024x}", fingerprint=f"{i + 8:024x}") for i, cell in enumerate(first.cells)]
    dataclasses.replace(first, cells=[old[0], first.cells[1]]).write(tmp_path)
    notes = first.write(tmp_path)
    assert "1 cells of sweep x give way" in notes[0]
    assert [c.cell_id for c in Plan.read(tmp_path).cells] == [first.cells[1].cell_id, first.cells[0].cell_id]
    assert plan_of({"seed": [0]}, name="x", set={"size": "tiny", "reward_model.hidden": [7]}).write(tmp_path) == []
    assert len(Plan.read(tmp_path).cells) == 3
