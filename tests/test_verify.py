"""verify: sees every damage, tells it from what is merely old, recomputes bit for bit, and changes nothing."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_pipeline import fake_plan, fake_run

from rmsweep import hardware, recompute, verify
from rmsweep.atomic import temporary_name
from rmsweep.cli import main
from rmsweep.engines.local import Local
from rmsweep.errors import ConfigError
from rmsweep.fingerprint import sealed, unsealed
from rmsweep.plan import Plan
from rmsweep.schemas import RECORD
from rmsweep.store import Store, parquet
from rmsweep.versions import STAGES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for name, seeds in (("s", 6), ("other", 3)):
        fake_run(fake_plan(seeds, keep="scores", name=name), root)
    return root


@pytest.fixture
def root(tmp_path, made):
    """Two sweeps that share half their cells, with kept arrays."""
    return Path(shutil.copytree(made, tmp_path / "root"))


def files_under(root):
    return sorted(path for path in Path(root).rglob("*") if path.is_file())


def snapshot(root):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files_under(root)}


def again(root, n=100, **options):
    """A report with a sample, computed by the fake in this process."""
    report = verify.verify(root)
    options = {"engine": Local(workers=0), "work": "fake_pipeline:WORK", **options}
    recompute.recompute(root, report, n, **options)
    return report


def with_records(root, change):
    """Replace every part of records by one whose rows went through `change`: sound checksums, other numbers."""
    store = Store(root)
    for name in store.record_parts.names():
        path = store.record_parts.folder / name
        rows = [change(dict(row)) for row in pq.read_table(path).to_pylist()]
        data = parquet(pa.Table.from_pylist(rows, schema=RECORD))
        path.unlink()
        digest = hashlib.sha256(data).hexdigest()[:24]
        path.with_name(f"{name.partition('-')[0]}-{digest}.parquet").write_bytes(data)


def test_a_sound_root_has_no_problem_and_stays_as_it_is(root):
    """Catches a false alarm, and a check that writes, heals or touches anything."""
    before = snapshot(root)
    report = again(root)
    assert report.problems == [] and report.warnings == [] and report.n_recomputed == 6
    assert snapshot(root) == before
    assert report.n_files == len([path for path in before if path.parent.name != "logs" and path.name != ".last"])


CHECKED = (
    "store/banks/*/*",
    "store/results/*",
    "store/costs/*",
    "store/kept/*",
    "sweeps/s/*.parquet",
    "sweeps/s/plan.json",
)


@pytest.mark.parametrize("pattern", CHECKED)
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "append"])
def test_every_damage_is_seen(root, pattern, how):
    """Catches a kind of artefact that is not read, or whose checksum is not compared; the file is named."""
    rng = random.Random(how)
    for path in sorted(root.glob(pattern)):
        data = path.read_bytes()
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        path.write_bytes({"flip": flipped, "cut": data[:place], "empty": b"", "append": data + b"\0"}[how])
        report = verify.verify(root)
        named = path.parent if "banks" in pattern or path.stem == "plan" else path
        assert [p.path for p in report.problems] == [str(named)], path
        assert all(p.what and p.hint for p in report.problems)
        path.write_bytes(data)
    assert verify.verify(root).problems == []


def test_a_plan_that_cannot_be_read(root):
    """Catches a plan.json that is passed over; the other sweep is still checked."""
    (root / "sweeps" / "s" / "plan.json").write_text("{")
    report = verify.verify(root)
    assert [p.path for p in report.problems] == [str(root / "sweeps" / "s")]
    assert list(report.plans) == [root / "sweeps" / "other"]


def test_only_the_named_sweep(root):
    """Catches a named sweep's check that fails for another sweep's damage."""
    (root / "sweeps" / "other" / "results.parquet").write_bytes(b"")
    assert verify.verify(root, "s").problems == [] and len(verify.verify(root, "other").problems) == 1


def test_a_table_without_checksum_must_be_readable(root):
    """Tables of before there were checksums: catches one that is not even opened."""
    (root / "sweeps" / "s" / "tables.json").unlink()
    assert verify.verify(root, "s").problems == []
    (root / "sweeps" / "s" / "results.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in verify.verify(root, "s").problems[0].what


def test_stale_is_not_wrong(root, monkeypatch):
    """Newer records of a sweep, from another one: how many cells, and no mismatch; damage is still seen."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"7": "raise", "8": "raise"}))
    fake_run(fake_plan(9, name="late"), root)
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    fake_run(fake_plan(10, name="more"), root, retry=frozenset(c.fingerprint for c in fake_plan(9).cells))
    report = verify.verify(root, "late")
    assert report.problems == [] and "stale: 2 cells have newer records" in " ".join(report.notes)


