"""The peer cudnn-frontend on a stand-in for its module, which computes with torch what the graph says."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import cudnn_graph, tune
from benchmarks.gpu.operations import build
from benchmarks.shapes import ConvShape


class Value:
    """A tensor of the graph: given, or computed from others."""

    def __init__(self, compute=None, **given):
        self.compute, self.given = compute, given

    def set_output(self, _):
        return self

    set_data_type = set_dim = set_stride = set_output


class Graph:
    def __init__(self, **types):
        self.types = types

    def tensor(self, **given):
        return Value(**given)

    def conv_fprop(self, image, weight, padding, stride, dilation):
        return Value(lambda of: F.conv2d(of(image), of(weight), None, stride, padding, dilation))

    def bias(self, input, bias):
        return Value(lambda of: of(input) + of(bias))

    def add(self, a, b):
        return Value(lambda of: of(a) + of(b))

    def relu(self, input):
        return Value(lambda of: of(input).relu())

    def build(self, modes):
        pass

    def get_workspace_size(self):
        return 0

    def execute(self, pack, workspace, handle):
        def of(value):
            if value.compute is not None:
                return value.compute(of)
            given = pack[value]
            assert list(given.shape) == value.given["dim"]
            assert list(given.stride()) == value.given["stride"]
            return given

        for value, tensor in pack.items():
            if value.compute is not None:
                tensor.copy_(of(value))


@pytest.fixture
def cudnn(monkeypatch):
    types = SimpleNamespace(HALF="half", BFLOAT16="bfloat16", FLOAT="float")
    module = SimpleNamespace(
        data_type=types, heur_mode=SimpleNamespace(A=0, FALLBACK=1), pygraph=Graph, create_handle=lambda: 1, __spec__=1
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)


SHAPES = {
    "plain": ConvShape("plain", 8, 16, 6, 3, 2),
    "residual": ConvShape("residual", 8, 16, 5, residual=True),
    "shortcut": ConvShape("shortcut", 8, 16, 4, shortcut=4, shortcut_stride=2),
}


@pytest.mark.parametrize("shape", [pytest.param(s, id=name) for name, s in SHAPES.items()])
def test_graph_is_the_operation(cudnn, shape):
    run = cudnn_graph.runner()
    for seed in (0, 1):
        op = build(shape, 2, torch.float32, "cpu", seed)
        for _ in range(2):
            torch.testing.assert_close(run(op), op.plain(), rtol=1e-4, atol=1e-4)
        assert run(op).is_contiguous(memory_format=torch.channels_last)


def test_peer_only_where_it_is_installed(cudnn, monkeypatch):
    assert "cudnn-frontend" in tune.peers()
    monkeypatch.setattr(cudnn_graph, "available", lambda: False)
    assert "cudnn-frontend" not in tune.peers()
