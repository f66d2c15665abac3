"""Every launcher's arguments through Triton's own CUDA launcher, the first time by its JIT, later directly."""

from __future__ import annotations

import shutil

import pytest
from compiling import run

pytest.importorskip("triton")
if shutil.which("cc") is None:
    pytest.skip("needs a C compiler, as Triton's launcher does", allow_module_level=True)

from driver_stub import environment

from fused_resblock.kernels.gpu import Gpu


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("stub"))


def printed(code: str, env: dict[str, str]) -> str:
    """Run Python with the stub for a driver; what it printed."""
    code = "import sys; sys.path.insert(0, 'tests'); from driver_stub import install; launches = install()\n" + code
    result = run(code, **env)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


EVERY_KERNEL = """
from benchmarks.codegen import jobs
from fused_resblock.kernels.launch import Launch

call, prepared = Launch.__call__, set()

def twice(self, *activations):
    taken, early = len(launches), launches.early
    call(self, *activations)
    assert self._compiled is not None
    call(self, *activations)
    assert len(launches) == taken + 2 and launches.early == early + 2
    by_jit, directly = launches.settings[-2:]
    assert by_jit == directly
    by_jit, directly = launches.arguments[-2:]
    assert len(by_jit) == len(directly) and all(a is b or a == b for a, b in zip(by_jit, directly))
    prepared.add(launches.settings[-1][0])

Launch.__call__ = twice
seen = set()
for job in jobs((90,), ("fp16",)):
    if (job.kernel, job.case) not in seen:
        seen.add((job.kernel, job.case))
        job.launch()
print(*sorted(prepared))
print(*sorted({setting[0] for setting in launches.settings} - prepared))
"""


def test_a_launch_without_the_jit_hands_over_what_the_jit_does(env):
    prepared, others = printed(EVERY_KERNEL, env).splitlines()
    kernels = "bn_act conv_bn_act conv_halo conv_pair conv_ring conv_tma pack stem_hopper"
    kernels += " expand_shift expand_shift_halo expand_shift_ring expand_shift_wide"
    kernels += " bottleneck_rows" * Gpu().rows
    assert sorted(prepared.split()) == sorted(f"_{name}_kernel" for name in kernels.split())
    assert others == "_relu_backward_kernel"


WITHOUT_TMA = """
from benchmarks.codegen import _stage_jobs
from fused_resblock.kernels.gpu import Gpu
job = next(_stage_jobs(Gpu(108, 80), "fp16"))
job.launch()
print(*[setting[0] for setting in launches.settings])
"""


def test_the_stage_kernel_of_chips_without_tma(env):
    assert printed(WITHOUT_TMA, env).split() == ["_expand_shift_kernel"]


REFUSED = """
import torch
from triton.runtime import driver
from fused_resblock.kernels.bn_act import bind_bn_act

x = torch.empty(2, 8, 4, 4, device="meta").to(memory_format=torch.channels_last)
bind_bn_act(x.shape, x.dtype, None, device=x.device)(x, None)
assert launches.early == 1
(launch,), taken, arguments = launches.prepared, len(launches), launches.arguments[-1]

def refusal(function, *args):
    try:
        function(*args)
    except (TypeError, RuntimeError) as error:
        return type(error).__name__
    raise AssertionError(f"taken: {args}")

print(refusal(launch._compiled, "x", *arguments[1:]))  # not a pointer
launch._grid, launch._compiled = (1, 70000, 1), None
print(refusal(launch, *arguments[: -len(launch._fixed) - 1]))  # 65535 at most
utils, half = driver.active.utils, 6
fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # before Triton 3.7
fill(0, 3, 2, half, [64, 64], [1024, 64], [64, 1], 0)
print(refusal(fill, 0, 3, 2, half, [64, 128], [1024, 128], [128, 1], 0))  # rows of 256 bytes, swizzled by 128
print(refusal(fill, 0, 3, 2, half, [64, 64], [1024, 60], [60, 1], 0))  # a stride of 120 bytes
assert len(launches) == taken
"""


def test_what_a_driver_refuses_is_refused(env):
    assert printed(REFUSED, env).split() == ["TypeError", "RuntimeError", "RuntimeError", "RuntimeError"]
