"""Which modules are found to be a stem, which not, and what `fuse`, `unfuse` and `explain` make of that."""

from __future__ import annotations

import pytest
import torch
from stem_networks import Network, network, parts
from torch import Tensor, nn
from torch.utils.data import default_collate

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock


def test_unfuse_filter_and_option():
    reference = network()
    fused = frb.fuse(reference)
    assert type(fused).__name__ == "FusedNetwork"
    assert isinstance(fused, Network)
    assert isinstance(fused.conv1, nn.Conv2d)
    frb.unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(fused.modules(), reference.modules(), strict=True))
    assert parts(frb.fuse(reference, stems=False)) == []
    assert parts(frb.fuse(reference, filter_fn=lambda name, module: name != "conv1")) == []
    reference.to(memory_format=torch.channels_last)  # else a stem alone does not pay
    assert len(parts(frb.fuse(reference, filter_fn=lambda name, module: name == "conv1"))) == 1


def test_fuse_twice():
    fused = frb.fuse(frb.fuse(network()))
    assert len(parts(fused)) == 1
    assert len(fused._fused_stems) == 1
    for backend in ("eager", "auto"):
        frb.fuse(fused, inplace=True, backend=backend)
        assert fused.conv1.__dict__["_fused_backend"] == backend
    assert len(fused._fused_stems) == 1


def test_one_conv_with_two_readers_is_no_stem():
    class Two(Network):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(x)
            return self.layer1(self.relu(self.bn1(y))) + y

    fused = frb.fuse(Two(pool=nn.Identity()).eval())
    assert parts(fused) == []


def test_several_stems_and_a_shared_relu():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
            self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
            self.block = BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = self.relu(norm(conv(x)))
            return self.block(self.pool(x))

    reference = randomize_norms(Deep()).eval()
    fused = frb.fuse(reference)
    assert parts(fused)[:2] == ["Conv2d + BatchNorm2d + ReLU"] * 2
    assert parts(fused)[2] == "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
    x = torch.randn(2, 3, 12, 13)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)


def test_network_that_cannot_be_traced_has_stems_in_its_parts():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network()

        def forward(self, images: list[Tensor]) -> list[int]:
            return [int(self.backbone(default_collate([image])).argmax()) for image in images]

    reference = Detector().eval()
    fused = frb.fuse(reference)
    assert [p.name for p in frb.explain(fused).parts] == ["backbone.conv1", "backbone.layer1"]
    images = [torch.randn(3, 19, 22) for _ in range(3)]
    with torch.no_grad():
        assert fused(images) == reference(images)


def test_explain_says_why_a_stem_computes_one_by_one():
    fused = frb.fuse(network())

    def reason() -> str:
        return frb.explain(fused).parts[0].reason

    assert reason() == "one operation"
    handle = fused.bn1.register_forward_hook(print)
    assert reason() == "hooks on bn1"
    handle.remove()
    fused.train()
    assert reason() == "batch statistics (train mode)"
    fused.eval().bn1 = nn.BatchNorm2d(8)
    assert reason() == "bn1 was replaced"
    del fused.bn1
    assert reason() == "bn1 was replaced"
    fused.conv1.padding_mode = "circular"
    assert "padding" in reason()


def test_explain_says_that_a_stem_is_parametrized():
    fused = frb.fuse(network())
    torch.nn.utils.parametrizations.weight_norm(fused.conv1)
    part = frb.explain(fused).parts[0]
    assert (part.fused, part.reason) == (False, "conv1: its class was changed")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edit_of_the_image_that_comes_later(mode):
    """The convolution may not wait for the norm any more once the forward does something between them."""

    class Editing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
            self.block, self.edits = frb.reference.BasicBlock(8, 8), False

        def forward(self, x):
            y = self.conv1(x)
            if self.edits:
                x.mul_(2)
            return self.block(self.relu(self.bn1(y)))

    reference = randomize_norms(Editing()).eval()
    fused = frb.fuse(reference, strict=True)
    assert fused._fused_stems
    with mode():
        for edits in (False, True):
            for network in (reference, fused):
                network.edits = edits
            x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
            for _ in range(2):
                torch.testing.assert_close(fused(x.clone()), reference(x.clone()), rtol=1e-4, atol=1e-5)
    assert not fused._fused_stems


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_on_what_a_stem_is_in_see_tensors(kind):
    """They come between its modules, which then compute one by one."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
            self.relu, self.block = nn.ReLU(), BasicBlock(8, 8)

        def forward(self, x):
            return self.block(self.relu(self.front(x)))

    reference = randomize_norms(Inner()).eval()
    fused = frb.fuse(reference, strict=True)
    assert [part.fused for part in frb.explain(fused).parts] == [True]
    seen: list[type] = []
    if kind == "forward":

        def double(module, args, y):
            seen.append(type(y))
            return y * 2 if type(y) is Tensor else y

        handles = [network.front.register_forward_hook(double) for network in (reference, fused)]
    else:
        note = lambda module, args: seen.append(type(args[0]))  # noqa: E731
        handles = [network.front.register_forward_pre_hook(note) for network in (reference, fused)]
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)
    assert seen == [Tensor, Tensor]
    assert [(part.fused, part.reason) for part in frb.explain(fused).parts] == [(False, "hooks on front")]
    for handle in handles:
        handle.remove()
    assert [part.fused for part in frb.explain(fused).parts] == [True]


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_a_norm_that_is_given_its_input_by_name(frozen):
    class ByName(Network):
        def forward(self, x: Tensor) -> Tensor:
            first = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            return self.layer1(first).mean() + self.bn1(input=self.conv1(x)).mean()

    reference = randomize_norms(ByName()).eval()
    fused, x = frb.fuse(reference, frozen=frozen), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_a_network_without_blocks(frozen):
    rows = [nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8)]
    reference = randomize_norms(nn.Sequential(*rows, nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(5))).eval()
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        reference(x)
        fused = frb.fuse(reference, frozen=frozen)
        for _ in range(5):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    row = "Conv2d + BatchNorm2d + ReLU"
    assert parts(fused) == [row, f"{row} + MaxPool2d"] + ["the network"] * frozen
    assert str(frb.explain(fused)).startswith("no residual blocks found")


def test_nothing_is_done_to_networks_without_convolutions():
    for layers in ([nn.Linear(3, 3), nn.ReLU()], [nn.Conv2d(3, 3, 1), nn.Tanh()]):
        fused = frb.fuse(nn.Sequential(*layers).eval(), frozen=True)
        assert [type(m) for m in fused.modules()] == [nn.Sequential, *map(type, layers)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("frozen", [False, True], ids=["default", "frozen"])
def test_a_convolution_that_is_called_again(mode, frozen):
    """Its second input changes before the result is read."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
            self.block = BasicBlock(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.relu(self.norm(self.conv(x))))
            y = self.conv(x)
            x.mul_(2)
            return self.norm(y) + x

    reference = randomize_norms(Again()).eval()
    fused, x = frb.fuse(reference, frozen=frozen), torch.randn(2, 8, 9, 7)
    with mode():
        for _ in range(5):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


def test_a_convolution_that_is_called_again_in_the_same_row():
    class Shared(Network):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (self.relu(self.bn1(self.conv1(t))) for t in (x, x.flip(3)))
            return self.fc(self.layer1(self.maxpool(a + b)).mean((2, 3)))

    reference = randomize_norms(Shared()).eval()
    fused, x = frb.fuse(reference), torch.randn(2, 3, 20, 20)
    assert parts(fused) == ["Conv2d + BatchNorm2d + ReLU"]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
