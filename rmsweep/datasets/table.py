"""The user's own file: one row per response with its prompt and golden reward, Parquet or JSON lines.

Prompts keep the order in which they first appear, responses the order of their rows. Prompts may have any number
of responses: the bank is padded (golden NaN, embedding zero) up to the longest prompt of each split.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.bank import SPLITS, Ints, write_notes, write_prompts
from rmsweep.component import component, downstream, silent
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.datasets._checks import Problems, is_text, normalised, shown
from rmsweep.datasets._rows import Batch, batches, column_names
from rmsweep.errors import DataError, unknown
from rmsweep.rng import stream
from rmsweep.size import Size

Scalar = str | bool | int | float | None
Count = Annotated[int, Field(ge=1)]
FLOAT32_MAX = float(np.finfo(np.float32).max)
SPLIT_FIELDS: dict[str, Any] = {
    "seed": 0, "split_seed": 0, "n_train_prompts": None, "n_test_prompts": None, "test_fraction": 0.25, "base_llms": (),
    "reward_scale": 1.0, "center": "none", "duplicates": "keep", "min_responses": 1, "max_responses": None,
}  # fmt: skip


@component("dataset", version=1)
@dataclass(frozen=True)
class Table:
    """A table of responses with golden rewards.

    path: FILE.parquet or FILE.jsonl. *_column: names of its columns; without prompt_id_column the prompt's text
    identifies the prompt; embedding_column (lists of equal length) goes with embedder=native.
    where: rows to use, {column: value} or {column: [values]}, all of which must hold (equality, nothing else).
    split_column holds train or test; without it prompts are split at random (split_seed): n_train_prompts and
    n_test_prompts, or test_fraction of them for testing. Prompts whose texts agree up to whitespace never straddle.
    empty: responses without any text: error, drop or keep. duplicates: drop keeps the first of equal responses to a
    prompt. min_responses: prompts with fewer usable responses are left out, before the split; those with a single
    one stay by default and cannot be compared with themselves. max_responses: a random choice of so many per prompt.
    center: prompt subtracts from each golden reward the mean of its prompt's usable responses.
    seed: of max_responses, of the embedder and of evaluation pairs.
    """

    uses_size: ClassVar[bool] = False

    path: str = silent("")
    prompt_column: str = "prompt"
    response_column: str = "response"
    golden_column: str = "golden_reward"
    prompt_id_column: str | None = None
    category_column: str | None = None
    embedding_column: str | None = None
    split_column: str | None = None
    where: dict[str, Scalar | list[Scalar]] = field(default_factory=dict, hash=False)
    n_train_prompts: Count | None = None
    n_test_prompts: Count | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    split_seed: Annotated[int, Field(ge=0)] = 0
    center: Literal["none", "prompt"] = "none"
    empty: Literal["error", "drop", "keep"] = "error"
    duplicates: Literal["keep", "drop"] = "keep"
    min_responses: Count = 1
    max_responses: Count | None = None
    reward_scale: RewardScale = downstream(1.0)
    seed: Annotated[int, Field(ge=0)] = 0
    base_llms: tuple[str, ...] = silent(("table",))

    @property
    def default_embedder(self) -> str:
        """The file's own embeddings where a column is named, else `lsa`."""
        return "native" if self.embedding_column else "lsa"

    def inputs(self, llm: Any, embedder: Any) -> dict[str, Path]:
        """The file."""
        if not self.path:
            raise DataError("dataset.path is not set; dataset.path=FILE names a .parquet or .jsonl file")
        path = Path(self.path).expanduser()
        column_names(path)
        return {"table": path}

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Responses per prompt; raises DataError with all problems of the file (row, column, value, allowed)."""
        sides = self._sides(embedder)
        return BankShape(sides[0].count, sides[1].count, has_texts=True)

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Write the bank: golden rewards, texts, and the column's embeddings or those that `embedder` fits on train."""
        sides = self._sides(embedder)
        for name, side in zip(SPLITS, sides, strict=True):
            np.save(folder / f"golden_{name}.npy", side.padded(side.golden.astype(np.float32)))
            write_prompts(folder, name, side.prompt_id, side.prompt, side.nested(), side.category)
        source = self._source(embedder)
        dim = (
            _copy_embeddings(source, sides, folder)
            if embedder.kind == "native"
            else _embed(self, embedder, sides, folder)
        )
        notes = {**source.notes, **_summary(source, sides)}
        if (asked := getattr(embedder, "dim", dim)) != dim:
            notes["embedding_dim_asked"] = asked
        write_notes(folder, seed=self.seed, embedding_dim=dim, **notes)

    def _source(self, embedder: Any) -> Source:
        """The file's usable rows, read and checked once per process while the file stays as it is."""
        if embedder.kind == "native" and not self.embedding_column:
            raise DataError(
                "embedder=native needs dataset.embedding_column=NAME (one list of numbers per row); or embedder=lsa"
            )
        if embedder.kind != "native" and not hasattr(embedder, "fit_embed"):
            raise DataError(
                f"embedder={embedder.kind} cannot embed a table's texts; allowed: lsa, or native with dataset.embedding_column"
            )
        path = self.inputs(None, embedder)["table"]
        column = self.embedding_column if embedder.kind == "native" else None
        reading = dataclasses.replace(self, **SPLIT_FIELDS, path=str(path.resolve()), embedding_column=column)
        stat = path.stat()
        return _read(reading, (stat.st_mtime_ns, stat.st_size))

    def _sides(self, embedder: Any) -> tuple[Side, Side]:
        """Train and test side with this table's choice of prompts and responses."""
        source = self._source(embedder)
        keep = _usable_rows(self, source)
        count = np.bincount(source.prompt_of[keep], minlength=len(source.prompt))
        train, test = _split_prompts(self, source, np.flatnonzero(count >= self.min_responses))
        return Side.of(self, source, keep, train), Side.of(self, source, keep, test)


