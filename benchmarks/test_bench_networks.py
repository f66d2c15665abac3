"""Networks, stages and blocks on a CPU, in pytest-benchmark's table.

`pytest benchmarks --benchmark-only -k "resnet50 and bfloat16"`, or `-k "layer1.0 and float32-batch-1-"`. Where there is
a GPU, `CUDA_VISIBLE_DEVICES=` in front of it. A provider is timed only if its output is right. The providers of a case
follow one another here, so that a drift of the machine can favour one; figures to be quoted come from `python -m
benchmarks.bench_cpu`, where they take turns.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import pytest
import torch

from benchmarks.cases import BATCHES, BLOCKS, DTYPES, NETWORKS, PARTS, PROVIDERS, STAGES, Case, exact_output, prepare
from benchmarks.harness import WARM_UP, parity

PLACES = () if torch.cuda.is_available() else (*PARTS, *STAGES, *BLOCKS)
CASES = [Case(n, p, d, b) for n, d, b, p in product(NETWORKS, DTYPES, BATCHES, PLACES)]


@lru_cache(maxsize=1)
def _prepared(case: Case):
    """The model, its input, eager PyTorch's output and the exact one: made once for the providers of a case."""
    model, x = prepare(case)
    with torch.no_grad():
        return model, x, model(x), exact_output(model, x)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_forward(benchmark, case: Case, provider: str) -> None:
    """Latency of one forward, `torch.no_grad()`, at 224x224."""
    benchmark.group = str(case)
    model, x, same_dtype, exact = _prepared(case)
    with torch.no_grad():
        call = PROVIDERS[provider](model, x)
        failure, error, bound = parity(call(x), same_dtype, exact)
        assert failure is None, f"{provider}, {case}: {failure}"
        benchmark.extra_info.update(vars(case), threads=torch.get_num_threads(), max_error=error, error_bound=bound)
        benchmark.pedantic(call, args=(x,), rounds=20 if case.batch == 1 else 5, warmup_rounds=WARM_UP)
