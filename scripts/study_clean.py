"""How protocol=clean was chosen: settings of batch, learning rate, stopping and regularisation, by validation only.

    python scripts/study_clean.py grid wide --out FILE [--real TABLE]    # runs what FILE lacks, prints tables
    python scripts/study_clean.py --quick --out FILE                      # seconds

Training prompts are parted into inner and outer ones. A setting trains on inner comparisons under the clean split,
whose validation loss keeps its best epoch; settings are compared on labelled comparisons of outer prompts, which
neither training nor stopping saw. Test prompts and golden rewards of outer prompts are never read. All settings see
the same comparisons, labels, initial weights and batch orders (paired differences).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import rmsweep
from rmsweep import component
from rmsweep.bank import Bank, Split
from rmsweep.component import build
from rmsweep.preferences import Preferences
from rmsweep.presets import Presets
from rmsweep.protocols import Examples, SplitExamples, pairwise, pointwise
from rmsweep.protocols.clean import Clean
from rmsweep.reward_models.mlp import build_network
from rmsweep.rng import streams
from rmsweep.size import Size

WORLDS: dict[str, dict[str, float]] = {  # three difficulties of the simulated world
    "easy": {"seed": 11, "nonlinearity": 0.1, "observation_noise": 0.1},
    "middle": {"seed": 12},
    "hard": {"seed": 13, "nonlinearity": 0.8, "frequency": 2.0, "observation_noise": 0.6, "within_share": 0.3},
}
BETAS = (0.5, 1.0, 5.0)
LOSSES = ("bradley_terry", "classification")
OUTER_PAIRS = 45  # labelled comparisons of each outer prompt


class Setting(NamedTuple):
    """What is chosen. batch counts comparisons. decoupled: AdamW. cosine: the rate falls to 0 over max_epochs."""

    learning_rate: float = 1e-3
    batch: int = 256
    weight_decay: float = 0.0
    decoupled: bool = False
    dropout: float = 0.0
    cosine: bool = False
    max_epochs: int = 60

    def __str__(self) -> str:
        parts = [f"lr {self.learning_rate:g}", f"batch {self.batch}"]
        if self.weight_decay:
            parts.append(f"{'AdamW' if self.decoupled else 'L2'} {self.weight_decay:g}")
        parts += [f"dropout {self.dropout:g}"] * bool(self.dropout)
        parts += [f"cosine over {self.max_epochs}"] * self.cosine
        return ", ".join(parts)


class Condition(NamedTuple):
    """Where a setting is tried."""

    world: str
    n: int
    beta: float
    objective: str
    seed: int


class Epoch(NamedTuple):
    """After an epoch: the inner validation loss, and loss and pairwise accuracy on outer comparisons."""

    inner: float
    loss: float
    accuracy: float


class Trajectory(NamedTuple):
    """One training run, long enough to tell every stopping rule; n_train comparisons are visited per epoch."""

    n_train: int
    epochs: list[Epoch]
    seconds: float

    def kept(self, patience: int, max_epochs: int) -> tuple[Epoch, int]:
        """The epoch that a stopping rule keeps, and the comparisons visited until it stopped."""
        best = 0
        for last in range(min(max_epochs, len(self.epochs))):
            best = last if self.epochs[last].inner < self.epochs[best].inner else best
            if last - best >= patience:
                break
        return self.epochs[best], (last + 1) * self.n_train


class World(NamedTuple):
    """One bank's training prompts in two parts; hidden: layer widths that suit its embeddings."""

    inner: Split
    outer: Split
    test: Split
    hidden: tuple[int, ...]
    reward_scale: float | str = 1.0

    def preferences(self, n: int, beta: float, seed: int, outer: bool = False) -> Preferences:
        """As many annotations, by the baseline's candidates and pairing, or of any two responses where they must be."""
        split = self.outer if outer else self.inner
        per_prompt = math.ceil(n / split.n_prompts)
        return rmsweep.annotate(
            Bank(split, self.test), n, beta=beta, seed=seed, pairs_per_prompt=per_prompt,
            candidates="random" if per_prompt == 1 else {"kind": "random", "k": "all"}, reward_scale=self.reward_scale,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- banks


def simulated(name: str, n_inner: int, n_outer: int, dim: int, hidden: tuple[int, ...], folder: Path) -> World:
    """The simulated world at one difficulty."""
    size = {"P": n_inner + n_outer, "N": 10, "Q": 1, "M": 2, "D": dim}
    return _world({"kind": "simulated", **WORLDS[name]}, "sim_2b", "native", n_outer, hidden, size, folder)


def real(table: Path, n_outer: int, hidden: tuple[int, ...], folder: Path) -> World:
    """Real responses as in sweep=examples/alpaca_eval: 600 training prompts of 48 responses."""
    settings = Presets().node("sweep", "examples/alpaca_eval")["set"]
    fields = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("dataset.")}
    node = {**Presets().node("dataset", "table"), **fields, "path": str(table)}
    embedder, size = {"kind": "lsa", "dim": 256}, Presets().node("size", "demo")
    world = _world(node, "table", embedder, n_outer, hidden, size, folder)
    return world._replace(reward_scale=node["reward_scale"])


