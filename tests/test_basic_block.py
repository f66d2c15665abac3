"""The designs for a BasicBlock that were weighed: their costs by hand, and the error of Winograd's F(2x2, 3x3)."""

from __future__ import annotations

import csv
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FP16, FP64
from parity import assert_parity
from torch import Tensor

from benchmarks.basic_block import HEADERS, main, one_kernel_seconds, read_measured, rows, winograd_seconds
from benchmarks.gpu_tables import basic_block
from benchmarks.shapes import ConvShape
from fused_resblock.kernels.cost import LATENCY, LAUNCH, Ceilings

INPUT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=FP64)
FILTER = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=FP64)
OUTPUT = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float32)


def both_sides(matrix: Tensor, t: Tensor) -> Tensor:
    return matrix @ t @ matrix.T


def winograd(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 with padding 1: operands of the products in x's dtype, everything else at least in fp32."""
    tiles = F.pad(x.double(), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
    image = both_sides(INPUT, tiles).to(x.dtype)
    filters = both_sides(FILTER, weight.double()).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.einsum("kcij,nchwij->nkhwij", filters.to(wide), image.to(wide))
    y = both_sides(OUTPUT.to(wide), sums)
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.to(torch.promote_types(x.dtype, torch.float32)), weight.to(x.dtype).float(), padding=1)


def fused(convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, layers: list[tuple[Tensor, ...]]) -> Tensor:
    """A BasicBlock whose convolutions, norms, add and ReLU are rounded once each."""
    h = x
    for number, (weight, scale, shift) in enumerate(layers):
        z = convolve(h, weight)
        z = z * scale.to(z.dtype)[:, None, None] + shift.to(z.dtype)[:, None, None]
        h = torch.relu(z + x if number else z).to(x.dtype)
    return h


def eager(x: Tensor, layers: list[tuple[Tensor, ...]]) -> Tensor:
    """The same, rounded after every operation."""
    h = x
    for number, (weight, scale, shift) in enumerate(layers):
        z = direct(h, weight).to(x.dtype)
        z = (z.float() * scale.float()[:, None, None] + shift.float()[:, None, None]).to(x.dtype)
        h = torch.relu(z + x if number else z)
    return h


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["float16", "bfloat16"])
def test_error_of_winograd_is_within_the_parity_rule(dtype, channels):
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = torch.relu(normal(2, channels, 16, 16)).to(dtype)
    layers = [
        tuple(
            t.to(dtype)
            for t in (
                normal(channels, channels, 3, 3) * (2 / (9 * channels)) ** 0.5,
                normal(channels).abs(),
                normal(channels),
            )
        )
        for _ in range(2)
    ]
    wide = [tuple(t.double() for t in layer) for layer in layers]
    for depth, what in ((1, "convolution, norm and ReLU"), (2, "block")):
        exact = fused(lambda h, w: F.conv2d(h, w, padding=1), x.double(), wide[:depth])
        assert_parity(fused(winograd, x, layers[:depth]), eager(x, layers[:depth]), exact, what=what)


def test_winograd_is_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 4, 6, 8, generator=generator).double(), torch.randn(5, 4, 3, 3, generator=generator)
    torch.testing.assert_close(winograd(x, weight.double()), F.conv2d(x, weight.double(), padding=1))


CHIP = Ceilings("chip", 1e15, 1e15, 4096e9, 1, shared=1 << 20)  # a multiprocessor of 1 GHz; memory is free


def test_one_kernel_by_hand():
    """One image of 4x4: a box of 4x4, 6x6 pixels between, so one and one blocks of 64 rows."""
    first = ConvShape("first", 64, 64, 4, 3)
    second = ConvShape("second", 64, 64, 4, 3, residual=True)
    flops = 2 * 2 * 64 * 64 * 64 * 9
    products = flops / CHIP.matrix
    expected = (products**4 + (products + 3 * LATENCY) ** 4) ** (1 / 4) + LAUNCH
    assert one_kernel_seconds((first, second), 1, 2, CHIP) == pytest.approx(expected, rel=1e-3)


def test_winograd_by_hand():
    """16x16 pixels are 64 outputs of 2x2: one program, 64 channels in two passes; shared memory moves 128 bytes a ns."""
    shape = ConvShape("conv", 64, 64, 16, 3)
    moved = 2 * 16 * 64 * 64 * 3 + 2 * 2 * 16 * 64 * 64
    assert winograd_seconds(shape, 1, 2, CHIP) == pytest.approx(moved / 128 * 1e-9 + LAUNCH, rel=1e-3)


def test_what_was_measured_is_the_sum_of_the_fastest(tmp_path):
    file = tmp_path / "tune.csv"
    lines = [
        "dtype,case,batch,backend,status,median_us",
        "fp16,64-64.3x3.s1.g1.plain.56px,128,triton,ok,60",
        "fp16,64-64.3x3.s1.g1.plain.56px,128,cudnn,ok,50",
        "fp16,64-64.3x3.s1.g1.plain.56px,32,cudnn,ok,10",
        "fp16,64-64.3x3.s1.g1.plain.56px,128,cudnn+bn_act,ok,40",
        "fp16,64-64.3x3.s1.g1.residual.56px,128,triton,ok,70",
        "fp16,64-64.3x3.s1.g1.residual.56px,128,cudnn,wrong,5",
    ]
    file.write_text("\n".join(lines))
    found = rows(128, CHIP, read_measured(file, 128))
    assert [line[-1] for line in found[:2]] == ["120.0", "not measured"]
    assert read_measured(tmp_path / "none.csv", 128) == {}


def test_command_writes_what_the_readme_shows(tmp_path, capsys):
    out = tmp_path / "b.csv"
    assert main(["--out", str(out)]) == 0
    assert "winograd_bound_us" in capsys.readouterr().out
    with out.open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == HEADERS
    assert [row["block"] for row in written][:3] == ["l1", "l2.first", "l2"]
    assert len(basic_block(written).splitlines()) == 4 + len(written)
    with pytest.raises(SystemExit):
        main(["--batch", "0"])
