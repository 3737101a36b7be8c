"""The cost model: known coefficients come back, intervals cover, and nothing is invented."""

from pathlib import Path

import numpy as np
import pytest
from conftest import PRESETS, cell_config, random_bank

from rmsweep import cost_model
from rmsweep.cli import main, render
from rmsweep.cost_model import CostModel, Observation, stages
from rmsweep.grid import describe
from rmsweep.plan import BankSize
from rmsweep.planner import make
from rmsweep.reward_models import Compute

CPU = Compute("cpu", "fp32")
HERE = "this-machine"
QUANTITIES = (5000, 10_000, 20_000, 40_000)


def work_of(reward_model="bt_mlp", n=10_000, size="paper", compute=CPU, **changes):
    """The stages of one simulated cell."""
    config = cell_config(reward_model=reward_model, size=size, n_annotations=n, **changes)
    p, per, q, m, d = (config["size"][k] for k in "PNQMD")
    return stages(config, BankSize(p, p * per, q * m, m, d), compute)


def truth(work, factor=1.0):
    """Seconds of the stages when every sort of work costs its own multiple of the nominal seconds."""
    coefficient = factor * np.array([0.7, 2.0, 0.5, 1.3, 0.8, 1.5])
    return tuple(float(np.dot(w.amounts, coefficient[: len(w.amounts)])) for w in work)


def observed(works, rng=None, noise=0.0, host=HERE, factor=1.0):
    """Finished cells with log-normal noise of mean 1, each stage its own."""
    found = []
    for i, work in enumerate(works):
        error = np.ones(3) if rng is None else np.exp(noise * rng.standard_normal(3) - noise**2 / 2)
        found.append(Observation(f"{host}-{i}", host, work, tuple(np.array(truth(work, factor)) * error)))
    return found


def hours(works, factor=1.0):
    return sum(sum(truth(w, factor)) for w in works) / 3600


def forecast(observations, works, label="m"):
    return CostModel(observations, host=HERE).forecast((label, w) for w in works)


GRID = [work_of(model, n) for model in ("bt_mlp", "clf_mlp", "clf_lgb") for n in QUANTITIES]


@pytest.mark.parametrize("model", ["bt_mlp", "clf_lgb", "bt_linear"])
def test_known_coefficients_are_recovered(model):
    """Catches a wrong work term, weights that let large cells decide alone, and a prior that overrules the data."""
    works = [work_of(model, n, size) for n in (60, 250, 500) for size in ("tiny", "demo", "small")] * 20
    found = forecast(observed(works, np.random.default_rng(0), 0.1), works)
    assert found.hours == pytest.approx(hours(works), rel=0.06) and not found.reach and not found.uncovered
    assert found.low < hours(works) < found.high and found.n_cells == len(works)
    for size in ("tiny", "demo", "small"):  # each size by itself, not the sum alone
        part = [work_of(model, n, size) for n in (60, 250, 500)]
        assert forecast(observed(works), part).hours == pytest.approx(hours(part), rel=0.1)


def test_the_interval_covers_the_sum():
    """Catches intervals that count cells as independent where the fit's own error is common to all of them."""
    rng, hits, widths = np.random.default_rng(1), 0, []
    planned = GRID * 90
    for _ in range(25):
        drift = np.exp(0.05 * rng.standard_normal())
        found = forecast(observed(GRID * 2, rng, 0.3, factor=drift), planned)
        hits += found.low <= hours(planned) <= found.high
        widths.append(found.high / found.low)
    assert hits >= 20 and np.median(widths) < 2


def test_sums_are_not_biased_by_skewed_noise():
    """Catches the mean of logarithms taken for the logarithm of the mean: 20 % too little at a noise of 0.7."""
    rng = np.random.default_rng(2)
    ratio = [forecast(observed(GRID * 8, rng, 0.7), GRID).hours / hours(GRID) for _ in range(12)]
    assert np.mean(ratio) == pytest.approx(1, abs=0.08)


def test_a_workers_start_up_is_no_work():
    """Catches an estimate spoilt by the cell during which a worker loaded its libraries."""
    works = [work_of("bt_mlp", 500, "tiny")] * 8
    observations = observed(works)
    slow = observations[0]._replace(seconds=(0.0, 30.0, 0.0))
    assert forecast([slow, *observations[1:]], works).hours < 1.6 * hours(works)