def _world(
    dataset: dict[str, Any], llm: str, embedder: Any, n_outer: int, hidden: tuple[int, ...], size: Any, folder: Path
) -> World:
    """The bank in `folder`, generated where it is missing; n_outer of its training prompts are outer ones."""
    if not (folder / "bank.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        built = (
            build("dataset", dataset),
            build("base_llm", Presets().node("base_llm", llm)),
            build("embedder", embedder),
        )
        built[0].generate(built[1], component.checked(Size, size, "size"), built[2], folder)
    bank = Bank.read(folder)
    order = np.random.default_rng(0).permutation(bank.train.n_prompts)
    return World(bank.train.take(order[n_outer:]), bank.train.take(order[:n_outer]), bank.test, hidden)


# ------------------------------------------------------------------------------------------------- training


class Data(NamedTuple):
    """A condition's inner examples, outer comparisons (and the same as examples of the objective), and rows [R, D]."""

    inner: SplitExamples
    outer_pairs: Examples
    outer: Examples
    inner_rows: torch.Tensor
    outer_rows: torch.Tensor

    @classmethod
    def of(cls, world: World, condition: Condition) -> Data:
        """Inner annotations with the cell's seed, outer ones the same for all seeds."""
        rows = build("objective", condition.objective).pointwise
        preferences = world.preferences(condition.n, condition.beta, condition.seed)
        inner = Clean().split(world.inner, preferences, rows, streams(condition.seed)("split"))
        labelled = world.preferences(OUTER_PAIRS * world.outer.n_prompts, condition.beta, 0, outer=True)
        pairs = pairwise(world.outer, labelled)
        outer = pointwise(world.outer, labelled) if rows else pairs
        return cls(inner, pairs, outer, _matrix(world.inner), _matrix(world.outer))


