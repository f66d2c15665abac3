"""Measured winners: for a convolution on a GPU the backend and the tile that were fastest there.

Tables are JSON files in `configs/`, one a GPU, written by tuning (`benchmarks.gpu`, `fused_resblock.tune`). A
convolution is named by everything but batch and image size, which together are its number of output pixels; of the
entries under its name the nearest within a factor of four counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

from .gpu import Gpu
from .tiles import StageTile, Tile

CONFIGS = Path(__file__).parent / "configs"
BACKENDS = ("triton", "cudnn", "eager")
#: ends the name of a stem's convolution, whose norm, ReLU and max-pool are one operation with it
STEM = ".pool"
#: how far the pixels of an entry may be from those asked for, as a factor
REACH = 4.0
#: microseconds that a MiB of memory has to save
US_PER_MIB = 1.5
#: cuDNN's convolutions keep folded weights beside a model's own: it is taken where these save as much, or it is faster
#: by this factor
CUDNN_FACTOR = 1.08


@dataclass(frozen=True)
class Entry:
    """The fastest backend at so many output pixels, and Triton's fastest tile, if one was right."""

    pixels: int
    backend: str
    tile: Tile | None

    def at(self, pixels: int) -> Entry:
        """This entry for more pixels: what was split over `split_k` programs to fill the GPU is split less.

        So about as many programs run as were measured, and no more partial sums are held.
        """
        if self.tile is None or self.tile.split_k == 1:
            return self
        halvings = max(0, round(log2(pixels / self.pixels)))
        return replace(self, tile=replace(self.tile, split_k=max(1, self.tile.split_k >> halvings)))


@dataclass(frozen=True)
class StageEntry:
    """Whether a block, or its tail and the next one's head, is faster as one kernel at so many pixels, and its tile."""

    pixels: int
    faster: bool
    tile: StageTile | None


@dataclass(frozen=True)
class Table:
    """The entries of one GPU."""

    name: str
    gpu: Gpu
    convolutions: Mapping[tuple[str, str], tuple[Entry, ...]]
    stages: Mapping[tuple[str, str], tuple[StageEntry, ...]]
    path: Path | None = None


def case_name(conv: Any, other: Any, epilogue: Any) -> str:
    """A convolution as tables name it, such as `64-256.1x1.s1.g1.residual`.

    Args:
        conv, epilogue: a `fused_resblock.params.Conv` and `Epilogue`.
        other: the residual or the shortcut's input; None for neither.
    """
    k, c, r, s = conv.weight.shape
    dilated = "" if conv.dilation == (1, 1) else f".d{_pair(conv.dilation)}"
    branch = epilogue.shortcut
    if branch is not None:
        kind = f"shortcut{branch.weight.shape[1]}.s{branch.stride[0]}"
    else:
        kind = "plain" if other is None else "residual"
    return f"{c * conv.groups}-{k}.{r}x{s}.s{_pair(conv.stride)}{dilated}.g{conv.groups}.{kind}"


def stage_name(conv: Any, expand: Any, shortcut: Any, reduce: Any) -> str:
    """A block's tail and the next one's head as tables name it, such as `64-256.s1.residual.next64`.

    Args:
        conv, expand, shortcut, reduce: see `expand_shift.bind_expand_shift`; the last two may be None.
    """
    k, c = expand.weight.shape[:2]
    kind = "residual" if shortcut is None else f"shortcut{shortcut.weight.shape[1]}"
    return f"{c}-{k}.s{conv.stride[0]}.{kind}.{'last' if reduce is None else f'next{reduce.weight.shape[0]}'}"


def whole_name(reduce: Any, conv: Any, expand: Any, shortcut: Any) -> str:
    """A bottleneck as one kernel as tables name it, such as `64-256.s1.residual.from256`: its tail, and its input."""
    return stage_name(conv, expand, shortcut, None).removesuffix("last") + f"from{reduce.weight.shape[1]}"


def _pair(value: tuple[int, int]) -> str:
    return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"


def winner(us: Mapping[str, float], weight_bytes: int) -> str:
    """The backend to take by the times of all: the fastest, but cuDNN only where it is worth its memory.

    Args:
        us: microseconds by backend, of `BACKENDS`; at least one.
        weight_bytes: of the convolution's weights, a shortcut's included.
    """
    fastest, *others = sorted((name for name in us if name in BACKENDS), key=us.__getitem__)
    if fastest != "cudnn" or not others:
        return fastest
    pays = us[others[0]] - us["cudnn"] >= US_PER_MIB * weight_bytes / 2**20
    return "cudnn" if pays or us[others[0]] >= CUDNN_FACTOR * us["cudnn"] else others[0]


def scratch_us(tile: Tile, strided: bool, pixels: int, outputs: int) -> float:
    """Microseconds that a tile's partial sums have to save beside a tile without any; 0 where the memory is there.

    It is not in a strided convolution, which runs while its block's input, four times its own output, is still needed.

    Args:
        tile: with `split_k` of them.
        strided: whether the convolution's stride is above 1.
        pixels, outputs: of its output.
    """
    if tile.split_k == 1 or not strided:
        return 0.0
    return US_PER_MIB * 4 * tile.split_k * pixels * outputs / 2**20


def nearest(entries: Iterable[Any], pixels: int) -> Any | None:
    """Of entries with `pixels` the one nearest to a number of pixels, as a factor; None if none is within `REACH`."""
    best = min(entries, key=lambda entry: abs(log2(entry.pixels / pixels)), default=None)
    return best if best is not None and abs(log2(best.pixels / pixels)) <= log2(REACH) else None


def read(path: Path) -> Table:
    """Read a table.

    Raises:
        ValueError: if the file is no table; the message names the file and what is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        convolutions: dict[tuple[str, str], list[Entry]] = {}
        for row in _rows(data["winners"], "winners"):
            if row["backend"] not in BACKENDS:
                raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {row['backend']!r}")
            tile = None if row["tile"] is None else Tile.parse(row["tile"])
            entry = Entry(_count(row, "pixels"), row["backend"], tile)
            convolutions.setdefault((row["dtype"], row["case"]), []).append(entry)
        stages: dict[tuple[str, str], list[StageEntry]] = {}
        for row in _rows(data.get("stages", []), "stages"):
            tile2 = None if row["tile"] is None else StageTile.parse(row["tile"])
            if not isinstance(row["faster"], bool):
                raise ValueError(f"faster must be true or false, got {row['faster']!r}")
            stage = StageEntry(_count(row, "pixels"), row["faster"], tile2)
            stages.setdefault((row["dtype"], row["case"]), []).append(stage)
        gpu = Gpu(_count(data, "multiprocessors"), _count(data, "capability"))
        return Table(str(data["gpu"]), gpu, _frozen(convolutions), _frozen(stages), path.resolve())
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"path must name a table of tuned tiles, got {path}: {what}") from None


def _rows(rows: Any, name: str) -> list[Any]:
    """A table's list."""
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list, got {type(rows).__name__}")
    return rows


def _count(row: Mapping[str, Any], name: str) -> int:
    """A whole number of a table, from 1 to 2^63 - 1."""
    number = row[name]
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**63:
        raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}")
    return number


def _frozen(entries: Mapping[Any, list[Any]]) -> dict[Any, tuple[Any, ...]]:
    return {key: tuple(rows) for key, rows in entries.items()}
