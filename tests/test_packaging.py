"""What is installed: the kernels under the package, the data files, one version, and a light import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fused_resblock
from fused_resblock.version import __version__

ROOT = Path(__file__).parent.parent
SOURCES = ("fused_resblock", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter that has no GPU and no Triton interpreter; return what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=os.sep)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout gets no build folder."""
    pytest.importorskip("setuptools", reason="building needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    done = subprocess.run([*command, str(folder / "out"), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (folder / "out").glob("*.whl")
    return file


def test_version_of_the_installed_package() -> None:
    try:
        installed = metadata.version("fused_resblock")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
    assert installed == __version__ == fused_resblock.__version__


def test_kernels_are_the_folder_of_this_checkout() -> None:
    import fused_resblock.kernels

    assert Path(fused_resblock.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_resblock").rglob("*.py")}
    kernels = {f"fused_resblock/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    configs = {f"fused_resblock/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.json")}
    data = {"fused_resblock/py.typed", "fused_resblock/demo/digits.pt"}
    assert package | kernels | configs | data <= names
    assert {name.split("/")[0] for name in names} == {"fused_resblock", f"fused_resblock-{__version__}.dist-info"}


def test_wheel_imports_its_own_kernels(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import fused_resblock, fused_resblock.kernels as k; print(fused_resblock.__version__, k.__file__)"
    assert python(code, PYTHONPATH=str(tmp_path)) == f"{__version__} {tmp_path}/fused_resblock/kernels/__init__.py"


def test_wheel_asks_for_floors_only(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read(f"fused_resblock-{__version__}.dist-info/METADATA").decode()
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.11", 'Requires-Dist: triton>=3.6; platform_system == "Linux"']


def pinned(path: Path) -> dict[str, tuple[int, ...]]:
    """Major and minor version of every package that a constraints file pins."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    pins = [line.split("==") for line in lines if "==" in line]
    return {name: tuple(map(int, version.split(".")[:2])) for name, version in pins}


def test_releases_reach_from_the_floors_to_what_is_newer_than_the_constraints() -> None:
    releases = ROOT / "tests" / "releases"
    oldest, newest = pinned(releases / "torch-2.11.txt"), pinned(releases / "torch-2.15.txt")
    usual = pinned(ROOT / "constraints.txt")
    for package, floor in {"torch": (2, 11), "triton": (3, 6)}.items():
        assert oldest[package] == floor
        assert floor < usual[package] < newest[package]


def test_import_adds_little_to_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import fused_resblock; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3  # seconds


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import fused_resblock, fused_resblock.kernels; "
        "print(before, 'triton' in sys.modules, torch.cuda.is_initialized())"
    )
    before, after, initialized = python(code).split()
    assert after == before
    assert initialized == "False"
    python("import sys; sys.modules['triton'] = None; import fused_resblock")


def test_chains_run_without_triton() -> None:
    code = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest))
sys.modules["triton"] = None
import torch, fused_resblock as frb
from fused_resblock.reference import Bottleneck
model = torch.nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)).eval()
x = torch.randn(2, 64, 6, 4)
with torch.no_grad():
    for backend in ("auto", "eager"):
        for stages in (True, "kernel"):
            fused = frb.fuse(model, backend=backend, stages=stages)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
print("ran")
"""
    assert python(code).strip() == "ran"
