"""Another release of Triton from its wheel, unpacked beside the installed one, to compile the kernels with."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

#: where wheels are kept and unpacked; ignored by git
FOLDER = Path(__file__).parents[1] / "build" / "triton"


def wheel_of(name: str, folder: Path = FOLDER) -> Path:
    """The wheel that a name stands for: a file, or a version, which pip downloads.

    Raises:
        ValueError: if it is neither.
    """
    if name.endswith(".whl"):
        if not Path(name).is_file():
            raise ValueError(f"triton must be a version or a wheel that exists, got {name!r}")
        return Path(name)
    kept = sorted(folder.glob(f"triton-{name}-*.whl"))
    if not kept:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            f"triton=={name}",
            "-d",
            str(folder),
        ]
        if subprocess.run(command).returncode:
            raise ValueError(f"triton must be a version that pip finds, or a wheel, got {name!r}")
        kept = sorted(folder.glob(f"triton-{name}-*.whl"))
    return kept[0]


def unpack(wheel: Path, folder: Path = FOLDER) -> Path:
    """Unpack a wheel, unless it is unpacked, and give the folder to put on the path.

    pip would make the compiler's tools executable; a plain unpacking does not.
    """
    target = folder / wheel.stem
    if not (target / "triton" / "__init__.py").is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    for tool in (target / "triton" / "backends" / "nvidia" / "bin").glob("*"):
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return target


def run_with(name: str, module: str, arguments: Sequence[str]) -> int:
    """Run a module of this checkout with another Triton, without the `--triton` in its arguments; its exit status.

    Raises:
        ValueError: see `wheel_of`.
    """
    folder, given = unpack(wheel_of(name)), list(arguments)
    place = next((i for i, word in enumerate(given) if word.startswith("--triton")), None)
    if place is not None:
        del given[place : place + (1 if "=" in given[place] else 2)]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", module, *given]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=Path(__file__).parents[1]).returncode
