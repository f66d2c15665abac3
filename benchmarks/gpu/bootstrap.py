"""Makes `fused_resblock.kernels` importable from a checkout that is not installed, where it is the folder `kernels/`.

Serves as a pytest plugin, too: `python -m pytest -p benchmarks.gpu.bootstrap`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "fused_resblock.kernels"


class KernelsFinder(MetaPathFinder):
    """Finds `fused_resblock.kernels` in the checkout; comes last, so an installed one goes first."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        folder = ROOT / "kernels"
        if fullname != NAME:
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """Put the finder at the end of the import path, once."""
    if not any(isinstance(finder, KernelsFinder) for finder in sys.meta_path):
        sys.meta_path.append(KernelsFinder())


install()
