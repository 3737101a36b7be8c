"""The papers' published embeddings: embd_{base_llm}_{embedder}_{task}_{split}.npy and reward_....npy.

Published with axes [P, N, D] (rewards [P, N, 1]) and rank-major [N, P, D] (rewards [N, P], rising along N);
the layout is found from shapes and order of the rewards. Embeddings are mapped and never copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from rmsweep.bank import SPLITS, Floats, Ints, open_npy, rounded, write_notes, write_prompts, write_reference
from rmsweep.component import component, downstream, silent
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.errors import DataError
from rmsweep.paths import user_path
from rmsweep.problems import Problems
from rmsweep.size import Size

Layout = Literal["PND", "NPD"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
CHUNK_BYTES = 64 << 20
SAMPLE_RESPONSES = 256  # responses whose embeddings `shape` looks at


@component("dataset", version=1)
@dataclass(frozen=True)
class Released:
    """Released embeddings and golden rewards of one task, without texts.

    root: the folder of the files. task, embedder_name: as the files spell them (Harmless, Gemma2b); the base
    LLM's spelling is `base_llm.name`. layout: PND or NPD where the shapes leave it open. reward_scale: the
    released annotation script divides golden differences by 6 for helpful and by 1 for harmless.
    """

    uses_size: ClassVar[bool] = False
    default_embedder: ClassVar[str] = "native"

    root: str = silent("")
    task: Name = "Harmless"
    embedder_name: Name = "Gemma2b"
    layout: Literal["auto", "PND", "NPD"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    reward_scale: RewardScale = downstream(1.0)
    base_llms: tuple[str, ...] = silent(())

    def inputs(self, llm: Any, embedder: Any) -> dict[str, Path]:
        """The four files; raises DataError naming every one that is missing."""
        if not self.root:
            raise DataError("dataset.root is not set; dataset.root=FOLDER holds the files embd_... and reward_...")
        if not NAME.fullmatch(str(getattr(llm, "name", ""))):
            raise DataError(f"base_llm.name={llm.name!r}: allowed are letters, digits, '_', '-' and '.'")
        root = user_path(self.root, "dataset.root")
        stem = f"{llm.name}_{self.embedder_name}_{self.task}"
        files = {f"{p}_{s}": root / f"{p}_{stem}_{s}.npy" for p in ("embd", "reward") for s in SPLITS}
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            raise DataError("no such file: " + "; ".join(missing) + _neighbours(root))
        return files

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Counts per prompt; checks layouts, all rewards and some embeddings, every problem in one error."""
        if embedder.kind != "native":
            raise DataError(f"embedder={embedder.kind} needs texts, released files have none; allowed: native, auto")
        train, test = self._sides(llm)
        problems = Problems(user_path(self.root, "dataset.root"), note="")
        for side in (train, test):
            _check_rewards(problems, side)
            _check_embeddings(problems, side, _sample(side))
        if train.embedding.shape[2] != test.embedding.shape[2]:
            dims = [f"{s.path} has D={s.embedding.shape[2]}" for s in (train, test)]
            problems.add(f"{dims[0]}, {dims[1]}: they must be equal")
        problems.check()
        for side in (train, test):
            problems.of(rounded, str(side.reward_path), np.asarray(side.golden))
        problems.check()
        return BankShape(train.counts, test.counts, has_texts=False)

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Write golden rewards and references to the embedding files, every number of which is checked."""
        sides = self._sides(llm)
        problems = Problems(user_path(self.root, "dataset.root"), note="")
        for side in sides:
            _check_rewards(problems, side)
            _check_embeddings(problems, side, _everything(side))
        problems.check()
        for name, side in zip(SPLITS, sides, strict=True):
            np.save(folder / f"golden_{name}.npy", np.ascontiguousarray(rounded(name, np.asarray(side.golden))))
            write_reference(folder, name, side.path.resolve(), side.layout)
            write_prompts(folder, name, [f"{name}-{i}" for i in range(len(side.golden))])
        write_notes(folder, seed=self.seed, layout={name: s.layout for name, s in zip(SPLITS, sides, strict=True)})

    def _sides(self, llm: Any) -> tuple[_Side, _Side]:
        """Both splits, opened and their layouts found; problems of both in one error."""
        files = self.inputs(llm, None)
        problems = Problems(user_path(self.root, "dataset.root"), note="")
        train, test = (problems.of(_open, files[f"embd_{s}"], files[f"reward_{s}"], self.layout) for s in SPLITS)
        problems.check()
        assert train is not None and test is not None
        return train, test


class _Side(NamedTuple):
    """One split: embedding [P, N, D] (a view of the mapped file), golden [P, N], the file's layout."""

    path: Path
    reward_path: Path
    embedding: Floats
    golden: Floats
    layout: Layout

    @property
    def counts(self) -> Ints:
        """Responses per prompt, [P]."""
        return np.full(self.golden.shape[0], self.golden.shape[1], dtype=np.int64)