class Run:
    """One network under one setting; bf16 products, fp32 weights."""

    def __init__(self, data: Data, hidden: tuple[int, ...], condition: Condition, setting: Setting) -> None:
        self.data, self.setting, self.objective = data, setting, build("objective", condition.objective)
        chance = streams(condition.seed)
        network = build_network((data.inner_rows.shape[1], *hidden, 1), "relu", chance("init"))
        self.network, self.order = _with_dropout(network, setting.dropout), chance("order")
        torch.manual_seed(condition.seed)  # dropout only
        kind = torch.optim.AdamW if setting.decoupled else torch.optim.Adam
        self.optimizer = kind(
            self.network.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay, fused=True
        )

    def trajectory(self, patience: int) -> Trajectory:
        """Train until `patience` epochs bring no new best inner validation loss."""
        start, epochs = time.process_time(), list[Epoch]()
        for epoch in range(self.setting.max_epochs):
            self._train_epoch(epoch)
            epochs.append(self._measure())
            losses = [e.inner for e in epochs]
            if len(losses) - 1 - int(np.argmin(losses)) >= patience:
                break
        n_train = len(np.unique(self.data.inner.train.comparison))
        return Trajectory(n_train, epochs, time.process_time() - start)

    def _train_epoch(self, epoch: int) -> None:
        self.network.train()
        examples, batch = self.data.inner.train, self.setting.batch * (2 if self.objective.pointwise else 1)
        order, starts = self.order.permutation(len(examples)), range(0, len(examples), batch)
        for step, start in enumerate(starts):
            if self.setting.cosine:
                done = (epoch + step / len(starts)) / self.setting.max_epochs
                self.optimizer.param_groups[0]["lr"] = self.setting.learning_rate * (1 + math.cos(math.pi * done)) / 2
            self.optimizer.zero_grad(set_to_none=True)
            part = examples.take(order[start : start + batch])
            rows = part.first if part.second is None else np.concatenate([part.first, part.second])
            self._loss(part, self._reward(self.data.inner_rows[torch.from_numpy(rows)])).backward()
            self.optimizer.step()

    def _loss(self, examples: Examples, reward: torch.Tensor) -> torch.Tensor:
        """Mean loss of examples with rewards [E], or [2E]: first sides, then second sides."""
        target = torch.from_numpy(examples.target)
        if examples.second is None:
            return self.objective.row_loss(reward, target).mean()
        return self.objective(*reward.chunk(2), target).mean()

    def _reward(self, rows: torch.Tensor) -> torch.Tensor:
        *hidden, last = self.network
        with torch.autocast("cpu", torch.bfloat16):
            for layer in hidden:
                rows = layer(rows)
        return last(rows.float()).squeeze(-1)

    @torch.no_grad()
    def _measure(self) -> Epoch:
        self.network.eval()
        inner, outer, pairs = self.data.inner.validation, self.data.outer, self.data.outer_pairs
        rows = inner.first if inner.second is None else np.concatenate([inner.first, inner.second])
        inner_loss = float(self._loss(inner, self._reward(self.data.inner_rows[torch.from_numpy(rows)])))
        reward = self._reward(self.data.outer_rows)
        first, second = (reward[torch.from_numpy(side)] for side in (pairs.first, pairs.second))
        known = torch.cat([first, second]) if outer.second is not None else reward[torch.from_numpy(outer.first)]
        margin = ((first - second) * (2 * torch.from_numpy(pairs.target) - 1)).numpy()
        accuracy = float((margin > 0).mean() + (margin == 0).mean() / 2)
        return Epoch(inner_loss, float(self._loss(outer, known)), accuracy)


def _matrix(split: Split) -> torch.Tensor:
    return torch.from_numpy(np.asarray(split.embedding)).reshape(-1, split.dim).to(torch.bfloat16)


def _with_dropout(network: torch.nn.Sequential, rate: float) -> torch.nn.Sequential:
    if not rate:
        return network
    layers = [[x, torch.nn.Dropout(rate)] if isinstance(x, torch.nn.ReLU) else [x] for x in network]
    return torch.nn.Sequential(*itertools.chain(*layers))


# ------------------------------------------------------------------------------------------------- the study

FIRST = Setting(1e-3, 256)  # what protocol=clean was before this study, with patience 3 and 30 epochs: the reference
CHOSEN = Setting(3e-4, 128)
GRID = [Setting(rate, batch) for rate in (1e-3, 3e-4, 1e-4) for batch in (64, 128, 256, 1024)]
GRID = [FIRST, *(s for s in GRID if s not in (FIRST, Setting(1e-3, 128), Setting(1e-4, 128), Setting(1e-4, 1024)))]
LARGE = [FIRST, CHOSEN, Setting(3e-4, 64), Setting(1e-4, 64), Setting(1e-4, 128)]
MORE = [
    CHOSEN._replace(weight_decay=1e-3),
    CHOSEN._replace(weight_decay=1e-2),
    CHOSEN._replace(weight_decay=1.0, decoupled=True),
    CHOSEN._replace(dropout=0.2),
    CHOSEN._replace(learning_rate=1e-3, cosine=True, max_epochs=6),
]
WIDE = [FIRST, CHOSEN, Setting(1e-4, 128)]
NARROW = [FIRST, *(Setting(rate, batch) for rate in (1e-3, 3e-4) for batch in (64, 32, 16)), CHOSEN, Setting(3e-3, 64)]
NARROW = [s._replace(max_epochs=200) for s in NARROW]


