"""What share of the measured bandwidth our convolutions reach where device memory binds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fused_resblock.kernels.cost import conv_bn_act_cost

from ..floors import ANY, gemm_of, second_of
from .records import Row
from .space import distinct_shapes, key_of

BATCH = 128
#: of 16 bits, for which the matrix units' rate was measured
DTYPES = ("fp16", "bf16")


def shares(rows: Sequence[Row], rates: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Of each convolution at `BATCH` that its bytes bind, and not its products: its bandwidth over a copy's.

    Each tensor counts once, of an image that a strided 1x1 reads the pixels that it keeps.

    Args:
        rows: of `tune.csv`; of a convolution the Triton kernel's fastest tile counts.
        rates: GPU -> what `ceilings.json` holds.
    """
    shapes = {key_of(shape): shape for shape in distinct_shapes()}
    us: dict[tuple[str, ...], float] = {}
    for row in rows:
        ours = row["backend"] == "triton" and row["status"] == "ok" and row["case"] in shapes and row["gpu"] in rates
        if ours and row["batch"] == str(BATCH) and row["dtype"] in DTYPES:
            key = row["gpu"], row["dtype"], row["case"]
            us[key] = min(float(row["median_us"]), us.get(key, float("inf")))
    found = []
    for (gpu, _, case), taken in us.items():
        shape = shapes[case]
        second = second_of(shape, BATCH)
        cost = conv_bn_act_cost(gemm_of(shape, BATCH), 2, ANY, residual=shape.residual, second=second)
        moved = cost.dram / taken / 1e6 / rates[gpu]["copy_tb_per_s"]
        if moved >= cost.flops / taken / 1e6 / rates[gpu]["bf16_matrix_tflops"]:
            found.append(moved)
    return found
