"""Measured winners in force: where tables come from, which one counts, what becomes of a tile that does not run."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import FP16, FP32, ConvCase, conv_bn_act_reference, require
from test_tables import CONTENT, WINNER, write

pytest.importorskip("triton")

import fused_resblock as frb
from fused_resblock import doctor
from fused_resblock.backends import triton as triton_backend
from fused_resblock.backends import tuned
from fused_resblock.functional import conv_bn_act
from fused_resblock.kernels import convolution
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tables import BACKENDS, CONFIGS, Entry, read
from fused_resblock.kernels.tiles import Tile
from fused_resblock.params import PLAIN, Conv

CONV = Conv(torch.empty(64, 64, 3, 3), padding=(1, 1))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No tables but the test's own, nothing warned of yet."""
    monkeypatch.setattr(tuned, "_given", [])
    monkeypatch.setattr(tuned, "_warned", set())
    monkeypatch.delenv(tuned.FOLDER, raising=False)
    tuned._of_folder.cache_clear()
    yield
    tuned._of_folder.cache_clear()
    tuned.forget()


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A machine with an H100, as far as tables can tell, and no table that ships."""
    monkeypatch.setattr(tuned, "CONFIGS", tmp_path / "none")
    monkeypatch.setattr(tuned, "_gpus", lambda: {Gpu(132, 90)})
    monkeypatch.setattr(tuned, "gpu_of", lambda device: Gpu(132, 90))


def on_gpu(images: int = 1, dtype: torch.dtype = FP16) -> SimpleNamespace:
    """What `lookup` looks at of a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype, shape=(images, 64, 56, 56))


def backend_of(images: int = 1) -> str | None:
    entry = tuned.lookup(on_gpu(images), CONV, None, PLAIN)
    return None if entry is None else entry.backend


def test_load_config(tmp_path, h100):
    assert backend_of() is None
    assert frb.load_config(write(tmp_path, CONTENT)) == 1
    assert backend_of() == "triton"
    assert backend_of(images=64) is None  # too far from what was measured
    assert tuned.lookup(on_gpu(dtype=FP32), CONV, None, PLAIN) is None
    assert tuned.lookup(torch.empty(1, 64, 56, 56, dtype=FP16), CONV, None, PLAIN) is None  # on the CPU


def test_a_tile_is_that_for_the_pixels_asked_for(tmp_path, h100):
    frb.load_config(write(tmp_path, {**CONTENT, "winners": [{**WINNER, "tile": "64x64x64.w4.s4.k4"}]}))
    assert [str(tuned.lookup(on_gpu(images), CONV, None, PLAIN).tile) for images in (1, 2, 4)] == [
        "64x64x64.w4.s4.k4",
        "64x64x64.w4.s4.k2",
        "64x64x64.w4.s4",
    ]


def test_a_later_table_goes_first_and_a_folder_is_read(tmp_path, h100):
    frb.load_config(write(tmp_path, CONTENT))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, {**CONTENT, "winners": [{**WINNER, "backend": "cudnn"}]})
    frb.load_config(folder)
    assert backend_of() == "cudnn"


def test_doctor_lists_the_tables(tmp_path, h100, capsys):
    frb.load_config(write(tmp_path, CONTENT))
    doctor.run()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Test", "sm_90", "1", "yes"] in lines


def test_folder_of_the_environment_variable(tmp_path, h100, monkeypatch):
    write(tmp_path, CONTENT)
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    with pytest.warns(RuntimeWarning, match="broken.json.*tiles are predicted instead"):
        assert backend_of() == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_of() == "triton"  # said once


def test_table_of_another_gpu_is_not_used(tmp_path, monkeypatch, h100):
    monkeypatch.setattr(tuned, "gpu_of", lambda device: Gpu(108, 80))
    monkeypatch.setattr(tuned, "_gpus", lambda: {Gpu(108, 80)})
    with pytest.warns(RuntimeWarning, match="tuned tiles of Test are not used: this machine has sm_80 with 108"):
        frb.load_config(write(tmp_path, CONTENT))
    assert backend_of() is None


def test_a_folder_of_other_gpus_tables_is_told_of_once(tmp_path, monkeypatch, h100):
    monkeypatch.setattr(tuned, "gpu_of", lambda device: Gpu(108, 80))
    monkeypatch.setattr(tuned, "_gpus", lambda: {Gpu(108, 80)})
    write(tmp_path, CONTENT)
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    with pytest.warns(RuntimeWarning, match="tuned tiles in .* are of Test and not used: this machine has sm_80"):
        assert backend_of() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_of() is None
        monkeypatch.setattr(tuned, "CONFIGS", CONFIGS)  # what ships need not be of this GPU
        assert backend_of() is None