def test_lost_records_are_a_mismatch(root):
    """The table shows cells whose records are gone: catches that being called stale."""
    for path in (root / "store" / "results").iterdir():
        path.unlink()
    report = verify.verify(root, "s")
    assert len(report.problems) == 1 and "shows 6 cells" in report.problems[0].what


def test_two_records_of_one_cell(root):
    """Both parts are sound, so only a comparison of the records can tell."""
    row = Store(root).records([fake_plan(1).cells[0].fingerprint]).to_pylist()[0]
    Store(root).publish_part("ab" * 12, [row | {"spearman": 0.5}], [])
    (problem,) = verify.verify(root).problems
    assert row["fingerprint"] in problem.what and problem.path.count(".parquet") == 2


def test_foreign_files_quarantine_and_temporary_files(root):
    """Only what is nobody's is warned of; what was set aside is said; neither is a mismatch."""
    store = root / "store"
    for folder in ("banks", "results", "kept"):
        (store / folder / temporary_name()).touch()
    (store / "quarantine" / "old.parquet.12345678").touch()
    (store / "claims").mkdir(exist_ok=True)
    (store / "claims" / ("ab" * 12)).symlink_to("somebody")
    foreign = [store / "results" / "notes.txt", store / "mine", store / "banks" / "x.npy"]
    for path in foreign:
        path.touch()
    report = verify.verify(root)
    assert report.problems == [] and sorted(w.path for w in report.warnings) == sorted(map(str, foreign))
    assert any("old.parquet" in note for note in report.notes)


# -- recomputing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [("golden_improvement", 2.0), ("bon_golden", [-0.0, 1 / 3]), ("golden_picked", [0.0] * 4), ("n_train", None)],
)
def test_another_number_is_seen(root, column, value):
    """Sound checksums, one value changed (a zero that lost its sign included): cell, column and both values."""
    plan = fake_plan(6)
    with_records(root, lambda row: row | ({column: value} if row["cell_id"] == plan.cells[2].cell_id else {}))
    assert all("no record" not in p.what for p in verify.verify(root).problems)
    (problem,) = again(root).problems
    assert plan.cells[2].cell_id in problem.what and column in problem.what
    assert "stored" in problem.what and "computed again" in problem.what


def test_other_columns_are_named_too(root):
    """Catches all differences but the first being dropped."""
    with_records(root, lambda row: row | {"n_train": 99, "golden_improvement": float("nan")})
    problems = again(root, 1).problems
    assert "stored nan" in problems[0].what and "(also n_train)" in problems[0].what


def test_kept_arrays_are_compared(root, monkeypatch):
    """Records alike, scores not."""
    stored = Store.kept
    monkeypatch.setattr(
        Store, "kept", lambda s, key: {k: a + (s.folder.parent == root) for k, a in stored(s, key).items()}
    )
    assert {"kept array scores" in p.what for p in again(root).problems} == {True}


def test_a_difference_names_what_was_another(root, monkeypatch):
    """Other libraries or another host may explain it, so the line must say so."""
    with_records(root, lambda row: row | {"golden_improvement": 2.0})
    assert "the stored one" not in again(root, 1).problems[0].hint
    monkeypatch.setattr(recompute.provenance, "installed", lambda: {"python": "2.7", "torch": "0.1"})
    monkeypatch.setattr(recompute.platform, "node", lambda: "elsewhere")
    monkeypatch.setattr(recompute.provenance, "code_of", lambda spec: dict.fromkeys(STAGES, "other"))
    hint = again(root, 1).problems[0].hint
    assert "(here 0.1)" in hint and "this is elsewhere" in hint and "by other code" in hint


