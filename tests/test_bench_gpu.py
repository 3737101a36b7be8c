"""scripts/bench_gpu.py: runs everywhere on request, and never passes a CPU off as a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_gpu.py"


def bench(*words, **environment):
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def check(file, device):
    """Every line is there, numbers are numbers, the parts add up to the extrapolation."""
    found = json.loads(file.read_text())
    lines, whole = found["speed"], found["extrapolated"]
    assert {(x["objective"], x["heads"]) for x in lines} >= {(o, h) for o in ("bt", "clf") for h in ("alone", 1, 4)}
    assert all(x["heads/s"] > 0 and 0 < x["train share"] < 1 and 0 < x["score share"] < 1 for x in lines)
    assert found["peak_tflops"] > 0 and whole["cells"] == 8640
    alone = [x["s/cell"] for x in lines if x["heads"] == "alone"]
    assert whole["hours_alone"] == pytest.approx(8640 * sum(alone) / len(alone) / 3600)
    assert whole["hours_stacked"] <= whole["hours_alone"]
    assert set(found["parity"]) == {"fp32", "bf16"} and found["out_of_tolerance"] == []
    assert all(line["equal epochs"] and line["score_mean"] > 0 for part in found["parity"].values() for line in part)
    assert ("CPU" in found["device"]) is (device == "cpu")


def test_without_a_gpu_it_says_so_and_fails():
    """Catches numbers of a CPU reported as a GPU's."""
    result = bench("--quick", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "no CUDA device" in result.stderr and not result.stdout


def test_the_same_code_runs_on_a_cpu(tmp_path):
    """Catches a script that breaks where nobody has a GPU to notice; parity of stacks is checked for real."""
    result = bench("--device", "cpu", "--quick", "--json", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "says nothing of a GPU" in result.stdout and "LightGBM" in result.stdout
    check(tmp_path / "gpu.json", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu(tmp_path):
    """Stacks on the GPU agree with the CPU within the stated tolerance."""
    result = bench("--quick", "--json", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    check(tmp_path / "gpu.json", "cuda")