def _open(path: Path, reward_path: Path, layout: str) -> _Side:
    """Open one split's files, check their shapes and bring both to [P, N]."""
    embedding, reward = open_npy(path), open_npy(reward_path)
    shapes = f"{path} {embedding.dtype} {embedding.shape}, {reward_path} {reward.dtype} {reward.shape}"
    if embedding.dtype not in (np.float16, np.float32) or reward.dtype.kind != "f":
        raise DataError(f"{shapes}; allowed: embeddings float16 or float32, rewards of floating point")
    if reward.ndim == 3 and reward.shape[2] == 1:
        reward = reward[:, :, 0]
    if embedding.ndim != 3 or reward.ndim != 2 or 0 in embedding.shape:
        raise DataError(f"{shapes}; needed: [P, N, D] or [N, P, D] with rewards [P, N, 1], [P, N] or [N, P]")
    if reward.shape not in (embedding.shape[:2], embedding.shape[1::-1]):
        raise DataError(f"{shapes}; the first two axes must agree: P and N, in either order")
    if reward.shape != embedding.shape[:2]:
        reward = reward.T
    found = _layout(reward, shapes) if layout == "auto" else layout
    if found == "NPD":
        return _Side(path, reward_path, embedding.transpose(1, 0, 2), reward.T, "NPD")
    return _Side(path, reward_path, embedding, reward, "PND")


def _layout(reward: Floats, shapes: str) -> Layout:
    """The axes of a file whose rewards are [A, B]: the longer one is P, and sorted rewards rise along N.

    Rank-major files hold the k-th worst response of every prompt at index k. Where A = B that order decides.
    """
    a, b = reward.shape
    by_length = None if a == b else "PND" if a > b else "NPD"
    rising = [n for n, axis in (("NPD", 0), ("PND", 1)) if reward.shape[axis] > 2 and _rises(reward, axis)]
    by_order = rising[0] if len(rising) == 1 else None
    votes = {vote for vote in (by_length, by_order) if vote}
    if len(votes) != 1:
        why = "the longer axis and the order of the rewards disagree" if votes else "both axes are equally long"
        raise DataError(f"{shapes}; {why}: dataset.layout=PND or NPD says which axis holds the prompts (P)")
    return "PND" if "PND" in votes else "NPD"


def _rises(reward: Floats, axis: int) -> bool:
    return bool((np.diff(reward, axis=axis) >= 0).all())


def _check_rewards(problems: Problems, side: _Side) -> None:
    """Note every golden reward that is not finite in float32."""
    good = np.abs(side.golden) <= np.finfo(np.float32).max
    where = f"{side.reward_path}: golden reward of prompt"
    places = ((p, r, side.golden[p, r]) for p, r in np.argwhere(~good))
    texts = (f"{where} {p}, response {r}: {value}; allowed: finite numbers" for p, r, value in places)
    problems.many(int((~good).sum()), texts)


def _check_embeddings(problems: Problems, side: _Side, bad: Iterable[tuple[int, int]]) -> None:
    """Note responses (prompt, response) whose embedding is not finite."""
    problems.add(*(f"{side.path}: the embedding of prompt {p}, response {r} holds NaN or infinity" for p, r in bad))


def _sample(side: _Side) -> Iterator[tuple[int, int]]:
    """Where embeddings are not finite, among a few responses spread over the file."""
    n_prompts, n_responses, _ = side.embedding.shape
    rows = np.linspace(0, n_prompts * n_responses - 1, SAMPLE_RESPONSES).astype(np.int64)
    prompt, response = np.divmod(np.unique(rows), n_responses)
    good = np.isfinite(side.embedding[prompt, response]).all(axis=1)
    yield from zip(prompt[~good].tolist(), response[~good].tolist(), strict=True)


def _everything(side: _Side) -> Iterator[tuple[int, int]]:
    """Where embeddings are not finite, reading the file once in chunks of CHUNK_BYTES."""
    _, n_responses, dim = side.embedding.shape
    step = max(1, CHUNK_BYTES // (n_responses * dim * side.embedding.itemsize))
    for start in range(0, len(side.embedding), step):
        good = np.isfinite(side.embedding[start : start + step]).all(axis=2)
        yield from ((start + int(p), int(r)) for p, r in np.argwhere(~good))


def _neighbours(root: Path) -> str:
    """What stands in the folder instead, for the message about missing files."""
    if not root.is_dir():
        return f"; dataset.root={root} is no folder"
    names = sorted(path.name for path in root.glob("embd_*.npy"))[:8]
    return f"; {root} holds {', '.join(names) or 'no embd_*.npy'} (base_llm.name, dataset.embedder_name, task)"
