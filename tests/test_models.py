"""`models` against torchvision: the same names, shapes and outputs for every network."""

from __future__ import annotations

import pytest
import torch

from fused_resblock import models
from fused_resblock.reference import BasicBlock, Bottleneck


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_same_as_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = models.randomize_norms(models.build(name, num_classes=10)).eval()
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    state = ours.state_dict()
    assert [(k, v.shape) for k, v in state.items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]
    theirs.load_state_dict(state, assign=True)
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


@pytest.mark.parametrize(
    "dilate", [(False, False, True), (False, True, True)], ids=["output-stride-16", "output-stride-8"]
)
def test_dilation_same_as_torchvision(dilate: tuple[bool, bool, bool]) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours = models.randomize_norms(models.resnet50(replace_stride_with_dilation=dilate, num_classes=10)).eval()
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=dilate, num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_function_for_every_name(name: str) -> None:
    with torch.device("meta"):
        direct, built = getattr(models, name)(num_classes=3), models.build(name, num_classes=3)
    assert [(k, v.shape) for k, v in direct.state_dict().items()] == [
        (k, v.shape) for k, v in built.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_zero_init_residual_starts_blocks_as_identity(name: str) -> None:
    model = models.build(name, zero_init_residual=True)
    blocks = [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    assert blocks
    for block in blocks:
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        assert not last.weight.any()
        assert block.bn1.weight.all()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name must be one of resnet18, .*, got 'resnet9'"):
        models.build("resnet9")


def test_wrong_number_of_dilations() -> None:
    with pytest.raises(ValueError, match="replace_stride_with_dilation must hold three values, got"):
        models.resnet50(replace_stride_with_dilation=(True, False))


def test_randomize_norms_leaves_no_default_and_repeats_itself() -> None:
    first, second, other = (models.randomize_norms(models.resnet18(num_classes=2), seed) for seed in (0, 0, 1))
    fresh = models.resnet18(num_classes=2).state_dict()
    norms = [key for key in fresh if "bn" in key or "downsample.1" in key]
    norms = [key for key in norms if not key.endswith("num_batches_tracked")]
    assert len(norms) == 4 * 20
    for key in norms:
        assert (first.state_dict()[key] != fresh[key]).float().mean() > 0.9, key
        assert torch.equal(first.state_dict()[key], second.state_dict()[key]), key
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key]), key
    assert all((first.state_dict()[key] > 0).all() for key in norms if key.endswith("running_var"))