def test_extrapolation_is_flagged_and_less_sure():
    """Catches a full-size estimate out of tiny cells that looks as good as one out of full-size cells."""
    tiny = [work_of("bt_mlp", n, "tiny") for n in (62, 500)] * 5
    full = [work_of("bt_mlp", n) for n in QUANTITIES]
    far, near = forecast(observed(tiny), full), forecast(observed(full * 3), full)
    assert near.reach == {} and far.reach["m"] > 100
    assert far.high / far.low > 4 * near.high / near.low
    twice = forecast(observed(full), [work_of("bt_mlp", 80_000)])
    assert twice.reach["m"] == pytest.approx(2) and twice.depth == {}
    assert forecast(observed(full), tiny).depth["m"] > 50


def test_few_cells_borrow_the_scale():
    """One cell fixes the machine's speed, and its work says how other sizes scale; the doubt about that is shown."""
    one = observed([work_of("bt_mlp", 20_000)])
    found = forecast(one, [work_of("bt_mlp", 40_000)])
    cost = hours([work_of("bt_mlp", 20_000)])
    assert cost < found.hours < 2.2 * cost and found.high / found.low > 1.5
    larger = forecast(one, [work_of("bt_mlp", 20_000, **{"reward_model.hidden": [2048, 1024]})])
    assert 1.5 * cost < larger.hours < 3 * cost


def test_unseen_kinds_get_no_number():
    """Catches a number for cells of which nothing like them was ever run."""
    observations = observed([work_of("bt_mlp", n) for n in QUANTITIES])
    for other in (
        work_of("clf_lgb"),
        work_of("clf_mlp"),
        work_of("bt_mlp", protocol="released"),
        work_of("bt_mlp", compute=Compute("cuda", "bf16")),
        None,  # a bank of unknown shape
    ):
        found = CostModel(observations, host=HERE).forecast([("seen", work_of("bt_mlp")), *[("other", other)] * 3])
        assert found.uncovered == {"other": 3} and found.n_covered == 1 and set(found.by_model) == {"seen"}
    assert forecast(observations, [work_of("clf_lgb")]).hours == 0


def test_other_settings_are_borrowed_with_more_doubt():
    """A new learning rate is priced by the others, less surely; cells with that very setting go first."""
    seen = observed([work_of("bt_mlp", n) for n in QUANTITIES] * 5)
    new = work_of("bt_mlp", 20_000, **{"protocol.learning_rate": 0.0123})
    same, other = forecast(seen, [work_of("bt_mlp", 20_000)]), forecast(seen, [new])
    assert other.hours == pytest.approx(same.hours, rel=0.05) and other.high / other.low > 1.15 * same.high / same.low
    slower = observed([new] * 5, host=HERE, factor=3.0)
    assert forecast([*seen, *slower], [new]).hours > 1.9 * hours([new])  # 3 in training, a mixture elsewhere


def test_the_precision_of_trees_is_no_matter():
    """LightGBM does not know of bf16: its cells are worth the same under either."""
    seen = observed([work_of("clf_lgb", compute=Compute("cpu", "bf16"))] * 3)
    assert forecast(seen, [work_of("clf_lgb", compute=CPU)]).n_covered == 1


def test_machines():
    """This machine's cells decide where there are enough of them; else the others', less surely."""
    works = [work_of("bt_mlp", n) for n in QUANTITIES]
    here, there = observed(works), observed(works, host="other", factor=5.0)
    both, only = forecast([*here, *there], works), forecast(there, works)
    assert both.hours == pytest.approx(hours(works), rel=0.05) and both.here and both.hosts == (HERE,)
    assert only.hours == pytest.approx(5 * hours(works), rel=0.05) and not only.here and only.hosts == ("other",)
    assert only.high / only.low > 1.5 * both.high / both.low


def test_the_same_cells_give_the_same_text():
    """Catches draws that differ from one `plan` to the next."""
    assert forecast(observed(GRID), GRID) == forecast(observed(GRID), GRID)


