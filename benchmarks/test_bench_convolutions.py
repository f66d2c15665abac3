"""Every fused convolution of the shape table, one by one: `pytest benchmarks --benchmark-only -k "3x3 and fused"`.

On a GPU in fp16, batch 128, every launch awaited; else in fp32, batch 1, on the CPU. A provider is timed only if its
output is right. `python -m benchmarks.gpu bench` measures networks and blocks in turns and as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.operations import Operation, build
from benchmarks.gpu.space import distinct_shapes, key_of
from benchmarks.harness import WARM_UP, parity
from benchmarks.shapes import ConvShape
from fused_resblock.backends import bind_conv_bn_act

DEVICE, DTYPE, BATCH = ("cuda", torch.float16, 128) if torch.cuda.is_available() else ("cpu", torch.float32, 1)
PROVIDERS = ("eager", "fused")


@lru_cache(maxsize=1)
def _prepared(shape: ConvShape) -> tuple[Operation, Tensor, Tensor]:
    """The operation, eager PyTorch's result and the exact one: made once for the providers of a shape."""
    operation = build(shape, BATCH, DTYPE, DEVICE)
    return operation, operation.plain(), operation.to(torch.float64).plain()


def _call(operation: Operation, provider: str) -> Callable[[], Tensor]:
    if provider == "eager":
        return operation.plain
    run = bind_conv_bn_act(operation.x, operation.conv, operation.other, operation.epilogue)
    return lambda: run(operation.x, operation.other)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", distinct_shapes(), ids=key_of)
def test_convolution(benchmark, shape: ConvShape, provider: str) -> None:
    """Latency of one convolution with its epilogue, `torch.no_grad()`."""
    benchmark.group = key_of(shape)
    with torch.no_grad():
        operation, same_dtype, exact = _prepared(shape)
        call = _call(operation, provider)
        failure, error, bound = parity(call(), same_dtype, exact)
        assert failure is None, f"{provider}: {failure}"
        benchmark.extra_info.update(device=DEVICE, batch=BATCH, max_error=error, error_bound=bound)

        def timed() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=20, warmup_rounds=WARM_UP)
