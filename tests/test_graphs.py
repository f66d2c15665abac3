"""`capture` with a recorder that stands for CUDA graphs: replays repeat the recorded call on the recorded memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import cast
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resblock as frb
from fused_resblock import graphs as module
from fused_resblock import on_cuda, per_module
from fused_resblock.backends import folding

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))


def made(**options) -> nn.Module:
    """A stage of two fused blocks."""
    torch.manual_seed(0)
    blocks = [frb.reference.ResidualBlock(8, 8) for _ in range(2)]
    for norm in (m for block in blocks for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return frb.fuse(nn.Sequential(*blocks).eval(), **options)


@pytest.fixture
def recorded(monkeypatch):
    """How many graphs have been recorded."""
    graphs = []

    def record(call, pool, stream):
        y = call()
        graphs.append(y)

        def replay() -> None:
            outputs, again = pytree.tree_leaves(y), pytree.tree_leaves(call())
            for old, new in zip(outputs, again, strict=True):
                old.copy_(new)

        return replay, y

    monkeypatch.setattr(on_cuda, "check_device", lambda caller, device: None)
    monkeypatch.setattr(module, "record", record)
    return graphs


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_same_result_and_one_graph(recorded):
    model = made()
    captured = frb.capture(model, X)
    for scale in (1.0, -2.0):
        close(captured(scale * X), model(scale * X))
    assert len(recorded) == 1
    assert not captured(X).requires_grad


def test_results_are_of_their_own_unless_asked_otherwise(recorded):
    model = made()
    captured = frb.capture(model, X)
    first = captured(X)
    kept = first.clone()
    captured(2 * X)
    assert torch.equal(first, kept)
    shared = frb.capture(model, X, copy=False)
    assert shared(X) is shared(2 * X)


def test_other_memory_formats_are_taken(recorded):
    model = made()
    captured = frb.capture(model, X.contiguous(memory_format=torch.channels_last))
    close(captured(X.contiguous()), model(X))
    close(captured(X.repeat_interleave(2, 3)[..., ::2]), model(X))


def test_several_shapes(recorded):
    model = made()
    captured = frb.capture(model, X, X[:1])
    captured.add(X[:, :, :4])
    for x in (X, X[:1], X[:, :, :4]):
        close(captured(x), model(x))
    assert len(recorded) == 3


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X[:1], r"\[1, 8, 9, 7\] float32 on cpu"),
        (X.double(), r"\[2, 8, 9, 7\] float64 on cpu"),
        (X.to("meta"), r"\[2, 8, 9, 7\] float32 on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_an_input_that_was_not_captured(recorded, x, words):
    captured = frb.capture(made(), X)
    known = r"\[2, 8, 9, 7\] float32 on cpu"
    with pytest.raises(ValueError, match=rf"^x must be like one of the captured examples \({known}\), got {words}$"):
        captured(x)
    with pytest.raises(TypeError, match="^x must be a tensor, got list"):
        captured([1.0])


def edit_in_place(model):
    with torch.no_grad():
        model[0].block[0].weight.mul_(2)


def edit_statistics(model):
    model[1].block[1].running_mean.add_(1)


def replace_parameter(model):
    model[0].block[0].weight = nn.Parameter(model[0].block[0].weight.detach() * 3)


def replace_module(model):
    model[0].relu = nn.ReLU(inplace=True).eval()


def load_state(model):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


def widen(model):
    model.double().float()


@pytest.mark.parametrize(
    "change", [edit_in_place, edit_statistics, replace_parameter, replace_module, load_state, widen]
)
def test_a_changed_model_is_captured_again(recorded, change):
    model = made()
    captured = frb.capture(model, X, X[:1])
    change(model)
    close(captured(X), model(X))
    close(captured(X), model(X))
    assert len(recorded) == 3
    close(captured(X[:1]), model(X[:1]))  # captured again when it is asked for
    assert len(recorded) == 4


class Scaled(nn.Module):
    """A model of somebody's own, whose forward asks its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.table = made(), 1.0, torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale * self.table


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "value"), [("scale", 3.0), ("table", torch.full((1,), 3.0)), ("new", 1)])
def test_changed_attributes_of_the_model_itself_are_captured_again(recorded, fused, name, value):
    model = Scaled().eval()
    model = frb.fuse(model) if fused else model
    captured = frb.capture(model, X)
    setattr(model, name, value)
    close(captured(X), model(X))
    assert len(recorded) == 2
    captured(X)
    assert len(recorded) == 2


