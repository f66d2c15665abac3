"""Another Triton from a wheel: found, unpacked once, put in front of the installed one."""

from __future__ import annotations

import os
import zipfile

import pytest

from benchmarks import other_triton
from benchmarks.other_triton import unpack, wheel_of

NAME = "triton-9.9.9-cp311-cp311-linux_x86_64.whl"


@pytest.fixture
def wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("triton/__init__.py", "__version__ = '9.9.9'")
        archive.writestr("triton/backends/nvidia/bin/ptxas", "#!/bin/sh")
    return tmp_path / NAME


def test_unpacked_tools_can_be_executed(wheel, tmp_path):
    folder = unpack(wheel, tmp_path / "unpacked")
    assert os.access(folder / "triton" / "backends" / "nvidia" / "bin" / "ptxas", os.X_OK)
    kept = (folder / "triton" / "__init__.py").stat().st_mtime_ns
    assert unpack(wheel, tmp_path / "unpacked") == folder
    assert (folder / "triton" / "__init__.py").stat().st_mtime_ns == kept


def test_a_kept_wheel_is_not_downloaded_again(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(other_triton.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    assert wheel_of("9.9.9", tmp_path) == wheel
    assert wheel_of(str(wheel), tmp_path) == wheel


def test_what_is_neither_a_version_nor_a_wheel(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^triton must be a version or a wheel that exists, got 'no\.whl'"):
        wheel_of("no.whl", tmp_path)
    monkeypatch.setattr(other_triton.subprocess, "run", lambda *a, **k: type("Result", (), {"returncode": 1}))
    with pytest.raises(ValueError, match=r"^triton must be a version that pip finds, or a wheel, got '0\.0'"):
        wheel_of("0.0", tmp_path)


def test_the_module_sees_the_other_triton(wheel, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(other_triton, "FOLDER", tmp_path / "unpacked")
    monkeypatch.setattr(unpack, "__defaults__", (tmp_path / "unpacked",))
    assert other_triton.run_with(str(wheel), "triton", []) != 0  # a package without a __main__
    assert "triton" in capfd.readouterr().err
