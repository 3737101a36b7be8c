"""The published pipeline restated: what rmsweep is timed against and compared with

Written from a description of the released training and evaluation scripts of arXiv 2411.04991, not from their text, and
nowhere slower than they are; each comment that begins with "cost:" names what it is that takes the time. Differences
that favour this baseline: one network instead of an ensemble of 3 or 10 of which one is read; metrics once instead of
three times the same; no disk reading (embeddings are handed over as fp32 in memory, the released files' type, outside
the clock). The scripts that train on same-prompt comparisons and the LightGBM runs were never released: for them the
same steps are taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightgbm
import numpy as np
import torch
from _bench import Clock
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split

from rmsweep.bank import Bank, Split
from rmsweep.preferences import Preferences

BON_N = (2, 5, 10, 30, 50, 100, 300, 500)
BON_REPEATS = 100
ROWS_PER_CALL = 500  # of a prompt's test responses, forwarded together
BATCH = 10_240


@dataclass(frozen=True)
class Baseline:
    """One cell of the published pipeline. objective: bt, clf or lgb. epochs: exactly so many, null for early stopping.

    pairing: cross_prompt as released, or same_prompt; bon_repeats: resamples behind best-of-N at each of `bon_n`.
    """

    objective: str
    seed: int = 0
    beta: float = 1.0
    pairing: str = "cross_prompt"
    hidden: tuple[int, int] = (1024, 512)
    rounds: int = 100
    epochs: int | None = None
    bon_n: tuple[int, ...] = BON_N
    bon_repeats: int = BON_REPEATS

    def run(self, bank: Bank, preferences: Preferences, clock: Clock) -> Outcome:
        """Annotate, copy, train, score, measure, each charged to the clock under that name.

        The annotation loop runs for its time only: training gets `preferences`, those of the rmsweep cell beside it,
        so that the two differ in fitting and evaluation alone.
        """
        chance = np.random.RandomState(self.seed)
        golden = bank.train.golden
        with clock("annotate"):
            annotate_loop(golden, len(preferences), self.beta, self.pairing, chance)
        with clock(None):
            rows = training_rows(bank.train, preferences)
        with clock("copies"):
            data = self._copies(rows)
        del rows
        model: Any
        with clock("train"):
            if self.objective == "lgb":
                model, epochs = train_lgb(data, self.rounds), self.rounds
            else:
                model, epochs = train_network(data, self.hidden, self.seed, self.epochs)
        scores = score_test(model, bank.test, clock)
        with clock("metrics"):
            bon = best_of_n(scores, bank.test.golden, self.bon_n, self.bon_repeats)
            spearman = mean_spearman(scores, bank.test.golden)
            quantile = mean_quantile(scores, bank.test.golden)
        return Outcome(bon, spearman, quantile, epochs, scores, len(data.train))

    def _copies(self, rows: Rows) -> SplitCopies:
        if self.objective == "bt":
            return both_orders(rows, self.seed)
        return single_rows(rows, self.seed, as_numpy=self.objective == "lgb")


class Outcome(NamedTuple):
    """Best-of-N by N, mean Spearman over prompts, mean quantile; epochs run; scores [Q, M]; examples trained on."""

    best_of_n: dict[int, float]
    spearman: float
    quantile: float
    epochs: int
    scores: NDArray[np.float32]
    n_train: int


class Rows(NamedTuple):
    """fp32 embeddings of the chosen and of the rejected responses, one array [D] each."""

    chosen: list[NDArray[np.float32]]
    rejected: list[NDArray[np.float32]]


class Copies(NamedTuple):
    """Examples: `x` holds one [E, D] per side (two for pairs, one for single responses), `y` [E]."""

    x: tuple[Any, ...]
    y: Any

    def __len__(self) -> int:  # examples, not fields
        return int(self.y.shape[0])


class SplitCopies(NamedTuple):
    """Training and validation examples."""

    train: Copies
    validation: Copies


def annotate_loop(
    golden: NDArray[Any], n: int, beta: float, pairing: str, chance: np.random.RandomState
) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """The annotation loop: one comparison for each of the first n prompts, (prompt, response) twice and who wins.

    n beyond the number of prompts goes round again.
    """
    n_prompts, n_responses = golden.shape
    n_used = min(n, n_prompts)
    candidates = [chance.choice(n_responses, 2, replace=False) for _ in range(n_used)]
    preferences = []
    for i in range(n):
        i %= n_used
        if pairing == "same_prompt":
            a, b = (i, int(candidates[i][0])), (i, int(candidates[i][1]))
        else:
            # cost: O(n^2) in all, since a draw without replacement shuffles all n prompts to take one of them
            j = int(chance.choice(n_used, 1, replace=False)[0])
            a, b = (i, int(candidates[i][chance.choice(2)])), (j, int(candidates[j][chance.choice(2)]))
        probability = 1 / (1 + np.exp(-beta * (float(golden[b]) - float(golden[a]))))
        preferences.append((a, b, int(chance.binomial(1, probability))))
    return preferences


def training_rows(split: Split, preferences: Preferences) -> Rows:
    """The lists that the annotation loop leaves: an array per chosen and per rejected response."""
    pairs, a_wins = preferences.comparisons, preferences.preference > 0.5
    rows_a, rows_b = pairs.rows_a(split), pairs.rows_b(split)
    used, where = np.unique(np.concatenate([rows_a, rows_b]), return_inverse=True)
    embedding = split.gather(used)
    a, b = where[: len(rows_a)], where[len(rows_a) :]
    chosen, rejected = np.where(a_wins, a, b), np.where(a_wins, b, a)
    return Rows([embedding[k] for k in chosen], [embedding[k] for k in rejected])


def both_orders(rows: Rows, seed: int) -> SplitCopies:
    """Bradley-Terry examples: (chosen, rejected) with target 1, (rejected, chosen) with target 0, then split.

    Mirrored before the split, so that most validation pairs have their mirror in training: part of what was published.
    """
    chosen, rejected = torch.tensor(rows.chosen), torch.tensor(rows.rejected)  # cost: number by number out of a list
    y = torch.cat([torch.ones(len(chosen)), torch.zeros(len(chosen))])
    # cost: every embedding now twice, and twice more below
    return _shuffled_and_split((torch.cat([chosen, rejected]), torch.cat([rejected, chosen])), y, seed)


def single_rows(rows: Rows, seed: int, as_numpy: bool) -> SplitCopies:
    """Classification examples: chosen responses with target 1, rejected ones with target 0, then split."""
    if as_numpy:  # for LightGBM
        x = torch.from_numpy(np.array(rows.chosen + rows.rejected))
    else:
        x = torch.cat([torch.tensor(rows.chosen), torch.tensor(rows.rejected)])  # cost: as above
    y = torch.cat([torch.ones(len(rows.chosen)), torch.zeros(len(rows.rejected))])
    return _shuffled_and_split((x,), y, seed)


def _shuffled_and_split(x: tuple[torch.Tensor, ...], y: torch.Tensor, seed: int) -> SplitCopies:
    """80 % train, 20 % validate, example by example."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = tuple(side[order] for side in x), y[order]  # cost: a copy of everything
    train, validation = (
        torch.from_numpy(i) for i in train_test_split(np.arange(len(y)), test_size=0.2, random_state=42)
    )
    return SplitCopies(  # cost: another
        Copies(tuple(side[train] for side in x), y[train]),
        Copies(tuple(side[validation] for side in x), y[validation]),
    )


