"""`tune` on a machine whose GPU is the interpreter: what it asks for, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from cases import require
from torch import nn

pytest.importorskip("triton")

import fused_resblock as frb
from fused_resblock import backends, on_cuda, tuning
from fused_resblock.backends import tuned
from fused_resblock.kernels import stage, tables
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.tiles import StageTile
from fused_resblock.models import randomize_norms
from fused_resblock.reference import Bottleneck

REAL_CHECK = on_cuda.check_device
X = torch.randn(2, 64, 6, 4, generator=torch.Generator().manual_seed(0))
CASES = {"64-16.1x1.s1.g1.plain", "16-16.3x3.s1.g1.plain", "16-64.1x1.s1.g1.residual"}
STEM = "3-64.7x7.s2.g1.plain"
IMAGES = torch.randn(2, 3, 18, 16, generator=torch.Generator().manual_seed(0))
TAILS = {"16-64.s1.residual.next16", "16-64.s1.residual.last"}


@pytest.fixture(autouse=True)
def machine_with_a_gpu(monkeypatch):
    """Few tiles, a clock that ticks, and no tables but the test's own."""
    require("triton")
    ticks = count(1)
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "triton")
    monkeypatch.delenv(tuned.FOLDER, raising=False)
    monkeypatch.setattr(on_cuda, "check_device", lambda caller, device: None)
    monkeypatch.setattr(tuning, "TRIED", 2)
    monkeypatch.setattr(tuned, "_given", [])
    monkeypatch.setattr(tuned, "_gpus", lambda: {Gpu()})

    def median_us(call):
        call()
        return float(next(ticks))

    monkeypatch.setattr(tuning, "median_us", median_us)
    yield
    tuned.forget()


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16))).eval()


def rows(path, kind: str = "winners") -> dict[str, dict]:
    return {row["case"]: row for row in json.loads(path.read_text())[kind]}


def test_every_distinct_operation_gets_a_row(tmp_path):
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    table = tables.read(path)
    assert table.gpu == Gpu()
    assert {case for _, case in table.convolutions} == CASES
    assert {case for _, case in table.stages} == TAILS
    for row in rows(path).values():
        assert row["pixels"] == 48
        assert row["backend"] == min(row["us"], key=row["us"].__getitem__)
        assert row["us"].keys() == {"triton", "eager"}
        assert row["us"]["triton"] == min(row["us"].values())  # the clock ticks: who came first
    assert all(row["us"].keys() == {"stage", "apart"} and row["faster"] for row in rows(path, "stages").values())


def test_the_fastest_tile_of_a_tail_is_in_the_table(tmp_path, monkeypatch):
    tried, bind = [], backends.triton.bind_tail
    several = [StageTile(16, 16, 16, 4, stages, 2) for stages in (3, 2, 1)]
    monkeypatch.setattr(stage, "fitting", lambda gemms, itemsize, gpu: several)
    monkeypatch.setattr(backends.triton, "bind_tail", lambda *args: tried.append(args[-1]) or bind(*args))
    times = iter((3.0, 1.0, 2.0, 9.0) * len(TAILS))  # of three tiles, and conv by conv
    monkeypatch.setattr(tuning, "convolution_winner", lambda found: {"backend": "eager", "tile": None, "us": {}})
    monkeypatch.setattr(tuning, "median_us", lambda call: next(times))
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    assert tried == several * len(TAILS)
    for row in rows(path, "stages").values():
        assert (row["faster"], row["tile"], row["us"]) == (True, str(several[1]), {"stage": 1.0, "apart": 9.0})
    entries = [entry for case in tables.read(path).stages.values() for entry in case]
    assert [entry.tile for entry in entries] == [several[1]] * len(TAILS)


