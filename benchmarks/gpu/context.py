"""What a step is given: the device, the folder, the time, and where to say what happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fused_resblock import machine

from .deadline import Deadline
from .device import Device
from .records import MARKS, Records

#: the log is kept under this size
LOG_BYTES = 1 << 20


@dataclass
class Context:
    """One run of one step; `quick` shrinks everything to see whether it runs."""

    device: Device
    folder: Path
    deadline: Deadline
    quick: bool = False
    stamp: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        date = datetime.now(timezone.utc).date().isoformat()
        self.stamp = {**machine.stamp(), "gpu": self.device.name, "date": date, **self.stamp}

    @property
    def marks(self) -> dict[str, Any]:
        """What every row of this run carries."""
        return {name: self.stamp.get(name) or "" for name in MARKS}

    def records(self, name: str, key: Sequence[str], columns: Sequence[str]) -> Records:
        """The results in one file of the folder."""
        return Records(self.folder / name, key, columns, self.marks)

    def rounds(self, usual: int) -> int:
        """How often something is timed."""
        return 2 if self.quick else usual

    def log(self, text: str) -> None:
        """Print, and append to the log."""
        print(text, flush=True)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Append to the log without printing; a log that has grown too long loses its older half."""
        path = self.folder / "gpu.log"
        with path.open("a", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")
        if path.stat().st_size > LOG_BYTES:
            path.write_text(path.read_text(encoding="utf-8", errors="replace")[-LOG_BYTES // 2 :], encoding="utf-8")
