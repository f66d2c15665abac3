"""`capture` within `torch.inference_mode()`, whose tensors nobody may write into elsewhere; on a stand-in for graphs."""

from __future__ import annotations

import torch
from test_graphs import X, close, made, recorded

import fused_resblock as frb

__all__ = ["recorded"]


def test_what_is_captured_there_is_called_anywhere(recorded):
    model = made()
    with torch.inference_mode():
        captured = frb.capture(model, X.clone())
    close(captured(X), model(X))
    with torch.no_grad():
        close(captured(2 * X), model(2 * X))
    assert len(recorded) == 1


def test_what_is_captured_again_there_is_called_anywhere(recorded):
    model = made()
    captured = frb.capture(model, X)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with torch.inference_mode():
        close(captured(X), model(X))
    close(captured(2 * X), model(2 * X))
    assert len(recorded) == 2
