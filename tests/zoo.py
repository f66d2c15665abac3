"""Residual blocks as people write them: each computes what the plan of a fused block can say. All take 8 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(channels: int, out_channels: int, kernel: int = 3, stride: int = 1, **kwargs) -> nn.Conv2d:
    """A convolution padded to keep the size at stride 1."""
    return nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, **kwargs)


class Base(nn.Module):
    """Two 3x3 convolutions with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8), nn.BatchNorm2d(8, eps=1e-3)


class FunctionalRelu(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class InPlaceEverything(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x
        return torch.relu_(out)


class PositionalInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), True))), True)


class Methods(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(out)).add_(x).relu()


class TorchAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())))


class NoNorm(nn.Module):
    """EDSR's block: bias, no norm, no ReLU at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class NormBehindRelu(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(torch.relu(self.conv2(self.bn1(torch.relu(self.conv1(x)))))) + x


class NormBehindAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))) + x).relu()


class NormTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn1(self.conv1(x))) + self.bn2(x)


class NormOnShortcut(Base):
    """RepVGG's identity branch: a norm and no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.bn3(x))


class ReluTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(self.bn1(self.conv1(x))) + torch.relu(x))


class AddsItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + out)


class SharedConv(Base):
    """One convolution called twice, with two norms."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(self.conv1(x))))) + x)


class SharedNorm(Base):
    """One norm behind two convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


class TwoBranches(Base):
    """Two 3x3 branches of the same input and no identity."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


class MiddleIsIdentity(Base):
    """The identity is what came out of the first convolution."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(first)) + first)


class ReluOfConvAndItsConv(Base):
    """Reads the value before and the value behind a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(torch.relu(first))) + first


class Residual(nn.Module):
    """The wrapper that many tutorials have."""

    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Sequential(conv(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class ConvNormRelu(nn.Sequential):
    """A helper module, as torchvision's Conv2dNormActivation."""

    def __init__(self, channels: int, out_channels: int, **kwargs) -> None:
        super().__init__(conv(channels, out_channels, **kwargs), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([ConvNormRelu(8, 4), ConvNormRelu(4, 8, kernel=2, stride=2)])
        self.shortcut = ConvNormRelu(8, 8, kernel=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for module in self.body:
            out = module(out)
        return out + self.shortcut(x)  # kernel 2: see test_blocks of strided 1x1


class NamedNorms(Base):
    """mmdetection's block: norms found by name, an inner forward, checkpointing that is off."""

    with_cp = False

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, "bn1")  # noqa: B009, as the original has it

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.norm1(self.conv1(x)).relu())) + x

        out = torch.utils.checkpoint.checkpoint(inner, x) if self.with_cp and x.requires_grad else inner(x)
        return torch.relu(out)


class PooledShortcut(nn.Module):
    """The shortcut of ResNet-D: average pooling, then a 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(8, 12, stride=2, bias=False), nn.BatchNorm2d(12))
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.down = nn.Sequential(pool, conv(8, 12, 1, bias=False), nn.BatchNorm2d(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.down(x) + self.body(x))


class SlicedShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x[:, :, ::2, ::2])


class MaxPooledShortcut(SlicedShortcut):
    def __init__(self) -> None:
        super().__init__()
        self.subsample = nn.MaxPool2d(1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.subsample(x) + self.conv(x)


class GroupedShortcut(nn.Module):
    """A shortcut that is no plain 1x1: grouped, with a bias and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(8, 8), nn.BatchNorm2d(8)
        self.down = conv(8, 8, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + self.down(x))


class SamePadding(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.conv2 = nn.Conv2d(8, 8, 1, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


class WithDropout(Base):
    """Wide ResNet's block: dropout between the convolutions, nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.bn2(torch.relu(self.conv1(self.bn1(x)))))) + x


class SlicedMiddle(nn.Module):
    """The strided view is one of a value in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.bn(self.conv1(x)))
        return self.conv2(first) + first[:, :, ::2, ::2]


class Identities(Base):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.nothing(self.bn1(self.conv1(self.nothing(x)))).contiguous().relu()
        return self.nothing(self.nothing(x.clone()) + self.bn2(self.conv2(out)))


class KeywordArguments(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(input=self.bn1(input=self.conv1(x)) + x, inplace=False)


class TrainingBranch(Base):
    """Does something else in train mode, by its own flag."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)) + x
        return out if self.training else torch.relu(out)


ALL = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in (Base, ConvNormRelu)
}
