"""Residual blocks that do more than return a value, or do it in a mode of their own. All take 8 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Base


class InPlaceOnSharedTensor(Base):
    """The in-place ReLU changes `first`, which the add reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(self.relu(first))) + first


class InPlaceOnInput(InPlaceOnSharedTensor):
    """A pre-activation block whose ReLU changes the identity, and the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(self.relu(x)))) + x


class PositionalInPlaceOnInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(F.relu(x, True)))) + x


class PositionalInPlaceOnSharedTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(F.relu(first, True))) + first


class InPlaceAddOnInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x.clone()))
        x += out
        return torch.relu(x)


class InPlaceThroughAlias(Base):
    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        alias = self.nothing(first)
        return self.bn2(self.conv2(torch.relu_(first))) + alias


class DropsResultOfInPlaceRelu(InPlaceOnSharedTensor):
    """Calls the in-place ReLU for its effect and returns the tensor that it changed."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x
        self.relu(out)
        return out


class DropsResultOfInPlaceAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)) + x
        out.add_(x)
        return torch.relu(out)


class DropsResultOnInput(InPlaceOnSharedTensor):
    def forward(self, x: Tensor) -> Tensor:
        self.relu(x)
        return self.bn1(self.conv1(x)) + x


class NoGradShortcut(Base):
    """No gradient flows through the identity."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            identity = self.bn2(self.conv2(x))
        return torch.relu(self.bn1(self.conv1(x)) + identity)


class AutocastInside(Base):
    """Part of it is to run in fp32 whatever the caller's autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        with torch.autocast("cpu", enabled=False):
            return self.bn2(self.conv2(out.float())) + x


class DetachedIdentity(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x.detach())


class KeepsItsFeatures(Base):
    """Leaves its activations on itself, as visualisation tools do."""

    features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(self.features)) + x)


class CountsItsCalls(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.bn1(self.conv1(x)) + x)


class CountsInBuffer(Base):
    """Counts in a tensor, in place: no attribute is set."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.bn1(self.conv1(x)) + x)


class CollectsItsFeatures(Base):
    """Appends its activations to a list: no attribute is set."""

    def __init__(self) -> None:
        super().__init__()
        self.features = []

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)) + x)
        self.features.append(out)
        return out


ALL = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == __name__
}