@dataclass(frozen=True, eq=False)
class Source:
    """Checked rows of the file, R of them, and its P prompts in order of first appearance.

    row [R] data row in the file; prompt_of [R]; golden [R] float64; same [P]: prompts with equal text share a number;
    side [P] train or test where the file says; dim and dtype of the embedding column.
    """

    path: Path
    embedding_column: str | None
    row: Ints
    prompt_of: Ints
    golden: NDArray[np.float64]
    response: list[str]
    prompt: list[str]
    prompt_id: list[str]
    category: list[str] | None
    side: list[str] | None
    same: Ints
    dim: int
    dtype: type[np.floating[Any]]
    notes: dict[str, int]


@dataclass(frozen=True, eq=False)
class Side:
    """One split: its rows (indices into Source's, sorted by prompt), each with a place [prompt, slot], and its prompts."""

    rows: Ints
    place: tuple[Ints, Ints]
    count: Ints
    golden: NDArray[np.float64]
    response: list[str]
    prompt: list[str]
    prompt_id: list[str]
    category: list[str] | None

    @classmethod
    def of(cls, table: Table, source: Source, keep: Ints, prompts: Ints) -> Side:
        """The rows of `keep` that belong to `prompts` (both ascending)."""
        position = np.full(len(source.prompt), -1)
        position[prompts] = np.arange(len(prompts))
        rows = keep[position[source.prompt_of[keep]] >= 0]
        rows = rows[np.argsort(source.prompt_of[rows], kind="stable")]
        prompt = position[source.prompt_of[rows]]
        count = np.bincount(prompt, minlength=len(prompts))
        slot = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        golden = source.golden[rows]
        if table.center == "prompt":
            golden = golden - (np.bincount(prompt, weights=golden, minlength=len(prompts)) / count)[prompt]
        return cls(
            rows, (prompt, slot), count, golden,
            response=[source.response[i] for i in rows],
            prompt=[source.prompt[i] for i in prompts],
            prompt_id=[source.prompt_id[i] for i in prompts],
            category=None if source.category is None else [source.category[i] for i in prompts],
        )  # fmt: skip

    def padded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """One value per row as [P, N], NaN where a prompt has fewer responses."""
        result = np.full((len(self.count), int(self.count.max())), np.nan, dtype=np.float32)
        result[self.place] = values
        return result

    def nested(self) -> list[list[str]]:
        """Responses per prompt."""
        ends = np.cumsum(self.count)
        return [
            self.response[end - n : end] for end, n in zip(ends.tolist(), self.count.tolist(), strict=True)
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, response) of every row."""
        return [
            (self.prompt[p], response)
            for p, response in zip(self.place[0].tolist(), self.response, strict=True)
        ]


@functools.lru_cache(maxsize=2)
def _read(table: Table, stat: tuple[int, int]) -> Source:
    """Read and check the whole file; `stat` makes a changed file a new entry of the cache."""
    path = Path(table.path)
    problems = Problems(path)
    _check_columns(table, column_names(path), problems)
    problems.check()
    reader = _Reader(table, problems)
    for batch in batches(path, list(_columns(table).values()) + list(table.where), problems):
        reader.add(batch)
    return reader.finish()


def _columns(table: Table) -> dict[str, str]:
    """Field of the config -> column of the file, for the columns in use."""
    fields = [f.name for f in dataclasses.fields(table) if f.name.endswith("_column")]
    return {name: getattr(table, name) for name in fields if getattr(table, name) is not None}


def _check_columns(table: Table, names: Sequence[str], problems: Problems) -> None:
    for key, column in [*_columns(table).items(), *((f"where.{column}", column) for column in table.where)]:
        if column not in names:
            problems.add(f"dataset.{key}: {unknown('column', column, names)}")
        elif names.count(column) > 1:
            problems.add(f"dataset.{key}: the file has {names.count(column)} columns called {column!r}")


class _Reader:
    """Checks row after row and gathers what is usable."""

    def __init__(self, table: Table, problems: Problems) -> None:
        self.table, self.problems = table, problems
        self.row: list[int] = []
        self.prompt_of: list[int] = []
        self.golden: list[float] = []
        self.response: list[str] = []
        self.index: dict[str, int] = {}  # prompt id -> prompt
        self.first_row: list[int] = []
        self.details: dict[str, list[str]] = {"prompt_column": [], "category_column": [], "split_column": []}
        self.seen: dict[str, dict[str, None]] = {column: {} for column in table.where}
        self.dim, self.dtype = 0, np.dtype(np.float32)
        self.notes = {"rows": 0, "rows_filtered_out": 0, "empty_dropped": 0}

    def add(self, batch: Batch) -> None:
        """Take one batch."""
        fields = {key: batch.columns[column] for key, column in _columns(self.table).items()}
        self.notes["rows"] += len(batch.rows)
        for i, row in enumerate(batch.rows):
            if self._wanted({column: batch.columns[column][i] for column in self.table.where}):
                self._take(row, {key: values[i] for key, values in fields.items()})

    def finish(self) -> Source:
        """Everything gathered; raises DataError with all problems found."""
        if not self.row and not self.problems.count:
            self._no_rows()
        same = self._same_texts()
        self.problems.check()
        return Source(
            path=Path(self.table.path), embedding_column=self.table.embedding_column,
            row=np.array(self.row, dtype=np.int64), prompt_of=np.array(self.prompt_of, dtype=np.int64),
            golden=np.array(self.golden), response=self.response,
            prompt=self.details["prompt_column"], prompt_id=list(self.index),
            category=self.details["category_column"] or None, side=self.details["split_column"] or None,
            same=same, dim=self.dim, dtype=self.dtype.type, notes=self.notes,
        )  # fmt: skip

    def _wanted(self, values: Mapping[str, Any]) -> bool:
        wanted = True
        for column, value in values.items():
            if len(self.seen[column]) < 10:
                self.seen[column][shown(value)] = None
            allowed = self.table.where[column]
            wanted &= any(_equal(value, a) for a in (allowed if isinstance(allowed, list) else [allowed]))
        self.notes["rows_filtered_out"] += not wanted
        return wanted

    def _take(self, row: int, values: dict[str, Any]) -> None:
        """Check one row and keep it where nothing is wrong with it."""
        before = self.problems.count
        for key, value in values.items():
            self._check_value(row, key, value)
        if self.problems.count > before:
            return
        if not values["response_column"].strip() and self.table.empty != "keep":
            self.notes["empty_dropped"] += 1
            return
        self.row.append(row)
        self.prompt_of.append(self._prompt(row, values))
        self.golden.append(float(values["golden_column"]))
        self.response.append(values["response_column"])

    def _check_value(self, row: int, key: str, value: Any) -> None:
        column = getattr(self.table, key)
        if key == "golden_column":
            if (
                not _is_real(value)
                or not abs(value if isinstance(value, int) else float(value)) <= FLOAT32_MAX
            ):
                self.problems.at(row, column, value, "a finite number")
        elif key == "embedding_column":
            self._check_vector(row, column, value)
        elif key == "prompt_id_column" and isinstance(value, int) and not isinstance(value, bool):
            pass
        elif not is_text(value):
            self.problems.at(
                row, column, value, "text (valid UTF-8)" + ", or a whole number" * (key == "prompt_id_column")
            )
        elif key == "split_column" and value not in SPLITS:
            self.problems.at(row, column, value, "train, test (dataset.where={...} selects rows)")
        elif key in ("prompt_column", "prompt_id_column") and not value.strip():
            self.problems.at(row, column, value, "text that is not empty")
        elif key == "response_column" and self.table.empty == "error" and not value.strip():
            self.problems.at(
                row,
                column,
                value,
                "text that is not empty; dataset.empty=drop leaves such rows out, =keep uses them",
            )

    def _check_vector(self, row: int, column: str, value: Any) -> None:
        vector = _vector(value)
        if vector is None:
            self.problems.at(row, column, value, "a list of numbers")
            return
        if not self.dim:
            self.dim, self.dtype = len(vector), vector.dtype
        if len(vector) != self.dim:
            self.problems.at(
                row, column, f"{len(vector)} numbers", f"{self.dim} numbers, as in the first row"
            )
        elif not np.isfinite(vector).all():
            at = int(np.argmin(np.isfinite(vector)))
            self.problems.at(row, column, f"[{at}] = {vector[at]}", f"finite numbers that fit {self.dtype}")

    def _prompt(self, row: int, values: dict[str, Any]) -> int:
        """Index of the row's prompt; what the prompt's first row says must hold in all of them."""
        identity = values["prompt_id_column" if "prompt_id_column" in values else "prompt_column"]
        index = self.index.setdefault(str(identity), len(self.first_row))
        details = {key: value for key, value in values.items() if key in self.details}
        if index == len(self.first_row):
            self.first_row.append(row)
            for key, value in details.items():
                self.details[key].append(value)
        for key, value in details.items():
            if (first := self.details[key][index]) != value:
                self.problems.at(
                    row, getattr(self.table, key), value,
                    f"{shown(first)}, as in row {self.first_row[index]} of the same prompt {shown(str(identity))}",
                )  # fmt: skip
        return index

    def _same_texts(self) -> Ints:
        """Per prompt a number that prompts of equal text (up to whitespace and NFC) share; in one split each."""
        first: dict[str, int] = {}
        prompts, sides = self.details["prompt_column"], self.details["split_column"]
        same = [first.setdefault(normalised(text), i) for i, text in enumerate(prompts)]
        for i, j in enumerate(same):
            if sides and sides[i] != sides[j]:
                allowed = f"{sides[j]!r}, as the prompt with the same text in row {self.first_row[j]}"
                self.problems.at(self.first_row[i], str(self.table.split_column), sides[i], allowed)
        return np.unique(same, return_inverse=True)[1].astype(np.int64)

    def _no_rows(self) -> None:
        held = "; ".join(f"{column} holds {', '.join(values)}" for column, values in self.seen.items())
        filtered = f": dataset.where={self.table.where} matches none of {self.notes['rows']} rows ({held})"
        self.problems.add("no usable rows" + (filtered if self.notes["rows_filtered_out"] else ""))


def _equal(value: Any, allowed: Scalar) -> bool:
    """Equality of plain values that keeps True and 1 apart."""
    plain = value is None or isinstance(value, str | int | float)
    return plain and isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


def _vector(value: Any) -> NDArray[np.floating[Any]] | None:
    """A row's embedding as float16 (kept) or float32; None for anything else than a list of numbers."""
    if isinstance(value, list) and not all(_is_real(v) for v in value):
        return None
    if not isinstance(value, list | np.ndarray) or not len(value):
        return None
    vector = np.asarray(value)
    if vector.dtype.kind not in "fiu":
        return None
    with np.errstate(over="ignore"):  # what does not fit becomes infinite and is refused
        return vector if vector.dtype == np.float16 else vector.astype(np.float32)


