"""Triton's own CUDA launcher on a machine without a GPU: it reads every argument, and a stub takes the launch.

`driver_stub.c` stands in for `libcuda.so.1`. The process must be started with `environment(folder)`, and call
`install()` before the first launch; tensors are `meta` ones, whose address is 0.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from fused_resblock.kernels.launch import Launch


def environment(folder: Path) -> dict[str, str]:
    """Build the stub in `folder` and return the variables with which a process loads it."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_suffix(".c"), folder / "libcuda.so.1"
    command = ["cc", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-I", include, source, "-o", library]
    subprocess.run(command, check=True, capture_output=True)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


class Launches:
    """The launches of this process: how many the stub took, and what the launcher was given for each.

    `settings` are the kernel's name, the grid, the stream, the loaded function and its packed numbers; `arguments` the
    kernel's own. `prepared` are the `Launch`es that were made.
    """

    def __init__(self) -> None:
        self._stub = ctypes.CDLL("libcuda.so.1")
        self.settings: list[tuple[Any, ...]] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.prepared: list[Launch] = []

    def __len__(self) -> int:
        return int(self._stub.stub_launches())

    @property
    def early(self) -> int:
        """How many of them may begin before the launch before them has ended."""
        return int(self._stub.stub_early())


def install() -> Launches:
    """Make the stub the active device: capability 9.0, number 0, stream 0."""
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    active, launches = CudaDriver(), Launches()
    active.get_current_device = torch.cuda.current_device
    active.get_device_capability = torch.cuda.get_device_capability
    active.get_current_stream = lambda device=0: 0
    launcher = active.launcher_cls

    def recording(src: Any, metadata: Any) -> Any:
        launch = launcher(src, metadata)

        def run(*args: Any) -> Any:
            launches.settings.append((src.fn.__name__, *args[:6]))  # the seventh is for hooks, new each time
            launches.arguments.append(args[9:])
            return launch(*args)

        return run

    active.launcher_cls = recording
    driver.set_active(active)
    prepare = Launch.__init__

    def on_cuda(self: Launch, kernel: Any, grid: Any, fixed: Any, device: torch.device, **options: int) -> None:
        prepare(self, kernel, grid, fixed, torch.device("cuda", 0), **options)
        launches.prepared.append(self)

    Launch.__init__ = on_cuda  # type: ignore[method-assign]
    return launches
