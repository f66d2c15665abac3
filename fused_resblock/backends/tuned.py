"""The tables of measured winners that are in force: those given to `load_config`, those in
`FUSED_RESBLOCK_CONFIG_DIR`, and those that ship; an earlier one goes before a later one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.gpu import Gpu, gpu_of, tf32_allowed
from ..kernels.tables import CONFIGS, Entry, StageEntry, Table, case_name, nearest, read
from ..params import Conv, Epilogue

FOLDER = "FUSED_RESBLOCK_CONFIG_DIR"
_given: list[Table] = []
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, the first time that this is said in the process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def load_config(path: str | os.PathLike[str]) -> int:
    """Put a table of tuned tiles, or every `*.json` of a folder, in force before all others.

    Args:
        path: what `tune` or `make gpu-tune` wrote.

    Returns:
        How many convolutions the tables name.

    Raises:
        TypeError: if path is no path.
        ValueError: if there is no such file, or it is no such table; then nothing changes.

    Tables of a GPU that is not in this machine are kept, and a warning says so: where they do not fit, tiles are
    predicted.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {path!r}")
    place = Path(path)
    files = _files(place)
    if files is None:
        files = [place]
    if not files:
        raise ValueError(f"path must hold a table of tuned tiles, got {place}")
    tables = [read(file) for file in files]
    here = _gpus()
    for table in tables:
        if table.gpu not in here:
            warn_once(f"tuned tiles of {table.name} are not used: this machine has {_named(here)}")
    read_again = {table.path for table in tables}
    _given[:] = [*tables, *(table for table in _given if table.path not in read_again)]
    forget()
    return sum(len(table.convolutions) for table in tables)


def _files(folder: Path) -> list[Path] | None:
    """The tables of a folder; None if it is no folder."""
    try:
        return sorted(file for file in folder.glob("*.json") if file.is_file()) if folder.is_dir() else None
    except OSError:  # a name that is too long, say
        return None


def forget() -> None:
    """Look everything up again, and bind again what was bound by other tables."""
    from . import clear_caches, resolve

    resolve.cache_clear()
    clear_caches()


def _gpus() -> set[Gpu]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {gpu_of(torch.device("cuda", index)) for index in range(count)}


def _named(gpus: set[Gpu]) -> str:
    return ", ".join(f"sm_{gpu.capability} with {gpu.multiprocessors} multiprocessors" for gpu in gpus) or "no GPU"


@lru_cache(maxsize=8)
def _of_folder(folder: str) -> tuple[Table, ...]:
    """The tables of a folder; one that cannot be read is left out with a warning.

    So is a folder that is none; a user's that holds tables of other GPUs alone has a warning, too.
    """
    files, ships = _files(Path(folder)), folder == str(CONFIGS)
    if files is None and not ships:
        warn_once(f"{FOLDER} must name a folder, got {folder[:200]}; tiles are predicted instead")
    tables = []
    for file in files or ():
        try:
            tables.append(read(file))
        except ValueError as error:
            warn_once(f"{error}; tiles are predicted instead")
    here = _gpus()
    if tables and here and not ships and not any(table.gpu in here for table in tables):
        names = ", ".join(table.name for table in tables)
        warn_once(f"tuned tiles in {folder} are of {names} and not used: this machine has {_named(here)}")
    return tuple(tables)


def _tables() -> Iterator[Table]:
    """Every table that was found, those that go first in front."""
    folder = os.environ.get(FOLDER)
    yield from _given
    yield from _of_folder(folder) if folder else ()
    yield from _of_folder(str(CONFIGS))


def known() -> list[tuple[Table, bool]]:
    """Every table, and whether it is of a GPU in this machine."""
    here = _gpus()
    return [(table, table.gpu in here) for table in _tables()]


def _of_gpu(device: torch.device) -> Iterator[Table]:
    """The tables of a device's GPU, those that go first in front; none for a CPU."""
    if device.type == "cuda":
        gpu = gpu_of(device)
        yield from (table for table in _tables() if table.gpu == gpu)


def measured(device: torch.device) -> bool:
    """Whether a table of this GPU is in force."""
    return any(_of_gpu(device))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as tables name it, fp32 by how its products are computed."""
    if dtype == torch.float32:
        return "tf32" if tf32_allowed() else "ieee"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def lookup(x: Tensor, conv: Conv, other: Tensor | None, epilogue: Epilogue, suffix: str = "") -> Entry | None:
    """What was measured for a convolution on x's GPU, for its pixels; None if nothing was that is near enough.

    `suffix` tells a convolution apart that something else follows, such as `kernels.tables.STEM`.
    """
    if not measured(x.device):
        return None
    n, _, p, q = conv.output_shape(x)
    key, pixels = (dtype_name(x.dtype), case_name(conv, other, epilogue) + suffix), n * p * q
    entry = _first(x, "convolutions", key, pixels)
    return None if entry is None else entry.at(pixels)


def lookup_stage(h: Tensor, conv: Conv, case: str) -> StageEntry | None:
    """What was measured for a block's tail and the next one's head as one kernel, by the case that names them."""
    n, _, p, q = conv.output_shape(h)
    return _first(h, "stages", (dtype_name(h.dtype), case), n * p * q)


def _first(x: Tensor, kind: str, key: tuple[str, str], pixels: int) -> Any:
    for table in _of_gpu(x.device):
        found = nearest(getattr(table, kind).get(key, ()), pixels)
        if found is not None:
            return found
    return None
