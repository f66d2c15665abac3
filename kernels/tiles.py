"""How the work of a kernel is cut into programs: tile sizes as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


def _parts(name: str) -> tuple[list[int], dict[str, int]]:
    """The sizes and the lettered numbers of a tile's name; raises ValueError where there is no such thing."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)((?:\.[a-z]\d+)*)", name)
    if match is None:
        raise ValueError(f"name must be that of a tile, got {name!r}")
    fields = re.findall(r"\.([a-z])(\d+)", match[4])
    return [int(size) for size in match.groups()[:3]], {letter: int(number) for letter, number in fields}


#: no number in a tile's name is above it
LARGEST = 1024


def _checked(tile: Any, name: str) -> Any:
    """The tile, if its name is `name` and every size is a power of two, as kernels ask, and not out of all bounds."""
    sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
    bounded = all(number <= LARGEST for number in vars(tile).values())
    if str(tile) != name or not bounded or any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"name must be that of a tile, got {name!r}")
    return tile


@dataclass(frozen=True)
class Tile:
    """What one program computes: a `block_m` x `block_n` piece of the output, `block_k` channels at a time.

    With `split_k` above 1 that many programs share the taps and channels of each piece. With `persistent` above 0 so
    many programs a multiprocessor stay resident and take piece after piece, which TMA moves (`conv_tma`); 0 is a
    program a piece (`conv_bn_act`). With `halo` the taps come from shared memory, too (`conv_halo`). With `ring` a 1x1,
    or both of a downsample branch, go through a ring of `num_stages` loads (`conv_ring`, `conv_pair`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    persistent: int = 0
    halo: bool = False
    ring: bool = False

    def __str__(self) -> str:
        name = f"{self.block_m}x{self.block_n}x{self.block_k}.w{self.num_warps}.s{self.num_stages}"
        name += f".k{self.split_k}" * (self.split_k > 1) + f".p{self.persistent}" * (self.persistent > 0)
        return name + ".h1" * self.halo + ".r1" * self.ring

    @classmethod
    def parse(cls, name: str) -> Tile:
        """The tile whose `str` is `name`.

        Raises:
            ValueError: if it is none's.
        """
        blocks, fields = _parts(name)
        numbers = (fields.get(letter, 0) for letter in "ws")
        kinds = (bool(fields.get(letter)) for letter in "hr")
        tile = cls(*blocks, *numbers, fields.get("k", 1), fields.get("p", 0), *kinds)
        return _checked(tile, name)


@dataclass(frozen=True)
class StageTile:
    """What a program of `expand_shift` computes: `block_m` pixels, `block_n` expanded channels at a time.

    `block_k` channels a step of the 3x3; its loop and that over the chunks have so many stages; `tma` moves the tiles
    (`expand_shift_tma`), and with `halo` the taps come from shared memory, too (`expand_shift_halo`). With `held` a
    downsample branch's input is loaded once and not for every chunk (`expand_shift_tma`). With `ring` so many boxes of
    pixels and blocks of filters are in two rings (`expand_shift_ring`, and with 128 for `block_k` `expand_shift_wide`).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    tap_stages: int
    chunk_stages: int
    tma: bool = False
    halo: bool = False
    held: bool = False
    ring: bool = False

    def __str__(self) -> str:
        name = f"{self.block_m}x{self.block_n}x{self.block_k}.w{self.num_warps}.s{self.tap_stages}.c{self.chunk_stages}"
        return name + ".t1" * self.tma + ".h1" * self.halo + ".x1" * self.held + ".r1" * self.ring

    @classmethod
    def parse(cls, name: str) -> StageTile:
        """The tile whose `str` is `name`.

        Raises:
            ValueError: if it is none's.
        """
        blocks, fields = _parts(name)
        numbers = (fields.get(letter, 0) for letter in "wsc")
        tile = cls(*blocks, *numbers, *(bool(fields.get(letter)) for letter in "thxr"))
        return _checked(tile, name)


@dataclass(frozen=True)
class StemTile:
    """What a program of `stem` computes: `pooled_rows` x (`pooled_columns` - 1) pixels of the pooled output."""

    pooled_rows: int = 8
    pooled_columns: int = 32
    num_warps: int = 8
