"""Shared by the bench scripts: clocks, banks kept between runs, the matrix peak, equivalence tests, tables"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rmsweep.bank import Bank

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy and torch, imported later, start their pools

PAPER = {"P": 42_846, "N": 10, "Q": 2_292, "M": 500, "D": 2_048}
GEMM_ROWS = 8_192
GEMM_TRIES = 5


class Clock:
    """Exclusive wall and process CPU seconds per stage: a stage entered within another pauses the outer one."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._open: list[str | None] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def __call__(self, stage: str | None) -> Iterator[None]:
        """Charge what happens inside to `stage`; None charges it to nobody."""
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, charged to `stage` whenever it is called."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(stage):
                return function(*args, **kwargs)

        return timed

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        stage = self._open[-1] if self._open else None
        if stage is not None:
            self.wall[stage] = self.wall.get(stage, 0.0) + now[0] - self._since[0]
            self.cpu[stage] = self.cpu.get(stage, 0.0) + now[1] - self._since[1]
        self._since = now


def median(values: Sequence[float | None]) -> float | None:
    """Median of the values that are known, None without any."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def cpu_seconds(function: Callable[[], Any], tries: int = GEMM_TRIES) -> float:
    """Median process CPU seconds of a call, after one call that is not counted."""
    function()
    seconds = []
    for _ in range(tries):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware."""
    from rmsweep import hardware

    return hardware.has_bf16("cpu")


def machine() -> dict[str, Any]:
    """Processor, cores and the versions of the libraries that do the work."""
    import lightgbm
    import numpy as np
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "bf16": has_bf16(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightgbm": lightgbm.__version__,
        "numpy": np.__version__,
    }


def matrix_peak(dim: int, hidden: Sequence[int], rows: int = GEMM_ROWS) -> dict[str, float]:
    """The best TFLOP/s of one thread per type, over the products of the MLP's forward and backward pass.

    Of each product the median of several tries; bf16 is left out where the processor has no such products.
    """
    import torch

    torch.set_num_threads(1)
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    peaks: dict[str, float] = {}
    for name, dtype in {"fp32": torch.float32, **({"bf16": torch.bfloat16} if has_bf16() else {})}.items():
        rates = []
        for fan_in, fan_out in ((dim, hidden[0]), (hidden[0], hidden[1])):
            x, w, g = (torch.randn(s).to(dtype) for s in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out)))
            products = [
                lambda x=x, w=w: torch.nn.functional.linear(x, w),
                lambda x=x, g=g: g.t() @ x,
                lambda w=w, g=g: g @ w,
            ]
            if fused is not None:
                products.append(lambda x=x, w=w: fused(x, w, None, "relu", [], ""))
            rates += [2 * rows * fan_in * fan_out / cpu_seconds(product) for product in products]
        peaks[name] = max(rates) / 1e12
    return peaks


class Equivalence(NamedTuple):
    """Difference of two means, its 90 % confidence interval, the margin, the larger one-sided p, the verdict."""

    difference: float
    low: float
    high: float
    margin: float
    p: float
    equivalent: bool


def tost(
    x: Sequence[float], y: Sequence[float], margin: float, level: float = 0.05, paired: bool = False
) -> Equivalence:
    """Two one-sided t-tests of |mean(x) - mean(y)| < margin at `level` each (Schuirmann 1987), by Welch or paired.

    t = (difference -+ margin) / se; equivalent where both reject, that is where the 1 - 2 level confidence
    interval lies within -margin ... margin.
    """
    import numpy as np
    from scipy.stats import t

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if paired:
        variances, df = [(a - b).var(ddof=1) / len(a)], float(len(a) - 1)
    else:
        variances = [v.var(ddof=1) / len(v) for v in (a, b)]
        weight = sum(v**2 / (len(values) - 1) for v, values in zip(variances, (a, b), strict=True))
        df = sum(variances) ** 2 / weight if weight else float(len(a) + len(b) - 2)
    difference, se = float(a.mean() - b.mean()), math.sqrt(sum(variances))
    if se == 0:
        inside = abs(difference) < margin
        return Equivalence(difference, difference, difference, margin, float(not inside), inside)
    p = max(t.sf((difference + margin) / se, df), t.cdf((difference - margin) / se, df))
    half = t.ppf(1 - level, df) * se
    return Equivalence(difference, difference - half, difference + half, margin, float(p), bool(p < level))


def cell_config(size: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The baseline cell's plain config: options of groups, values, and dotted keys (`protocol.patience=5`) changed.

    size: P, N, Q, M, D of the simulated bank.
    """
    from rmsweep.cell import GROUPS
    from rmsweep.presets import Presets

    presets = Presets()
    chosen = {**presets.baseline_choices, **{k: v for k, v in changes.items() if k in GROUPS}}
    config: dict[str, Any] = {group: presets.node(group, chosen[group]) for group in GROUPS}
    config["size"] = dict(size)
    for name in ("beta", "n_annotations", "pairs_per_prompt", "seed", "error_rate", "evaluate"):
        config[name] = changes.get(name, presets.baseline[name])
    for key, value in changes.items():
        if "." in key:
            group, field = key.split(".", 1)
            config[group][field] = value
    return config


def has_option(group: str, option: str) -> bool:
    """Whether conf/ has this option."""
    from rmsweep.presets import Presets

    return option in Presets().options(group)


def has_field(group: str, option: str, field: str) -> bool:
    """Whether the component of this option has `field`."""
    from rmsweep.presets import Presets

    return field in Presets().node(group, option)


def simulated_bank(size: Mapping[str, Any], folder: Path | None, **changes: Any) -> Bank:
    """The simulated bank of this size, built once and kept in `folder` (default: a folder of this user's in /tmp)."""
    from rmsweep.bank import Bank
    from rmsweep.cell import bank_id, build_cell

    spec = build_cell(cell_config(size, **changes))
    parent = folder or Path(tempfile.gettempdir()) / f"rmsweep-bench-{os.getuid()}"
    parent.mkdir(parents=True, exist_ok=True)
    kept = parent / bank_id(spec, {})
    if not kept.exists():
        print(f"building the bank {dict(size)} in {kept}", flush=True)
        fresh = Path(tempfile.mkdtemp(dir=parent))
        try:
            spec.dataset.generate(spec.base_llm, spec.size, spec.embedder, fresh)
            fresh.rename(kept)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return Bank.read(kept)


def show(value: Any) -> str:
    """A number in four significant digits, words as they are, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """An aligned table of the rows' keys in the order of the first row."""
    print(f"\n{title}")
    if not rows:
        print("  (nothing)")
        return
    names = list(rows[0])
    cells = [names, *([show(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(padded), flush=True)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Everything that was measured, as one JSON file."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1, default=float) + "\n", encoding="utf-8")