def test_a_cell_that_fails_now(root, monkeypatch):
    """Stored as done: catches a status that is not compared."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"3": "raise"}))
    (problem,) = again(root).problems
    assert "status: stored 'done', computed again 'failed'" in problem.what and "seed 3" in problem.path


def test_columns_of_an_older_version(root):
    """A part that lacks a column stored nothing in it: nothing to compare."""
    store = Store(root)
    for name in store.record_parts.names():
        path = store.record_parts.folder / name
        data = parquet(pq.read_table(path).drop_columns(["n_train"]))
        path.unlink()
        path.with_name(f"{name[:24]}-{hashlib.sha256(data).hexdigest()[:24]}.parquet").write_bytes(data)
    assert again(root).problems == []


def test_the_sample(tmp_path, monkeypatch):
    """In turn from every reward model, by the seed alone, done cells only, each once."""
    plan = fake_plan(12)
    cells = [
        cell._replace(labels={**cell.labels, "reward_model": "a" if i < 10 else "b"})
        for i, cell in enumerate(plan.cells)
    ]
    plans = {tmp_path / "s": Plan("s", cells, plan.compute), tmp_path / "t": plan}
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"0": "raise"}))
    fake_run(fake_plan(11), tmp_path)

    def drawn(n, seed):
        return [cell for chosen in recompute.sample(plans, Store(tmp_path), n, seed) for cell in chosen.cells]

    plans.pop(tmp_path / "t")
    assert sorted(c.labels["reward_model"] for c in drawn(4, 0)) == ["a", "a", "a", "b"]
    assert len({c.fingerprint for c in drawn(99, 0)}) == 10
    assert drawn(4, 0) == drawn(4, 0) and any(drawn(4, 0) != drawn(4, seed) for seed in range(1, 5))


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_bank_that_is_gone(root, how):
    """A small one is built again elsewhere; one that is too large is said, and no mismatch."""
    for path in list(root.glob("store/banks/*/golden.npy")):
        if how == "damaged":
            path.write_bytes(b"")
        else:
            path.parent.rename(root / path.parent.name)
    before = snapshot(root)
    report = again(root)
    assert report.n_recomputed == 6 and len(report.problems) == (how == "damaged")
    recompute_max, recompute.MAX_REBUILT = recompute.MAX_REBUILT, 0
    try:
        report = again(root)
    finally:
        recompute.MAX_REBUILT = recompute_max
    assert report.n_recomputed == 0 and sum("cannot be computed again" in note for note in report.notes) == 6
    assert snapshot(root) == before


def test_pinned_to_what_is_not_here(root, monkeypatch):
    """A clear message before anything is computed."""
    monkeypatch.setattr(hardware, "problem", lambda device, precision: "no such GPU")
    with pytest.raises(ConfigError, match=r"sweep other cannot be computed here: no such GPU"):
        again(root)


def test_no_plugin_is_imported_that_the_user_did_not_name(root, tmp_path):
    """A plan is data: what it names must not be run."""
    marker, plugin = tmp_path / "ran", tmp_path / "evil.py"
    plugin.write_text(f"open({str(marker)!r}, 'w')")
    for path in root.glob("sweeps/*/plan.json"):
        digest = hashlib.sha256(plugin.read_bytes()).hexdigest()
        path.write_bytes(sealed(unsealed(path.read_bytes()) | {"plugins": {str(plugin): digest}}))
    with pytest.raises(ConfigError, match="--plugin"):
        again(root)
    assert main(["verify", "--sample", "1", f"root={root}"]) == 1
    assert not marker.exists()


# -- the command line --------------------------------------------------------------------------------------


def test_exit_codes(root, capsys):
    """0, then 4 with one line per problem, 1 for a root without a store or an unknown sweep."""
    assert main(["verify", f"root={root}"]) == 0
    assert capsys.readouterr().out.strip().endswith(" 0 mismatches")
    path = next((root / "store" / "results").iterdir())
    path.write_bytes(b"")
    assert main(["verify", "s", f"root={root}"]) == 4
    out = capsys.readouterr().out
    assert f"MISMATCH: {path}: its bytes are not those of its name; the next `rmsweep run`" in out
    assert main(["verify", f"root={root / 'nothing'}"]) == 1 and "no store there" in capsys.readouterr().err
    assert main(["verify", "such", f"root={root}"]) == 1 and "Valid: other, s" in capsys.readouterr().err
    assert main(["verify", "--sample", "-1", f"root={root}"]) == 1
    assert not os.path.lexists(root / "nothing")


def test_the_real_pipeline(tmp_path, capsys):
    """Cells of three kinds of models, again in workers as a run has them: the very bits of this process."""
    words = ["size=tiny", "reward_model=bt_linear,clf_lgb,bt_mlp", f"root={tmp_path}", "sweep.name=real", "seed=0,1"]
    assert main(["run", *words, "engine.workers=0"]) == 0
    assert main(["verify", "--sample", "3", f"root={tmp_path}"]) == 0
    assert "3 cells computed again: 0 mismatches" in capsys.readouterr().out
