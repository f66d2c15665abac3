"""A ResNet builder with torchvision's constructor, parameter names and `state_dict`, for use without torchvision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .reference import BasicBlock, Bottleneck, conv1x1

#: network name -> (block, blocks per stage, further `ResNet` arguments); figures from the papers' tables.
ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[int, int, int, int], dict[str, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
}


class ResNet(nn.Module):
    """Stem (7x7 stride 2, BN, ReLU, 3x3 max-pool stride 2), four stages of residual blocks, pooling, classifier.

    Args:
        block: a block class with torchvision's constructor and an `expansion`, such as `reference.Bottleneck` or
            `FusedBottleneck`.
        layers: how many blocks each of the four stages has.
        num_classes: width of the classifier.
        zero_init_residual: start each block's last gamma at 0, so that it begins as the identity.
        groups, width_per_group: of the 3x3 in a bottleneck.
        replace_stride_with_dilation: for stages 2 to 4, whether dilation takes the place of stride 2.
        norm_layer: makes a normalisation from a channel count; None means `nn.BatchNorm2d`.

    Shape: `[N, 3, H, W]` to `[N, num_classes]`.

    Raises:
        ValueError: if replace_stride_with_dilation does not hold three values.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must hold three values, got {replace_stride_with_dilation}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._reset_parameters(zero_init_residual)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_channels = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out_channels:
            downsample = nn.Sequential(conv1x1(self.inplanes, out_channels, stride), self._norm_layer(out_channels))
        width = (self.groups, self.base_width)
        stage = [block(self.inplanes, planes, stride, downsample, *width, first_dilation, self._norm_layer)]
        self.inplanes = out_channels
        for _ in range(1, blocks):
            stage.append(block(self.inplanes, planes, 1, None, *width, self.dilation, self._norm_layer))
        return nn.Sequential(*stage)

    def _reset_parameters(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)  # type: ignore[arg-type]
                elif isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)  # one name for all, or the others would keep theirs in memory
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build(name: str, **kwargs: Any) -> ResNet:
    """Make the network called `name` with random weights; `kwargs` go to `ResNet`.

    Raises:
        ValueError: if the name is not one of `ARCHITECTURES`.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"name must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    block, layers, defaults = ARCHITECTURES[name]
    return ResNet(block, layers, **{**defaults, **kwargs})


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18 (11.7 M parameters)."""
    return build("resnet18", **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34 (21.8 M parameters)."""
    return build("resnet34", **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 v1.5 (25.6 M parameters)."""
    return build("resnet50", **kwargs)


def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101 v1.5 (44.5 M parameters)."""
    return build("resnet101", **kwargs)


def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152 v1.5 (60.2 M parameters)."""
    return build("resnet152", **kwargs)


def resnext50_32x4d(**kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d (25.0 M parameters)."""
    return build("resnext50_32x4d", **kwargs)


def wide_resnet50_2(**kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 (68.9 M parameters)."""
    return build("wide_resnet50_2", **kwargs)


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm of `model` random statistics and affine parameters, in place; return the model.

    A fresh network has mean 0, variance 1, gamma 1 (or 0) and beta 0, with which a fusion that forgets one of them
    still gives the right answer. Tests, benchmarks and the demo call this so that it does not.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 1.5),
                ):
                    if tensor is not None:
                        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model