def test_the_winner_is_told_how_many_weights_there_are(monkeypatch, tmp_path):
    """A shortcut's among them."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64))
    model = randomize_norms(nn.Sequential(Bottleneck(32, 16, downsample=shortcut))).eval()
    told = []
    monkeypatch.setattr(tables, "winner", lambda us, weight_bytes: told.append(weight_bytes) or "triton")
    frb.tune(model, X[:, :32], out=tmp_path / "t.json", progress=False)
    assert sorted(told) == [4 * 32 * 16, 4 * 9 * 16 * 16, 4 * 64 * (16 + 32)]


def test_the_table_is_in_force_afterwards(tmp_path):
    frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    (table,) = {id(t.convolutions): t for t in tuned._given[:1]}.values()
    assert {case for _, case in table.convolutions} == CASES


class WithStem(nn.Module):
    """A stem as the kernel takes it, in front of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        self.maxpool, self.layer1 = nn.MaxPool2d(3, 2, 1), network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


def test_a_stem_as_one_kernel_and_apart(tmp_path):
    path = frb.tune(randomize_norms(WithStem()).eval(), IMAGES, out=tmp_path / "t.json", progress=False)
    assert rows(path).keys() == CASES | {STEM + ".pool"}
    row = rows(path)[STEM + ".pool"]
    assert (row["pixels"], row["backend"], row["tile"]) == (2 * 9 * 8, "triton", None)
    assert row["us"].keys() == {"triton", "eager"}
    assert (STEM + ".pool") in {case for _, case in tables.read(path).convolutions}


def test_the_convolution_of_a_stem_that_is_faster_apart_is_tuned_too(tmp_path, monkeypatch):
    apart, bind = {"backend": "eager", "tile": None, "us": {"eager": 1.0, "triton": 2.0}}, backends.triton.bind_stem
    monkeypatch.setattr(tuning, "stem_winner", lambda found: apart)
    monkeypatch.setattr(tuned, "_of_gpu", lambda device: iter(tuned._given))
    monkeypatch.setattr(backends.triton, "bind_stem", lambda *args, measured: bind(*args, measured=True))
    path = frb.tune(randomize_norms(WithStem()).eval(), IMAGES, out=tmp_path / "t.json", progress=False)
    assert rows(path).keys() == CASES | {STEM + ".pool", STEM}


def test_the_convolutions_of_a_tail_that_is_faster_as_one_kernel_are_tuned_all_the_same(tmp_path, monkeypatch):
    """As a table has it that another batch was tuned for: conv by conv is what the tail is held against."""
    monkeypatch.setattr(tuned, "_of_gpu", lambda device: iter(tuned._given))
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    assert all(row["faster"] for row in rows(path, "stages").values())
    frb.tune(network(), X.repeat(2, 1, 1, 1), out=path, progress=False)
    for kind, cases in (("winners", CASES), ("stages", TAILS)):
        found = [(row["case"], row["pixels"]) for row in json.loads(path.read_text())[kind]]
        assert sorted(found) == sorted((case, pixels) for case in cases for pixels in (48, 96))


def test_a_wrong_stem_is_no_winner(tmp_path, monkeypatch):
    bind = backends.triton.bind_stem

    def wrong(*args, **options):
        run = bind(*args, **options)
        return lambda x, other: run(x, other) + 1

    monkeypatch.setattr(backends.triton, "bind_stem", wrong)
    path = frb.tune(randomize_norms(WithStem()).eval(), IMAGES, out=tmp_path / "t.json", progress=False)
    assert rows(path)[STEM + ".pool"]["us"].keys() == {"eager"}


def test_a_second_table_of_the_same_file_takes_the_place_of_the_first(tmp_path):
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "winners": data["winners"][:1], "stages": []}))
    frb.load_config(path)
    (table,) = (table for table in tuned._given if table.path == path.resolve())
    assert len(table.convolutions) == 1


