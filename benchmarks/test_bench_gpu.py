"""Networks, stages and blocks on a GPU, in pytest-benchmark's table.

`pytest benchmarks --benchmark-only -k "resnet50 and layer1 and fused"`, or `-k "resnet18-whole-bf16 and graph"`.

A provider is timed only if its output is right, every call awaited, as it is and as a CUDA graph. The providers of a
case follow one another here; figures to be quoted come from `make gpu-bench`, where they take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import BLOCKS, BODY, STAGES, exact_output
from benchmarks.gpu.bench import bounding_output
from benchmarks.gpu.device import CudaDevice, Device
from benchmarks.gpu.networks import GROUPS, NO_GRAPH, Case, Made, prepare
from benchmarks.gpu.onnx_session import available as onnxruntime_is_installed
from benchmarks.gpu.operations import precision
from benchmarks.harness import WARM_UP, parity
from fused_resblock.models import ARCHITECTURES

PARTS = (*BLOCKS, *STAGES, BODY)
CASES = [Case(n, b, dtype=d) for n, d, b in product(ARCHITECTURES, ("fp16", "bf16", "tf32"), (1, 32, 128))]
CASES += [Case(n, 128, part) for n, part in product(("resnet50", "resnet18"), PARTS)]
MAKERS = {name: make for group in GROUPS.values() for name, make in group.items()}
PROVIDERS = [name + graph for name in MAKERS for graph in ("", "+graph") if not (graph and name in NO_GRAPH)]


def _label(case: Case, between: str = " ") -> str:
    return str(case).removesuffix(f" {case.group}").replace(" ", between)


@lru_cache(maxsize=1)
def device() -> Device:
    """The GPU."""
    return CudaDevice()


@lru_cache(maxsize=1)
def _prepared(case: Case) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model, its input, the output whose error sets the bound and the exact one: once for a case's providers."""
    with precision(case.dtype) as dtype:
        model, x = prepare(case, device().torch_name, dtype)
        exact = exact_output(model, x)
        return model, x, bounding_output(case.dtype, model, x, exact), exact


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES if torch.cuda.is_available() else [], ids=lambda case: _label(case, "-"))
def test_forward(benchmark, case: Case, provider: str) -> None:
    """Latency of one forward, `torch.no_grad()`."""
    name, _, graph = provider.partition("+")
    if name == "onnxruntime" and not onnxruntime_is_installed():
        pytest.skip("needs onnxruntime with CUDA")
    benchmark.group = _label(case)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with precision(case.dtype), torch.no_grad():
            model, x, same_dtype, exact = _prepared(case)
            call = Made(MAKERS[name], model, x, device(), bool(graph))()
            failure, error, bound = parity(call(x), same_dtype, exact)
            assert failure is None, f"{provider}, {case}: {failure}"
            benchmark.extra_info.update(vars(case), max_error=error, error_bound=bound)
            benchmark.pedantic(_awaited(call), args=(x,), rounds=20, warmup_rounds=WARM_UP)
    finally:
        torch.backends.cudnn.benchmark = before


def _awaited(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        call(x)
        device().synchronize()

    return run
