"""Tile sizes of the convolution kernel and the heuristic that picks one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program computes: a `block_m` x `block_n` piece of the output, `block_k` channels at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def _power_of_two(value: int, low: int, high: int) -> int:
    """The smallest power of two that is >= value, kept within [low, high]."""
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


@dataclass(frozen=True)
class Gpu:
    """What the choice of a tile needs of a GPU; an H100 unless told."""

    multiprocessors: int = 132
    capability: int = 90


def choose_tile(
    m: int, n: int, k: int, taps: int, itemsize: int, *, second: bool = False, gpu: Gpu | None = None
) -> Tile:
    """Pick the tile of an implicit GEMM.

    Args:
        m: output pixels N*P*Q.
        n: output channels of a group.
        k: input channels of a group.
        taps: R*S; 1 for a 1x1 convolution.
        itemsize: bytes of an element.
        second: whether a second GEMM is accumulated beside the first.
        gpu: where the kernel runs.

    Reasons, from the compiled code (`make codegen`): 128x128 at 8 warps spills with a second accumulator, and on
    sm_100 without one; 128x64 at 4 warps spills there too, 64x64 does not. wgmma needs 64 rows. R x S kernels stay at 4
    warps: with 8, a flattened loop over taps and channels has miscompiled in Triton (pytorch#173068). Tiles that fill
    fewer programs than there are multiprocessors are halved in M, then in N.
    """
    gpu = gpu or Gpu()
    tight = second or gpu.capability // 10 == 10
    block_m = 64 if tight and taps > 1 else 128
    block_n = _power_of_two(n, 16, 128 if taps == 1 and not tight else 64)
    block_k = _power_of_two(k, 16, 128 // itemsize)

    def programs() -> int:
        return -(-m // block_m) * -(-n // block_n)

    if programs() < gpu.multiprocessors:
        block_m = 64
    while programs() < gpu.multiprocessors and block_n > 32:
        block_n //= 2
    num_warps = 8 if taps == 1 and block_m * block_n >= (128 * 64 if tight else 128 * 128) else 4
    return Tile(block_m, block_n, block_k, num_warps, num_stages=3)
