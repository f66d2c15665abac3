"""Chains of bottlenecks whose tails and next heads run as one kernel: where they do, where not, and the same results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BF16, DEVICE, FP16, FP32, require, slack_of
from chains import CHAINS, CLOSE, PARAMS, X, chain, identity, image_for, merged
from parity import assert_parity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.backends import triton, tuned
from fused_resblock.kernels.tables import StageEntry
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.params import Conv


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)[6:]) for d in (FP32, FP16, BF16)])
@pytest.mark.parametrize(("make", "count"), PARAMS)
def test_parity(make, count, dtype):
    require("triton", dtype)
    reference = chain(make).to(dtype)
    fused = frb.fuse(reference, backend="triton", stages="kernel", strict=True)
    x = image_for(reference).to(dtype)
    with torch.no_grad():
        y = fused(x)
        assert torch.equal(fused(x), y)
        exact = chain(make).to(dtype).double()(x.double())
        assert_parity(y, reference(x), exact, what="y", floor=1e-6, slack=slack_of("triton", dtype))
    assert merged(fused) == count


def test_off_unless_a_table_says_so(monkeypatch):
    require("triton")
    reference = chain(CHAINS["layer"][0])
    x = image_for(reference)
    asked, answers = [], {"64": None}

    def lookup(h, conv, case):
        asked.append(case)
        return answers["64"]

    monkeypatch.setattr(tuned, "lookup_stage", lookup)
    tile = StageTile(32, 16, 16, 4, 1, 1)
    not_taken = StageEntry(48, True, replace(tile, ring=True)), StageEntry(48, True, replace(tile, halo=True))
    entries = (None, 0), (StageEntry(48, False, tile), 0), (StageEntry(48, True, tile), 3), *((e, 0) for e in not_taken)
    for answer, count in entries:
        answers["64"] = answer
        fused = frb.fuse(reference, backend="triton")
        with torch.no_grad():
            torch.testing.assert_close(fused(x), reference(x), **CLOSE)
        assert merged(fused) == count
    assert set(asked) == {
        "16-64.s2.shortcut32.next16",
        "16-64.s1.residual.next16",
        "16-64.s1.residual.last",
        "16-64.s2.shortcut32.last",
    }


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_other_backends_run_conv_by_conv(backend):
    reference = chain(CHAINS["layer"][0])
    fused = frb.fuse(reference, backend=backend, stages="kernel")
    x = image_for(reference)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), **CLOSE)
    if backend == "eager":
        assert merged(fused) == 0


def replaced(block: nn.Module) -> None:
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False).requires_grad_(False).to(DEVICE)


CHANGES = {
    "nothing": lambda b: None,
    "weights in place": lambda b: b.conv2.weight.data.mul_(2),
    "statistics": lambda b: b.bn3.running_mean.add_(1),
    "hook on a convolution": lambda b: b.conv2.register_forward_hook(lambda m, a, y: y * 2),
    "hook on the block": lambda b: b.register_forward_hook(lambda m, a, y: y * 2),
    "train mode": lambda b: b.train(),
    "grouped convolution": replaced,
    "stride": lambda b: setattr(b.conv2, "dilation", (2, 2)) or setattr(b.conv2, "padding", (2, 2)),
    "forward overridden": lambda b: setattr(b, "forward", lambda x: x * 3),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change_of_one_block(change, place):
    require("triton")
    reference = chain(CHAINS["identity blocks"][0])
    fused = frb.fuse(reference, backend="triton", stages="kernel")
    results = []
    with torch.no_grad():
        fused(X)
        for module in (fused, reference):
            torch.manual_seed(3)
            with torch.enable_grad():
                change(module[place])
            results.append(module(X))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", ["conv3", "conv1"])
@pytest.mark.parametrize("change", ["shape", "dtype", "device"])
def test_weights_that_do_not_fit_raise_what_they_raise_alone(name, change):
    require("triton")
    fused = frb.fuse(chain(CHAINS["identity blocks"][0]), backend="triton", stages="kernel")
    conv = getattr(fused[1], name)
    weight = conv.weight.detach()
    changed = {"shape": weight[:, :8], "dtype": weight.double(), "device": weight.to("meta")}[change]
    conv.weight = nn.Parameter(changed)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        fused(X)


def test_a_tile_that_does_not_run_gives_way(monkeypatch):
    require("triton")
    from fused_resblock.kernels import stage as kernels

    def bind(*args, **options):
        def fail(h, other):
            raise RuntimeError("out of resource: shared memory")

        return fail

    monkeypatch.setattr(kernels, "bind_stage", bind)
    monkeypatch.setattr(tuned, "_warned", set())
    reference = chain(CHAINS["layer"][0])
    fused = frb.fuse(reference, backend="triton", stages="kernel")
    x = image_for(reference)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="does not run here"):
        torch.testing.assert_close(fused(x), reference(x), **CLOSE)


def test_gradients_and_train_mode_run_block_by_block():
    reference = chain(CHAINS["identity blocks"][0])
    fused = frb.fuse(reference, backend="triton", stages="kernel")
    for module in (reference, fused):
        module(X).sum().backward()
    for ours, theirs in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **{key: 10 * value for key, value in CLOSE.items()})
    with torch.no_grad():
        torch.testing.assert_close(fused.train()(X), reference.train()(X), **CLOSE)


class ReadsItsInputOnce(nn.Module):
    """A residual block whose shortcut begins behind its first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(64, 16, 1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + x)


def test_a_result_that_the_next_head_alone_reads():
    require("triton")
    reference = chain(lambda: [identity(), ReadsItsInputOnce()])
    fused = frb.fuse(reference, backend="triton", stages="kernel", strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), reference(X), **CLOSE)
    assert merged(fused) == 1


def test_unfuse_and_state_dict():
    reference = chain(CHAINS["layer"][0])
    fused = frb.fuse(reference, stages="kernel")
    assert fused.state_dict().keys() == reference.state_dict().keys()
    restored = frb.unfuse(fused)
    assert type(restored) is nn.Sequential
    assert "_fused_kernel" not in restored.__dict__


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_bad_option(value):
    with pytest.raises(ValueError, match='^stages must be True, False or "kernel", got '):
        frb.fuse(chain(CHAINS["layer"][0]), stages=value)


def test_refusal_is_the_kernels():
    conv = Conv(torch.empty(16, 16, 3, 3), padding=(1, 1), dilation=(2, 2))
    assert "dilated" in triton.tail_refusal(FP16, conv, Conv(torch.empty(64, 16, 1, 1)), None, None)


def test_float64():
    require("triton")
    reference = chain(CHAINS["layer"][0])
    x = image_for(reference)
    reference, x = reference.double(), x.double()
    fused = frb.fuse(reference, backend="triton", stages="kernel")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x))
    assert merged(fused) == 0, "float64 has no tile"
