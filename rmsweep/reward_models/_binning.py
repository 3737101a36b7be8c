"""Embeddings binned for LightGBM once, for many cells of a bank."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from rmsweep.bank import Floats, Ints, Split
from rmsweep.reward_models._convert import gathered

SAMPLE_ROWS = 20_000  # rows behind the bank's bin edges
BATCH_ROWS = 1024  # in fp32 they fit memory that is reused
MAX_POOL_BYTES = 1 << 30  # a binned bank of the papers' full size has 0.9e9


class BinnedBank:
    """Training sets under bin edges of a fixed sample of a split: up to 20,000 evenly spaced responses.

    The whole split is binned once the cells of a unit have binned as many rows between them (it then costs at
    most twice the cheaper way) and it fits in MAX_POOL_BYTES; a training set is then a copy of binned rows.
    Both ways give the same bits, so numbers never depend on which cells came before.
    """

    def __init__(self, split: Split, params: dict[str, Any]) -> None:
        self.split, self.params = split, params
        valid = np.flatnonzero(np.isfinite(split.golden.reshape(-1)))
        n = min(len(valid), SAMPLE_ROWS)
        sample = gathered(split, valid[np.arange(n) * len(valid) // n])
        self.edges = lightgbm.Dataset(sample, np.zeros(n), params=params).construct()
        self.pool: lightgbm.Dataset | None = None
        self.rows_binned = 0

    def dataset(self, rows: Ints, target: NDArray[np.float32]) -> lightgbm.Dataset:
        """The binned training set of flat bank rows, which may repeat, in row order."""
        order = np.argsort(rows, kind="stable")
        rows, target = rows[order], target[order]
        if self._pool_pays(len(rows)):
            self.pool = self._bin(np.arange(self.split.golden.size)).construct()
        self.rows_binned += len(rows)
        chosen = self._bin(rows) if self.pool is None else self.pool.subset(rows.tolist())
        return chosen.construct().set_label(target)  # a subset forgets labels that it is given before

    def _pool_pays(self, n: int) -> bool:
        n_bytes = self.split.golden.size * self.split.dim * (1 if self.params["max_bin"] < 256 else 2)
        worth = self.rows_binned and self.rows_binned + n >= self.split.golden.size
        return self.pool is None and bool(worth) and n_bytes <= MAX_POOL_BYTES

    def _bin(self, rows: Ints) -> lightgbm.Dataset:
        source = _Rows(self.split, rows)
        return lightgbm.Dataset(source, np.zeros(len(rows)), reference=self.edges, params=self.params)


class _Rows(lightgbm.Sequence):
    """Flat bank rows, gathered batch by batch while LightGBM bins them."""

    batch_size = BATCH_ROWS

    def __init__(self, split: Split, rows: Ints) -> None:
        self.split, self.rows = split, rows

    def __getitem__(self, index: Any) -> Floats:
        return gathered(self.split, self.rows[index])

    def __len__(self) -> int:
        return len(self.rows)
