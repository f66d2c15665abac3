"""What the chip itself can do: how fast it copies, in device memory and in L2, and how fast it multiplies."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from .context import Context
from .records import read_json, write_json

COPY_BYTES, L2_BYTES, MATRIX = 1 << 30, 8 << 20, 8192
QUICK_COPY_BYTES, QUICK_L2_BYTES, QUICK_MATRIX = 1 << 16, 1 << 12, 64
L2_COPIES = 50  # in a row, so that their launches overlap


def _copy(size: int, device: str) -> Callable[[], torch.Tensor]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(n: int, device: str) -> Callable[[], torch.Tensor]:
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return lambda: a @ b


def measure(context: Context) -> dict[str, Any]:
    """Device copy in bytes read plus bytes written a second, and a square bf16 matrix product in operations a second.

    Medians. One copy is far larger than any L2 cache; of the other, source and target stay in L2.
    """
    device = context.device
    sizes = (QUICK_COPY_BYTES, QUICK_L2_BYTES, QUICK_MATRIX) if context.quick else (COPY_BYTES, L2_BYTES, MATRIX)
    size, small, n = sizes
    copy_ns = median(device.times([_copy(size, device.torch_name)], context.rounds(20)))
    l2_ns = median(device.times([_copy(small, device.torch_name)] * L2_COPIES, context.rounds(20)))
    device.free()
    product_ns = median(device.times([_product(n, device.torch_name)], context.rounds(20)))
    return {
        "copy_tb_per_s": 2 * size / copy_ns / 1e3,
        "l2_copy_tb_per_s": 2 * small / l2_ns / 1e3,
        "bf16_matrix_tflops": 2 * n**3 / product_ns / 1e3,
        "copy_bytes": size,
        "l2_copy_bytes": small,
        "multiprocessors": device.gpu.multiprocessors,
        "matrix_size": n,
    }


def line(told: dict[str, Any]) -> str:
    """The measured rates in words."""
    copies = f"copy {told['copy_tb_per_s']:.3g} TB/s, in L2 {told['l2_copy_tb_per_s']:.3g} TB/s"
    return f"{copies}, bf16 product {told['bf16_matrix_tflops']:.4g} TFLOP/s"


def run(context: Context) -> int:
    """Measure the ceilings unless this machine's are known."""
    path = context.folder / "ceilings.json"
    known = read_json(path)
    if "l2_copy_tb_per_s" in known and all(known.get(name) == value for name, value in context.marks.items()):
        context.log("ceilings: already measured")
        return 0
    told = measure(context)
    write_json(path, {**context.stamp, **context.marks, **told})
    context.log(f"ceilings: {line(told)}")
    return 0
