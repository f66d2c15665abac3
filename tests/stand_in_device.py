"""A device for the GPU runner's tests: CPU tensors, kernels in Triton's interpreter, memory that runs out on demand."""

from time import perf_counter_ns

import torch

from benchmarks.gpu.compiling import Compiled
from fused_resblock.kernels.gpu import Gpu


class StandIn:
    """Implements `benchmarks.gpu.device.Device` on the CPU.

    Args:
        refused: tiles that do not compile.

    `out_of_memory_after`, when set, is how many readings of the clock succeed before memory runs out, once.
    """

    torch_name = "cpu"
    name = "Stand-In 9000"
    capability = 90
    gpu = Gpu()
    l2_bytes = 1000

    def __init__(self, refused=()):
        self.refused = refused
        self.compile_calls = []
        self.out_of_memory_after = None
        self.timed = 0
        self.flushed = 0
        self.awaited = 0

    def synchronize(self):
        self.awaited += 1

    def clock(self):
        if self.out_of_memory_after is not None:
            self.out_of_memory_after -= 1
            if self.out_of_memory_after < 0:
                self.out_of_memory_after = None
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return perf_counter_ns()

    def capture(self, call):
        call()
        return call

    def times(self, calls, rounds):
        self.timed += len(calls)
        for call in calls:
            call()
        return [1000 + i for i in range(rounds)]

    def memory(self):
        return 0, 1 << 20

    def free(self):
        pass

    def flush_l2(self):
        self.flushed += 1

    def compiled(self, jobs, deadline):
        for job in jobs:
            if not deadline.allows():
                return
            self.compile_calls.append(job)
            yield Compiled(job, "OutOfResources: shared memory" if job.tile in self.refused else None, 1024)