def _usable_rows(table: Table, source: Source) -> Ints:
    """Rows left after dropping duplicates and choosing max_responses per prompt, ascending."""
    keep = np.arange(len(source.row))
    if table.duplicates == "drop":
        keep = keep[~_repeated(source)]
    if table.max_responses is not None:
        shuffled = stream(table.seed, "max_responses").permutation(keep)
        prompt = source.prompt_of[shuffled]
        order = np.argsort(prompt, kind="stable")
        count = np.bincount(prompt, minlength=len(source.prompt))
        slot = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        keep = np.sort(shuffled[order[slot < table.max_responses]])
    return keep


def _repeated(source: Source) -> NDArray[np.bool_]:
    """Rows whose response text stood in an earlier row of the same prompt, [R]."""
    seen: set[tuple[int, str]] = set()
    keys = zip(source.prompt_of.tolist(), source.response, strict=True)
    return np.array([key in seen or bool(seen.add(key)) for key in keys], dtype=bool)  # type: ignore[func-returns-value]


def _split_prompts(table: Table, source: Source, prompts: Ints) -> tuple[Ints, Ints]:
    """Training and test prompts, ascending; equal texts on one side only. DataError when there are too few."""
    if source.side is not None:
        if (table.n_train_prompts, table.n_test_prompts) != (None, None):
            raise DataError(
                "dataset.split_column already says which prompts train and test; leave n_*_prompts null"
            )
        side = np.array(source.side)[prompts]
        train, test = prompts[side == "train"], prompts[side == "test"]
    else:
        train, test = _random_split(table, source, prompts)
    wanted = (table.n_train_prompts or 1, table.n_test_prompts or 1)
    if len(train) < wanted[0] or len(test) < wanted[1]:
        raise DataError(
            f"{source.path}: {len(prompts)} usable prompts give {len(train)} for training and {len(test)} for testing; "
            f"needed: {wanted[0]} and {wanted[1]} (dataset.n_train_prompts, n_test_prompts, min_responses={table.min_responses})"
        )
    return np.sort(train), np.sort(test)


