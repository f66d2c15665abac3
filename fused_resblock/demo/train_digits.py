"""Train the digits network of the demo: `python -m fused_resblock.demo.train_digits`.

AdamW, one-cycle learning rate, label smoothing, and small random shifts and rotations of the training digits. The
number of epochs was fixed beforehand and the last weights are kept, so that the held-out digits choose nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .digits import CHECKPOINT, SPLIT_SEED, DigitsNet, classify, load_split


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each image by up to 12 degrees, scale it by up to 10 % and shift it by up to one pixel.

    Args:
        images: `[N, 1, H, W]`; outside the picture the value is -1, the background.
        generator: source of the random numbers.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    count, _, height, width = images.shape
    angle = uniform(count) * math.radians(12)
    scale = 1 + 0.1 * uniform(count)
    shift = uniform(count, 2) * torch.tensor([2 / width, 2 / height])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(epochs: int, seed: int = 0, batch: int = 64) -> tuple[DigitsNet, float]:
    """Train from scratch on the training part; the same seed gives the same weights on the same machine.

    Returns:
        The network in eval mode, and its accuracy (0 to 1) on the held-out digits.

    Raises:
        ValueError: if epochs is not positive.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels, held_out_images, held_out_labels = load_split()
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for index in order[: steps * batch].view(steps, batch):
            loss = loss_of(net(distort(images[index], generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1:3d} of {epochs}: training loss {total / steps:.4f}")
    net.eval()
    accuracy = (classify(net, held_out_images).argmax(1) == held_out_labels).double().mean().item()
    return net, accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the held-out accuracy and write the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m fused_resblock.demo.train_digits", description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order and the distortions")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="where to write the checkpoint")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"epochs must be at least 1, got {args.epochs}")
    net, accuracy = train(args.epochs, args.seed)
    print(f"held-out accuracy {accuracy:.2%} on digits that were not trained on")
    torch.save(
        {
            "state_dict": net.state_dict(),
            "held_out_accuracy": accuracy,
            "split_seed": SPLIT_SEED,
            "seed": args.seed,
            "epochs": args.epochs,
            "torch": str(torch.__version__),
        },
        args.out,
    )
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e3:.0f} kB, fp32)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
