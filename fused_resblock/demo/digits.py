"""Handwritten digits: a small trained network with all four residual blocks, classified eager and fused.

The data are scikit-learn's `load_digits`, 1,797 scanned digits of 8x8 pixels (the test part of the UCI set "Optical
Recognition of Handwritten Digits", Alpaydin and Kaynak 1998). A quarter is held out and never trained on;
`train_digits.py` made the checkpoint, which holds fp32 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock, conv3x3

CHECKPOINT = Path(__file__).with_name("digits.pt")
SPLIT_SEED = 0
HELD_OUT = 0.25


class DigitsNet(nn.Module):
    """A 3x3 stem, one of each of the four reference blocks, global pooling and a linear classifier.

    Shape: `[N, 1, 8, 8]` to `[N, 10]`; 107 k parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv3x3(1, 32), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.basic = BasicBlock(32, 32)
        self.residual = ResidualBlock(32, 64, stride=2)
        self.bottleneck = Bottleneck(64, 16)
        self.preact = PreActBottleneck(64, 128, 32, stride=2)
        self.norm = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.preact(self.bottleneck(self.residual(self.basic(self.stem(x)))))
        return self.fc(torch.relu(self.norm(x)).mean(dim=(2, 3)))


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the digits and split them, the classes in equal shares, always in the same way.

    Returns:
        Training images `[1347, 1, 8, 8]` fp32 from -1 to 1, their labels `[1347]` int64, and the same of the 450
        held-out digits.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=digits.target
    )
    images = [torch.tensor(part, dtype=torch.float32).unsqueeze(1) / 8 - 1 for part in parts[:2]]
    labels = [torch.tensor(part, dtype=torch.int64) for part in parts[2:]]
    return images[0], labels[0], images[1], labels[1]


def load_trained(path: Path = CHECKPOINT) -> tuple[DigitsNet, dict[str, Any]]:
    """Read a checkpoint of `train_digits.py`.

    Returns:
        The network in eval mode, and the checkpoint's metadata (`held_out_accuracy`, `split_seed`, `epochs`, `torch`).

    Raises:
        ValueError: if the checkpoint was trained on another split, whose training digits would be among the held out.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["split_seed"] != SPLIT_SEED:
        raise ValueError(f"split_seed must be {SPLIT_SEED} in {path.name}, got {checkpoint['split_seed']}")
    net = DigitsNet().eval()
    net.load_state_dict(checkpoint.pop("state_dict"))
    return net, checkpoint


@torch.no_grad()
def classify(net: nn.Module, images: Tensor) -> Tensor:
    """Return the logits `[N, 10]` of `images`, in fp32 on the CPU."""
    return net(images.contiguous(memory_format=torch.channels_last)).float().cpu()


def compare(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Classify the held-out digits with the eager and with the fused network.

    Returns:
        `count`, `eager_accuracy` and `fused_accuracy` (0 to 1), `differing` predictions, the largest absolute
        difference of a logit `max_abs_error`, the `blocks` that were fused, and the accuracy noted at training time.
    """
    import fused_resblock as frb

    net, metadata = load_trained()
    net.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _, _, images, labels = load_split()
    fused = frb.fuse(net)
    inputs = images.to(device=device, dtype=dtype)
    eager_logits, fused_logits = classify(net, inputs), classify(fused, inputs)
    eager_class, fused_class = eager_logits.argmax(1), fused_logits.argmax(1)
    return {
        "count": len(labels),
        "eager_accuracy": (eager_class == labels).double().mean().item(),
        "fused_accuracy": (fused_class == labels).double().mean().item(),
        "differing": int((eager_class != fused_class).sum()),
        "max_abs_error": (eager_logits - fused_logits).abs().max().item(),
        "blocks": [
            {"name": r.name, "class": r.cls, "fused": r.fused, "backend": r.backend, "reason": r.reason}
            for r in frb.explain(fused)
        ],
        "accuracy_at_training": metadata["held_out_accuracy"],
    }
