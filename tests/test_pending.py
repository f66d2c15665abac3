"""A pending tensor is what the modules would have given, to everything that touches it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock import pending
from fused_resblock.models import randomize_norms
from fused_resblock.pending import Pending, scope


class Network(nn.Module):
    """A stem and a block; returns whatever `use` makes of the convolution's output."""

    def __init__(self, use) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.block = frb.reference.BasicBlock(8, 8)
        self.use = None
        self.replace(use)

    def replace(self, use) -> None:
        """What the forward does from now on, behind the back of whoever traced it."""
        self.__dict__["use"] = use

    def forward(self, x: Tensor):
        return self.use(self, x)


def usual(net: nn.Module, x: Tensor) -> Tensor:
    """The forward that is traced."""
    return net.block(net.maxpool(net.relu(net.bn1(net.conv1(x)))))


def both(use) -> tuple[nn.Module, nn.Module]:
    """A network and its fused copy, which were fused with the usual forward and now do something else."""
    torch.manual_seed(0)
    reference = randomize_norms(Network(usual)).eval()
    fused = frb.fuse(reference, strict=True)
    assert [p.name for p in frb.explain(fused).parts] == ["conv1"]
    reference.replace(use)
    fused.replace(use)
    return reference, fused


USES = {
    "usual": usual,
    "conv alone": lambda n, x: n.conv1(x),
    "conv and norm": lambda n, x: n.bn1(n.conv1(x)),
    "no pool": lambda n, x: n.block(n.relu(n.bn1(n.conv1(x)))),
    "no norm": lambda n, x: n.maxpool(n.relu(n.conv1(x))),
    "pool before the ReLU": lambda n, x: n.relu(n.maxpool(n.bn1(n.conv1(x)))),
    "norm behind the ReLU": lambda n, x: n.bn1(n.relu(n.conv1(x))),
    "norm twice": lambda n, x: n.maxpool(n.bn1(n.bn1(n.conv1(x)))),
    "ReLU twice": lambda n, x: n.maxpool(n.relu(n.relu(n.conv1(x)))),
    "pool twice": lambda n, x: n.maxpool(n.maxpool(n.conv1(x))),
    "arithmetic between": lambda n, x: n.relu(n.bn1(n.conv1(x) * 2 + 1)),
    "functional between": lambda n, x: n.maxpool(torch.sigmoid(n.bn1(n.conv1(x)))),
    "read twice": lambda n, x: (lambda y: n.bn1(y) + y)(n.conv1(x)),
    "concatenated": lambda n, x: torch.cat([n.bn1(n.conv1(x)), n.conv1(x)], 1),
    "in place": lambda n, x: n.bn1(n.conv1(x).mul_(2)),
    "in place, result dropped": lambda n, x: (lambda y: (y.add_(1), n.bn1(y))[1])(n.conv1(x)),
    "sliced": lambda n, x: n.bn1(n.conv1(x)[:, :, 1:, 1:]),
    "shape asked": lambda n, x: n.conv1(x).reshape(n.conv1(x).shape[0], -1),
    "numpy": lambda n, x: torch.from_numpy(np.sqrt(np.abs(n.bn1(n.conv1(x)).numpy()))),
    "numpy of a copy": lambda n, x: torch.from_numpy(n.conv1(x).cpu().float().numpy()),
    "as an array": lambda n, x: torch.tensor(np.asarray(n.conv1(x))),
    "list": lambda n, x: torch.tensor(n.conv1(x)[0, 0].tolist()),
    "detached": lambda n, x: n.conv1(x).detach(),
    "clone": lambda n, x: n.bn1(n.conv1(x)).clone(),
    "out=": lambda n, x: torch.add(n.conv1(x), 1, out=torch.empty(0)),
    "copy_": lambda n, x: torch.zeros(2, 8, 6, 5).copy_(n.conv1(x)),
    "deepcopy": lambda n, x: copy.deepcopy(n.conv1(x)),
    "pickle": lambda n, x: pickle.loads(pickle.dumps(n.conv1(x))),
    "dictionary": lambda n, x: {"a": n.bn1(n.conv1(x))}["a"] + 0,
    "returned": lambda n, x: n.relu(n.bn1(n.conv1(x))),
    "norm in train mode": lambda n, x: n.maxpool(n.bn1.train()(n.conv1(x))),
    "1 image": lambda n, x: n.conv1(x[:1]),
    "another dtype": lambda n, x: n.bn1(n.conv1(x)).double(),
    "max and index": lambda n, x: n.conv1(x).max(dim=1).values,
    "data pointer": lambda n, x: torch.tensor(n.conv1(x).data_ptr() != 0),
    "strides": lambda n, x: torch.tensor(n.conv1(x.contiguous(memory_format=torch.channels_last)).stride()),
}


