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


def choose_tile(
    m: int, n: int, k: int, taps: int, itemsize: int, *, second: bool = False, multiprocessors: int = 132
) -> Tile:
    """Pick the tile of an implicit GEMM.

    Args:
        m: output pixels N*P*Q.
        n: output channels of a group.
        k: input channels of a group.
        taps: R*S; 1 for a 1x1 convolution.
        itemsize: bytes of an element.
        second: whether a second GEMM is accumulated beside the first.
        multiprocessors: of the GPU; an H100 has 132.

    Reasons, from the compiled code for sm_80, sm_90 and sm_120: two accumulators of 128x128 use 248 registers or spill,
    128x64 does not at 8 warps and does at 4, where 64x64 does not; wgmma needs 64 rows. R x S kernels stay at 4 warps: with 8, a flattened loop over taps and
    channels has miscompiled in Triton (pytorch#173068). Tiles that fill fewer programs than there are multiprocessors
    are halved in M, then in N.
    """
    block_m = 64 if second and taps > 1 else 128
    block_n = _power_of_two(n, 16, 128 if taps == 1 and not second else 64)
    block_k = _power_of_two(k, 16, 128 // itemsize)
    num_warps = 8 if taps == 1 and block_m * block_n * (2 if second else 1) >= 128 * 128 else 4
    if -(-m // block_m) * -(-n // block_n) < multiprocessors:
        block_m, num_warps = 64, 4
    while -(-m // block_m) * -(-n // block_n) < multiprocessors and block_n > 32:
        block_n //= 2
    return Tile(block_m, block_n, block_k, num_warps, num_stages=3)
