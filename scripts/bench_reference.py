"""rmsweep beside the published pipeline, on the same bank and the same preferences: seconds, ratios, metrics, parity"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from _bench import (
    PAPER,
    Clock,
    cell_config,
    cpu_seconds,
    has_bf16,
    has_field,
    has_option,
    machine,
    matrix_peak,
    median,
    print_table,
    show,
    simulated_bank,
    tost,
    write_json,
)

if TYPE_CHECKING:
    from rmsweep.bank import Bank
    from rmsweep.preferences import Preferences

OBJECTIVES = ("bt", "clf", "lgb")
STAGES = {"prepare": ("annotate", "copies", "examples"), "train": ("train",), "evaluate": ("score", "metrics")}
QUICK = {"P": 260, "N": 10, "Q": 24, "M": 40, "D": 24}
NEVER = 1_000_000  # a patience that no run exhausts
BETAS = (0.5, 0.7, 1.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Variant:
    """A way of rmsweep's to do a baseline's cell. `changes` of the baseline cell; `needs` what conf/ must have."""

    name: str
    objective: str
    changes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[tuple[str, ...], ...] = ()

    @property
    def missing(self) -> str | None:
        """What this checkout lacks for it, in words."""
        for need in self.needs:
            if not (has_option(*need) if len(need) == 2 else has_field(*need)):
                return f"{self.name}: skipped, this checkout has no {' '.join(need)}"
        return None


class Point(NamedTuple):
    """What varies between the cells of a run."""

    n: int
    beta: float
    seed: int


VARIANTS = (
    Variant("bt released", "bt", {"reward_model": "bt_mlp", "protocol": "released"}),
    Variant(
        "bt released collapsed",
        "bt",
        {"reward_model": "bt_mlp", "protocol": "released", "protocol.collapse_mirror": True},
        (("protocol", "released", "collapse_mirror"),),
    ),
    Variant("bt clean", "bt", {"reward_model": "bt_mlp", "protocol": "clean"}),
    Variant("clf released", "clf", {"reward_model": "clf_mlp", "protocol": "released"}),
    Variant("clf clean", "clf", {"reward_model": "clf_mlp", "protocol": "clean"}),
    Variant("lgb", "lgb", {"reward_model": "clf_lgb", "protocol": "released"}),
    Variant(
        "lgb fast",
        "lgb",
        {"reward_model": "clf_lgb_fast", "protocol": "released"},
        (("reward_model", "clf_lgb_fast"),),
    ),
)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with sizes resolved."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a tiny size, in seconds: it proves that this script runs")
    p.add_argument("--n", type=_ints, help="n_annotations [5000,40000]")
    for name, value in PAPER.items():
        p.add_argument(f"--{name}", type=int, help=f"of the bank [{value}]")
    p.add_argument("--hidden", type=_ints, help="layers of the networks [1024,512]; parity at full width takes hours")
    p.add_argument("--only", type=_words, default=OBJECTIVES, help="of bt,clf,lgb")
    p.add_argument("--beta", type=_floats, help="annotation quality [1; parity 0.7,5]; timing uses the first")
    p.add_argument("--pairing", choices=("cross_prompt", "same_prompt"), default="cross_prompt", help="as released")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of rmsweep's MLPs")
    p.add_argument("--epochs", type=int, help="exactly so many on both sides under protocol=released [early stopping]")
    p.add_argument("--repeats", type=int, default=3, help="medians are over these, each with its own seed")
    p.add_argument("--lgb-cells", type=int, default=30, help="cells of a LightGBM sweep that share a binned bank")
    p.add_argument("--rounds", type=int, help="of LightGBM, both sides [100]")
    p.add_argument("--parity", action="store_true", help="compare the distributions of the metrics, not the seconds")
    p.add_argument("--seeds", type=int, default=20, help="of --parity")
    p.add_argument(
        "--margin-sd", type=float, default=1.0, help="equivalence margin in the baseline's sd over seeds, less than "
        "which no reader of one seed could see"
    )  # fmt: skip
    p.add_argument("--margin-floor", type=float, default=0.01, help="least margin, as a share of what can be won: "
                   "golden_best - golden_random for best-of-N, 1 for Spearman")  # fmt: skip
    p.add_argument("--bank-dir", type=Path, help="where simulated banks are kept [a folder in /tmp]")
    p.add_argument("--json", type=Path, help="write everything that was measured to this file")
    args = p.parse_args(words)
    if unknown := set(args.only) - set(OBJECTIVES):
        p.error(f"--only: {', '.join(sorted(unknown))}; allowed: {', '.join(OBJECTIVES)}")
    if args.margin_sd <= 0 or args.repeats < 1 or args.seeds < 2:
        p.error("needs --margin-sd > 0, --repeats >= 1, --seeds >= 2")
    if args.precision == "bf16" and not has_bf16():
        p.error("--precision bf16: this processor has no bf16 products")
    args.size = {k: getattr(args, k) or (QUICK if args.quick else PAPER)[k] for k in PAPER}
    args.n = args.n or ([120] if args.quick else [5_000, 40_000])
    args.hidden = args.hidden or ((32, 16) if args.quick else (1024, 512))
    args.rounds = args.rounds or (5 if args.quick else 100)
    args.beta = args.beta or ([0.7, 5.0] if args.parity else [1.0])
    args.lgb_cells = min(args.lgb_cells, 3) if args.quick else args.lgb_cells
    args.auto = args.precision if args.precision != "auto" else ("bf16" if has_bf16() else "fp32")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code never depends on a time or a verdict."""
    args = parse(words)
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"options": {k: v for k, v in vars(args).items() if k != "json"}, "machine": machine()}
    found["options"]["bank_dir"] = str(args.bank_dir)
    print(f"{found['machine']}\nrmsweep's MLPs in {args.auto}, one thread, bank {args.size}")
    bank = simulated_bank(args.size, args.bank_dir)
    found.update(parity(args, bank) if args.parity else timing(args, bank))
    write_json(args.json, found)
    return 0


