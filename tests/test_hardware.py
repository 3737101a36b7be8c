"""Device and precision: found once per sweep, pinned, refused elsewhere."""

import pytest
from test_runner import Quiet, unit

from rmsweep import hardware
from rmsweep.cli.device import resolve_compute
from rmsweep.errors import ConfigError
from rmsweep.reward_models import Compute
from rmsweep.runner import run_unit


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of given processor flags and compute capability of its GPU, if any."""

    def make(flags: str, capability: str | None = None) -> None:
        hardware._cpu_flags.cache_clear()
        hardware._nvidia_smi.cache_clear()
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
        monkeypatch.setattr(hardware, "CPUINFO", cpuinfo)
        tool = tmp_path / "nvidia-smi"
        tool.unlink(missing_ok=True)
        if capability:
            tool.write_text(f"#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: Fake (UUID: GPU-1)' || echo {capability}\n")
            tool.chmod(0o755)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    yield make
    hardware._cpu_flags.cache_clear()
    hardware._nvidia_smi.cache_clear()


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ("avx2", None, Compute("cpu", "fp32")),
        ("avx512_bf16", None, Compute("cpu", "bf16")),
        ("avx2 amx_bf16", None, Compute("cpu", "bf16")),
        ("avx512_bf16", "7.0", Compute("cuda", "fp32")),
        ("avx2", "9.0", Compute("cuda", "bf16")),
    ],
)
def test_auto_is_what_the_machine_multiplies_in_hardware(machine, flags, capability, expected):
    """Catches bf16 that would be emulated, and a processor's flags read for its GPU."""
    machine(flags, capability)
    assert resolve_compute("auto", "auto") == expected


def test_auto_follows_the_pinned_plan(machine):
    """A sweep begun in fp32 goes on in fp32 where bf16 would be chosen today."""
    machine("avx512_bf16", "9.0")
    assert resolve_compute("auto", "auto", Compute("cpu", "fp32")) == Compute("cpu", "fp32")
    assert resolve_compute("auto", "fp32").device == "cuda"


@pytest.mark.parametrize(
    ("device", "precision", "pinned", "words"),
    [
        ("cuda", "fp32", None, "no NVIDIA GPU"),
        ("cpu", "bf16", None, "no bf16 products; allowed here: fp32"),
        ("auto", "auto", Compute("cpu", "bf16"), "as this sweep is pinned"),
        ("auto", "fp32", Compute("cuda", "fp32"), "as this sweep is pinned"),
    ],
)
def test_what_this_machine_lacks_is_bad_input_for_a_run_but_not_for_a_plan(machine, device, precision, pinned, words):
    """A login node may plan what only the workers can compute; a run on it must not mix arithmetics."""
    machine("avx2")
    with pytest.raises(ConfigError, match=words):
        resolve_compute(device, precision, pinned)
    assert resolve_compute(device, precision, pinned, here=False).precision in ("fp32", "bf16")


def test_a_hidden_gpu_is_none(machine, monkeypatch):
    """Catches a GPU taken although CUDA_VISIBLE_DEVICES hides it."""
    machine("avx2", "9.0")
    assert hardware.has_cuda()
    hardware._nvidia_smi.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not hardware.has_cuda()


def test_a_worker_on_other_hardware_refuses(machine, tmp_path):
    """Catches a sweep pinned to bf16 that is finished in emulated bf16 on another machine."""
    machine("avx2")
    task, _ = unit(tmp_path)
    reply = run_unit(task._replace(job=task.job._replace(compute=Compute("cpu", "bf16"))), Quiet())
    assert reply.end == "refused" and "no bf16 products" in reply.error