@pytest.mark.parametrize("folder", ["absent", "a" * 5000])
def test_the_environment_variable_must_name_a_folder(tmp_path, monkeypatch, h100, folder):
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path / folder))
    with pytest.warns(RuntimeWarning, match="^FUSED_RESBLOCK_CONFIG_DIR must name a folder, got "):
        assert backend_of() is None
    with pytest.raises(ValueError, match="^path must name a table of tuned tiles, got "):
        frb.load_config(tmp_path / folder)


NO_LISTS = [json.dumps({**CONTENT, "stages": {}}), json.dumps({**CONTENT, "winners": {}})]


@pytest.mark.parametrize("content", ["{", json.dumps({**CONTENT, "winners": [{}]}), *NO_LISTS])
def test_a_malformed_table_changes_nothing(tmp_path, content, h100):
    good = tmp_path / "good"
    good.mkdir()
    frb.load_config(write(good, CONTENT))
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match="^path must name a table of tuned tiles, got "):
        frb.load_config(file)
    assert backend_of() == "triton"


def test_a_folder_without_tables(tmp_path):
    with pytest.raises(ValueError, match="^path must hold a table of tuned tiles, got "):
        frb.load_config(tmp_path)


@pytest.fixture
def entry(monkeypatch):
    """A function that puts an entry in force for every convolution."""

    def put(entry: Entry) -> None:
        monkeypatch.setattr(tuned, "lookup", lambda *args: entry)

    return put


def test_the_measured_tile_is_what_runs(entry, monkeypatch):
    require("triton")
    tile, seen = Tile(32, 16, 16, 4, 1), []
    real = convolution.bind_convolution

    def bind(*args, **options):
        seen.append(args[4:])
        return real(*args, **options)

    monkeypatch.setattr(convolution, "bind_convolution", bind)
    entry(Entry(70, "triton", tile))
    args = ConvCase().build(FP32)
    torch.testing.assert_close(conv_bn_act(**args, backend="triton"), conv_bn_act_reference(**args))
    assert seen == [(tile,)]


def test_a_measured_tile_that_the_kernel_refuses_is_not_used(entry):
    """TMA cannot move 9 channels of fp32."""
    require("triton")
    entry(Entry(70, "triton", Tile(32, 16, 16, 4, 1, persistent=1)))
    args = ConvCase(channels=9).build(FP32)
    torch.testing.assert_close(conv_bn_act(**args, backend="triton"), conv_bn_act_reference(**args))


@pytest.mark.parametrize("at", ["binding", "running"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_measured_tile_that_does_not_run_gives_way_with_one_warning(entry, backend, at, monkeypatch):
    require("triton")
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "triton")
    measured = Tile(32, 16, 16, 4, 1)
    entry(Entry(70, "triton", measured))
    args = ConvCase(channels=9).build(FP32)
    real = convolution.bind_convolution

    def bind(x, conv, other, epilogue, tile=None, **options):
        run = real(x, conv, other, epilogue, tile, **options)

        def fail(x, other):
            raise RuntimeError("out of resource: shared memory")

        if tile == measured and at == "binding":
            fail(x, other)
        return fail if tile == measured else run

    monkeypatch.setattr(convolution, "bind_convolution", bind)
    expected = conv_bn_act_reference(**args)
    with pytest.warns(RuntimeWarning, match="tuned tile 32x16x16.w4.s1 does not run here .*shared memory"):
        torch.testing.assert_close(conv_bn_act(**args, backend=backend), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(conv_bn_act(**args, backend=backend), expected)


def test_out_of_memory_is_not_the_tiles_fault():
    def full(x, other):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = triton_backend.guarded(lambda: full, "tile", lambda: pytest.fail("another tile would not help"), "otherwise")
    with pytest.raises(torch.OutOfMemoryError):
        run(None, None)


def test_what_a_tuned_tile_was_bound_with_is_let_go():
    import gc
    import weakref

    from fused_resblock.backends import triton

    x = torch.ones(3)
    alive = weakref.ref(x)
    run = triton.guarded(lambda: lambda x, other: x + 1, "tile", lambda x=x: x, "otherwise")
    assert torch.equal(run(torch.zeros(3), None), torch.ones(3))
    del x
    gc.collect()
    assert alive() is None
    assert torch.equal(run(torch.zeros(3), None), torch.ones(3))


def test_the_tables_that_ship_are_read(monkeypatch):
    """Each names the GPU that it was measured on; on it they are in force without a word."""
    monkeypatch.setattr(tuned, "gpu_of", lambda device: Gpu(132, 90))
    tables = [read(file) for file in CONFIGS.glob("*.json")]
    assert [table.gpu for table in tables] == [Gpu(132, 90)]
    assert all(table.convolutions and table.stages for table in tables)
    assert backend_of(images=128) in BACKENDS


def test_load_config_of_no_path():
    with pytest.raises(TypeError, match="^path must be a path, got 3"):
        frb.load_config(3)  # type: ignore[arg-type]