class Part(NamedTuple):
    """Settings tried together under the same conditions; training runs go on for `patience` epochs."""

    conditions: list[Condition]
    settings: list[Setting]
    patience: int


def conditions(worlds: Iterable[str], quantities: tuple[int, ...], seeds: int) -> Iterator[Condition]:
    """Every world and quantity; beta in a Latin square over them and the seeds, so that each meets each."""
    for (w, world), (q, n), seed in itertools.product(enumerate(worlds), enumerate(quantities), range(seeds)):
        beta = BETAS[(w + q + seed) % len(BETAS)]
        for objective in LOSSES:
            yield Condition(world, n, beta, objective, seed)


def run(world: World, wanted: list[Condition], settings: list[Setting], patience: int, out: Path) -> None:
    """Append the trajectories in one world that `out` lacks, one JSON line each."""
    known = set(read(out))
    for condition in wanted:
        missing = [s for s in settings if (condition, s) not in known]
        data = Data.of(world, condition) if missing else None
        for setting in missing:
            assert data is not None
            trajectory = Run(data, world.hidden, condition, setting).trajectory(patience)
            with out.open("a") as file:
                file.write(json.dumps([condition, setting, trajectory]) + "\n")


def read(out: Path) -> dict[tuple[Condition, Setting], Trajectory]:
    """All trajectories of a file."""
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    return {(Condition(*c), Setting(*s)): Trajectory(t[0], [Epoch(*e) for e in t[1]], t[2]) for c, s, t in lines}


