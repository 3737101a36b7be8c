"""The papers' published embeddings: embd_{base_llm}_{embedder}_{task}_{split}.npy with reward_....npy beside them.

Published with axes [P, N, D] (rewards [P, N, 1]) and rank-major [N, P, D] (rewards [N, P], ascending along N);
the layout is found from the shapes and the order of the rewards. Embeddings are memory-mapped and never copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rmsweep.bank import SPLITS, Floats, open_npy, write_notes, write_prompts, write_reference
from rmsweep.component import component, downstream, silent
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.errors import DataError
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

    root: the folder of the files. task, embedder_name: as the files spell them (Harmless, Gemma2b); the base LLM's
    spelling is `base_llm.name`. layout: PND or NPD where the shapes leave it open. reward_scale: the released
    annotation script divides golden differences by 6 for helpful and by 1 for harmless.
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
        if not NAME.fullmatch(llm.name):
            raise DataError(f"base_llm.name={llm.name!r}: allowed are letters, digits, '_', '-' and '.'")
        root = Path(self.root).expanduser()
        stem = f"{llm.name}_{self.embedder_name}_{self.task}"
        files = {f"{p}_{s}": root / f"{p}_{stem}_{s}.npy" for p in ("embd", "reward") for s in SPLITS}
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            raise DataError("no such file: " + "; ".join(missing) + _neighbours(root))
        return files

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Counts per prompt; checks layouts, all rewards and a sample of the embeddings, every problem in one error."""
        if embedder.kind != "native":
            raise DataError(f"embedder={embedder.kind} needs texts, released files have none; allowed: native, auto")
        train, test = self._sides(llm)
        problems = [p for side in (train, test) for p in _problems(side, _sample(side))]
        if train.embedding.shape[2] != test.embedding.shape[2]:
            dims = [f"{s.path} has D={s.embedding.shape[2]}" for s in (train, test)]
            problems.append(f"{dims[0]}, {dims[1]}: they must be equal")
        if problems:
            raise DataError("\n  ".join(problems))
        return BankShape(*(np.full(s.golden.shape[0], s.golden.shape[1]) for s in (train, test)), has_texts=False)

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Write golden rewards and references to the embedding files, whose every number is checked, in chunks."""
        sides = self._sides(llm)
        problems = [p for side in sides for p in _problems(side, _chunks(side))]
        if problems:
            raise DataError("\n  ".join(problems))
        for name, side in zip(SPLITS, sides, strict=True):
            np.save(folder / f"golden_{name}.npy", np.ascontiguousarray(side.golden, dtype=np.float32))
            write_reference(folder, name, side.path.resolve(), side.layout)
            write_prompts(folder, name, [f"{name}-{i}" for i in range(len(side.golden))])
        write_notes(folder, seed=self.seed, layout={name: s.layout for name, s in zip(SPLITS, sides, strict=True)})

    def _sides(self, llm: Any) -> tuple[_Side, _Side]:
        """Both splits, opened and their layouts found; problems of both in one error."""
        files = self.inputs(llm, None)
        sides, problems = [], []
        for name in SPLITS:
            try:
                sides.append(_open(files[f"embd_{name}"], files[f"reward_{name}"], self.layout))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n  ".join(problems))
        return sides[0], sides[1]


class _Side(NamedTuple):
    """One split: embedding [P, N, D] (a view of the mapped file), golden [P, N], how the file has its axes."""

    path: Path
    reward_path: Path
    embedding: Floats
    golden: Floats
    layout: Layout


def _open(path: Path, reward_path: Path, layout: str) -> _Side:
    """Open one split's files, check their shapes and bring both to [P, N]."""
    embedding, reward = open_npy(path), open_npy(reward_path)
    shapes = f"{path} {embedding.dtype} {embedding.shape}, {reward_path} {reward.dtype} {reward.shape}"
    if embedding.dtype not in (np.float16, np.float32) or reward.dtype.kind != "f":
        raise DataError(f"{shapes}; allowed: embeddings float16 or float32, rewards float16, float32 or float64")
    if reward.ndim == 3 and reward.shape[2] == 1:
        reward = reward[:, :, 0]
    if embedding.ndim != 3 or reward.ndim != 2 or 0 in embedding.shape:
        raise DataError(f"{shapes}; needed: [P, N, D] or [N, P, D] with rewards [P, N, 1], [P, N] or [N, P]")
    if reward.shape not in (embedding.shape[:2], embedding.shape[1::-1]):
        raise DataError(f"{shapes}: the first two axes do not agree; needed: P and N in either order")
    found = _layout(embedding, reward, layout, shapes)
    if reward.shape != embedding.shape[:2]:  # the two files differ in their order of P and N
        reward = reward.T
    if found == "NPD":
        embedding, reward = embedding.transpose(1, 0, 2), reward.T
    return _Side(path, reward_path, embedding, np.asarray(reward), found)


def _layout(embedding: Floats, reward: Floats, layout: str, shapes: str) -> Layout:
    ...
