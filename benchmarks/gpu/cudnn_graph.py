"""A peer: cuDNN's runtime-fused graph of convolution, bias, residual and ReLU, by the package nvidia-cudnn-frontend.

Where torch reaches cuDNN's older fused calls, the graph API has an engine that compiles a fused kernel for the graph.
Batch norm is folded into the weights, as a user of inference would; a downsample branch is a graph of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resblock.backends.folding import fold
from fused_resblock.params import Bound, Conv

from .operations import Operation, once_each


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("cudnn") is not None


class Graph:
    """`relu(conv(x) + bias + residual)`, without the last two where they are not asked for, built for x's shape."""

    def __init__(self, x: Tensor, conv: Conv, *, residual: bool, relu: bool) -> None:
        import cudnn

        self._cudnn, self._handle = cudnn, cudnn.create_handle()
        weight, bias = fold(conv, x.dtype)
        self._weights = weight, bias.view(1, -1, 1, 1)
        self._shape = conv.output_shape(x)
        kinds = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
        kind, wide = getattr(cudnn.data_type, kinds[x.dtype]), cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=self._handle
        )

        def tensor(like: Tensor) -> Any:
            return graph.tensor(dim=list(like.shape), stride=list(like.stride()), data_type=kind)

        out = self._empty(x)
        self._names = [tensor(t) for t in (x, *self._weights, *([out] if residual else []))]
        image, filters, shift, *rest = self._names
        z = graph.conv_fprop(
            image=image,
            weight=filters,
            padding=list(conv.padding),
            stride=list(conv.stride),
            dilation=list(conv.dilation),
        )
        z = graph.bias(input=z, bias=shift)
        if rest:
            z = graph.add(a=z, b=rest[0])
        if relu:
            z = graph.relu(input=z)
        z.set_output(True).set_data_type(kind).set_dim(list(out.shape)).set_stride(list(out.stride()))
        self._y, self._graph = z, graph
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self._workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)

    def _empty(self, x: Tensor) -> Tensor:
        return torch.empty(self._shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The result, channels_last, on the current stream."""
        y = self._empty(x)
        if x.is_cuda:
            self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = (x, *self._weights, *([] if residual is None else [residual]))
        pack = dict(zip((*self._names, self._y), (*tensors, y), strict=True))
        self._graph.execute(pack, self._workspace, handle=self._handle)
        return y


def bind(op: Operation) -> Bound:
    """The graphs of an operation, built for its shapes."""
    branch = op.epilogue.shortcut
    main = Graph(op.x, op.conv, residual=op.other is not None, relu=op.epilogue.relu)
    if branch is None or op.other is None:
        return main
    second = Graph(op.other, branch, residual=False, relu=False)
    return lambda x, other: main(x, second(other))  # type: ignore[arg-type]


def runner() -> Callable[[Operation], Tensor]:
    """A function of an operation; its graphs are built once for each."""
    return once_each(bind)