def test_another_forward_of_the_model_itself_is_refused(recorded):
    model = Scaled().eval()
    captured = frb.capture(model, X)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="overridden forwards"):
        captured(X)


def test_moved_parameters_leave_their_memory_to_the_graph(recorded):
    model = made()
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    captured = frb.capture(model, X)
    model.double().float()
    gc.collect()
    assert all(reference() is not None for reference in storages)
    del captured
    with torch.no_grad():
        model(X)  # on a CPU its blocks hold what they sampled until they are asked again
    gc.collect()
    assert all(reference() is None for reference in storages)


def test_casts_of_autocast_are_not_cached_in_a_capture(recorded, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_warm_up", lambda call, device: seen.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        frb.capture(made(), X)
        assert torch.is_autocast_cache_enabled()
    assert seen == [False]


def test_changed_settings_are_captured_again(recorded, monkeypatch):
    captured = frb.capture(made(), X)
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "eager")
    captured(X)
    frb.clear_caches()
    captured(X)
    captured(X)
    assert len(recorded) == 3


@pytest.mark.parametrize("where", ["root", "inside"])
def test_hooks(recorded, where):
    model = made()
    captured = frb.capture(model, X)
    (model if where == "root" else model[0].block[1]).register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="^model must be free of hooks"):
        captured(X)
    with pytest.raises(ValueError, match="^model must be free of hooks"):
        frb.capture(model, X)


def test_what_a_graph_reads_stays_in_memory(recorded):
    """Folded weights are let go by the caches, and not by the graph that has their addresses."""
    frb.clear_caches()  # of models of other tests
    model = made()
    with torch.no_grad():
        model(X)
    captured = frb.capture(model, X)
    entries = frb.backends.onednn._packed._entries.values()
    packed = [weakref.ref(weight) for entry in entries for weight, _ in entry.value.values()]
    assert packed
    frb.clear_caches()
    for block in model:
        block.use_backend("eager")
    for part in model.modules():
        per_module.forget(part)
    gc.collect()
    assert all(reference() is not None for reference in packed)
    del captured
    gc.collect()
    assert all(reference() is None for reference in packed)


def test_bad_models_and_examples(recorded):
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, got str"):
        frb.capture("resnet50", X)
    with pytest.raises(TypeError, match="^example must be a tensor, got tuple"):
        frb.capture(made(), (2, 8, 9, 7))
    with pytest.raises(ValueError, match="^model must be in eval mode, got train mode"):
        frb.capture(made().train(), X)
    with pytest.raises(ValueError, match="^example must be on the model's device cpu, got meta"):
        frb.capture(made(), X.to("meta"))
    with torch.inference_mode():
        model = cast_model(made())
    with pytest.raises(ValueError, match="^model must record changes of its tensors"):
        frb.capture(model, X)


def cast_model(model: nn.Module) -> nn.Module:
    """The same with parameters made here."""
    for name, parameter in list(model[0].block[0].named_parameters()):
        setattr(model[0].block[0], name, nn.Parameter(cast(parameter, torch.float32).clone(), requires_grad=False))
    return model


def test_an_example_on_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="^example must be on a CUDA device, got cpu"):
        frb.capture(made(), X)


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="^capture must have a CUDA device, got none"):
        frb.capture(made(), X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    model, x = made().cuda(), X.cuda()
    captured = frb.capture(model, x)
    with torch.no_grad():
        for scale in (1.0, 3.0):
            close(captured(scale * x), model(scale * x))
        model[0].block[0].weight.mul_(2)
        close(captured(x), model(x))


def test_nothing_is_kept_outside_of_a_capture():
    kept: list[object] = []
    with folding.keeping(kept):
        folding.keep(1)
    folding.keep(2)
    assert kept == [1]
