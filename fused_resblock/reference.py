"""The four residual blocks in plain PyTorch: the oracle of every test and the baseline of every benchmark.

Nothing here is fused and nothing but torch is imported. The fused classes of `modules.py` subclass these, so
constructor, parameter names and `state_dict` are the same by construction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded by its dilation, so that stride 1 keeps the size."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """1x1 convolution: a matrix product over channels at every (strided) pixel."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)


class BasicBlock(nn.Module):
    """Residual block of ResNet-18/34: `relu(bn2(conv2(relu(bn1(conv1(x))))) + identity)`.

    Args:
        inplanes: channels of the input.
        planes: channels of both 3x3 convolutions, and of the output (`expansion = 1`).
        stride: of the first 3x3.
        downsample: module applied to the input to form the identity branch; None adds the input itself.
        groups, base_width: must be 1 and 64, as in torchvision.
        dilation: must be 1, as in torchvision.
        norm_layer: makes a normalisation from a channel count; None means `nn.BatchNorm2d`.

    Shape: `[N, inplanes, H, W]` to `[N, planes, ceil(H / stride), ceil(W / stride)]`.

    Raises:
        ValueError: for groups, base_width or dilation that the block does not have.

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), figure 5 left; the
    argument order is torchvision's.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise ValueError(f"groups must be 1 in a BasicBlock, got {groups}")
        if base_width != 64:
            raise ValueError(f"base_width must be 64 in a BasicBlock, got {base_width}")
        if dilation != 1:
            raise ValueError(f"dilation must be 1 in a BasicBlock, got {dilation}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """Residual block of ResNet-50/101/152, ResNeXt and Wide ResNet: 1x1 reduce, 3x3, 1x1 expand, add, ReLU.

    Args:
        inplanes: channels of the input.
        planes: the block puts out `4 * planes` channels (`expansion = 4`).
        stride: of the 3x3 ("v1.5"; the paper strides the first 1x1).
        downsample: module applied to the input to form the identity branch; None adds the input itself.
        groups, base_width: the 3x3 has `int(planes * base_width / 64) * groups` channels in `groups` groups.
        dilation: of the 3x3, which is padded by it.
        norm_layer: makes a normalisation from a channel count; None means `nn.BatchNorm2d`.

    Shape: `[N, inplanes, H, W]` to `[N, 4 * planes, ceil(H / stride), ceil(W / stride)]`.

    Source: He et al., arXiv:1512.03385, figure 5 right; grouped form Xie et al., arXiv:1611.05431; wide form
    Zagoruyko and Komodakis, arXiv:1605.07146. The argument order is torchvision's.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResidualBlock(nn.Module):
    """The plain residual block: `relu(block(x) + skip(x))`, both branches as `nn.Sequential`.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride: of the first 3x3, and of the 1x1 on the skip branch.

    `block` is 3x3(stride), BN, ReLU, 3x3, BN; `skip` is 1x1(stride), BN when the stride or the channel count
    changes, else None. No convolution has a bias.

    Shape: `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.skip: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.skip is None else self.skip(x)
        return torch.relu(self.block(x) + identity)


class PreActBottleneck(nn.Module):
    """Pre-activation bottleneck, the unit of TF-slim's ResNet-v2: normalise and activate first, add last.

    With `preact = relu(bn(x))`: the residual branch is 1x1, BN, ReLU, 3x3(stride, dilation), BN, ReLU, 1x1 with
    bias; the shortcut is `x[:, :, ::stride, ::stride]` of the **raw** input when the channel counts agree (slim's
    `subsample`), else a 1x1(stride) with bias on `preact`. The output is shortcut + residual, with no final ReLU.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        bottleneck_channels: channels of the 3x3.
        stride: of the 3x3 and of the shortcut.
        dilation: of the 3x3, which is padded by it.

    BN has momentum 0.003 (slim's decay 0.997) and eps 1e-5. slim's `conv2d_same` with kernel 3 pads by `dilation`
    on both sides at every size, which is `Conv2d(padding=dilation)`; it is not TensorFlow's "SAME", which pads
    even sizes on one side only under stride 2.

    Shape: `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`.

    Source: He et al., "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027).
    """

    def __init__(
        self, in_channels: int, out_channels: int, bottleneck_channels: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003)

        self.preact = norm(in_channels)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = conv1x1(in_channels, out_channels, stride, bias=True)
        self.conv1 = conv1x1(in_channels, bottleneck_channels)
        self.bn1 = norm(bottleneck_channels)
        self.conv2 = conv3x3(bottleneck_channels, bottleneck_channels, stride, dilation=dilation)
        self.bn2 = norm(bottleneck_channels)
        self.conv3 = conv1x1(bottleneck_channels, out_channels, bias=True)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        preact = torch.relu(self.preact(x))
        if self.shortcut is None:
            identity = x[:, :, :: self.stride, :: self.stride]
        else:
            identity = self.shortcut(preact)
        out = torch.relu(self.bn1(self.conv1(preact)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return identity + self.conv3(out)