def test_work_counts_what_the_size_says():
    """Catches hidden layers and rounds that a size fills in, ignored; annotations that default to the bank's."""
    tiny, demo = (work_of("bt_mlp", 500, size)[1].amounts for size in ("tiny", "demo"))
    weights = [a[4] / (500 * cost_model.NOMINAL["weight row"]) for a in (tiny, demo)]
    assert weights == pytest.approx([32 * 64 + 64 * 32 + 32, 64 * 256 + 256 * 128 + 128])
    assert work_of("clf_lgb", 500, "tiny")[1].amounts[3] == pytest.approx(20 * 500 * 32 * 1e-8)
    assert work_of("bt_mlp", None, "tiny") == work_of("bt_mlp", 500, "tiny")


# -- in `rmsweep plan` -------------------------------------------------------------------------------------


def plan_of(words, capsys):
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_plan_says_what_it_knows(tmp_path, capsys):
    """Before anything ran, after a few cells, for kinds that never ran, and when nothing is left to do."""
    root = f"root={tmp_path}/out"
    few = ["size=tiny", "reward_model=bt_mlp,clf_lgb", "seed=0,1", "n_annotations=100,200", "engine.workers=0", root]
    assert "nothing was measured under root=" in plan_of(few, capsys)
    assert main(["run", *few]) == 0
    assert "estimated core-hours: 0, nothing is new" in plan_of(few, capsys)
    more = ["size=tiny", "reward_model=bt_mlp,clf_lgb,bt_linear", "seed=range(9)", "n_annotations=150", root]
    text = plan_of(more, capsys)
    assert "about 0.00" in text and "90 % interval" in text and "fitted to 8 cells done on" in text
    assert "sizes within those of the cells seen" in text and "without 9 cells of bt_linear" in text
    text = plan_of(["size=paper", "reward_model=bt_mlp", "seed=range(9)", "n_annotations=40000", root], capsys)
    assert "EXTRAPOLATED beyond the largest cells seen: bt_mlp" in text
    assert "not known for 1 cell of bt_linear" in plan_of(["size=tiny", "reward_model=bt_linear", root], capsys)


def test_banks_that_no_size_describes(tmp_path, capsys):
    """Catches cells on a user's own bank that count for nothing, before or after it was built."""
    random_bank(np.random.default_rng(0), p=40, n=4, q=6, m=5, d=8).write(tmp_path / "bank")
    words = ["dataset=folder", f"dataset.path={tmp_path}/bank", "base_llm=table", "reward_model=bt_linear"]
    words += ["n_annotations=30", "engine.workers=0", f"root={tmp_path}/out"]
    assert main(["run", *words, "seed=0"]) == 0
    text = plan_of([*words, "seed=0,1,2"], capsys)
    assert "fitted to 1 cell done" in text and "sizes within" in text


def test_equal_cells_count_once(tmp_path, monkeypatch):
    """Catches rows of equal cells, which are computed once, priced twice; and finished cells priced at all."""
    monkeypatch.setattr(cost_model, "observe", lambda root: observed([work_of("bt_mlp", 500, "tiny")] * 3))
    axes = {"reward_model.hidden": [None, [64, 32]], "seed": [0, 1]}
    plan = make(describe({"set": {"size": "tiny"}, "axes": axes}), PRESETS, compute=CPU)
    assert len(plan.cells) == 4 and len({c.fingerprint for c in plan.cells}) == 2
    assert cost_model.estimate(plan, tmp_path, {}).n_covered == 2
    assert cost_model.estimate(plan, tmp_path, {plan.cells[0].fingerprint: "done"}).n_covered == 1
    assert cost_model.Surveyor(plan, tmp_path).work(plan.cells[0]) == work_of("bt_mlp", 500, "tiny")


def test_text_of_a_forecast_without_cells():
    """Catches a text that fails on the empty forecast."""
    plan = make(describe({"set": {"size": "tiny"}, "axes": {"seed": [0]}}), PRESETS, compute=CPU)
    empty = CostModel([], host=HERE).forecast([("bt_mlp", work_of())])
    assert "not known for 1 cell of bt_mlp" in render.cost_text(plan, {}, empty, Path("outputs"))
