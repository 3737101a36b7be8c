"""A bank that already lies in a folder, as `Bank.write` leaves it: the user's own arrays."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rmsweep.bank import Bank, Split, check_banks, check_split
from rmsweep.component import component, downstream, silent
from rmsweep.datasets import BankShape, RewardScale
from rmsweep.errors import DataError
from rmsweep.size import Size


@component("dataset", version=1)
@dataclass(frozen=True)
class BankFolder:
    """The bank in `path` (file layout: Bank.read). Its bytes, not its path, decide the fingerprint."""

    uses_size: ClassVar[bool] = False
    default_embedder: ClassVar[str] = "native"
    seed: ClassVar[int] = 0

    path: str | None = silent(None)
    reward_scale: RewardScale = downstream(1.0)
    base_llms: tuple[str, ...] = silent(("table",))

    def inputs(self, llm: Any, embedder: Any) -> dict[str, Path]:
        """Every file of the folder."""
        return {file.name: file for file in sorted(self._folder().iterdir()) if file.is_file()}

    def shape(self, llm: Any, size: Size, embedder: Any) -> BankShape:
        """Counts per prompt; raises DataError on gaps, infinite rewards or embeddings of another shape."""
        bank = self._bank()
        for name, split in (("train", bank.train), ("test", bank.test)):
            check_split(name, split)
        check_banks(bank.train, bank.test)
        return BankShape(bank.train.count, bank.test.count, has_texts=_has_texts(bank.train) and _has_texts(bank.test))

    def generate(self, llm: Any, size: Size, embedder: Any, folder: Path) -> None:
        """Copy the files into the store."""
        for name, path in self.inputs(llm, embedder).items():
            shutil.copyfile(path, folder / name)

    def _folder(self) -> Path:
        if not self.path or not (Path(self.path) / "bank.json").is_file():
            raise DataError(
                f"dataset.path={self.path}: no bank there; write one with Bank.from_arrays(...).write(folder)"
            )
        return Path(self.path)

    def _bank(self) -> Bank:
        folder = self._folder()
        if references := sorted(folder.glob("reference_*.json")):
            raise DataError(f"{references[0]}: points to a file elsewhere; such banks are dataset=released_...")
        try:
            return Bank.read(folder)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder}: not a bank as Bank.write leaves it ({type(error).__name__}: {error})") from None


def _has_texts(split: Split) -> bool:
    return split.response is not None
