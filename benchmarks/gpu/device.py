"""Everything that the steps ask of the GPU, in one place: names, limits, memory, graphs and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter_ns
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_resblock.kernels.gpu import Gpu
from fused_resblock.table import error_line

from .compiling import Compilable, Compiled, compile_all
from .deadline import Deadline
from .requirements import Unusable


class Broken(Exception):
    """The CUDA context is lost; what broke it is on record, so a new process goes on behind it."""


class Device(Protocol):
    """What the steps need of a GPU."""

    torch_name: str  # of torch's device
    name: str
    capability: int
    gpu: Gpu
    l2_bytes: int

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def clock(self) -> int:
        """Nanoseconds, when all launched work is done."""

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Record what a call launches as a graph; the result replays it and returns the tensors of the recording."""

    def times(self, calls: Sequence[Callable[[], Any]], rounds: int) -> list[int]:
        """Nanoseconds a call, `rounds` times, over all the calls one after another and without the launches."""

    def memory(self) -> tuple[int, int]:
        """Bytes that tensors hold now, and the most they have held since the last call."""

    def free(self) -> None:
        """Give cached memory back."""

    def flush_l2(self) -> None:
        """Drive out of L2 what is in it."""

    def compiled(self, jobs: Iterable[Compilable], deadline: Deadline) -> Iterator[Compiled]:
        """Compile jobs ahead, in any order, and give them back with what the compiler said."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def is_broken(error: BaseException) -> bool:
    """Whether the CUDA context is lost (an illegal access, a failed assertion): only a new process can go on."""
    text = str(error).lower()
    fatal = ("illegal memory access", "illegal instruction", "misaligned address", "device-side assert")
    return any(word in text for word in (*fatal, "unspecified launch failure", "launch timed out"))


class CudaDevice:
    """The current CUDA device.

    Raises:
        Unusable: if there is none.
    """

    torch_name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Unusable("an NVIDIA GPU must be visible to torch: torch.cuda.is_available() is False")
        try:
            properties = torch.cuda.get_device_properties(0)
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            raise Unusable(f"the GPU must take work, got {error_line(error)}") from error
        self.name = properties.name
        self.capability = 10 * properties.major + properties.minor
        self.gpu = Gpu(properties.multi_processor_count, self.capability)
        self.l2_bytes = properties.L2_cache_size

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def clock(self) -> int:
        torch.cuda.synchronize()
        return perf_counter_ns()

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, chooses algorithms, allocates workspaces: none may happen in a capture
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def times(self, calls: Sequence[Callable[[], Any]], rounds: int) -> list[int]:
        def once() -> Tensor | None:
            for call in calls:
                result = call()
            return result

        replay = self.capture(once)
        replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in pairs:
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return [round(start.elapsed_time(end) * 1e6 / len(calls)) for start, end in pairs]

    def memory(self) -> tuple[int, int]:
        now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return now, most

    def free(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def flush_l2(self) -> None:
        torch.empty(2 * self.l2_bytes, dtype=torch.int8, device=self.torch_name).zero_()

    def compiled(self, jobs: Iterable[Compilable], deadline: Deadline) -> Iterator[Compiled]:
        return compile_all(list(jobs), self.capability, deadline)
