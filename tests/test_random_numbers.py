"""Forwards that draw random numbers keep drawing them, and `fuse` itself draws none."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.proxies import RANDOM as REASON
from fused_resblock.tracing import graph_of

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "another tensor's method": lambda: torch.empty(()).uniform_().item(),
    "python": random.random,
    "numpy": np.random.rand,
}


class Block(nn.Module):
    """Leaves its convolutions out now and then (stochastic depth), by default in train mode only."""

    def __init__(self, draw: str, always: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.draw, self.always, self.p = draw, always, 0.5

    def forward(self, x: Tensor) -> Tensor:
        if (self.training or self.always) and DRAWS[self.draw]() < self.p:
            return x
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def blocks(draw: str, always: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(draw, always) for _ in range(6))).eval()


def seed(number: int = 1) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def left_out(model: nn.Module) -> list[int]:
    """How often each block returns its input, of 20 calls from one seed."""
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    seed()
    with torch.no_grad():
        return [sum(torch.equal(block(x), x) for _ in range(20)) for block in model]


@pytest.mark.parametrize("draw", DRAWS)
def test_stochastic_depth_in_train_mode_with_frozen_norms(draw):
    model = blocks(draw, always=False)
    fused = frb.fuse(model)
    assert all(report.fused for report in frb.explain(fused))
    for network in (model, fused):
        network.train()
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
    assert left_out(fused) == left_out(model)
    assert 20 < sum(left_out(model)) < 100


@pytest.mark.parametrize("draw", DRAWS)
def test_a_block_that_draws_in_eval_mode_is_kept(draw):
    model = blocks(draw, always=True)
    fused = frb.fuse(model)
    assert {(report.fused, report.reason) for report in frb.explain(fused)} == {(False, REASON)}
    assert left_out(fused) == left_out(model)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_network_that_draws_is_not_one_function(draw):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = blocks(draw, always=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.flip(-1) if DRAWS[draw]() < 0.5 else x)

    x = torch.randn(1, 4, 3, 3)
    for number in range(3):  # whatever was drawn when it was fused and when it was checked
        seed(number)
        fused = frb.fuse(Network().eval(), frozen=True)
        with torch.no_grad():
            assert len({fused(x).sum().item() for _ in range(16)}) == 2
        (reason,) = (part.reason for part in frb.explain(fused).parts if part.modules == "the network")
        assert reason == f"frozen: its own forward: {REASON}"


@pytest.mark.parametrize("draw", DRAWS)
def test_fuse_and_a_schedule_draw_nothing(draw):
    def next_numbers(work) -> tuple[float, ...]:
        seed()
        work()
        return torch.rand(()).item(), random.random(), np.random.rand()

    model = blocks(draw, always=False)
    fused = frb.fuse(model)
    untouched = next_numbers(lambda: None)
    assert next_numbers(lambda: frb.fuse(model)) == untouched
    assert next_numbers(lambda: setattr(fused[0], "p", 0.25)) == untouched


def test_what_another_thread_draws_meanwhile_is_its_own():
    numbers = []

    class Waiting(Block):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: numbers.append(torch.rand(()).item()))
            thread.start()
            thread.join()
            return super().forward(x)

    seed()
    graph_of(Waiting("torch").eval(), training=False)
    numbers.append(torch.rand(()).item())
    seed()
    Waiting("torch")  # draws its weights
    assert numbers == [torch.rand(()).item() for _ in range(2)]
