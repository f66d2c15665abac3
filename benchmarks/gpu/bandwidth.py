"""What share of the measured bandwidth our convolutions reach where device memory binds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .records import Row

#: at which inputs and outputs do not stay in L2
BATCH = 128
#: of 16 bits, for which the matrix units' rate was measured
DTYPES = ("fp16", "bf16")


def shares(rows: Sequence[Row], rates: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Of each convolution at `BATCH` that its bytes bind, and not its products: its bandwidth over a copy's.

    Args:
        rows: of `tune.csv`; of a convolution the Triton kernel's fastest tile counts.
        rates: GPU -> what `ceilings.json` holds.
    """
    fastest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        ours = row["backend"] == "triton" and row["status"] == "ok" and row["tb_per_s"]
        if ours and row["batch"] == str(BATCH) and row["dtype"] in DTYPES and row["gpu"] in rates:
            key = row["gpu"], row["dtype"], row["case"]
            if key not in fastest or float(row["median_us"]) < float(fastest[key]["median_us"]):
                fastest[key] = row
    found = []
    for (gpu, *_), row in fastest.items():
        moved = float(row["tb_per_s"]) / rates[gpu]["copy_tb_per_s"]
        if moved >= float(row["tflops"]) / rates[gpu]["bf16_matrix_tflops"]:
            found.append(moved)
    return found
