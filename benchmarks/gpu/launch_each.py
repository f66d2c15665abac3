"""Launch the main kernels once each, for the profiler and for compute-sanitizer to look at.

`python -m benchmarks.gpu.launch_each [--tiny] [--device cpu]`; `names` lists the launches in their order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch

from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.convolution import bind_convolution
from fused_resblock.kernels.relu_backward import relu_backward

from ..shapes import ConvShape, basic_shapes, bottleneck_shapes
from .operations import build

BATCH = 32
#: odd sizes: masks of pixels, channels and taps all matter
TINY = (
    ConvShape("tiny.1x1", 24, 40, 7),
    ConvShape("tiny.3x3", 24, 40, 7, 3, 2),
    ConvShape("tiny.residual", 16, 24, 5, 3, residual=True),
    ConvShape("tiny.shortcut", 16, 24, 5, shortcut=40, shortcut_stride=2),
    ConvShape("tiny.grouped", 32, 32, 5, 3, groups=8),
)


def launches(tiny: bool, device: str = "cuda") -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch: the ResNet-50 and ResNet-18 convolutions at batch 32 in fp16, then the elementwise kernels."""
    shapes = TINY if tiny else (*bottleneck_shapes(), *basic_shapes())
    dtype, batch = (torch.float32, 3) if device == "cpu" else (torch.float16, 3 if tiny else BATCH)
    for shape in shapes:
        yield shape.name, lambda shape=shape: _fused(shape, batch, dtype, device)
    operation = build(
        ConvShape("pixels", 24, 24, 9) if tiny else ConvShape("pixels", 256, 256, 56), batch, dtype, device
    )
    x, norm = operation.x, operation.conv.norm
    yield "bn_act.residual", lambda: bn_act(x, norm, x)
    yield "relu_backward", lambda: relu_backward(x, x)


def _fused(shape: ConvShape, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The operation of a shape on the kernel that is chosen for it."""
    operation = build(shape, batch, dtype, device)
    return bind_convolution(*operation.prepared())(operation.x, operation.other)


def names() -> list[str]:
    """The launches of a profiled run, in order, without making any tensors."""
    convolutions = [shape.name for shape in (*bottleneck_shapes(), *basic_shapes())]
    return [*convolutions, "bn_act.residual", "relu_backward"]


def main(argv: Sequence[str] | None = None) -> int:
    """Launch everything, wait, and say how much it was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launch_each", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small odd shapes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    count = 0
    with torch.no_grad():
        for _, launch in launches(args.tiny, args.device):
            launch()
            count += 1
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} kernels launched")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
