"""The stem on Hopper, run compiled and without a GPU: filters, images and rows of a program of several sizes."""

from __future__ import annotations

import pytest
import torch
from cases import FP16, FP32
from compiling import run
from test_stem_kernel import build

pytest.importorskip("triton")

from fused_resblock.kernels import stem
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.stem import bind_stem, pack_weight
from fused_resblock.kernels.tiles import StemTile

COMPILED = """
import sys

sys.path.insert(0, "tests")
from test_stem_kernel import build, plain

import torch

from benchmarks.emulate import judged
from fused_resblock.backends import triton as backend
from fused_resblock.kernels import stem_hopper
from fused_resblock.kernels.stem import bind_stem

choose_rows = stem_hopper.choose_rows
for rows, *case in (
    (0, 3, 64, 7, 3, (21, 60)),
    (3, 4, 64, 7, 2, (16, 33)),
    (0, 2, 128, 7, 3, (30, 31)),
    (5, 3, 64, 7, 0, (17, 15)),
    (2, 3, 64, 7, 3, (37, 120)),
    (0, 1, 64, 7, 3, (1, 1)),
):
    if rows:
        stem_hopper.choose_rows = lambda *sizes: rows
    x, conv = build(*case, torch.float16)
    wide = lambda v: v.double() if isinstance(v, torch.Tensor) else v
    norm = type(conv.norm)(*map(wide, conv.norm))
    exact = plain(x.double(), conv._replace(weight=wide(conv.weight), bias=wide(conv.bias), norm=norm))
    launch = bind_stem(x, backend.prepare(conv, torch.float16), backend.packed_stem(x, conv))
    row = judged(90, lambda: launch(x), exact.half(), exact)
    assert row["status"] == "ok", (rows, case, row)
    stem_hopper.choose_rows = choose_rows
"""


def test_compiled_kernel_is_right():
    result = run(COMPILED)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("k", "size", "dtype", "capability", "tile", "expected"),
    [
        (64, 7, FP16, 90, None, True),
        (128, 7, FP16, 90, None, True),
        (64, 7, FP32, 90, None, False),
        (32, 7, FP16, 90, None, False),
        (64, 5, FP16, 90, None, False),
        (64, 7, FP16, 80, None, False),
        (64, 7, FP16, 90, StemTile(), False),
    ],
)
def test_what_it_takes(k, size, dtype, capability, tile, expected, monkeypatch):
    from fused_resblock.kernels import stem_hopper

    asked = []
    monkeypatch.setattr(stem, "gpu_of", lambda device: Gpu(capability=capability))
    monkeypatch.setattr(stem, "interpreted", lambda: False)
    monkeypatch.setattr(stem_hopper, "launch_of", lambda *arguments: asked.append(True))
    monkeypatch.setattr(stem, "_launch_of", lambda *arguments: asked.append(False))
    x, conv = build(3, k, size, size // 2, (32, 32), dtype)
    bind_stem(x, conv, pack_weight(conv.weight, bool(conv.padding[1] % 2)), tile)
    assert asked == [expected]


@pytest.mark.parametrize(("programs", "rows"), [(2, 1), (2 * 128, 56), (2 * 32, 56), (1, 200)])
def test_programs_fill_the_chip(programs, rows):
    """Nine tenths of what it holds at once at least, where there are rows enough; never more rows than there are."""
    from fused_resblock.kernels.stem_hopper import choose_rows

    chosen = choose_rows(programs, rows, 132)
    count = programs * -(-rows // chosen)
    assert chosen <= rows
    assert count >= 0.9 * min(2 * 132, programs * rows)


def test_taps_in_the_order_of_the_matrix_units():
    from fused_resblock.kernels.stem_hopper import matrix_order

    taps = torch.arange(32).reshape(1, 1, 32)
    order = matrix_order(taps).flatten().tolist()
    assert sorted(order) == list(range(32))
    for thread in range(4):  # of a step, the numbers 2t, 2t + 1, 2t + 8 and 2t + 9 are a thread's
        own = [order[16 * step + 8 * half + 2 * thread + i] for step in range(2) for half in range(2) for i in range(2)]
        assert own == list(range(8 * thread, 8 * thread + 8))