def test_a_place_where_no_table_can_be_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "convolution_winner", lambda found: pytest.fail("measured"))
    with pytest.raises(ValueError, match="^out must be a file, got the folder"):
        frb.tune(network(), X, out=tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="^out must be in a folder that can be written, got"):
        frb.tune(network(), X, out=tmp_path / "file" / "t.json", progress=False)


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "t.json", tuning.convolution_winner, []

    def interrupted(found):
        calls.append(found)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(found)

    monkeypatch.setattr(tuning, "convolution_winner", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frb.tune(network(), X, out=path, progress=False)
    assert len(rows(path)) == 1
    frb.tune(network(), X, out=path, progress=False)
    assert rows(path).keys() == CASES
    assert len(calls) == 4
    frb.tune(network(), X, out=path, progress=False)
    assert len(calls) == 4


def test_other_versions_are_measured_again(tmp_path):
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "triton": "3.0", "winners": data["winners"][:1], "stages": []}))
    with pytest.warns(RuntimeWarning, match=r"^out holds tiles measured with triton 3\.0, which are measured again: "):
        frb.tune(network(), X, out=path, progress=False)
    assert rows(path).keys() == CASES


def test_in_tf32_the_measure_is_an_ideal_unit(tmp_path, monkeypatch):
    """Torch may compute a shape in full fp32, as here; nothing that multiplies in TF32 would be right then."""
    monkeypatch.setattr(backends.triton, "in_tf32", lambda dtype, device: True)
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    assert all(row["us"].keys() == {"triton", "eager"} for row in rows(path).values())
    assert all(row["us"].keys() == {"stage", "apart"} for row in rows(path, "stages").values())


def test_a_wrong_way_is_never_a_winner(tmp_path, monkeypatch):
    from fused_resblock.kernels import convolution

    real = convolution.bind_convolution

    def wrong(*args, **options):
        run = real(*args, **options)
        return lambda x, other: run(x, other) + 1 if len(args) > 4 else run(x, other)

    monkeypatch.setattr(convolution, "bind_convolution", wrong)
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    assert all(row["backend"] == "eager" and row["tile"] is None for row in rows(path).values())


def test_a_way_that_fails_is_left_out(tmp_path, monkeypatch):
    def fail(call):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tuning, "median_us", fail)
    path = frb.tune(network(), X, out=tmp_path / "t.json", progress=False)
    assert rows(path) == rows(path, "stages") == {}, "where nothing ran nothing is known"


def test_where_the_table_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    assert frb.tune(frb.fuse(network(), stages=False), X, progress=False) == tmp_path / "cpu.json"
    assert rows(tmp_path / "cpu.json", "stages") == {}


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got str"):
        frb.tune("resnet50", X)
    with pytest.raises(TypeError, match="^example must be a tensor, got list"):
        frb.tune(network(), [1])
    with pytest.raises(ValueError, match="^model must be in eval mode"):
        frb.tune(network().train(), X)
    with pytest.raises(ValueError, match="^example must be on the model's device cpu, got meta"):
        frb.tune(network(), X.to("meta"))
    with pytest.raises(ValueError, match="^model must hold residual blocks, got none"):
        frb.tune(nn.Conv2d(64, 64, 1).eval(), X, out=tmp_path / "t.json")
    with pytest.raises(TypeError, match="^out must be a path, got 3"):
        frb.tune(network(), X, out=3)
    with pytest.raises(ValueError, match="^out must be in a folder that can be written, got "):
        frb.tune(network(), X, out=tmp_path / ("a" * 5000))
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ValueError, match="^path must name a table of tuned tiles, got "):
        frb.tune(network(), X, out=bad)
    head = {"gpu": "A100", "capability": 80, "multiprocessors": 108, "winners": []}
    bad.write_text(json.dumps(head))
    with pytest.raises(ValueError, match=r"^out must be a table of cpu, got .*bad\.json of A100"):
        frb.tune(network(), X, out=bad)


def test_devices():
    with pytest.raises(RuntimeError, match="^tune must have a CUDA device, got none"):
        REAL_CHECK("tune", torch.device("cpu"))


def test_an_example_on_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="^example must be on a CUDA device, got cpu"):
        REAL_CHECK("tune", torch.device("cpu"))
