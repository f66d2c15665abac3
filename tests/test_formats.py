"""Networks in NCHW that flatten with `view`, as many do: a stem's result, which is channels_last, must not get there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stem_networks import same_at_several
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.formats import is_nchw
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock
from fused_resblock.stem import StemConv

FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"]
)


def conv(c: int, k: int, *behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU(), *behind)


class Network(nn.Module):
    """Two stems, `middle`, and a head."""

    def __init__(self, head: Callable[[Tensor], Tensor], middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 16), conv(16, 16, nn.MaxPool2d(2)), head
        self.middle = nn.Identity() if middle is None else middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.second(self.first(x))))


class Branches(nn.Module):
    """A forward that cannot be traced around one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.features = conv(3, 16, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x.view(x.shape[0], -1) if x.shape[2] > 1 else x


class Closed(nn.Module):
    """A residual block whose forward cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x)) + x
        return y.view(x.shape[0], -1) if x.shape[2] > 1 else y


def stems(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, StemConv)]


def check(model: nn.Module, frozen: bool) -> list[str]:
    """The names of the convolutions of stems in a model that does fused what it did."""
    randomize_norms(model).eval()
    fused = frb.fuse(model, frozen=frozen)
    same_at_several(fused, model, 2, 3, 64, 64)
    return stems(fused)


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda x: x.view(x.size(0), -1), id="view"),
        pytest.param(lambda x: x.view((x.shape[0], -1)), id="view, sizes in a tuple"),
        pytest.param(lambda x: x.view(1, -1, 32, 32, 1), id="view that joins images and channels"),
        pytest.param(lambda x: torch.as_strided(x, (2, 16), (16 * 32 * 32, 32 * 32)) * 2, id="as_strided"),
        pytest.param(lambda x: (x.reshape(2, -1).mul_(2), x)[1], id="reshaped and edited"),
        pytest.param(lambda x: (F.dropout(x, 0.5, False) * 2).view(-1, 16 * 32 * 32), id="further behind"),
        pytest.param(lambda x: torch.stack([x, x]).view(4, -1), id="view of both"),
        pytest.param(lambda x: x.flatten(2).view(-1), id="flattened in part"),
        pytest.param(lambda x: x.view_as(torch.zeros(2 * 16, 32, 32)), id="view_as"),
        pytest.param(lambda x: x * x.stride(1), id="strides"),
    ],
)
def test_a_view_of_stems(head, frozen):
    assert check(Network(head), frozen) == []


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda x: torch.flatten(x, 1).view(2, -1), id="flatten"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1), id="pooled to one"),
        pytest.param(lambda x: x.contiguous().view(x.size(0), -1), id="made contiguous"),
        pytest.param(lambda x: x.mean((2, 3)), id="no view"),
    ],
)
def test_what_may_be_channels_last(head):
    assert check(Network(head), frozen=False) == ["first.0", "second.0"]


@pytest.mark.parametrize("middle", [nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
def test_layers_that_forget_the_format(middle):
    assert check(Network(lambda x: x.view(x.shape[0], -1), middle), frozen=False) == ["first.0", "second.0"]


def test_views_behind_a_fused_block():
    """The block's own result is channels_last; here its image is one pixel then, and viewed as ever."""
    network = Network(lambda x: F.avg_pool2d(x, 32).view(x.size(0), -1), middle=BasicBlock(16, 16))
    assert check(network, frozen=False) == ["first.0", "second.0"]


def test_a_closed_block_may_do_anything():
    """Its forward cannot be traced, and flattens with `view`."""
    assert check(Network(lambda x: x, middle=Closed()), frozen=False) == []


def test_a_network_in_channels_last_has_all_its_stems():
    network = Network(lambda x: x.permute(0, 2, 3, 1).view(x.size(0), -1)).to(memory_format=torch.channels_last)
    assert check(network, frozen=False) == ["first.0", "second.0"]


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_what_is_done_to_the_result_of_a_part_is_not_known(frozen):
    assert check(Branches(), frozen) == ["features.0"]


@FORMATS
def test_what_a_network_returns_is_as_ever(memory_format):
    model = randomize_norms(Network(lambda x: {"features": [x, x.size(0)], "middle": x[:, :1]})).eval()
    fused = frb.fuse(model)
    x = torch.randn(2, 3, 64, 64).to(memory_format=memory_format)
    with torch.no_grad():
        for _ in range(6):
            mine, others = fused(x), model(x)
            assert mine["features"][0].stride() == others["features"][0].stride()
            torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-4)


def test_results_that_are_one_tensor():
    fused = frb.fuse(Network(lambda x: {"out": x, "aux": x}).eval())
    with torch.no_grad():
        y = fused(torch.randn(2, 3, 64, 64))
    assert y["out"] is y["aux"]
    assert y["out"].is_contiguous()


class Permuted(Network):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        x = x.permute(0, 3, 1, 2)
        return [super().forward(x), x]


def test_results_that_are_of_the_input():
    fused, images = frb.fuse(Permuted(lambda x: x).eval()), torch.randn(2, 64, 64, 3)
    with torch.no_grad():
        assert fused(images)[1].data_ptr() == images.data_ptr()


def test_in_channels_last_since():
    model = Network(lambda x: x).eval()
    fused, x = frb.fuse(model).to(memory_format=torch.channels_last), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.to(memory_format=torch.channels_last)(x)
        assert fused(x).stride() == expected.stride()


def test_a_stem_that_is_gone():
    """Put out of its place in a part of the network, which the network is not told."""
    model = randomize_norms(Network(lambda x: x)).eval()
    fused = frb.fuse(model)
    for network in (fused, model):
        network.first[0] = nn.Sequential(network.first[0])
    same_at_several(fused, model, 2, 3, 64, 64)


def test_vmap():
    model = randomize_norms(Network(lambda x: x)).eval()
    fused, x = frb.fuse(model), torch.randn(3, 2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(x), torch.vmap(model)(x), rtol=1e-4, atol=1e-4)


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


@pytest.mark.parametrize("after", [0, 6], ids=["at once", "later"])
def test_a_view_that_came_later(after):
    model = randomize_norms(Network(nn.Sigmoid())).eval()
    fused, x = frb.fuse(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(after):
            fused(x)
        for network in (fused, model):
            network.head = View()
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_views_what_another_fused_one_gives():
    inner = randomize_norms(Network(lambda x: x)).eval()
    reference = nn.Sequential(conv(3, 3), inner, View()).eval()
    fused = frb.fuse(nn.Sequential(reference[0], frb.fuse(inner), View()).eval())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(6):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


def test_what_a_fused_block_gives_is_channels_last():
    fused = frb.fuse(Network(lambda x: x, middle=BasicBlock(16, 16)).eval())
    with torch.no_grad():
        assert fused(torch.randn(2, 3, 64, 64)).is_contiguous(memory_format=torch.channels_last)


@FORMATS
@pytest.mark.parametrize("weights", [[(4, 3, 3, 3)], [(4, 3, 1, 1)], [(4, 1, 3, 3)], [(4, 3, 1, 1), (4, 3, 3, 3)]])
def test_formats_as_torch_tells_them_apart(weights, memory_format):
    convs = nn.Sequential(*(nn.Conv2d(c, k, r, groups=1) for k, c, r, _ in weights)).to(memory_format=memory_format)
    assert is_nchw(convs) == (memory_format == torch.contiguous_format)
    for layer in convs:
        x = torch.randn(1, layer.in_channels, 5, 6)
        assert layer(x).is_contiguous(memory_format=memory_format)
