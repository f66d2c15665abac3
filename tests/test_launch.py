"""A launch that is prepared once: when the compiled kernel is called directly, and when the JIT has to look again."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from fused_resblock.kernels import launch as module
from fused_resblock.kernels.launch import Launch


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
    return Kernel()


ALIGNED, OFF = torch.zeros(8), torch.zeros(8)[1:]


def test_second_call_goes_straight_to_the_compiled_kernel(kernel):
    launch = Launch(kernel, (3, 2), (1, None), torch.device("cuda", 0), num_warps=4)
    launch(ALIGNED, None)
    launch(ALIGNED, None)
    assert kernel.calls == [
        ("jit", (3, 2, 1), (ALIGNED, None, 1, None), {"num_warps": 4}),
        ("compiled", (3, 2, 1), (ALIGNED, None, 1, None), {}),
    ]


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
