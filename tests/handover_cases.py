"""Two or three chains of bottlenecks that hand over heads, and how many of those were taken."""

from __future__ import annotations

import torch
from cases import FP32, require
from chains import first, identity
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import handover
from fused_resblock.models import randomize_norms

X = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(1))


class Body(nn.Module):
    """Two chains, the second of which has a stride of 2, or three; what is done between them is the test's."""

    def __init__(self, chains: int = 2) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(identity(), identity())
        self.layer2 = nn.Sequential(first(64), identity())
        self.layer3 = nn.Sequential(identity(), identity()) if chains > 2 else nn.Identity()
        self.between = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.between(self.layer1(x))))


def body(between=None, dtype=FP32, chains=2) -> tuple[Body, Body]:
    """The reference and its fused copy, after two forwards: each chain knows the next one and computes its head."""
    require("triton", dtype)
    torch.manual_seed(0)
    reference = randomize_norms(Body(chains)).eval().to(dtype)
    fused = frb.fuse(reference, backend="triton", stages="kernel")
    with torch.no_grad():
        fused(X.to(dtype)), fused(X.to(dtype))
    if between is not None:
        reference.between = fused.between = between
    return reference, fused


class Counted:
    """How many heads were taken, of how many that waited."""

    def __init__(self, monkeypatch) -> None:
        self.taken, self.asked, claim = 0, 0, handover._claim

        def counting(*args):
            head = claim(*args)
            self.asked += 1
            self.taken += head is not None
            return head

        monkeypatch.setattr(handover, "_claim", counting)


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