def _random_split(table: Table, source: Source, prompts: Ints) -> tuple[Ints, Ints]:
    rank = stream(table.split_seed, "split_prompts").permutation(len(source.prompt))[source.same[prompts]]
    order = prompts[np.argsort(rank, kind="stable")]
    if table.n_train_prompts is not None:
        n_train = table.n_train_prompts
    else:
        n_test = table.n_test_prompts or max(1, math.floor(table.test_fraction * len(prompts) + 0.5))
        n_train = max(0, len(order) - n_test)
    train, rest = order[:n_train], order[n_train:]
    rest = rest[~np.isin(source.same[rest], source.same[train])]
    return train, rest[: table.n_test_prompts]


def _embed(table: Table, embedder: Any, sides: tuple[Side, Side], folder: Path) -> int:
    """Write the embeddings that `embedder` fits on the training side; returns D."""
    embedded = embedder.fit_embed(sides[0].pairs(), sides[1].pairs(), table.seed)
    for name, side, values in zip(SPLITS, sides, embedded, strict=True):
        target = _open_target(folder, name, side, values.shape[1], values.dtype.type)
        target[side.place] = values
        target.flush()
    return int(embedded[0].shape[1])


def _copy_embeddings(source: Source, sides: tuple[Side, Side], folder: Path) -> int:
    """Stream the embedding column into the bank; returns D."""
    place: dict[int, tuple[Any, int, int]] = {}
    targets = [
        _open_target(folder, name, s, source.dim, source.dtype) for name, s in zip(SPLITS, sides, strict=True)
    ]
    for target, side in zip(targets, sides, strict=True):
        for row, prompt, slot in zip(
            source.row[side.rows].tolist(), *(p.tolist() for p in side.place), strict=True
        ):
            place[row] = (target, prompt, slot)
    column = str(source.embedding_column)
    for batch in batches(source.path, [column], Problems(source.path)):
        for row, value in zip(batch.rows, batch.columns[column], strict=True):
            if row in place:
                target, prompt, slot = place[row]
                target[prompt, slot] = _vector(value)
    for target in targets:
        target.flush()
    return source.dim


def _open_target(folder: Path, name: str, side: Side, dim: int, dtype: type[np.floating[Any]]) -> Any:
    """A zero-filled embedding file [P, N, D] on disk."""
    shape = (len(side.count), int(side.count.max()), dim)
    return np.lib.format.open_memmap(folder / f"embedding_{name}.npy", "w+", dtype, shape)


def _summary(source: Source, sides: tuple[Side, Side]) -> dict[str, int]:
    """What is worth knowing of the splits (`rmsweep bank show`)."""
    counts = {f"prompts_{name}": len(side.count) for name, side in zip(SPLITS, sides, strict=True)}
    rows = {f"responses_{name}": len(side.rows) for name, side in zip(SPLITS, sides, strict=True)}
    return {
        **counts,
        **rows,
        "prompts_unused": len(source.prompt) - sum(counts.values()),
        "duplicate_responses": int(_repeated(source).sum()),
        "train_prompts_with_one_response": int((sides[0].count == 1).sum()),
    }
