"""The peer onnxruntime, on the CPU: a block and a network give what torch gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.gpu import networks, onnx_session
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock

needs = pytest.mark.skipif(not onnx_session.available(), reason="onnxruntime is not installed")


@needs
def test_block():
    block = randomize_norms(BasicBlock(8, 8)).eval()
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    session = onnx_session.Session(block, x)
    with torch.no_grad():
        for image in (x, x * 2):
            torch.testing.assert_close(session(image), block(image), rtol=1e-4, atol=1e-4)


def test_provider_only_where_it_is_installed(monkeypatch):
    case = networks.Case("resnet18", 2, group="engines")
    model, x = nn.Identity(), torch.ones(1)
    monkeypatch.setattr(onnx_session, "available", lambda: True)
    names = networks.providers(case, model, x, None)
    assert "onnxruntime" in names
    assert "onnxruntime+graph" not in names
    monkeypatch.setattr(onnx_session, "available", lambda: False)
    assert "onnxruntime" not in networks.providers(case, model, x, None)
