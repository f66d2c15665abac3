"""What `pytest benchmarks --benchmark-only` times on a GPU, on a machine without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gpu_fixtures import block, one_thread
from stand_in_device import StandIn

from benchmarks import test_bench_gpu as suite
from benchmarks.gpu.networks import GROUPS, Case

TINY = Case("resnet18", 2, "layer1.0", size=16, dtype="ieee")


class Benchmark(SimpleNamespace):
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        super().__init__(extra_info={}, timed=0)

    def pedantic(self, call, args, rounds, warmup_rounds):
        self.timed += 1
        suite.device().awaited = 0
        assert call(*args) is None
        assert suite.device().awaited == 1


@pytest.fixture
def gpu(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(suite, "device", lambda: made)
    monkeypatch.setattr(suite, "prepare", lambda case, *rest: (block(), torch.randn(case.batch, 16, 4, 4)))
    suite._prepared.cache_clear()
    yield made
    suite._prepared.cache_clear()


@pytest.mark.parametrize("provider", ["eager", "folded", "fused+graph", "frozen", "conv-by-conv"])
def test_what_is_right_is_timed_and_awaited(provider, gpu):
    benchmark = Benchmark()
    suite.test_forward(benchmark, TINY, provider)
    assert benchmark.timed == 1
    assert benchmark.group == "resnet18 layer1.0 ieee batch 2"
    assert benchmark.extra_info["max_error"] <= benchmark.extra_info["error_bound"]


def test_what_is_wrong_is_not_timed(gpu, monkeypatch):
    monkeypatch.setitem(suite.MAKERS, "bad", lambda model, x: lambda x: model(x) + 1)
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="bad, resnet18 layer1.0 ieee batch 2 main: max error"):
        suite.test_forward(benchmark, TINY, "bad")
    assert benchmark.timed == 0


def test_every_provider_block_stage_and_network_is_there():
    assert {name for group in GROUPS.values() for name in group} == {name.partition("+")[0] for name in suite.PROVIDERS}
    assert "onnxruntime+graph" not in suite.PROVIDERS
    assert len(set(suite.CASES)) == len(suite.CASES)
    parts = {case.part for case in suite.CASES}
    assert {"whole", "layer1-4", "layer3", "layer4.1"} <= parts
