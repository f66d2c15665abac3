"""Blocks that are kept: convolution, norm and ReLU in a row within them are joined, where their graph can be seen."""

from __future__ import annotations

from types import SimpleNamespace

import effects
import odd_blocks
import pytest
import torch
from stem_networks import network, parts, same_at_several
from torch import Tensor, nn
from zoo import Base

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock
from fused_resblock.stem import StemConv


class Split(Base):
    """As in Res2Net: groups of channels, each convolved after the one before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.relu(self.bn1(self.conv1(x))), 4, 1)
        first = self.relu(self.norms[0](self.convs[0](first)))
        second = self.relu(self.norms[1](self.convs[1](first + second)))
        return self.relu(self.bn2(self.conv2(torch.cat([first, second], 1))) + x)


class Views(Split):
    """Asks for memory in NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y.view(y.shape[0], -1).reshape(y.shape))) + x)


def around(block: nn.Module) -> nn.Module:
    """A network of a fused block and this one."""
    torch.manual_seed(0)
    model = randomize_norms(nn.Sequential(BasicBlock(8, 8), nn.Sequential(block))).eval()
    return model.to(memory_format=torch.channels_last)


def check(model: nn.Module, frozen: bool) -> nn.Module:
    """The model fused, which does what it did."""
    fused = frb.fuse(model, frozen=frozen)
    same_at_several(fused, model, 2, 8, 7, 6)
    return fused


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_stems_within_a_kept_block(frozen):
    fused = check(around(Split()), frozen)
    row = "Conv2d + BatchNorm2d"
    assert parts(fused) == [f"{row} + ReLU"] * 3 + [row] + ["the network"] * frozen
    assert "split" in frb.explain(fused)[1].reason
    assert not any(isinstance(module, StemConv) for module in frb.unfuse(fused).modules())


@pytest.mark.parametrize("block", [*odd_blocks.ALL.values(), *effects.ALL.values()])
def test_odd_blocks_in_a_network(block):
    """Its first forwards run as they do where nothing is frozen."""
    with torch.no_grad():
        try:
            around(block())(torch.randn(2, 8, 7, 6))
        except Exception:
            pytest.skip("it does not fit a network of one tensor")
    check(around(block()), frozen=True)


def closed(model: nn.Module, **options) -> bool:
    """Whether nothing is joined within the last block."""
    return not any(isinstance(module, StemConv) for module in frb.fuse(model, **options)[1].modules())


def test_blocks_that_stay_closed():
    assert not closed(around(Split()))
    assert closed(around(Split()), filter_fn=lambda name, module: name != "1.0")
    assert closed(around(Split()), stems=False)
    hooked = around(Split())
    hooked[1][0].norms[0].register_forward_hook(lambda *_: None)
    assert closed(hooked)
    assert closed(around(odd_blocks.BranchOnValue()))


def test_a_block_that_asks_for_nchw():
    model = randomize_norms(nn.Sequential(nn.Sequential(Views()), BasicBlock(8, 8))).eval()
    fused = check(model, frozen=False)
    assert [isinstance(conv, StemConv) for conv in (fused[0][0].conv1, fused[0][0].conv2)] == [False, True]


def test_a_closed_block_beside_an_open_one():
    model = nn.Sequential(around(Split()), around(odd_blocks.BranchOnValue()))
    fused = check(model, frozen=False)
    inside = [[isinstance(module, StemConv) for module in fused[i][1].modules()] for i in range(2)]
    assert [any(row) for row in inside] == [True, False]


def test_a_network_whose_attributes_change():
    """It is looked at again, with the same blocks open."""
    fused = frb.fuse(nn.Sequential(around(Split()), around(odd_blocks.BranchOnValue())))
    before = parts(fused)
    fused.flag = True
    with torch.no_grad():
        fused(torch.randn(2, 8, 7, 6))
    assert parts(fused) == before != []


@pytest.mark.parametrize("inner", [False, True])
def test_on_a_gpu_only_frozen(inner):
    for frozen in (False, True):
        on_gpu = SimpleNamespace(weight=SimpleNamespace(is_cuda=True), _fused_many=inner, unasked=lambda f=frozen: f)
        assert StemConv._pays(on_gpu, (64, 64, 112, 112)) == (frozen or not inner)  # type: ignore[arg-type]
    plain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for model, many in ((around(Split()), True), (plain, True), (network(), False)):
        assert {m._fused_many for m in frb.fuse(model).modules() if isinstance(m, StemConv)} == {many}
