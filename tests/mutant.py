"""One deliberate fault: a text of the library and what takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which stands once in `file`, becomes `new`, and one of the `killers` (pytest ids) fails."""

    name: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]

    def stale(self, root: Path = ROOT) -> bool:
        """Whether the text to replace is not in the file exactly once."""
        return (root / self.file).read_text(encoding="utf-8").count(self.old) != 1

    def apply(self, root: Path) -> None:
        """Put the fault into the copy at `root`."""
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")
