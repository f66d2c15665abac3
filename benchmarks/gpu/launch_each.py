"""Launch the main kernels once each, for the profiler and for compute-sanitizer to look at.

`python -m benchmarks.gpu.launch_each [--tiny] [--device cpu]` prints a line for each launch, in their order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch

from fused_resblock.backends.triton import prepare
from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.convolution import bind_convolution
from fused_resblock.kernels.gpu import gpu_of
from fused_resblock.kernels.launch import Launch
from fused_resblock.kernels.relu_backward import relu_backward
from fused_resblock.kernels.stage import choose_stage_tile
from fused_resblock.kernels.stem import bind_stem, pack_weight
from fused_resblock.kernels.tiles import StageTile, Tile

from ..shapes import ConvShape, basic_shapes, bottleneck_shapes
from . import space
from .block_shapes import BlockShape
from .block_shapes import shapes as block_shapes
from .operations import build
from .tail_shapes import TailShape
from .tail_shapes import shapes as tail_shapes
from .tails import Shape, bound

BATCH = 32
#: odd sizes: masks of pixels, channels and taps all matter
TINY = (
    ConvShape("tiny.1x1", 24, 40, 7),
    ConvShape("tiny.3x3", 24, 40, 7, 3, 2),
    ConvShape("tiny.residual", 16, 24, 5, 3, residual=True),
    ConvShape("tiny.shortcut", 16, 24, 5, shortcut=40, shortcut_stride=2),
    ConvShape("tiny.grouped", 32, 32, 5, 3, groups=8),
)


TINY_TAILS = (TailShape("tiny", 16, 5, outputs=16), TailShape("tiny.first", 32, 3, 2, 24, 16))
#: for the kernels that are written for one chip, which take few channel counts; on a GPU with every tile of theirs
TINY_OF_CHIP = (
    ConvShape("tiny.halo", 64, 64, 9, 3),
    ConvShape("tiny.ring", 64, 256, 9, residual=True),
    ConvShape("tiny.pair", 64, 256, 9, shortcut=64),
)
TINY_TAILS_OF_CHIP: tuple[Shape, ...] = (
    TailShape("tiny.halo", 64, 5, outputs=64),
    TailShape("tiny.ring", 128, 5, outputs=128),
    BlockShape("tiny", 64, 5),
    BlockShape("tiny.first", 64, 5, 64),
)


def launches(tiny: bool, device: str = "cuda") -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch: convolutions of ResNet-50 and 18, tails, blocks, stem, elementwise kernels, batch 32, fp16."""
    shapes = TINY if tiny else (*bottleneck_shapes(), *basic_shapes())
    dtype, batch = (torch.float32, 3) if device == "cpu" else (torch.float16, 3 if tiny else BATCH)
    for shape in shapes:
        yield shape.name, lambda shape=shape: _fused(shape, batch, dtype, device)
    for tail in TINY_TAILS if tiny else tail_shapes(False):
        yield f"tail.{tail.name}", lambda tail=tail: _tail(tail, batch, dtype, device)
    for block in () if tiny or device == "cpu" else block_shapes(False):
        for tile in block.shipped(dtype.itemsize, gpu_of(torch.device(device)))[:1]:
            yield f"block.{block.name}", partial(_tail, block, batch, dtype, device, tile)
    if tiny and device != "cpu":
        yield from _of_chip(batch, dtype, device)
    yield "stem", lambda: _stem(*((3, 40) if tiny else (batch, 224)), dtype, device)
    operation = build(
        ConvShape("pixels", 24, 24, 9) if tiny else ConvShape("pixels", 256, 256, 56), batch, dtype, device
    )
    x, norm = operation.x, operation.conv.norm
    yield "bn_act.residual", lambda: bn_act(x, norm, x)
    yield "relu_backward", lambda: relu_backward(x, x)


def _of_chip(batch: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile of the kernels that are written for one chip."""
    gpu = gpu_of(torch.device(device))
    for shape in TINY_OF_CHIP:
        for tile in space.tiles(shape, "fp16", gpu):
            if tile.halo or tile.ring:
                yield shape.name, partial(_fused, shape, batch, dtype, device, tile)
    for tail in TINY_TAILS_OF_CHIP:
        for of_tail in tail.shipped(dtype.itemsize, gpu):
            if of_tail.halo or of_tail.ring:
                kind = "block" if isinstance(tail, BlockShape) else "tail"
                yield f"{kind}.{tail.name}", partial(_tail, tail, batch, dtype, device, of_tail)


def _fused(shape: ConvShape, batch: int, dtype: torch.dtype, device: str, tile: Tile | None = None) -> torch.Tensor:
    """The operation of a shape on the kernel that is chosen for it, or that the tile is for."""
    operation = build(shape, batch, dtype, device)
    return bind_convolution(*operation.prepared(tile), tile)(operation.x, operation.other)


def _tail(shape: Shape, batch: int, dtype: torch.dtype, device: str, tile: StageTile | None = None) -> object:
    """A tail on the stage kernel, with the tile that ships unless one is given; or a block with a tile."""
    asked = shape.build(batch, dtype, device)
    h, other = asked.inputs()
    tile = tile or choose_stage_tile(asked.gemms(), dtype.itemsize, gpu_of(h.device))
    return None if tile is None else bound(asked, tile)(h, other)


def _stem(batch: int, size: int, dtype: torch.dtype, device: str) -> object:
    """The stem of a ResNet."""
    operation = build(ConvShape("stem", 3, 64, size, 7, 2), batch, dtype, device)
    packed = pack_weight(operation.conv.weight, True)
    return bind_stem(operation.x, prepare(operation.conv, dtype), packed)(operation.x)


@contextmanager
def told(case: str) -> Iterator[list[str]]:
    """Within this context every kernel of the library's that is launched says so: `launch: <case> <kernel>`."""
    launched: list[str] = []
    run = Launch.__call__

    def launch(self: Launch, *activations: object) -> None:
        launched.append(self.kernel_name)
        print(f"launch: {case} {self.kernel_name}", flush=True)
        run(self, *activations)

    with patch.object(Launch, "__call__", launch):
        yield launched


def main(argv: Sequence[str] | None = None) -> int:
    """Launch everything, wait, and say how much it was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launch_each", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small odd shapes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    count = 0
    with torch.no_grad():
        for case, launch in launches(args.tiny, args.device):
            with told(case) as kernels:
                launch()
            count += len(kernels)
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} kernels launched")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