class Difference(NamedTuple):
    """A paired difference to the reference setting over conditions: mean and standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Difference:
        """Mean and standard error (nan for a single value)."""
        spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), float(spread / math.sqrt(len(values))))

    def text(self, unit: float, digits: int = 1) -> str:
        """In units of `unit`."""
        return f"{self.mean / unit:+.{digits}f} ± {self.error / unit:.{digits}f}"


class Rule(NamedTuple):
    """A setting with its stopping rule."""

    setting: Setting
    patience: int
    max_epochs: int

    def __str__(self) -> str:
        return f"{self.setting}, patience {self.patience}"


def table(found: dict[tuple[Condition, Setting], Trajectory], rules: list[Rule], reference: Rule) -> str:
    """Markdown: every rule against the reference, by objective, over the conditions that all of them ran in.

    Differences of outer loss in thousandths of a nat (below 0: better), of pairwise accuracy in percentage points;
    epochs until stop and comparison visits (visits = epochs x training comparisons) relative to the reference.
    """
    lines = []
    for objective in LOSSES:
        shared = [
            c for c in dict.fromkeys(c for c, _ in found)
            if c.objective == objective and all((c, r.setting) in found for r in (reference, *rules))
        ]  # fmt: skip
        quantities = sorted({c.n for c in shared})
        lines += ["", f"**{objective}**, {len(shared)} conditions", ""]
        lines.append("| setting | loss | " + "".join(f"n={n} | " for n in quantities) + "accuracy | epochs | visits |")
        lines.append("|---" * (5 + len(quantities)) + "|")
        lines += [_row(found, shared, quantities, rule, reference) for rule in rules]
    return "\n".join(lines)


def _row(
    found: dict[tuple[Condition, Setting], Trajectory],
    shared: list[Condition],
    quantities: list[int],
    rule: Rule,
    reference: Rule,
) -> str:
    def kept(condition: Condition, rule: Rule) -> tuple[Epoch, int]:
        return found[condition, rule.setting].kept(rule.patience, rule.max_epochs)

    pairs = [(kept(c, rule), kept(c, reference)) for c in shared]
    loss = [mine.loss - other.loss for (mine, _), (other, _) in pairs]
    accuracy = [mine.accuracy - other.accuracy for (mine, _), (other, _) in pairs]
    epochs = np.mean([kept(c, rule)[1] / found[c, rule.setting].n_train for c in shared])
    visits = np.exp(np.mean([math.log(mine / other) for (_, mine), (_, other) in pairs]))
    by_n = [Difference.of([d for d, c in zip(loss, shared, strict=True) if c.n == n]).text(1e-3) for n in quantities]
    cells = [str(rule), Difference.of(loss).text(1e-3), *by_n, Difference.of(accuracy).text(1e-2, 2)]
    return f"| {' | '.join(cells)} | {epochs:.1f} | {visits:.2f} |"


def parts(with_real: bool, seeds: int) -> dict[str, Part]:
    """The parts of the study by name, cheap ones first."""
    everywhere = list(conditions(["easy", "middle", "hard"], (250, 1000, 4000, 16_000), seeds))
    everywhere += list(conditions(["real"], (1000, 4000, 16_000), seeds)) if with_real else []
    central = [c for c in everywhere if c.n in (1000, 4000)]
    wide = [("wide", 5000, beta, o, s) for beta, s in ((1.0, 0), (5.0, 1), (5.0, 2), (1.0, 3)) for o in LOSSES]
    return {
        "grid": Part([c for c in everywhere if c.n < 16_000], GRID, 4),
        "large": Part([c for c in everywhere if c.n == 16_000], LARGE, 2),
        "more": Part(central, [FIRST, CHOSEN, *MORE], 3),
        "wide": Part([Condition(*c) for c in wide], WIDE, 2),
        "narrow": Part(list(conditions(["narrow"], (62, 125, 250, 500), 3)), NARROW, 4),
    }


def make_world(name: str, banks: Path, table: Path | None) -> World:
    """The world of a name, generated into a folder of `banks` once. wide: the paper's D and layers; narrow: tiny."""
    if name == "quick":
        return simulated("easy", 300, 40, 16, (8,), banks / name)
    if name == "narrow":
        return simulated("middle", 500, 400, 32, (64, 32), banks / name)
    if name == "wide":
        return simulated("middle", 5600, 400, 2048, (1024, 512), banks / name)
    if name == "real":
        assert table is not None
        return real(table, 150, (512, 256), banks / name)
    return simulated(name, 16_000, 400, 128, (512, 256), banks / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="*", help="grid, large, more, wide, narrow; none: only the tables of what OUT holds"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of trajectories, continued")
    parser.add_argument("--banks", type=Path, help="folder of banks (default: beside OUT)")
    parser.add_argument("--real", type=Path, help="table of real responses as in sweep=examples/alpaca_eval")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two settings on a tiny bank, seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = parts(args.real is not None, args.seeds)
    if args.quick:
        known = {"quick": Part(list(conditions(["quick"], (100,), 2)), [FIRST, CHOSEN._replace(max_epochs=8)], 2)}
    for name in known if args.quick else args.part:
        for world, group in itertools.groupby(known[name].conditions, key=lambda c: c.world):
            made = make_world(world, args.banks or args.out.with_suffix(""), args.real)
            run(made, list(group), known[name].settings, known[name].patience, args.out)
    found = read(args.out)
    for name, part in known.items():
        part_found = {key: t for key, t in found.items() if key[0] in part.conditions and key[1] in part.settings}
        tried = [s for s in part.settings if any(s == setting for _, setting in part_found)]
        if tried:
            rules = [Rule(s, patience, 200) for patience in (1, 2, 3)[: part.patience] for s in tried]
            print(f"\n## {name}\n{table(part_found, rules, Rule(part.settings[0], min(3, part.patience), 30))}")


if __name__ == "__main__":
    main()
