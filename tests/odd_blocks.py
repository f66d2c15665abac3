"""Residual blocks that no plan describes, and some that only look like one. All take 8 channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo import Base, conv


class ForgetsItsSkip(Base):
    """The well-known bug: `out` is overwritten and the identity is never used."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = torch.relu(self.bn1(self.conv1(x)))
        out + identity
        return torch.relu(self.bn2(self.conv2(out)))


class AddsTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)) + x)) + x)


class ReturnsTuple(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.bn1(self.conv1(x)) + x
        return torch.relu(out), out


class ReturnsDict(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.bn1(self.conv1(x)) + x}


class SqueezeExcite(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out * self.gate(out) + x)


class ScaledResidual(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.conv2(torch.relu(self.conv1(x)))


class ScaledByTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor(0.1) * self.conv2(torch.relu(self.conv1(x)))


class AlphaAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.bn1(self.conv1(x)), x, alpha=2)


class Subtracts(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) - x


class LayerScale(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x))) * self.gamma + x


class Concatenates(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn1(self.conv1(x)) + x, x], 1)


class ModuleNamedClone(nn.Module):
    """A convolution that bears the name of a tensor method."""

    def __init__(self) -> None:
        super().__init__()
        self.clone, self.contiguous, self.add = conv(8, 8), nn.BatchNorm2d(8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(torch.relu(self.contiguous(self.clone(x)))) + x


class InputNamedClone(Base):
    def forward(self, clone: Tensor) -> Tensor:
        return self.bn1(self.conv1(clone)) + clone


class BranchOnValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return out + x if out.sum() > 0 else out - x


class Asserts(Base):
    """What hinders is the activation, not the assertion in front of it."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        torch._assert(out.shape == x.shape, "")
        return torch.tanh(out) + x


class BranchOnShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return out + x if x.shape[-1] > 100 else torch.relu(out + x)


class OffsetSlice(Base):
    """The identity that a convolution without padding leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn1(self.conv1(x))) + x[:, :, 1:-1, 1:-1]


class StridedOffsetSlice(OffsetSlice):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x[:, :, 1:-1:2, 1:-1:2]


class StridedSliceWithAStart(StridedOffsetSlice):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, stride=2, padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x[:, :, 1::2, 1::2]


class UnevenSlice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, (2, 1), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x[:, :, ::2]


class SliceOfSlice(Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, 4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x[:, :, ::2, ::2][:, :, ::2, ::2]


class Broadcasts(nn.Module):
    """The identity is one pixel, spread over the image by the add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.pool = conv(8, 8), conv(8, 8, 1), nn.AvgPool2d((7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.down(self.pool(x)))


class BroadcastsPool(Broadcasts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.down(self.conv(x)) + self.pool(x))


class BroadcastsTheConvolution(Broadcasts):
    """The convolution's result is one pixel, spread over the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.down(self.pool(self.conv(x))) + x)


class BroadcastsOneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one = conv(8, 8), conv(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.one(x))


ALL = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == __name__
}
