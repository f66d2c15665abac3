"""A peer: a network exported to ONNX and run by onnxruntime, on torch's own memory and stream.

onnxruntime takes NCHW memory: the input is copied to it in each call, as the other providers take channels_last.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("onnxruntime", "onnx", "onnxscript")


def available() -> bool:
    """Whether onnxruntime and what the export needs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


class Session:
    """A model for inputs of one shape.

    Raises:
        RuntimeError: if onnxruntime would run it somewhere else than on x's device.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        import onnxruntime

        self._x = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(x)
            program = torch.onnx.export(model, (self._x,), dynamo=True, verbose=False)
            assert program is not None
        options: dict[str, Any] = {}
        provider = "CPUExecutionProvider"
        if x.is_cuda:
            provider = "CUDAExecutionProvider"
            options = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream), "prefer_nhwc": "1"}
        self._session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=[(provider, options)]
        )
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"onnxruntime must offer {provider}, got {self._session.get_providers()}")
        self._y = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        self._binding = self._session.io_binding()
        places = ((self._session.get_inputs()[0].name, self._x), (self._session.get_outputs()[0].name, self._y))
        for bind, (name, t) in zip((self._binding.bind_input, self._binding.bind_output), places, strict=True):
            kind = {torch.float16: 10, torch.float32: 1, torch.bfloat16: 16}[t.dtype]  # of onnx.TensorProto
            bind(name, t.device.type, t.device.index or 0, kind, tuple(t.shape), t.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        """The output, which the next call overwrites."""
        self._x.copy_(x)
        self._session.run_with_iobinding(self._binding)
        return self._y
