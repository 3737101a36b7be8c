"""The bank: responses of one base LLM to one dataset with golden rewards and embeddings, train and test.

Axes: P (Q) prompts, N (M) responses per prompt, D embedding dimensions. Everything downstream sees only the bank,
so a simulated world, an imported table, released embeddings and a real LLM are interchangeable. Ragged data are
padded at the end of a prompt's row: golden NaN marks "no such response".
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rmsweep.errors import DataError

SPLITS = ("train", "test")
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Split:
    """One side (train or test) of a bank.

    golden [P, N] float32, NaN = no such response, only after the last valid one; embedding [P, N, D] fp16 or fp32,
    often memory-mapped, padding zero; prompt_id, prompt, category [P]; response [P][count]; ceiling [P, N] =
    E[golden | embedding], the best score any reward model can reach, where the world knows it.
    """

    golden: Floats
    embedding: Floats
    prompt_id: Sequence[str]
    prompt: Sequence[str] | None = None
    response: Sequence[Sequence[str]] | None = None
    category: Sequence[str] | None = None
    ceiling: Floats | None = None

    def __repr__(self) -> str:
        texts = ", with texts" if self.response is not None else ""
        return f"Split({self.n_prompts} prompts x {self.n_responses} responses, D={self.dim}{texts})"

    @functools.cached_property
    def count(self) -> Ints:
        """Responses per prompt, int64 [P]."""
        return np.isfinite(self.golden).sum(axis=1)

    @property
    def n_prompts(self) -> int:
        """P."""
        return int(self.golden.shape[0])

    @property
    def n_responses(self) -> int:
        """N, the largest number of responses of any prompt."""
        return int(self.golden.shape[1])

    @property
    def dim(self) -> int:
        """D."""
        return int(self.embedding.shape[2])

    def rows(self, prompt: Ints, response: Ints) -> Ints:
        """Flat row ids prompt * N + response; the currency of comparisons and training."""
        return prompt * self.n_responses + response

    def gather(self, rows: Ints, dtype: type[np.floating[Any]] | None = np.float32) -> Floats:
        """Embeddings of flat rows [len(rows), D], in the bank's own type if dtype is None; copies those rows only."""
        prompt, response = np.divmod(rows, self.n_responses)
        return np.asarray(self.embedding[prompt, response], dtype=dtype)

    def golden_of(self, rows: Ints) -> Floats:
        """Golden rewards of flat rows as float64 [len(rows)]."""
        return self.golden.reshape(-1)[rows].astype(np.float64)

    def chunks(self, max_rows: int = 16384) -> Iterator[slice]:
        """Slices over prompts with at most about `max_rows` responses each, for streaming."""
        step = max(1, max_rows // max(1, self.n_responses))
        for start in range(0, self.n_prompts, step):
            yield slice(start, min(start + step, self.n_prompts))

    def take(self, prompts: Ints) -> Split:
        """The same split with the given prompts only (copies their embeddings)."""

        def pick(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in prompts]

        return Split(
            golden=self.golden[prompts],
            embedding=np.asarray(self.embedding[prompts]),
            prompt_id=[self.prompt_id[i] for i in prompts],
            prompt=pick(self.prompt),
            response=pick(self.response),
            category=pick(self.category),
            ceiling=None if self.ceiling is None else self.ceiling[prompts],
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """Train and test split of one bank; `seed` seeds what belongs to the bank (evaluation pairs), not to a cell."""

    train: Split
    test: Split
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_arrays(
        golden_train: Floats,
        embedding_train: Floats,
        golden_test: Floats,
        embedding_test: Floats,
        *,
        prompt_id_train: Sequence[str] | None = None,
        prompt_id_test: Sequence[str] | None = None,
        response_train: Sequence[Sequence[str]] | None = None,
        response_test: Sequence[Sequence[str]] | None = None,
        seed: int = 0,
    ) -> Bank:
        """A bank from arrays in memory: golden [P, N] and [Q, M], embedding [P, N, D] and [Q, M, D].

        A NaN golden reward at the end of a row means "no such response", whatever its embedding. Raises
        DataError on wrong shapes, infinite rewards, non-finite embeddings, duplicate prompt ids or a prompt in both.
        """
        train = _checked_split("train", golden_train, embedding_train, prompt_id_train, response_train)
        test = _checked_split("test", golden_test, embedding_test, prompt_id_test, response_test)
        check_banks(train, test)
        return Bank(train, test, seed=seed)

    def __repr__(self) -> str:
        return f"Bank(train={self.train!r}, test={self.test!r}, seed={self.seed})"

    def write(self, folder: str | Path) -> None:
        """Write the bank's files into `folder`, made where it is missing (layout: see `read`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, split in zip(SPLITS, (self.train, self.test), strict=True):
            np.save(folder / f"golden_{name}.npy", np.asarray(split.golden, dtype=np.float32))
            np.save(folder / f"embedding_{name}.npy", np.asarray(split.embedding))
            if split.ceiling is not None:
                np.save(folder / f"ceiling_{name}.npy", np.asarray(split.ceiling, dtype=np.float32))
            write_prompts(folder, name, split.prompt_id, split.prompt, split.response, split.category)
        write_notes(folder, seed=self.seed, **self.notes)

    @staticmethod
    def read(folder: Path) -> Bank:
        """Open a bank folder, embeddings memory-mapped and never unpickled.

        Files per split S: golden_S.npy [P, N], embedding_S.npy [P, N, D] (or reference_S.json naming a file elsewhere
        and its layout), optional ceiling_S.npy, prompts_S.parquet; bank.json carries seed and notes.
        """
        notes = json.loads((folder / "bank.json").read_text())
        train, test = (_read_split(folder, name) for name in SPLITS)
        return Bank(train, test, seed=notes.pop("seed"), notes=notes)


def write_prompts(
    folder: Path,
    name: str,
    prompt_id: Sequence[str],
    prompt: Sequence[str] | None = None,
    response: Sequence[Sequence[str]] | None = None,
    category: Sequence[str] | None = None,
) -> None:
    """Write prompts_{name}.parquet: one row per prompt with its id and, where known, texts and category."""
    columns: dict[str, Any] = {"prompt_id": pa.array(list(prompt_id), pa.string())}
    if prompt is not None:
        columns["prompt"] = pa.array(list(prompt), pa.string())
    if response is not None:
        columns["response"] = pa.array([list(r) for r in response], pa.list_(pa.string()))
    if category is not None:
        columns["category"] = pa.array(list(category), pa.string())
    pq.write_table(pa.table(columns), folder / f"prompts_{name}.parquet", write_page_checksum=True)


def write_notes(folder: Path, *, seed: int, **notes: Any) -> None:
    """Write bank.json: the bank's seed and anything worth showing (`rmsweep bank show`)."""
    (folder / "bank.json").write_text(json.dumps({"seed": seed, **notes}, indent=1, sort_keys=True))


class NpyWriter:
    """A .npy file written front to back in blocks of rows: memory stays at one block, whatever the shape."""

    def __init__(self, path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._dtype = np.dtype(dtype)

    def append(self, block: NDArray[Any]) -> None:
        """Write the next rows."""
        self._file.write(np.ascontiguousarray(block, dtype=self._dtype).data)

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_reference(folder: Path, name: str, path: Path, layout: str) -> None:
    """Write reference_{name}.json: the embeddings stay in `path`, axes in `layout` ("PND" or "NPD")."""
    (folder / f"reference_{name}.json").write_text(json.dumps({"path": str(path), "layout": layout}))


def open_npy(path: Path) -> NDArray[Any]:
    """Memory-map a .npy file; object arrays (pickles) and broken headers are refused with a DataError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a plain .npy array ({error}); allowed: float16, float32, float64") from None


def _read_split(folder: Path, name: str) -> Split:
    golden = open_npy(folder / f"golden_{name}.npy")
    reference = folder / f"reference_{name}.json"
    if reference.exists():
        where = json.loads(reference.read_text())
        embedding = open_npy(Path(where["path"]))
        embedding = embedding.transpose(1, 0, 2) if where["layout"] == "NPD" else embedding
    else:
        embedding = open_npy(folder / f"embedding_{name}.npy")
    ceiling = folder / f"ceiling_{name}.npy"
    texts = pq.read_table(folder / f"prompts_{name}.parquet", page_checksum_verification=True).to_pydict()
    return Split(
        golden=np.asarray(golden),
        embedding=embedding,
        prompt_id=texts["prompt_id"],
        prompt=texts.get("prompt"),
        response=texts.get("response"),
        category=texts.get("category"),
        ceiling=np.asarray(open_npy(ceiling)) if ceiling.exists() else None,
    )


def _checked_split(
    name: str,
    golden: Floats,
    embedding: Floats,
    prompt_id: Sequence[str] | None,
    response: Sequence[Sequence[str]] | None,
) -> Split:
    golden, embedding = np.asarray(golden), np.asanyarray(embedding)
    _check_shapes(name, golden, embedding)
    if golden.dtype.kind not in "fiu" or embedding.dtype.kind != "f":
        raise DataError(f"{name}: golden is {golden.dtype}, embedding {embedding.dtype}; needed: real numbers")
    check_golden(name, golden)
    golden32 = rounded(f"golden_{name}", golden)
    if np.isnan(golden32).any() or embedding.dtype.itemsize > 4:  # padding counts as zero, whatever it holds
        embedding = np.where(np.isnan(golden32)[..., None], 0, embedding).astype(np.float32)
    ids = [f"{name}-{i}" for i in range(len(golden))] if prompt_id is None else [str(i) for i in prompt_id]
    split = Split(golden32, embedding, ids, response=response)
    check_split(name, split)
    return split


def check_banks(train: Split, test: Split) -> None:
    """Refuse splits of different D, and a prompt in both."""
    if train.dim != test.dim:
        raise DataError(f"embedding_train has D={train.dim}, embedding_test D={test.dim}: they must be equal")
    both = set(train.prompt_id) & set(test.prompt_id)
    if both:
        raise DataError(f"prompt id {min(both)!r} is in train and in test ({len(both)} such prompts)")


def _check_shapes(name: str, golden: Floats, embedding: Floats) -> None:
    if golden.ndim != 2 or embedding.ndim != 3 or embedding.shape[:2] != golden.shape or not golden.size:
        raise DataError(
            f"golden_{name} has shape {golden.shape}, embedding_{name} {embedding.shape}; "
            "needed: [P, N] and [P, N, D], none of them 0"
        )


def check_split(name: str, split: Split) -> None:
    """Refuse wrong shapes, bad rewards, non-finite embeddings, ids or texts that do not match the prompts."""
    golden, embedding = split.golden, split.embedding
    _check_shapes(name, golden, embedding)
    check_golden(name, golden)
    for part in split.chunks():
        bad = ~np.isfinite(np.asarray(embedding[part])).all(axis=2)
        if bad.any():
            prompt, response = np.argwhere(bad)[0]
            raise DataError(f"embedding_{name}[{part.start + prompt}, {response}] is not finite")
    if len(split.prompt_id) != len(golden):
        raise DataError(f"prompt_id_{name} has {len(split.prompt_id)} entries for {len(golden)} prompts")
    counts = Counter(split.prompt_id)
    if len(counts) != len(golden):
        raise DataError(f"prompt_id_{name}: {counts.most_common(1)[0][0]!r} occurs more than once")
    if split.response is not None and [len(r) for r in split.response] != split.count.tolist():
        raise DataError(
            f"response_{name}: needs one text per response, [P][count]; the numbers differ from golden_{name}"
        )


def rounded(name: str, golden: Floats) -> NDArray[np.float32]:
    """Golden rewards [P, N] as float32; DataError where rounding would blur the differences within prompts."""
    wide = np.asarray(golden, dtype=np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if np.isinf(narrow).any():
        prompt, response = np.argwhere(np.isinf(narrow))[0]
        raise DataError(f"{name}[{prompt}, {response}] is {wide[prompt, response]}; allowed: finite float32 numbers")
    valid = np.isfinite(wide)
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = np.where(valid, wide, 0).sum(axis=1, keepdims=True) / count
    spread = np.sqrt(np.mean((wide - mean)[valid] ** 2))
    error = np.abs(narrow.astype(np.float64) - wide)[valid].max()
    if error > 1e-3 * spread > 0:
        raise DataError(
            f"{name}: float32 rounds these rewards by up to {error:.2g}, their spread within prompts is {spread:.2g}; "
            "subtract their mean first (dataset.center=prompt where there is that option)"
        )
    return narrow


def check_golden(name: str, golden: Floats) -> None:
    """Refuse infinite rewards, prompts without a response, and gaps before a prompt's last response."""
    if np.isinf(golden).any():
        prompt, response = np.argwhere(np.isinf(golden))[0]
        raise DataError(f"golden_{name}[{prompt}, {response}] is {golden[prompt, response]}; allowed: finite numbers")
    valid = np.isfinite(golden)
    gaps = ~valid[:, :-1] & valid[:, 1:]
    if gaps.any() or not valid[:, :1].all():
        prompt = int(np.argwhere(gaps.any(axis=1) | ~valid[:, 0])[0, 0])
        raise DataError(f"golden_{name}[{prompt}]: NaN before the last response; NaN may only pad the end of a row")
