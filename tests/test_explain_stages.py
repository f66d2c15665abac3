"""What `explain` says of chains of blocks, and of the tails in them that run as one kernel."""

from __future__ import annotations

import pytest
import torch
from cases import FP16, FP32, FP64, require
from chains import CHAINS, chain, identity, image_for, merged
from gated_blocks import SqueezeExcite
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.backends import eager, tuned
from fused_resblock.kernels.tables import StageEntry
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.models import randomize_norms
from fused_resblock.reference import Bottleneck


def test_explain_says_where_the_kernel_runs():
    require("triton")
    whole = frb.fuse(chain(CHAINS["layer"][0]), backend="triton", stages="kernel")
    assert [part.reason for part in frb.explain(whole).parts] == ["one chain, 3 of 3 tails as one kernel"]
    assert [part.reason for part in frb.explain(frb.fuse(chain(CHAINS["layer"][0]))).parts] == ["one chain"]


class Gated(Bottleneck):
    """A bottleneck with squeeze-and-excitation in front of its add."""

    def __init__(self) -> None:
        super().__init__(64, 16)
        self.gate = SqueezeExcite(64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.gate(self.bn3(self.conv3(y))) + x)


#: chains in which a tail is none: its blocks, a dtype, and what `explain` says of it
APART = {
    "groups": (CHAINS["groups"][0], FP32, "0 of 2{}: 0: the 3x3 changes the channel count or is grouped"),
    "mixed kinds": (CHAINS["mixed kinds"][0], FP32, "2 of 4{}: 0: the block's last convolution is no plain 1x1"),
    "gate": (lambda: [Gated(), identity()], FP32, "1 of 2{}: 0: gate runs as it is"),
    "the same block again": (lambda: [Gated()] * 2, FP32, "0 of 2{}: 0: gate runs as it is"),
    "too wide": (
        lambda: [Bottleneck(2048, 512), Bottleneck(2048, 512)],
        FP16,
        "0 of 2{}: 0: no tile has room for 512 channels in fp16",
    ),
    "too wide in TF32": (
        lambda: [Bottleneck(1024, 256), Bottleneck(1024, 256)],
        FP32,
        "no tile has room for 256 channels in tf32",
    ),
    "wider next": (
        lambda: [identity(), identity(base_width=2048)],
        FP16,
        "1 of 2{}: 1: no tile has room for 512 channels in fp16",
    ),
    "float64": (CHAINS["identity blocks"][0], FP64, "0 of 2{}: 0: no tile has room for 16 channels in float64"),
}


@pytest.mark.parametrize("name", APART)
def test_explain_says_why_a_tail_is_none(name):
    make, dtype, expected = APART[name]
    require("triton", dtype)
    fused = frb.fuse(chain(make).to(dtype), backend="triton", stages="kernel")
    before = frb.explain(fused).parts[0].reason
    assert expected.format(" tails as one kernel") in before
    with torch.no_grad():
        fused(image_for(fused).to(dtype))
    assert frb.explain(fused).parts[0].reason == before
    assert f", {merged(fused)} of " in before


def test_explain_knows_that_tf32_is_off(monkeypatch):
    require("triton")
    fused = frb.fuse(chain(CHAINS["layer"][0]), backend="triton", stages="kernel")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "0 of 3 tails as one kernel: 0: products in fp32 do not fit" in frb.explain(fused).parts[0].reason


def test_explain_says_what_a_table_decided(monkeypatch):
    require("triton")
    tile = StageTile(32, 16, 16, 4, 1, 1)
    monkeypatch.setattr(tuned, "lookup_stage", lambda *_: StageEntry(48, True, tile))
    fused = frb.fuse(chain(CHAINS["layer"][0]), backend="triton")
    with torch.no_grad():
        fused(image_for(fused))
    said = "one chain, 3 of 3 tails as one kernel: measured to be faster for the last new size"
    assert frb.explain(fused).parts[0].reason == said
    fused[0].conv2.weight.data.mul_(2)
    assert frb.explain(fused).parts[0].reason == "one chain"


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: nn.Sequential(identity(), nn.Dropout(), identity()), {}, "1 (Dropout) is not a fused block"),
        (lambda: OwnForward(identity(), identity()), {}, "a forward of its own"),
        (
            lambda: nn.Sequential(identity(), identity(), identity()),
            {"filter_fn": lambda name, block: name != "1"},
            "1 (Bottleneck) is not a fused block",
        ),
        (lambda: nn.Sequential(identity(), identity()), {"stages": False}, None),
    ],
    ids=["dropout", "forward", "filter", "not asked for"],
)
def test_explain_says_why_blocks_are_no_chain(make, options, reason):
    fused = frb.fuse(randomize_norms(make()).eval(), **options)
    parts = [(part.fused, part.reason) for part in frb.explain(fused).parts]
    assert parts == ([] if reason is None else [(False, reason)])
    assert bool(frb.explain(fused.train()).parts) == bool(parts)


@pytest.mark.parametrize(
    ("first", "others", "convolutions", "reason"),
    [
        ("eager", "triton", 3, "2 of 3 tails as one kernel: 0: the backend is eager"),
        ("triton", "eager", 6, "1 of 3 tails as one kernel: 1: the backend is eager"),
    ],
)
def test_each_block_of_a_chain_runs_on_its_own_backend(first, others, convolutions, reason, monkeypatch):
    """Its first convolution as well, which the tail of a block on another one does not compute."""
    require("triton")
    blocks = chain(lambda: [identity(), identity(), identity()])
    fused = frb.fuse(blocks, backend=first, filter_fn=lambda name, block: name == "0", stages=False)
    fused = frb.fuse(fused, backend=others, filter_fn=lambda name, block: name != "0", stages="kernel")
    bind, by_eager = eager.bind_conv_bn_act, []

    def counted(*args: object) -> object:
        by_eager.append(args)
        return bind(*args)

    monkeypatch.setattr(eager, "bind_conv_bn_act", counted)
    assert reason in frb.explain(fused).parts[0].reason
    with torch.no_grad():
        fused(image_for(fused))
    assert reason in frb.explain(fused).parts[0].reason
    assert len(by_eager) == convolutions
