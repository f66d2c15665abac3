"""`explain`: the data and the table, for the model as it is now."""

from __future__ import annotations

import sys

import pytest
import torch
import zoo
from frozen_networks import network
from odd_blocks import SqueezeExcite
from torch import nn
from torch.nn.utils import prune

import fused_resblock as frb
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.reference import BasicBlock, Bottleneck, PreActBottleneck

explain_module = sys.modules["fused_resblock.explain"]  # the name in the package is the function
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="names what a machine without a GPU uses")


@pytest.fixture
def model() -> nn.Module:
    """Two blocks that fuse and one that does not, in eval mode."""
    return nn.Sequential(BasicBlock(8, 8), SqueezeExcite(), Bottleneck(8, 2, groups=2)).eval()


def test_is_a_list_of_named_tuples(model):
    reports = frb.explain(frb.fuse(model))
    assert isinstance(reports, frb.Explanation)
    assert len(reports) == 3
    name, cls, fused, backend, reason = reports[0]
    assert (name, cls, fused) == ("0", "FusedBasicBlock", True)
    assert backend in ("onednn", "triton", "cudnn")
    assert reason
    assert isinstance(reports[1], frb.BlockReport)
    assert [r.fused for r in reports] == [True, False, True]
    assert reports[1].backend == "eager"
    assert dict(reports[1]._asdict())["name"] == "1"


def test_table_has_a_line_for_every_block(model):
    with torch.no_grad():
        lines = str(frb.explain(frb.fuse(model, stems=False))).splitlines()
    assert lines[0].split() == ["name", "class", "state", "backend", "reason"]
    table = [line.split() for line in lines[2 : lines.index("2 of 3 fused")]]
    assert [(line[0], line[1], line[2]) for line in table] == [
        ("0", "FusedBasicBlock", "fused"),
        ("1", "SqueezeExcite", "kept"),
        ("2", "FusedBottleneck", "fused"),
    ]


def test_table_tells_that_autograd_is_on(model):
    assert str(frb.explain(frb.fuse(model[:1], stems=False))).splitlines()[-1].endswith("autograd is on now")
    assert str(frb.explain(model)).splitlines()[-1] == "0 of 3 fused"


@CPU_ONLY
def test_parts_whose_operations_are_plain_pytorch():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)))
    parts = frb.explain(frb.fuse(model.eval(), backend="eager")).parts
    assert [(part.name, part.fused, part.reason) for part in parts] == [("0", False, "forced"), ("2", False, "forced")]
    parts = frb.explain(frb.fuse(model.double())).parts
    assert [part.fused for part in parts] == [False, False]
    assert all("float64" in part.reason for part in parts)


@CPU_ONLY
def test_dilated_filter_that_lies_in_the_padding():
    block = BasicBlock(8, 8).eval()
    block.conv1.padding, block.conv1.dilation = (2, 2), (1, 2)
    block.conv1.kernel_size, block.conv1.weight = (3, 1), nn.Parameter(block.conv1.weight[..., :1].clone())
    (report,) = frb.explain(frb.fuse(block))
    assert report.backend == "eager+onednn"


@CPU_ONLY
def test_heads_that_are_not_packed():
    model = network().bfloat16()
    assert [part.name for part in frb.explain(frb.fuse(model)).parts][-1] == "fc"
    pruned = frb.fuse(model)
    prune.random_unstructured(pruned.fc, "weight", 0.5)
    mixed = frb.fuse(model)
    mixed.fc.float()
    for other in (pruned, mixed):
        assert "fc" not in [part.name for part in frb.explain(other).parts]


def test_model_that_was_not_fused_yet(model):
    reports = frb.explain(model)
    assert [r.reason for r in reports if r.name != "1"] == ["not fused: `fuse` was not called, or left it out"] * 2
    assert not any(r.fused for r in reports)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda b: b.train(), "batch statistics", id="train mode"),
        pytest.param(lambda b: b.bn1.train(), "batch statistics", id="one norm in train mode"),
        pytest.param(lambda b: b.conv1.register_forward_hook(print), "hooks", id="hook"),
        pytest.param(lambda b: setattr(b, "relu", nn.SiLU()), "SiLU", id="module replaced"),
        pytest.param(lambda b: b.double(), "float64", id="float64"),
        pytest.param(lambda b: nn.utils.parametrizations.weight_norm(b.conv1), "", id="parametrization"),
    ],
)
@CPU_ONLY
def test_changes_behind_fuse_are_seen(change, reason):
    fused = frb.fuse(BasicBlock(8, 8).eval())
    change(fused)
    (report,) = frb.explain(fused)
    assert not report.fused
    assert report.backend == "eager"
    assert reason in report.reason


def test_train_mode_of_a_frozen_model_is_fused():
    fused = frb.fuse(BasicBlock(8, 8)).train()
    for norm in (fused.bn1, fused.bn2):
        norm.eval()
    assert frb.explain(fused)[0].fused


@CPU_ONLY
@pytest.mark.parametrize("backend", ["auto", "onednn", "triton", "eager"])
def test_backend_of_a_fused_block(backend):
    (report,) = frb.explain(frb.fuse(PreActBottleneck(8, 8, 4).eval(), backend=backend))
    assert report.backend == {"auto": "onednn"}.get(backend, backend)
    assert report.fused == (backend != "eager")


def test_explaining_changes_nothing(model):
    model.train()
    before = [(m.training, dict(vars(m))) for m in model.modules()]
    frb.explain(model)
    frb.explain(frb.fuse(model))
    assert [(m.training, dict(vars(m))) for m in model.modules()] == before


def test_meta_model():
    with torch.device("meta"):
        fused = frb.fuse(BasicBlock(8, 8).eval())
    (report,) = frb.explain(fused)
    assert report.backend == "eager"
    assert fused(torch.empty(2, 8, 5, 5, device="meta")).shape == (2, 8, 5, 5)


def test_every_block_of_the_zoo_has_a_line():
    model = nn.ModuleDict({name: cls() for name, cls in zoo.ALL.items()}).eval()
    reports = frb.explain(frb.fuse(model))
    assert [r.name for r in reports] == list(zoo.ALL)
    assert all(r.fused for r in reports)


def test_backend_is_that_of_the_gpu_and_of_its_table(monkeypatch):
    """Before Hopper cuDNN takes the 3x3s; and a table of measured winners has the last word."""
    asked, resolve = [], explain_module.backends.resolve

    def noting(name, problem, *rest):
        asked.append(problem.capability)
        return resolve(name, problem, *rest)

    monkeypatch.setattr(explain_module.backends, "resolve", noting)
    monkeypatch.setattr(explain_module, "gpu_of", lambda device: Gpu(108, 80))
    block = frb.fuse(BasicBlock(8, 8).eval())
    (report,) = frb.explain(block)
    assert set(asked) == {80}
    assert "measured" not in report.reason
    monkeypatch.setattr(explain_module.tuned, "measured", lambda device: True)
    (report,) = frb.explain(block)
    assert report.reason.endswith("for some shapes what was measured to be faster")


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        block = frb.fuse(frb.reference.BasicBlock(8, 8).eval(), inplace=True)
        x, calls = torch.randn(2, 8, 5, 5), []
        with pytest.MonkeyPatch.context() as patch:
            fold = frb.backends.layouts.fold
            patch.setattr(frb.backends.layouts, "fold", lambda *args: calls.append(args) or fold(*args))
            for _ in range(3):
                block(x)
        assert len(calls) == 6
        assert "folded at every call" in frb.explain(block)[0].reason
        assert "at every call" not in frb.explain(frb.fuse(block))[0].reason
