"""Residual blocks with modules that scale what they are given, as people write them. All take 8 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Base, conv


class SqueezeExcite(nn.Module):
    """Two linear layers behind a global average pool, with the views of most code of this kind."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(inplace=True), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1)
        return x * y.expand_as(x)


class WithNorm(nn.Module):
    """1x1 convolutions with a batch norm between them, and the product the other way round."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.relu(self.norm(self.fc1(x.mean((2, 3), keepdim=True))), inplace=True))
        return torch.sigmoid(y).mul(x)


class ChannelAndSpatial(nn.Module):
    """Two gates in a row, as in CBAM; the second one's `view` takes no channels_last tensor."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.channel, self.spatial = SqueezeExcite(channels), conv(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(x)
        n, _, h, w = x.shape
        flat = x.view(n * 8, h * w).view(n, 8, h * w)
        maps = torch.cat([flat.mean(1, keepdim=True), flat.amax(1, keepdim=True)], dim=1)
        return torch.mul(x, self.spatial(maps.view(n, 2, h, w)).sigmoid())


class Swish(nn.Module):
    """An activation of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Broadcast(nn.Module):
    """One channel scaled to eight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class _Gated(Base):
    """A gate in front of the add."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.gate(out) + x)


class Plain(_Gated):
    def __init__(self) -> None:
        super().__init__(SqueezeExcite())


class Normed(_Gated):
    def __init__(self) -> None:
        super().__init__(WithNorm())


class Twice(_Gated):
    def __init__(self) -> None:
        super().__init__(ChannelAndSpatial())


class InPlaceAround(_Gated):
    """Its result is changed in place."""

    def __init__(self) -> None:
        super().__init__(SqueezeExcite())

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))))
        out += x
        return out.relu_()


class Inside(_Gated):
    """Between the convolutions, as in RegNet-Y, and a strided shortcut."""

    def __init__(self) -> None:
        super().__init__(WithNorm())
        self.conv1, self.down = conv(8, 8, stride=2), conv(8, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(torch.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.bn2(self.conv2(out)) + self.down(x))


class OnTheShortcut(_Gated):
    def __init__(self) -> None:
        super().__init__(SqueezeExcite())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.gate(x))


class Behind(_Gated):
    """Behind the add, and in front of the first convolution."""

    def __init__(self) -> None:
        super().__init__(SqueezeExcite())
        self.first = WithNorm()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(self.first(x))))))
        return self.gate(torch.relu(out + x))


class CalledTwice(_Gated):
    def __init__(self) -> None:
        super().__init__(SqueezeExcite())

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(torch.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.gate(self.bn2(self.conv2(out))) + x)


class OwnActivation(_Gated):
    def __init__(self) -> None:
        super().__init__(Swish())

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.bn2(self.conv2(self.gate(self.bn1(self.conv1(x))))) + x)


GATED: dict[str, type[nn.Module]] = {
    "gate": Plain,
    "gate with a norm": Normed,
    "gate of gates": Twice,
    "gate between in-place operations": InPlaceAround,
    "gate inside": Inside,
    "gate on the shortcut": OnTheShortcut,
    "gate behind": Behind,
    "gate called twice": CalledTwice,
    "activation of one's own": OwnActivation,
}


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.mean((2, 3), keepdim=True)) * 1


class ChangesItsInputByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, True) * x


class ChangesAView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        flat += 1
        return x * x.sigmoid()


class WritesAnIndex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x * x.sigmoid()


class GivesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x * x.sigmoid()
        return x


class LooksAtStrides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.stride(1)


class BranchesOnSizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid() if x.shape[-1] > 3 else x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * x.sigmoid()


class ChangesItsInputInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.mul_(2) if self.training else x) * x.sigmoid()


class WritesItsOutput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, x.sigmoid(), out=x)


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.add(x, 1, out=x)
        return x * x.sigmoid()


class ScalesSomethingElse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 2


NO_GATES = (
    ChangesItsInput,
    ChangesItsInputByName,
    ChangesAView,
    WritesAnIndex,
    GivesItsInput,
    LooksAtStrides,
    BranchesOnSizes,
    Counts,
    ChangesItsInputInTraining,
    WritesItsOutput,
    WritesItsInput,
    ScalesSomethingElse,
)


def gated(gate: nn.Module) -> nn.Module:
    """A residual block with this in front of its add."""
    return _Gated(gate)