@contextmanager
def charged(clock: Clock, spec: Any, seen: dict[str, Any]) -> Iterator[None]:
    """Charge the stages of rmsweep.pipeline.run_cell to the clock, and keep its examples and schedule in `seen`."""
    from rmsweep import pipeline

    protocol = type(spec.protocol)

    def kept(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] = function(*args, **kwargs)
            return seen[name]

        return call

    def trained(*args: Any, **kwargs: Any) -> Any:
        with clock("train"):
            return _ScoringCharged(inner_train(*args, **kwargs), clock, seen)

    inner_train = pipeline.train
    with ExitStack() as stack:
        for owner, name, new in (
            (pipeline, "annotate", clock.wrap("annotate", pipeline.annotate)),
            (pipeline, "train", trained),
            (pipeline, "evaluate", clock.wrap("metrics", pipeline.evaluate)),
            (protocol, "split", clock.wrap("examples", kept("examples", protocol.split))),
            (protocol, "schedule", kept("schedule", protocol.schedule)),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


class _ScoringCharged:
    """A fitted model whose scoring is charged to the stage `score`, and whose scored rows are counted."""

    def __init__(self, model: Any, clock: Clock, seen: dict[str, Any]) -> None:
        self._model, self._clock, self._seen = model, clock, seen

    def score(self, split: Any) -> Any:
        """As the model does."""
        self._seen["scored"] = self._seen.get("scored", 0) + split.golden.size
        with self._clock("score"):
            return self._model.score(split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def config_of(args: argparse.Namespace, variant: Variant, point: Point) -> dict[str, Any]:
    """The variant's cell as a plain config. --epochs binds under protocol=released only: the clean one always stops."""
    changes = dict(variant.changes)
    if variant.objective == "lgb":
        changes["reward_model.rounds"] = args.rounds
    else:
        changes["reward_model.hidden"] = list(args.hidden)
        if args.epochs and changes["protocol"] == "released":
            changes |= {"protocol.max_epochs": args.epochs, "protocol.patience": NEVER}
    changes |= {"n_annotations": point.n, "beta": point.beta, "seed": point.seed, "pairing": args.pairing}
    return cell_config(args.size, **changes)


def run_ours(
    args: argparse.Namespace, bank: Bank, variant: Variant, point: Point, cache: dict[Any, Any], precision: str
) -> dict[str, Any]:
    """One cell through rmsweep's own pipeline."""
    from rmsweep.cell import build_cell
    from rmsweep.pipeline import run_cell
    from rmsweep.reward_models import Compute

    seen: dict[str, Any] = {}
    spec, clock = build_cell(config_of(args, variant, point)), Clock()
    with charged(clock, spec, seen):
        outcome = run_cell(spec, bank, Compute("cpu", precision), cache, keep="scores")
    metrics = outcome.metrics
    record = _record(variant.name, "rmsweep", variant.objective, point, clock)
    record |= {
        "protocol": variant.changes["protocol"],
        "bon": metrics["bon_golden"][-1],
        "spearman": metrics["spearman"],
        "epochs": metrics["epochs"],
        "precision": "fp32" if variant.objective == "lgb" else precision,
        "scores": outcome.kept["scores"],
    }
    if variant.objective != "lgb":
        record |= _flops(args, bank, seen, int(metrics["epochs"]))
    return record


def run_baseline(args: argparse.Namespace, bank: Bank, objective: str, point: Point, **changes: Any) -> dict[str, Any]:
    """The same cell by the published pipeline, on the preferences of rmsweep's protocol=released."""
    from reference_baseline import BON_N, Baseline

    m = bank.test.n_responses
    options: dict[str, Any] = {
        "objective": objective,
        "seed": point.seed,
        "beta": point.beta,
        "pairing": args.pairing,
        "hidden": args.hidden,
        "rounds": args.rounds,
        "epochs": None if objective == "lgb" else args.epochs,
        "bon_n": tuple(sorted({k for k in BON_N if k < m} | {m})),
        **changes,
    }
    clock = Clock()
    outcome = Baseline(**options).run(bank, released_preferences(args, bank, point), clock)
    record = _record(f"{objective} baseline", "baseline", objective, point, clock)
    return record | {
        "protocol": "released",
        "bon": outcome.best_of_n[m],
        "spearman": outcome.spearman,
        "epochs": outcome.epochs,
        "precision": "fp32",
        "scores": outcome.scores,
    }


def released_preferences(args: argparse.Namespace, bank: Bank, point: Point) -> Preferences:
    """What rmsweep's cells under protocol=released are trained on; no reward model has a say in it."""
    from rmsweep.cell import build_cell
    from rmsweep.rng import streams
    from rmsweep.stages.annotate import annotate

    return annotate(build_cell(config_of(args, VARIANTS[0], point)), bank, streams(point.seed), {})


def _record(variant: str, side: str, objective: str, point: Point, clock: Clock) -> dict[str, Any]:
    record: dict[str, Any] = {"variant": variant, "side": side, "objective": objective, **point._asdict()}
    record |= {"cpu_parts": clock.cpu, "wall_parts": clock.wall}
    for kind, seconds in (("cpu", clock.cpu), ("wall", clock.wall)):
        for stage, parts in STAGES.items():
            record[f"{stage}_{kind}"] = sum(seconds.get(part, 0.0) for part in parts)
        record[f"cell_{kind}"] = sum(seconds.values())
    return record


def _flops(args: argparse.Namespace, bank: Bank, seen: dict[str, Any], epochs: int) -> dict[str, float]:
    """Matrix work of training (with validation) and of scoring, from rows x weights.

    Forward and weight gradients 2 R W each, gradients of a layer's inputs 2 R (W - W_1): the first layer needs none.
    """
    examples, schedule = seen["examples"], seen["schedule"]
    widths = (bank.test.dim, *args.hidden, 1)
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    w, per_example = sum(sizes), 1 if examples.train.second is None else 2
    n = len(examples.train)
    stepped = n if schedule.epoch == "pass" else (schedule.steps or math.ceil(n / schedule.batch)) * schedule.batch
    rows, validated = epochs * stepped * per_example, epochs * len(examples.validation) * per_example
    return {
        "train_flops": 2.0 * (rows * (3 * w - sizes[0]) + validated * w),
        "score_flops": 2.0 * seen["scored"] * w,
    }


def timing(args: argparse.Namespace, bank: Bank) -> dict[str, Any]:
    """Everything interleaved `repeats` times: baseline and all of rmsweep's variants, cell by cell."""
    variants = _available(args)
    warm_up(args, variants)
    peaks = [matrix_peak(bank.test.dim, args.hidden)]
    records, sweeps, bon = _interleaved(args, bank, variants)
    peaks.append(matrix_peak(bank.test.dim, args.hidden))
    peak = {name: median([p[name] for p in peaks]) for name in peaks[0]}
    summary = summarise(records, sweeps, peak)
    found = {"peak_tflops": peak, "peaks_tflops": peaks, "cells": records, "summary": summary, "lgb_sweeps": sweeps}
    found |= {"best_of_n": bon, "bars": bars(args, summary, bon)}
    _print_timing(args, found)
    return found


def _interleaved(
    args: argparse.Namespace, bank: Bank, variants: list[Variant]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Records of all cells, the binning of the LightGBM sweeps, exact against resampled best-of-N."""
    from tqdm import tqdm

    records: list[dict[str, Any]] = []
    sweeps: list[dict[str, Any]] = []
    bon: dict[str, Any] = {}
    caches: dict[tuple[int, str], dict[Any, Any]] = {}
    steps = list(itertools.product(args.n, range(args.repeats), args.only))
    with tqdm(total=sum(1 + sum(v.objective == o for v in variants) for *_, o in steps), unit="cell") as bar:
        for n, seed, objective in steps:
            bar.set_description(f"n={n} {objective}")
            point = Point(n, args.beta[0], seed)
            records.append(run_baseline(args, bank, objective, point))
            bar.update()
            for variant in (v for v in variants if v.objective == objective):
                cache: dict[Any, Any] = {}
                if objective == "lgb":  # its cells are those of a sweep
                    cache = caches.setdefault((n, variant.name), {})
                    sweeps += [] if cache else [binning(args, bank, variant, n, cache)]
                records.append(run_ours(args, bank, variant, point, cache, args.auto))
                bar.update()
            for record in records[-1:]:
                bon = bon or exact_against_resampled(record["scores"], bank.test.golden)
            for record in records:
                record.pop("scores", None)
            write_json(args.json, {"cells": records})  # long: keep what there is
            if objective == "lgb" and seed == args.repeats - 1:
                caches.clear()  # a binned bank has a gigabyte
    return records, sweeps, bon


def warm_up(args: argparse.Namespace, variants: list[Variant]) -> None:
    """Every cell once on a few random rows: what libraries import and build at first use is charged to nobody."""
    import numpy as np

    from rmsweep.bank import Bank

    chance, d = np.random.default_rng(0), 8
    shapes = ((40, 4), (40, 4, d), (6, 5), (6, 5, d))
    bank = Bank.from_arrays(*(chance.standard_normal(shape).astype(np.float32) for shape in shapes))
    small = argparse.Namespace(**{**vars(args), "hidden": (8, 4), "epochs": 2, "rounds": 2})
    for objective in args.only:
        run_baseline(small, bank, objective, Point(40, 1.0, 0))
    for variant in variants:
        run_ours(small, bank, variant, Point(40, 1.0, 0), {}, args.auto)


def _available(args: argparse.Namespace) -> list[Variant]:
    """The variants of the objectives asked for, those that this checkout lacks named and left out."""
    wanted = [v for v in VARIANTS if v.objective in args.only]
    for variant in wanted:
        if variant.missing:
            print(variant.missing)
    return [v for v in wanted if not v.missing]


def binning(args: argparse.Namespace, bank: Bank, variant: Variant, n: int, cache: dict[Any, Any]) -> dict[str, Any]:
    """What sharing a binned bank costs a LightGBM sweep over beta and seeds: CPU seconds of its cells with one tree.

    With one tree a cell is little but binning. `beyond_marginal` is what the cells took beyond the last of them, per
    cell: added to a cell that finds the bank binned it gives a cell of this sweep on average. Annotation and training
    only; the cells that are timed whole come afterwards, with the same cache.
    """
    from rmsweep.cell import build_cell
    from rmsweep.reward_models import Compute
    from rmsweep.rng import streams
    from rmsweep.stages.annotate import annotate
    from rmsweep.stages.train import train

    def cell(point: Point) -> float:
        config = config_of(args, variant, point)
        config["reward_model"]["rounds"] = 1
        spec, clock, chance = build_cell(config), Clock(), streams(point.seed)
        preferences = annotate(spec, bank, chance, cache)
        with clock("train"):
            train(spec, bank, preferences, chance, Compute(), cache)
        return clock.cpu["train"]

    seconds = [cell(Point(n, BETAS[i % len(BETAS)], i // len(BETAS))) for i in range(args.lgb_cells)]
    marginal = median(seconds[-3:]) or 0.0
    return {
        "variant": variant.name,
        "n": n,
        "cells": len(seconds),
        "seconds": seconds,
        "first": seconds[0],
        "marginal": marginal,
        "beyond_marginal": sum(seconds) / len(seconds) - marginal,
    }


def exact_against_resampled(scores: Any, golden: Any) -> dict[str, Any]:
    """Best-of-N of the same scores: exact for all N by rmsweep, and by 100 resamples at a few N."""
    import numpy as np
    from reference_baseline import BON_N, BON_REPEATS, best_of_n

    from rmsweep.metrics.best_of_n import best_of_n as exact

    m = golden.shape[1]
    ns = tuple(sorted({k for k in BON_N if k < m} | {m}))
    clock = Clock()
    with clock("resampled"):
        resampled = best_of_n(scores, golden, ns)
    curve = exact(scores, golden)
    seconds = cpu_seconds(lambda: exact(scores, golden))
    tied = int(((scores == scores.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())
    equal = bool(np.isclose(curve[-1], resampled[m], rtol=0, atol=1e-6))
    assert equal or tied, f"best-of-N at N=M: exact {curve[-1]}, resampled {resampled[m]}"
    return {
        "n": list(ns),
        "exact": [float(curve[k - 1]) for k in ns],
        "resampled": [resampled[k] for k in ns],
        "resamples": BON_REPEATS,
        "cpu_exact_all_n": seconds,
        "cpu_resampled": clock.cpu["resampled"],
        "ratio": clock.cpu["resampled"] / max(seconds, 1e-9),
        "equal_at_m": equal,
        "prompts_with_tied_picks": tied,
    }


def summarise(
    records: list[dict[str, Any]], sweeps: list[dict[str, Any]], peak: dict[str, Any]
) -> list[dict[str, Any]]:
    """Medians over repeats, one row per n and variant, with ratios to the baseline's row of that n and objective.

    A LightGBM cell's seconds are marginal (bank binned before) plus what the sweep's binning costs per cell;
    `at_equal_epochs_cpu` (protocol=released) has the training seconds scaled to the baseline's number of epochs.
    """
    rows = []
    for n, variant in dict.fromkeys((r["n"], r["variant"]) for r in records):
        mine = [r for r in records if (r["n"], r["variant"]) == (n, variant)]
        row: dict[str, Any] = {k: mine[0][k] for k in ("n", "variant", "side", "objective", "protocol", "precision")}
        for key in ("bon", "spearman", "epochs"):
            row[key] = median([r[key] for r in mine])
        for kind in ("cpu", "wall"):
            for stage in (*STAGES, "cell"):
                row[f"{stage}_{kind}"] = median([r[f"{stage}_{kind}"] for r in mine])
        for part in ("score", "metrics"):
            row[f"{part}_cpu"] = median([r["cpu_parts"].get(part) for r in mine])
        for sweep in sweeps:
            if (sweep["n"], sweep["variant"]) == (n, variant):
                row["marginal_cpu"] = row["cell_cpu"]
                row["train_cpu"] += sweep["beyond_marginal"]
                row["cell_cpu"] += sweep["beyond_marginal"]
        if "train_flops" in mine[0]:
            rates = [r["train_flops"] / r["cpu_parts"]["train"] / 1e12 for r in mine]
            scoring = [r["score_flops"] / r["cpu_parts"]["score"] / 1e12 for r in mine]
            row |= {"train_tflops": median(rates), "score_tflops": median(scoring)}
            if limit := peak.get(row["precision"]):
                row |= {"train_share": row["train_tflops"] / limit, "score_share": row["score_tflops"] / limit}
        rows.append(row)
    for row in rows:
        base = next(
            r for r in rows if r["side"] == "baseline" and (r["n"], r["objective"]) == (row["n"], row["objective"])
        )
        for stage in (*STAGES, "cell"):
            row[f"{stage}_ratio"] = base[f"{stage}_cpu"] / max(row[f"{stage}_cpu"], 1e-9)
        if row["protocol"] == "released":
            scale = 1.0 if row["objective"] == "lgb" else base["epochs"] / row["epochs"]
            row["at_equal_epochs_cpu"] = row["cell_cpu"] + (scale - 1) * row["train_cpu"]
            row["cell_ratio_equal_epochs"] = base["cell_cpu"] / row["at_equal_epochs_cpu"]
            row["scaled"] = scale != 1.0
        if "marginal_cpu" in row:
            row["marginal_ratio"] = base["cell_cpu"] / row["marginal_cpu"]
    return rows


class Bar(NamedTuple):
    """A bar, what was reached, and the verdict in words."""

    bar: str
    reached: float | None
    verdict: str


def bars(args: argparse.Namespace, summary: list[dict[str, Any]], bon: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, judged where this run has the sizes and the hardware for it; no exit code depends on it."""
    table = {(row["n"], row["variant"]): row for row in summary}
    full = all(args.size[k] == PAPER[k] for k in ("D", "M", "Q"))
    found: list[Bar] = []

    def judge(bar: str, key: tuple[int, str], column: str, least: float, needs_bf16: bool = True) -> None:
        row = table.get(key)
        value = None if row is None else row.get(column)
        if value is None:
            found.append(Bar(bar, None, "not measured"))
        elif needs_bf16 and not (has_bf16() and row is not None and row["precision"] == "bf16"):
            found.append(Bar(bar, value, f"SKIPPED: bf16 products {'not asked for' if has_bf16() else 'absent here'}"))
        elif not full:
            found.append(Bar(bar, value, "not judged: not the full size"))
        else:
            scaled = column.endswith("equal_epochs") and row is not None and row["scaled"]
            note = ", training scaled to the baseline's epochs" if scaled else ""
            found.append(Bar(bar, value, ("met" if value >= least else "NOT MET") + note))

    for variant, least in (("clf released", 4.0), ("bt released", 4.5), ("bt released collapsed", 7.0)):
        judge(f"{variant}, n=40000, equal epochs: cell {least:g}x", (40_000, variant), "cell_ratio_equal_epochs", least)
    judge("bt clean, n=5000: training 15x", (5_000, "bt clean"), "train_ratio", 15.0)
    for variant, base, least in (("bt clean", "bt baseline", 1e-9), ("clf clean", "clf baseline", 0.0)):
        clean, published = table.get((5_000, variant)), table.get((5_000, base))
        if clean and published:
            clean["bon_gain"] = clean["bon"] - published["bon"]
        judge(
            f"{variant}, n=5000: BoN at N=M {'above' if least else 'not below'} baseline",
            (5_000, variant),
            "bon_gain",
            least,
            needs_bf16=False,
        )
    for variant, least in (("lgb", 1.4), ("lgb fast", 2.5)):
        judge(
            f"{variant}, n=40000, in a sweep: cell {least:g}x", (40_000, variant), "cell_ratio", least, needs_bf16=False
        )
    for n in args.n:
        for variant in ("bt released", "clf released"):
            for part in ("train", "score"):
                judge(f"{variant}, n={n}: {part} at 75 % of the matrix peak", (n, variant), f"{part}_share", 0.75)
    reached = "met" if bon["ratio"] >= 100 else "NOT MET"
    found.append(
        Bar("exact BoN 100x faster than resampling", bon["ratio"], reached if full else "not judged: not full")
    )
    equal = "met" if bon["equal_at_m"] else "ties in the scores"
    found.append(Bar("exact BoN equal at N=M", None, equal))
    if args.epochs:
        note = "with --epochs the baseline does not stop by itself: judge clean protocols in a run without it"
        found = [b._replace(verdict=note) if " clean" in b.bar and b.reached is not None else b for b in found]
    return [b._asdict() for b in found]


def _print_timing(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """All tables of a timing run."""
    summary, bon = found["summary"], found["best_of_n"]
    stop = f"exactly {args.epochs} epochs (clean: early stopping)" if args.epochs else "early stopping"
    peaks = zip(*(p.items() for p in found["peaks_tflops"]), strict=True)
    rates = "; ".join(f"{name} {show(before)} before, {show(after)} after" for (name, before), (_, after) in peaks)
    print(f"\nmatrix peak of one thread, TFLOP/s: {rates}")
    _print_columns(
        f"CPU seconds per cell, medians of {args.repeats}, {stop}; ratio = baseline / this",
        summary,
        *(f"{stage}_cpu" for stage in (*STAGES, "cell")),
        *(f"{stage}_ratio" for stage in (*STAGES, "cell")),
    )
    _print_columns(
        "wall seconds per cell (LightGBM: bank binned before)",
        summary,
        *(f"{stage}_wall" for stage in (*STAGES, "cell")),
    )
    _print_columns(
        f"metrics (BoN at N=M={args.size['M']}) and matrix work (TFLOP/s, share of the peak of that precision)",
        summary, "precision", "epochs", "bon", "spearman", "cell_ratio_equal_epochs", "score_cpu", "metrics_cpu",
        "train_tflops", "train_share", "score_tflops", "score_share",
    )  # fmt: skip
    if found["lgb_sweeps"]:
        _print_columns(
            f"LightGBM in a sweep of {args.lgb_cells} cells, CPU seconds: bank binned before, with its share of that",
            [row for row in summary if "marginal_cpu" in row],
            "marginal_cpu", "marginal_ratio", "cell_cpu", "cell_ratio",
        )  # fmt: skip
        names = ("cells", "first", "marginal", "beyond_marginal")
        _print_columns("binning: CPU seconds of that sweep's cells with one tree", found["lgb_sweeps"], *names)
    _print_best_of_n(bon)
    print_table("bars", found["bars"])
    peak = found["peak_tflops"]
    if "bf16" in peak:
        print(
            f"limit: this processor multiplies bf16 {peak['bf16'] / peak['fp32']:.2f} times as fast as fp32; "
            "no program that does the baseline's products in bf16 gains more than that in them"
        )


def _print_columns(title: str, rows: list[dict[str, Any]], *names: str) -> None:
    print_table(title, [{name: row.get(name) for name in ("n", "variant", *names)} for row in rows])


def _print_best_of_n(bon: dict[str, Any]) -> None:
    title = f"best-of-N of the same scores: exact for all N {show(bon['cpu_exact_all_n'])} CPU s, {bon['resamples']}"
    title += f" resamples at {len(bon['n'])} N {show(bon['cpu_resampled'])} s, ratio {bon['ratio']:.0f}"
    rows = zip(bon["n"], bon["exact"], bon["resampled"], strict=True)
    print_table(title, [dict(zip(("N", "exact", "resampled"), row, strict=True)) for row in rows])


def parity(args: argparse.Namespace, bank: Bank) -> dict[str, Any]:
    """The metrics of both sides over seeds, and whether their distributions' means are equivalent."""
    import numpy as np
    from tqdm import tqdm

    variants = [v for v in _available(args) if v.changes["protocol"] == "released"]
    settings = [(n, beta, objective) for n in args.n for beta in args.beta for objective in args.only]
    golden = bank.test.golden.astype(np.float64)
    room = float(golden.max(axis=1).mean() - golden.mean(axis=1).mean())
    rows, cells = [], []
    with tqdm(total=len(settings) * args.seeds, unit="seed") as bar:
        for n, beta, objective in settings:
            ours, runs = [v for v in variants if v.objective == objective], []
            caches: dict[str, dict[Any, Any]] = {v.name: {} for v in ours}
            for seed in range(args.seeds):
                bar.set_description(f"n={n} beta={beta:g} {objective}")
                runs += _parity_seed(args, bank, ours, caches, objective, Point(n, beta, seed))
                bar.update()
            rows += _parity_rows(args, runs, room)
            cells += runs
            write_json(args.json, {"parity": rows, "cells": cells})  # hours: keep what there is
    _print_parity(args, rows, room)
    return {"parity": rows, "cells": cells, "golden_room": room}


def _parity_seed(
    args: argparse.Namespace, bank: Bank, variants: list[Variant], caches: dict[str, dict[Any, Any]], objective: str,
    point: Point,
) -> list[dict[str, Any]]:  # fmt: skip
    """The baseline's cell and those of the variants, in both precisions where there are two."""
    runs = [run_baseline(args, bank, objective, point, bon_n=(bank.test.n_responses,), bon_repeats=1)]
    precisions = ["fp32"] if objective == "lgb" else list(dict.fromkeys((args.auto, "fp32")))
    for variant in variants:
        cache = caches[variant.name] if objective == "lgb" else {}
        runs += [run_ours(args, bank, variant, point, cache, precision) for precision in precisions]
    keep = ("variant", "side", "objective", "n", "beta", "seed", "precision", "bon", "spearman", "epochs", "cell_cpu")
    return [{k: run[k] for k in keep} for run in runs]


def _parity_rows(args: argparse.Namespace, runs: list[dict[str, Any]], room: float) -> list[dict[str, Any]]:
    """Baseline against each variant (Welch), then its bf16 against its fp32 (paired by seed), for both metrics."""
    import numpy as np

    def values(variant: str, precision: str, metric: str) -> list[float]:
        return [r[metric] for r in runs if (r["variant"], r["precision"]) == (variant, precision)]

    rows = []
    base = next(r["variant"] for r in runs if r["side"] == "baseline")
    ours = list(dict.fromkeys((r["variant"], r["precision"]) for r in runs if r["side"] == "rmsweep"))
    pairs = [((variant, precision), (base, "fp32"), False) for variant, precision in ours]
    both = [v for v, precision in ours if precision == "bf16" and (v, "fp32") in ours]
    pairs += [((variant, "bf16"), (variant, "fp32"), True) for variant in both]
    for metric, floor in (("bon", args.margin_floor * room), ("spearman", args.margin_floor)):
        margin = max(args.margin_sd * float(np.std(values(base, "fp32", metric), ddof=1)), floor)
        for (variant, precision), against, paired in pairs:
            x, y = values(variant, precision, metric), values(*against, metric)
            row: dict[str, Any] = {k: runs[0][k] for k in ("n", "beta")}
            row |= {"variant": f"{variant} {precision}", "against": " ".join(against), "metric": metric}
            row |= {"seeds": len(x), "test": "paired" if paired else "Welch"}
            row |= {"mean": float(np.mean(x)), "mean_against": float(np.mean(y))}
            row |= {"sd": float(np.std(x, ddof=1)), "sd_against": float(np.std(y, ddof=1))}
            rows.append(row | tost(x, y, margin, paired=paired)._asdict())
    return rows


def _print_parity(args: argparse.Namespace, rows: list[dict[str, Any]], room: float) -> None:
    print(
        f"\nmargin: the larger of {args.margin_sd:g} sd of the baseline over its seeds at that setting (a shift that"
        f"\none seed's noise hides) and {args.margin_floor:g} of what can be won ({room:.3g} golden units for BoN at"
        "\nN=M, 1 for Spearman). Equivalent: both one-sided t-tests reject at 5 %: the 90 % interval within the margin"
    )
    if not has_bf16():
        print("bf16 against fp32: SKIPPED, this processor has no bf16 products")
    left_out = {"seeds", "test"}
    print_table(
        f"parity over {args.seeds} seeds", [{k: v for k, v in row.items() if k not in left_out} for row in rows]
    )


def _ints(text: str) -> list[int]:
    return [int(word.replace("_", "")) for word in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
