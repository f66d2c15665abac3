"""Networks that run as one function, and tensors and inputs of other kinds than most: small, strided, sparse, wrapped."""

from __future__ import annotations

import warnings

import pytest
import torch
from frozen_networks import CALLS, functions
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fused_resblock as frb
from fused_resblock import sampling
from fused_resblock.models import randomize_norms, resnet18


def close(fused: nn.Module, reference: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), reference(x), rtol=1e-3, atol=1e-4)


def stack(channels: int) -> nn.Sequential:
    """Two stems, the second with so many channels."""
    first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())


def with_strides() -> nn.Sequential:
    model = stack(64)
    model[4].running_var = torch.ones(64, 2)[:, 0]
    model[3].weight = nn.Parameter(torch.randn(8, 64).t()[:, :, None, None])
    return model


@pytest.mark.parametrize(
    ("model", "edit"),
    [
        pytest.param(lambda: stack(1), lambda n: n[4].bias.data.add_(1), id="norm of one channel"),
        pytest.param(lambda: stack(1), lambda n: n[4].running_mean.numpy().__iadd__(1), id="statistic, by numpy"),
        pytest.param(lambda: stack(1), lambda n: n[3].bias.data.add_(1), id="convolution of one channel"),
        pytest.param(with_strides, lambda n: n[4].running_var.data.mul_(3), id="statistic with strides"),
        pytest.param(with_strides, lambda n: n[3].weight.data.mul_(3), id="transposed filter"),
    ],
)
def test_whole_tensors_through_data(model, edit):
    reference = randomize_norms(model()).eval()
    fused, x = frb.fuse(reference), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for _ in range(CALLS):
            fused(x)
    assert functions(fused)
    for network in (fused, reference):
        edit(network)
    close(fused, reference, x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1,), (3,), (7,), (2, 3), (9, 5, 2)])
@pytest.mark.parametrize("layout", ["dense", "transposed", "every second", "expanded"])
def test_words_are_of_the_tensor(layout, size, dtype):
    """Each changes with the tensor, and with nothing else of what it is a part."""
    whole = torch.zeros((*size, 2), dtype=dtype)
    part = {
        "dense": whole[:0].new_zeros(size),
        "transposed": whole[..., 0].clone().mT if len(size) > 1 else whole[..., 0],
    }
    tensor = part.get(layout, whole[..., 1] if layout == "every second" else whole[..., :1].expand(*size, 4))
    found, storages = sampling.words([tensor])
    assert len(found) == 1 if tensor.dim() < 2 else len(found) in (1, 2)
    assert len(storages) == 1
    if layout == "every second":
        whole[..., 0] = 1
        assert set(sampling.read(found)) == {0}
    if layout != "expanded":
        tensor.fill_(1)
        assert 0 not in sampling.read(found)


def test_words_of_tensors_without_any():
    sparse, empty = torch.eye(3).to_sparse(), torch.zeros(0)
    assert sampling.words([sparse, empty, None, torch.zeros(2, device="meta")]) == ([], [])


def wrapped(n: nn.Module) -> None:
    n.fc.weight = nn.Parameter(TwoTensor(n.fc.weight.detach().clone(), n.fc.weight.detach().clone()))


TENSORS = {
    "wrapped weight": wrapped,
    "sparse weight": lambda n: setattr(n.fc, "weight", nn.Parameter(n.fc.weight.detach().to_sparse_csr())),
    "sparse buffer": lambda n: n.register_buffer("adjacency", torch.eye(3).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("after", [0, CALLS], ids=["from the start", "later"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in TENSORS.items()])
def test_tensors_without_memory_of_their_own(change, after):
    reference = randomize_norms(resnet18(num_classes=5)).eval()
    fused, x = frb.fuse(reference), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(after):
            fused(x)
        for network in (fused, reference):
            change(network)
            network.train().eval()
        for _ in range(4):
            mine, others = fused(x), reference(x)
            assert type(mine) is type(others)
            values = (mine.a, others.a) if isinstance(mine, TwoTensor) else (mine, others)
            torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


class Inner(nn.Module):
    """Asks one attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.doubled = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return 2 * y if self.doubled else y


@pytest.mark.parametrize("black", [0.0, 1.0], ids=["black images first", "not"])
def test_an_attribute_of_a_fused_network_within_another(black, known):
    """Of a black image, by which what was found out again would be judged, the result is the same."""
    front, inner = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU()), Inner().eval()
    inner.conv.bias = None
    randomize_norms(inner)
    inner.bn.running_mean.zero_()
    inner.bn.bias.data.zero_()
    reference = nn.Sequential(*front, inner).eval()
    fused = frb.fuse(nn.Sequential(*front, frb.fuse(inner)).eval())
    x = torch.randn(1, 3, 16, 16)
    close(fused, reference, x)
    close(fused, reference, x)
    assert functions(fused)
    for network in (fused, reference):
        network[2].doubled = True
    close(fused, reference, black * x)
    close(fused, reference, black * x)
    close(fused, reference, x)
    close(fused, reference, x)


def test_traced_after_an_attribute_was_set():
    fused, x = frb.fuse(resnet18(num_classes=5).eval()), torch.randn(1, 3, 32, 32)
    fused.fc = nn.Identity()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fused, x)
        torch.testing.assert_close(traced(x), fused(x), rtol=1e-3, atol=1e-4)


def test_an_input_in_the_layout_of_mkldnn():
    reference = randomize_norms(resnet18(num_classes=5)).eval()
    x = torch.randn(1, 3, 32, 32).to_mkldnn()
    with torch.no_grad():
        torch.testing.assert_close(frb.fuse(reference)(x).to_dense(), reference(x).to_dense())
