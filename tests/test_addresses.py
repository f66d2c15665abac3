"""Addresses beyond 2**31 elements: the last program of a launch on tensors that are too large to exist here.

The kernels run in Triton's interpreter with two changes: every program is the last one, and loads and stores note
their addresses instead of touching memory. A tensor is one number seen as gigabytes, in the middle of reserved address
space of its own; an offset that was multiplied in 32 bits points outside of it.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch
from cases import FP16
from torch import Tensor

from fused_resblock.params import PLAIN, BatchNorm, Conv, Epilogue

pytest.importorskip("triton")
from triton.runtime import interpreter

from fused_resblock.kernels.bn_act import bn_act
from fused_resblock.kernels.conv_bn_act import bind_conv_bn_act
from fused_resblock.kernels.expand_shift import bind_expand_shift
from fused_resblock.kernels.launch import interpreted
from fused_resblock.kernels.relu_backward import relu_backward
from fused_resblock.kernels.tiles import StageTile, Tile

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="reads addresses out of Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

SPACE = 2**37  # bytes of address space a tensor; the tensor begins in the middle
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
TILE = Tile(64, 16, 2048, num_warps=4, num_stages=1)
MANY, WIDE = (1057, 993), 2049  # rows and columns, channels: 2**31 elements are passed in the last of them


class Huge:
    """Makes tensors that hold one number, and keeps the offsets at which each was read or written."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[str, list[int]] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = FP16) -> Tensor:
        space = mmap.mmap(-1, SPACE, flags=RESERVED)
        number = torch.frombuffer(space, dtype=dtype, count=1, offset=SPACE // 2)
        self.tensors[name] = number.expand(*shape)
        self.seen[name] = []
        return self.tensors[name]

    def note(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        """Book one load or store to the tensor in whose space it lies, if any."""
        addresses = np.broadcast_to(addresses, mask.shape)[mask].astype(np.int64)
        for name, tensor in self.tensors.items():
            offsets = addresses - tensor.data_ptr()
            if len(offsets) and np.abs(offsets).max() < SPACE // 2:
                self.seen[name] += [int(offsets.min()), int(offsets.max())]

    def check(self, *large: str) -> None:
        """Every access lay inside of its tensor, and in the large ones it came to the last element."""
        for name, offsets in self.seen.items():
            count, item = self.tensors[name].numel(), self.tensors[name].element_size()
            assert offsets, f"{name} was not accessed, or far outside"
            assert min(offsets) >= 0, f"{name}: an address before its beginning"
            assert max(offsets) < count * item, f"{name}: an address behind its end"
            if name in large:
                assert count > 2**31
                assert max(offsets) == (count - 1) * item, f"{name}: its last element is not reached"


@pytest.fixture
def huge(monkeypatch):
    """The maker of tensors, with the interpreter changed as the module says and results made by it, too."""
    huge, last = Huge(), [0, 0, 0]
    run, handle, number = interpreter.GridExecutor.__call__, interpreter.TensorHandle, interpreter._get_np_dtype

    def run_last(self: Any, *args: Any, **kwargs: Any) -> None:
        last[: len(self.grid)] = [size - 1 for size in self.grid]
        self.grid = (1,)
        run(self, *args, **kwargs)

    def load(self: Any, ptrs: Any, mask: Any, *_: Any) -> Any:
        huge.note(ptrs.data, mask.data)
        kind = ptrs.get_element_ty()
        return handle(np.zeros(ptrs.data.shape, number(kind)), kind)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
        huge.note(ptrs.data, mask.data)

    def program_id(self: Any, axis: int) -> Any:
        return handle(np.array([last[axis]], np.int32), interpreter.tl.int32)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last)
    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(builder, "create_get_program_id", program_id)

    def empty(shape: Any, *, dtype: torch.dtype, **_: Any) -> Tensor:
        name = "partial" if dtype == torch.float32 else f"out{len(shape)}"
        return huge(name + "b" * (name in huge.tensors), *shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: huge("out4", *like.shape, dtype=like.dtype))
    return huge


def norm(channels: int) -> BatchNorm:
    return BatchNorm(*(torch.zeros(1).expand(channels) for _ in range(4)))


def conv_bn_act(x: Tensor, conv: Conv, other: Tensor | None = None, epilogue: Epilogue = PLAIN) -> None:
    """Launch the kernel once with a tile that goes through all channels in two steps."""
    bind_conv_bn_act(x, conv, other, epilogue, TILE)(x, other)


def test_pointwise_input_and_output(huge):
    conv = Conv(huge("weight", WIDE, WIDE, 1, 1), None, norm(WIDE))
    conv_bn_act(huge("x", 1, WIDE, *MANY), conv)
    huge.check("x", "out4")


def test_strided_pointwise_input(huge):
    conv_bn_act(huge("x", 3, WIDE, *MANY), Conv(huge("weight", 8, WIDE, 1, 1), stride=(2, 2)))
    huge.check("x")


def test_input_of_a_3x3(huge):
    conv = Conv(huge("weight", 8, WIDE, 3, 3), padding=(1, 1))
    conv_bn_act(huge("x", 3, WIDE, *MANY), conv)
    huge.check("x")


def test_grouped_input_and_output(huge):
    conv = Conv(huge("weight", 2 * WIDE, WIDE, 3, 3), padding=(1, 1), groups=2)
    conv_bn_act(huge("x", 1, 2 * WIDE, *MANY), conv)
    huge.check("x", "out4")


def test_weight(huge):
    conv_bn_act(huge("x", 1, 65537, 3, 3), Conv(huge("weight", 32769, 65537, 1, 1)))
    huge.check("weight")


@pytest.mark.parametrize("stride", [1, 2])
def test_residual(stride, huge):
    h, w = ((size - 1) // stride + 1 for size in MANY)
    residual = huge("residual", 3, WIDE, *MANY)
    conv = Conv(huge("weight", WIDE, 8, 1, 1))
    conv_bn_act(huge("x", 3, 8, h, w), conv, residual, Epilogue(stride))
    huge.check("residual")


@pytest.mark.parametrize("stride", [1, 2])
def test_input_of_the_second_convolution(stride, huge):
    h, w = ((size - 1) // stride + 1 for size in MANY)
    second = Conv(huge("weight2", 8, WIDE, 1, 1), None, norm(8), (stride, stride))
    conv = Conv(huge("weight", 8, 8, 1, 1))
    conv_bn_act(huge("x", 3, 8, h, w), conv, huge("x2", 3, WIDE, *MANY), Epilogue(shortcut=second))
    huge.check("x2")


def test_weight_of_the_second_convolution(huge):
    epilogue = Epilogue(shortcut=Conv(huge("weight2", 32769, 65537, 1, 1)))
    conv = Conv(huge("weight", 32769, 8, 1, 1))
    conv_bn_act(huge("x", 1, 8, 3, 3), conv, huge("x2", 1, 65537, 3, 3), epilogue)
    huge.check("weight2")


def test_partial_sums(huge):
    """Split-K writes as many tensors as programs share a tile: together they are larger than each."""
    x = huge("x", 1, 768, *MANY)
    tile = Tile(64, 16, 128, 4, 1, split_k=3)  # a 32-bit offset of the third lies in front of the tensor
    bind_conv_bn_act(x, Conv(huge("weight", 1024, 768, 1, 1), None, norm(1024)), None, PLAIN, tile)(x, None)
    huge.check("partial")


def test_stage(huge):
    """Input, residual, output and the next block's input of the stage kernel."""
    tile = StageTile(64, 16, 16, 4, 1, 1)
    h, residual = huge("h", 129, 16, *MANY), huge("residual", 129, 40, *MANY)
    layers = Conv(huge("w", 16, 16, 3, 3), padding=(1, 1)), Conv(huge("w3", 40, 16, 1, 1))
    reduce = Conv(huge("w1", 16, 40, 1, 1))
    bind_expand_shift(h, *layers, residual, None, reduce, tile)(h, residual)
    huge.check("h", "residual", "out4", "out4b")


@pytest.mark.parametrize("stride", [1, 2])
def test_bn_act(stride, huge):
    h, w = ((size - 1) // stride + 1 for size in MANY)
    residual = huge("residual", 5, WIDE, *MANY)
    bn_act(huge("x", 5, WIDE, h, w), norm(WIDE), residual, Epilogue(stride))
    huge.check("x", "residual", "out4")


def test_relu_backward(huge):
    relu_backward(huge("dy", 1, WIDE, *MANY), huge("y", 1, WIDE, *MANY))
    huge.check("dy", "y", "out4")
