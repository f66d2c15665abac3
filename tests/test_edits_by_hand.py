"""Edits that go around a module's methods, or come in the midst of something, are seen all the same."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from frozen_networks import CALLS, images, network
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import modules, sampling
from fused_resblock.models import randomize_norms
from fused_resblock.programs import Before, Programs
from fused_resblock.reference import BasicBlock


class Unit(nn.Module):
    """The residual unit of RefineNet, whose first ReLU may change what is added in the end."""

    scaled = True

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.scaled = nn.ReLU(), False
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(self.relu(x)))) + x
        return torch.relu(y) if self.scaled else y


def hooks_forgotten(block: nn.Module) -> None:
    block.conv1._forward_hooks = OrderedDict()
    block.conv1.register_forward_hook(lambda m, a, y: y * 2)


CHANGES = {
    "ReLU in place": lambda block: setattr(block.relu, "inplace", True),
    "attribute deleted": lambda block: delattr(block, "scaled"),
    "hooks forgotten": hooks_forgotten,
}


@pytest.mark.parametrize("chain", [False, True], ids=["block", "chain"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_change(change, chain):
    reference = nn.Sequential(Unit(), Unit()) if chain else Unit()
    fused, x = frb.fuse(reference.eval(), strict=True), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        fused(x), fused(x)
        for model in (fused, reference):
            for block in model.modules():
                if isinstance(block, Unit):
                    change(block)
        for _ in range(3):
            torch.testing.assert_close(fused(x.clone()), reference(x.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "no program"])
def test_filters_cut_off(kind):
    """Neither version nor address nor strides of what is left are other ones."""
    reference = randomize_norms(BasicBlock(16, 16)).eval()
    fused, x = frb.fuse(reference, strict=True), torch.randn(2, 16, 6, 6)
    with torch.set_grad_enabled(kind == "no program"):
        fused(x), fused(x)
        for block in (fused, reference):
            block.conv1.weight.data = block.conv1.weight.data[:8]
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(block.bn1, name)
                tensor.data = tensor.data[:8]
            block.conv2.weight.data = block.conv2.weight.data[:, :8]
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-5)


def test_attribute_of_a_network_deleted():
    class Scaled(type(network())):
        factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    reference = network(cls=Scaled)
    reference.factor = 3.0
    fused = frb.fuse(reference, frozen=True)
    with torch.no_grad():
        for _ in range(CALLS):
            fused(images())
        del fused.factor, reference.factor
        torch.testing.assert_close(fused(images()), reference(images()), rtol=1e-4, atol=1e-4)


def test_a_program_that_is_kept_late_is_not_kept_under_another_guard():
    block, x = frb.fuse(BasicBlock(8, 8).eval()), torch.randn(1, 8, 5, 5)
    tensors = list(block.parameters())
    programs, inner = Programs(), list(block.modules())
    old, new = object(), object()
    programs.keep(x, old, Before(inner, tensors), inner, tensors, all_modes=True)
    late = programs._kept
    with torch.no_grad():
        block.conv1.weight.mul_(2)
    assert programs.find(x) is None
    programs.keep(x, new, Before(inner, tensors), inner, tensors, all_modes=True)
    late.programs.clear()
    assert programs.find(x) is new
    assert programs.guard is not late.guard


def test_words_outlive_the_memory_of_their_tensor():
    tensor = torch.full((64, 64), 3.0)
    address = tensor.data_ptr()
    found, storages = sampling.words([tensor])
    tensor.data = torch.zeros(64, 64)
    assert [storage.data_ptr() for storage in storages] == [address]
    assert len(set(sampling.read(found))) == 1


@pytest.mark.parametrize("calls", [1, CALLS])
def test_functional_call_of_a_frozen_network(calls):
    """Given weights are gone afterwards, also where everything is asked in that very call."""
    reference = network()
    fused, x = frb.fuse(reference, frozen=True), images()
    others = {name: p * 1.5 for name, p in reference.named_parameters()}
    fused(x)  # under autograd: everything is asked once more
    with torch.no_grad():
        expected = torch.func.functional_call(reference, others, (x,))
        for _ in range(calls):
            torch.testing.assert_close(torch.func.functional_call(fused, others, (x,)), expected, rtol=1e-4, atol=1e-4)
        for _ in range(CALLS + 1):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


class Wrapper(nn.Module):
    """Has no graph, and is not fused itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if x.sum() == x.sum() else x


def test_a_forward_while_a_wrapper_of_a_frozen_block_is_loaded():
    reference = Wrapper(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))).eval()
    fused, x = frb.fuse(reference, frozen=True, heads=False, stems=False), torch.randn(1, 8, 5, 5)
    state = copy.deepcopy(randomize_norms(reference, seed=5)).state_dict()
    state = {name: value * 1.5 for name, value in state.items()}
    with torch.no_grad():
        for _ in range(CALLS):
            fused(x)
        last = fused.model[1].conv1
        last.register_load_state_dict_pre_hook(lambda *args: fused(x))
        for model in (fused, reference):
            model.load_state_dict(state)
        for _ in range(CALLS):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)


def test_promises_leave_no_hooks():
    fused = frb.fuse(network(), frozen=True)
    frb.fuse(fused, inplace=True, frozen=True)
    assert {len(module._load_state_dict_post_hooks) for module in fused.modules()} == {0, 1}
    assert all(not m._load_state_dict_post_hooks for m in frb.unfuse(copy.deepcopy(fused)).modules())


def test_a_block_keeps_its_class_while_it_is_planned_again(monkeypatch):
    """Others may be calling it."""
    fused, classes = frb.fuse(BasicBlock(8, 8).eval()), []
    recognize = modules.recognize
    monkeypatch.setattr(modules, "recognize", lambda block: classes.append(type(fused)) or recognize(block))
    fused.flag = 1
    assert classes == [type(fused)]
    assert type(fused) is not BasicBlock
