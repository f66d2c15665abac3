"""The file that `tune` writes: where it goes, what it holds already, and its rows, each kept as soon as it is known."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from . import machine
from .backends import tuned
from .backends.asked import Asked
from .backends.whole import Layers
from .kernels import tables
from .kernels.gpu import gpu_of


def path_of(out: str | os.PathLike[str] | None, device: torch.device) -> Path:
    """The table's file: `out`, or one named after the GPU in `FUSED_RESBLOCK_CONFIG_DIR` or else the current folder.

    Raises:
        TypeError, ValueError: if `out` is no path.
    """
    if out is not None:
        if not isinstance(out, (str, os.PathLike)):
            raise TypeError(f"out must be a path, got {out!r}")
        if "\0" in str(out):
            raise ValueError(f"out must be a path, got {out!r}")
        return Path(out)
    return Path(os.environ.get(tuned.FOLDER) or ".") / f"{re.sub('[^a-z0-9]+', '-', _gpu_name(device).lower())}.json"


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def key_of(found: Asked) -> tuple[str, str, int]:
    """An operation as tables name it: dtype, case and output pixels."""
    first, *rest = found.layers
    n, _, h, w = found.size
    p, q = first.output_size(h, w)
    if found.whole:
        case = Layers.of(found).case
    elif rest:
        case = tables.stage_name(first, rest[0], found.epilogue.shortcut, found.reduce)
    else:
        case = tables.case_name(first, found.other_size, found.epilogue) + tables.STEM * (found.pool is not None)
    return tuned.dtype_name(found.dtype), case, n * p * q


def check_out(out: str | os.PathLike[str] | None, device: torch.device) -> Path:
    """The table's file; ValueError unless a table of this GPU can be written there, or one that is there continued."""
    return Growing(path_of(out, device), device).path


class Growing:
    """A table that is being made, kept on disk after each row."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, gpu = path, gpu_of(device)
        try:
            if path.is_dir():
                raise ValueError(f"out must be a file, got the folder {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out must be in a folder that can be written, got {path}: {error}") from None
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"out must be in a folder that can be written, got {path}")
        self._head = {
            "gpu": _gpu_name(device),
            **{name: machine.stamp().get(name) for name in ("driver", "torch", "triton", "fused_resblock", "commit")},
            "date": datetime.date.today().isoformat(),
            "capability": gpu.capability,
            "multiprocessors": gpu.multiprocessors,
        }
        self._rows: dict[str, list[dict[str, Any]]] = {"winners": [], "stages": []}
        if path.exists():
            known = tables.read(path)
            if known.gpu != gpu:
                raise ValueError(f"out must be a table of {self._head['gpu']}, got {path} of {known.name}")
            data = json.loads(path.read_text(encoding="utf-8"))
            others = [f"{name} {data.get(name)}" for name in ("torch", "triton") if data.get(name) != self._head[name]]
            if others:
                told = " and ".join(others)
                tuned.warn_once(f"out holds tiles measured with {told}, which are measured again: {path}")
            else:
                self._rows = {name: data.get(name, []) for name in self._rows}

    def knows(self, found: Asked) -> bool:
        """Whether an operation is in the table."""
        key = key_of(found)
        return any((row["dtype"], row["case"], row["pixels"]) == key for row in self._rows[_kind(found)])

    def add(self, found: Asked, winner: dict[str, Any]) -> None:
        """Add an operation's winner, and write; not where nothing ran: another time it may."""
        if not winner["us"]:
            return
        dtype, case, pixels = key_of(found)
        self._rows[_kind(found)].append({"dtype": dtype, "case": case, "pixels": pixels, **winner})
        self.write()

    def write(self) -> Path:
        """Replace the file; a reader sees the old one or the new one."""
        text = json.dumps({**self._head, **self._rows}, indent=1)
        target = self.path.resolve()  # a link stays one
        part = target.with_name(f"{target.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(target)
        return self.path


def _kind(found: Asked) -> str:
    return "stages" if found.kind in ("tail", "block") else "winners"
