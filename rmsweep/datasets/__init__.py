"""Datasets: where a bank comes from. Each validates its sources before any compute and writes one bank folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from rmsweep.bank import Ints
from rmsweep.size import Size

RewardScale = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["sd", "within_prompt_sd"]


class BankShape(NamedTuple):
    """What is known of a bank before it is built: responses per prompt (int64 [P] and [Q]) and whether it has texts."""

    count_train: Ints
    count_test: Ints
    has_texts: bool


class Dataset(Protocol):
    """A source of banks.

    base_llms: the options of group base_llm that go with it. reward_scale: the unit in which annotators see golden
    differences: a number, the sd of all golden rewards, or their pooled sd within prompts. seed: the bank's own chance.
    """

    base_llms: tuple[str, ...]
    reward_scale: RewardScale
    seed: int
    uses_size: bool
    default_embedder: str

    def inputs(self, llm: Any, embedder: Any) -> dict[str, Path]:
        """Files whose bytes decide the bank: name -> path. Their sha256 enter the fingerprint."""
        ...

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Read and check the sources, cheaply; raises DataError with every problem (file, row, column, value)."""
        ...

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Write the bank's files into `folder` (layout: Bank.read) in bounded memory."""
        ...