@pytest.mark.filterwarnings("ignore:.*non-leaf.*", "ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("use", [pytest.param(use, id=name) for name, use in USES.items()])
def test_use(use, mode):
    reference, fused = both(use)
    if mode is torch.enable_grad:
        reference.requires_grad_(False), fused.requires_grad_(False)
    x = torch.randn(2, 3, 12, 10)
    with mode():
        for _ in range(2):
            theirs = use(reference, x)
            ours = fused(x)
            ours, theirs = ours + 0, theirs + 0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_leaves_the_network_is_computed():
    kept: list[Tensor] = []
    _, fused = both(lambda n, x: (kept.append(n.conv1(x)), {"y": [n.bn1(n.conv1(x))]})[1])
    with torch.no_grad():
        x = torch.randn(1, 3, 6, 6)
        (y,) = fused(x)["y"]
        assert type(y) is Tensor
        assert isinstance(kept[0], Pending)
        assert kept[0].computed is not None
        copies = [y.clone(), kept[0].clone()]
        x.zero_(), fused.conv1.weight.zero_()
        assert torch.equal(y, copies[0])
        assert torch.equal(kept[0], copies[1])


def test_what_else_leaves_the_network_is_the_very_object():
    sizes: list[object] = []
    _, fused = both(lambda n, x: (n.conv1(x), (sizes.append(n.conv1(x).shape), sizes)[1], x.shape[-2:]))
    with torch.no_grad():
        y, same, size = fused(torch.randn(1, 3, 6, 6))
        assert type(y) is Tensor
        assert (type(same[0]), type(size)) == (torch.Size, torch.Size)
    _, fused = both(lambda n, x: (n.conv1(x).shape, sizes)[1])
    with torch.no_grad():
        assert fused(torch.randn(1, 3, 6, 6)) is sizes


def test_no_work_is_left_pending_outside_of_the_network():
    _, fused = both(usual)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        assert type(fused.conv1(x)) is Tensor
        assert type(fused.relu(fused.bn1(fused.conv1(x)))) is Tensor
    assert not pending.allowed()


def test_scope_ends_with_an_error():
    def fail(net: nn.Module, x: Tensor) -> Tensor:
        net.kept = [net.conv1(x)]
        raise KeyError("stop")

    _, fused = both(fail)
    with torch.no_grad(), pytest.raises(KeyError):
        fused(torch.randn(1, 3, 6, 6))
    assert not pending.allowed()
    assert fused.kept[0].computed is not None


def test_an_error_is_not_hidden_by_another():
    def fail(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv1(x)
        x.zero_()
        raise KeyError(y.shape)

    _, fused = both(fail)
    with torch.no_grad(), pytest.raises(KeyError):
        fused(torch.randn(1, 3, 6, 6))


def test_input_changed_before_the_output_was_used():
    """What was asked for cannot be had any more: an error, not a wrong result."""

    def change(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv1(x)
        x.mul_(2)
        return net.bn1(y)

    _, fused = both(change)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must stay as it is until its output has been used"):
        fused(torch.randn(1, 3, 6, 6))


def test_metadata_without_values():
    conv = nn.Conv2d(3, 8, 3, 2, 1)
    x = torch.randn(2, 3, 7, 9)
    with scope(), torch.no_grad():
        y = Pending(x, (conv,), (2, 8, 4, 5))
        assert (y.shape, y.dtype, y.device, y.dim(), y.size(1)) == ((2, 8, 4, 5), x.dtype, x.device, 4, 8)
        assert y.stride() == (8 * 20, 1, 40, 8)
        assert y.computed is None
        assert isinstance(y, Tensor)
        y.sum()
        assert y.computed is not None


def test_shape_behind_an_edit_in_place():
    shapes = []

    def use(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv1(x)
        y.unsqueeze_(0)
        shapes.append((y.shape, y.dim(), y.stride()))
        return y[0]

    reference, fused = both(use)
    with torch.no_grad():
        x = torch.randn(1, 3, 6, 6).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x), reference(x))
    assert shapes[0] == shapes[1]


def test_list_of_a_class_of_its_own():
    class Parts(list):
        pass

    reference, fused = both(lambda n, x: torch.cat(Parts([n.conv1(x), n.conv1(x)])))
    with torch.no_grad():
        x = torch.randn(1, 3, 6, 6)
        torch.testing.assert_close(fused(x), reference(x))


def test_values_are_of_the_mode_of_the_call():
    def use(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv1(x)
        with torch.inference_mode():
            y.sum()
        return y

    _, fused = both(use)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        assert not fused(x).is_inference()
    with torch.inference_mode():
        assert fused(x).is_inference()


def test_memory_is_freed():
    _, fused = both(usual)
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        fused(x)
    parts = [weakref.ref(m) for m in fused.modules()]
    del fused
    gc.collect()
    assert [p() for p in parts if p() is not None] == []