def probability(network: torch.nn.Module, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """sigma(f(a) - f(b)) of pairs or sigma(f(x)) of single responses, [E]."""
    rewards = [network(side).squeeze(-1) for side in x]  # cost: fp32 products; a mirrored pair is computed twice
    return torch.sigmoid(rewards[0] - rewards[1] if len(rewards) == 2 else rewards[0])


def train_network(
    data: SplitCopies, hidden: Sequence[int], seed: int, epochs: int | None = None, patience: int = 3
) -> tuple[torch.nn.Sequential, int]:
    """The network with its last weights, and how many epochs it took.

    Adam 1e-3 on the cross-entropy of probabilities (log clamped at -100), batches of min(10240, n), at most 30
    epochs of ceil(n / batch) steps; stop when the newest validation loss exceeds each of the last three.
    """
    torch.manual_seed(seed)
    widths, layers = (data.train.x[0].shape[1], *hidden), []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
    adam, loss = torch.optim.Adam(network.parameters(), lr=1e-3), torch.nn.BCELoss()
    n, losses = len(data.train), []
    batch = min(BATCH, n)
    for _ in range(epochs or 30):
        for _ in range(math.ceil(n / batch)):
            index = torch.randperm(n)[:batch]  # a new subset for every step: an epoch is not a pass over the data
            x = tuple(side[index] for side in data.train.x)  # cost: the batch's embeddings copied
            step = loss(probability(network, x), data.train.y[index])
            adam.zero_grad()
            step.backward()
            adam.step()
        with torch.no_grad():
            losses.append(float(loss(probability(network, data.validation.x), data.validation.y)))
        if epochs is None and stops(losses, patience):
            break
    return network, len(losses)


def stops(losses: Sequence[float], patience: int) -> bool:
    """Whether the newest loss is larger than each of the `patience` ones before it."""
    return len(losses) > patience and all(losses[-1] > previous for previous in losses[-1 - patience : -1])


def train_lgb(data: SplitCopies, rounds: int) -> lightgbm.Booster:
    """LightGBM at the library's defaults on one thread."""
    params = {"objective": "binary", "metric": "binary_logloss", "verbosity": -1, "num_threads": 1}
    # cost: 2048 features binned anew for every cell
    return lightgbm.train(params, lightgbm.Dataset(data.train.x[0].numpy(), data.train.y.numpy()), rounds)


def score_test(model: Any, split: Split, clock: Clock) -> NDArray[np.float32]:
    """Scores [Q, M]: logits of a network, probabilities of a booster, one prompt after the other."""
    scores = np.empty(split.golden.shape, dtype=np.float32 if isinstance(model, torch.nn.Module) else np.float64)
    for q in range(split.n_prompts):
        for start in range(0, split.n_responses, ROWS_PER_CALL):
            part = slice(start, start + ROWS_PER_CALL)
            with clock(None):
                rows = np.asarray(split.embedding[q, part], dtype=np.float32)
            with clock("score"), torch.no_grad():  # cost: fp32 products, 500 rows at a time
                if isinstance(model, torch.nn.Module):
                    scores[q, part] = model(torch.from_numpy(rows)).squeeze(-1).numpy()
                else:
                    scores[q, part] = model.predict(rows, num_threads=1)
    return scores


def best_of_n(
    scores: NDArray[Any], golden: NDArray[Any], ns: Sequence[int], repeats: int = BON_REPEATS
) -> dict[int, float]:
    """Mean golden reward of the top-scored of N responses, by N, over random subsets of each prompt's responses.

    A repeat draws one permutation for all prompts and takes its first N.
    """
    found: dict[int, list[float]] = {n: [] for n in ns}
    for repeat in range(repeats):
        order = np.random.RandomState(repeat).permutation(scores.shape[1])
        for n in ns:
            subset, picked = order[:n], []
            for score, reward in zip(scores, golden, strict=True):  # cost: a Python step per prompt, N and repeat
                picked.append(reward[subset][np.argmax(score[subset])])
            found[n].append(float(np.mean(picked, dtype=np.float64)))
    return {n: float(np.mean(values)) for n, values in found.items()}


def mean_spearman(scores: NDArray[Any], golden: NDArray[Any]) -> float:
    """Mean Spearman correlation over prompts, undefined ones dropped."""
    values = [spearmanr(s, g).statistic for s, g in zip(scores, golden, strict=True)]  # cost: a SciPy call per prompt
    return float(np.nanmean(values))


def mean_quantile(scores: NDArray[Any], golden: NDArray[Any]) -> float:
    """Mean share of a prompt's responses that are worse than the pick."""
    return float(np.mean([np.mean(g < g[np.argmax(s)]) for s, g in zip(scores, golden, strict=True)]))
