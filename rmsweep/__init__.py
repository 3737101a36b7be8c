"""rmsweep: controlled sweeps over preference-based reward models.

In a notebook::

    bank = rmsweep.Bank.from_arrays(golden_train, embedding_train, golden_test, embedding_test)
    preferences = rmsweep.annotate(bank, 5_000, beta=1.0, pairing="cross_prompt")
    model = rmsweep.fit(bank, preferences, "clf_mlp")
    rmsweep.best_of_n(rmsweep.score(model, bank.test), bank.test.golden)      # N = 1..M
    rmsweep.sweep({"beta": [0.5, 1, 3], "seed": range(5)}, objectives={"mine": my_loss}, bank=bank)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Bank", "annotate", "best_of_n", "fit", "load", "score", "sweep"]

if TYPE_CHECKING:
    from rmsweep.bank import Bank
    from rmsweep.notebook import annotate, best_of_n, fit, load, score, sweep


def __getattr__(name: str) -> Any:
    """Load the notebook face when it is used: the command line starts without torch."""
    import importlib

    if name == "Bank":
        return importlib.import_module("rmsweep.bank").Bank
    if name in __all__:
        return getattr(importlib.import_module("rmsweep.notebook"), name)
    raise AttributeError(f"module 'rmsweep' has no attribute {name!r}")
