"""Whole networks of torchvision and timm against themselves: outputs, gradients, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BF16, FP32
from parity import assert_parity
from torch import nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

from torchvision.models import _utils as tv_utils  # noqa: E402
from torchvision.models.detection import _utils as detection_utils  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

TV = torchvision.models


def randomize(model: nn.Module) -> nn.Module:
    """`randomize_norms`, frozen norms included: zero-initialised gammas would hide the residual branch."""
    generator = torch.Generator().manual_seed(1)
    for module in randomize_norms(model).modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                low = -0.5 if name in ("bias", "running_mean") else 0.5
                buffer.uniform_(low, low + 1, generator=generator)
    return model


NETWORKS = [
    pytest.param(lambda: TV.resnet18(), 8, id="torchvision resnet18"),
    pytest.param(lambda: TV.resnet50(), 16, id="torchvision resnet50"),
    pytest.param(lambda: TV.resnext50_32x4d(), 16, id="torchvision resnext50_32x4d"),
    pytest.param(lambda: TV.wide_resnet50_2(), 16, id="torchvision wide_resnet50_2"),
    pytest.param(lambda: timm.create_model("resnet18"), 8, id="timm resnet18"),
    pytest.param(lambda: timm.create_model("resnet50"), 16, id="timm resnet50"),
    pytest.param(lambda: timm.create_model("resnet50d"), 16, id="timm resnet50d"),
    pytest.param(lambda: TV.ResNet(frb.FusedBottleneck, [1, 1, 1, 1]), 4, id="torchvision's ResNet of FusedBottleneck"),
    pytest.param(lambda: TV.ResNet(frb.FusedBasicBlock, [1, 1, 1, 1]), 4, id="torchvision's ResNet of FusedBasicBlock"),
    pytest.param(
        lambda: frb.models.ResNet(frb.FusedBottleneck, [1, 1, 1, 1], groups=4), 4, id="our ResNet of FusedBottleneck"
    ),
    pytest.param(lambda: frb.models.ResNet(frb.FusedBasicBlock, [1, 1, 1, 1]), 4, id="our ResNet of FusedBasicBlock"),
]


@pytest.mark.parametrize(("make", "blocks"), NETWORKS)
def test_every_block_is_fused_and_outputs_agree(make, blocks):
    reference = frb.unfuse(randomize(make())).eval()
    fused = frb.fuse(reference, strict=True)
    reports = frb.explain(fused)
    assert len(reports) == blocks
    assert all(r.fused for r in reports), str(reports)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = fused(x), reference(x)
        exact = reference.double()(x.double())
    assert_parity(ours, theirs, exact, what="logits", floor=1e-5)


@pytest.mark.parametrize("make", [pytest.param(TV.resnet18, id="resnet18"), pytest.param(TV.resnet50, id="resnet50")])
def test_bfloat16(make):
    reference = randomize(make()).eval()
    exact_model = copy.deepcopy(reference).double()
    x = torch.randn(4, 3, 64, 64).to(BF16)
    reference = reference.to(BF16)
    exact_model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        assert_parity(frb.fuse(reference)(x), reference(x), exact_model(x.double()), what="logits")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: TV.ResNet(TV.resnet.Bottleneck, [1, 1, 1, 1], groups=2), id="Bottleneck"),
        pytest.param(lambda: TV.ResNet(TV.resnet.BasicBlock, [1, 1, 1, 1]), id="BasicBlock"),
    ],
)
def test_training_is_the_reference_to_the_bit(make):
    reference = randomize(make()).train()
    fused = frb.fuse(reference)
    states = []
    for model in (reference, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(2):
            x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
            optimizer.step()
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    for model in (reference, fused):
        model.eval()
    torch.testing.assert_close(fused(x), reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_detection_backbone_with_frozen_norms_and_eps_0(training):
    reference = randomize(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    )
    detection_utils.overwrite_eps(reference, 0.0)
    reference.train(training)
    fused = frb.fuse(reference, strict=True)
    reports = frb.explain(fused)
    assert len(reports) == 16
    assert all(r.fused for r in reports)
    x = torch.randn(1, 3, 64, 64)
    exact_model = copy.deepcopy(reference).double()
    results = []
    for model in (fused, reference, exact_model):
        outputs = model(x.to(next(model.parameters()).dtype))
        sum(v.square().mean() for v in outputs.values()).backward()
        results.append((outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads), (exact, exact_grads) = results
    for key in exact:
        assert_parity(ours[key].detach(), theirs[key].detach(), exact[key].detach(), what=key, floor=1e-5)
    assert our_grads.keys() == their_grads.keys()
    assert not any("layer1" in name or name.startswith("body.conv1") for name in our_grads)
    for name, grad in exact_grads.items():
        error = (our_grads[name].double() - grad).norm()
        bound = 2 * (their_grads[name].double() - grad).norm() + 1e-4 * grad.norm()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def test_segmentation_backbone_with_dilation():
    backbone = TV.resnet50(replace_stride_with_dilation=[False, True, True])
    reference = tv_utils.IntermediateLayerGetter(randomize(backbone), {"layer3": "aux", "layer4": "out"}).eval()
    fused = frb.fuse(reference, strict=True)
    assert fused.layer4[2].conv2.dilation == (4, 4)
    x = torch.randn(1, 3, 49, 64)
    with torch.no_grad():
        ours, theirs = fused(x), reference(x)
        exact = reference.double()(x.double())
    for key in ("aux", "out"):
        assert ours[key].shape[2:] == (7, 8)
        assert_parity(ours[key], theirs[key], exact[key], what=key, floor=1e-5)


@pytest.mark.parametrize(
    ("make", "x", "reason"),
    [
        pytest.param(lambda: TV.video.r3d_18(), (1, 3, 4, 32, 32), None, id="video r3d_18"),
        pytest.param(lambda: timm.create_model("skresnet18"), (1, 3, 64, 64), "calls", id="timm skresnet18"),
        pytest.param(lambda: TV.mobilenet_v2(), (1, 3, 64, 64), None, id="torchvision mobilenet_v2"),
        pytest.param(
            lambda: timm.create_model("resnet18", norm_layer=lambda c, **k: nn.GroupNorm(2, c)),
            (1, 3, 64, 64),
            "GroupNorm",
            id="timm resnet18 with GroupNorm",
        ),
        pytest.param(
            lambda: timm.create_model("resnet18", act_layer=nn.SiLU),
            (1, 3, 64, 64),
            "SiLU",
            id="timm resnet18 with SiLU",
        ),
    ],
)
def test_what_cannot_be_fused_is_left_alone(make, x, reason):
    reference = randomize(make()).eval()
    fused = frb.fuse(reference)
    reports = frb.explain(fused)
    x = torch.randn(x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    if reason is not None:
        assert len(reports) == 8
        assert not any(r.fused for r in reports)
        assert all(any(word in r.reason for word in reason.split("|")) for r in reports), str(reports)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("resnet18", {"drop_path_rate": 0.3}, id="drop path"),
        pytest.param("resnet18", {"drop_block_rate": 0.3}, id="drop block"),
        pytest.param("resnet18", {"zero_init_last": False, "output_stride": 8}, id="output stride 8"),
        pytest.param("resnet18", {"features_only": True}, id="features_only"),
        pytest.param("resnet26d", {"block_args": {"attn_layer": None}}, id="resnet26d"),
        pytest.param("resnetblur18", {}, id="resnetblur18"),
        pytest.param("resnetv2_18", {}, id="resnetv2_18"),
    ],
)
def test_timm_variants(name, options):
    reference = randomize(timm.create_model(name, **options)).eval()
    fused = frb.fuse(reference)
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        outputs = []
        for model in (fused, reference):
            model.train(training)
            torch.manual_seed(4)
            with torch.no_grad():
                y = model(x)
            outputs.append(y if isinstance(y, list) else [y])
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    assert frb.explain(fused)


def test_state_dict_of_the_original_loads_into_the_fused():
    original, other = randomize(TV.resnet18()).eval(), TV.resnet18()
    fused = frb.fuse(other).eval()
    assert list(fused.state_dict()) == list(original.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused(x)
        fused.load_state_dict(original.state_dict())
        torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-4)
    assert fused(x).dtype == FP32


def test_a_graph_module_within_a_model_keeps_its_mode():
    """A copy that torchvision's make of themselves is in train mode."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = extraction.create_feature_extractor(randomize(TV.resnet18()), ["layer1"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)["layer1"]

    reference = Wrapped().eval()
    fused, x = frb.fuse(reference), torch.randn(1, 3, 40, 40)
    assert not any(module.training for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
