"""A launch that is prepared once: when the compiled kernel is called directly, and when the JIT has to look again."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fused_resblock.kernels import launch as module
from fused_resblock.kernels.launch import Launch, starts_early


class Kernel:
    """Stands for a JIT function and for what it compiles: notes who was called, with what grid and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getitem__(self, grid):
        def jit(*args, **options):
            self.calls.append(("jit", grid, args, options))
            return Compiled(self)

        return jit


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.calls.append(("compiled", grid, args, {}))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "current", lambda device: nullcontext())
    monkeypatch.setattr(module, "starts_early", lambda: False)
    return Kernel()


ALIGNED, OFF = torch.zeros(8), torch.zeros(8)[1:]


def test_second_call_goes_straight_to_the_compiled_kernel(kernel):
    launch = Launch(kernel, (3, 2), (1, None), torch.device("cuda", 0), num_warps=4)
    launch(ALIGNED, None)
    launch(ALIGNED, None)
    assert kernel.calls == [
        ("jit", (3, 2, 1), (ALIGNED, None, 1, None, False), {"num_warps": 4, "launch_pdl": False}),
        ("compiled", (3, 2, 1), (ALIGNED, None, 1, None, False), {}),
    ]


@pytest.mark.parametrize(
    ("backend", "arch", "version", "setting", "early"),
    [
        ("cuda", 90, 12080, None, True),
        ("cuda", 120, 12030, "1", True),
        ("cuda", 90, 12080, "0", False),
        ("cuda", 90, 12020, None, False),
        ("cuda", 89, 12080, None, False),
        ("hip", "gfx942", 12080, None, False),
    ],
)
def test_where_a_kernel_may_start_before_the_last_one_has_ended(
    backend, arch, version, setting, early, kernel, monkeypatch
):
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=backend, arch=arch))
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: version, raising=False)
    monkeypatch.setattr(module.knobs.runtime, "interpret", False)
    monkeypatch.setattr(module, "starts_early", starts_early)
    monkeypatch.delenv("FUSED_RESBLOCK_PDL", raising=False)
    if setting is not None:
        monkeypatch.setenv("FUSED_RESBLOCK_PDL", setting)
    launch = Launch(kernel, (1,), (7,), torch.device("cuda", 0))
    launch(ALIGNED)
    launch(ALIGNED)
    assert kernel.calls == [
        ("jit", (1, 1, 1), (ALIGNED, 7, early), {"launch_pdl": early}),
        ("compiled", (1, 1, 1), (ALIGNED, 7, early), {}),
    ]


def test_the_interpreter_starts_nothing_early(monkeypatch):
    monkeypatch.setattr(module.knobs.runtime, "interpret", True)
    assert not starts_early()


def test_misaligned_activations_are_looked_at_again(kernel):
    launch = Launch(kernel, (1,), (), torch.device("cuda", 0))
    for x in (OFF, ALIGNED, OFF, ALIGNED):
        launch(x)
    assert [call[0] for call in kernel.calls] == ["jit", "jit", "jit", "compiled"]


def test_interpreter_has_nothing_to_keep(kernel):
    launch = Launch(kernel, (1,), (), torch.device("cpu"))
    launch(ALIGNED)
    launch(ALIGNED)
    assert [call[0] for call in kernel.calls] == ["jit", "jit"]


PRECISION = """
import torch
from fused_resblock.kernels.gpu import tf32_allowed
assert tf32_allowed() == torch.backends.cudnn.allow_tf32
torch.backends.cudnn.allow_tf32 = {old}
assert tf32_allowed() is {old}
torch.backends.cudnn.conv.fp32_precision = "ieee"
assert not tf32_allowed()
"""


@pytest.mark.parametrize("old", [True, False])
def test_tf32_is_asked_of_torchs_new_settings_and_old_ones(old):
    code = PRECISION.format(old=old)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
