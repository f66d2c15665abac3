"""The epilogue's gradient, `dz = dy * (y > 0)` and its channel sums, against torch."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, BF16, DTYPES, FP32, FP64, image, require

from fused_resblock.backends import relu_backward

SIZES = [
    pytest.param((2, 12, 7, 5), id="small"),
    pytest.param((1, 1, 1, 1), id="one number"),
    pytest.param((3, 70, 3, 3), id="channels over a tile"),
    pytest.param((2, 64, 12, 11), id="pixels over a tile"),
    pytest.param((1, 3, 40, 37), id="3 channels"),
    pytest.param((5, 8, 1, 1), id="1x1 images"),
]


def expected(dy: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`dz` as torch's ReLU gives it, and its exact sum."""
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    return dz, dz.to(FP64).sum((0, 2, 3))


def check(dy: torch.Tensor, y: torch.Tensor | None, backend: str) -> None:
    """dz to the bit; the sum within rounding of the accumulator type."""
    dz, total = relu_backward(dy, y, backend=backend)
    exact_dz, exact_total = expected(dy, y)
    assert dz.dtype == dy.dtype
    assert torch.equal(dz, exact_dz)
    wide = torch.promote_types(dy.dtype, FP32)
    assert total.dtype == wide
    assert total.shape == (dy.shape[1],)
    bound = 8 * torch.finfo(wide).eps * dz.to(FP64).abs().sum((0, 2, 3))
    assert ((total.to(FP64) - exact_total).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_relu(size, dtype, backend):
    require(backend, dtype)
    check(image(*size, dtype=dtype), image(*size, dtype=dtype).relu(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_relu(dtype, backend):
    require(backend, dtype)
    check(image(2, 12, 7, 5, dtype=dtype), None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda t: t.contiguous(), id="NCHW"),
        pytest.param(lambda t: torch.cat([t, t], 1)[:, t.shape[1] :], id="channel slice"),
        pytest.param(lambda t: t[:1, :, :1, :1].expand(t.shape), id="expanded"),
        pytest.param(lambda t: t.repeat_interleave(2, 3)[..., ::2], id="every second"),
    ],
)
def test_layouts(layout, backend):
    require(backend)
    dy, y = image(2, 12, 7, 5), image(2, 12, 7, 5).relu()
    check(layout(dy), layout(y), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_output_passes_nothing_and_nan_passes_all(backend):
    require(backend)
    y = torch.tensor([0.0, -0.0, 1e-38, 2.0, float("nan"), float("inf")])
    y = y.to(image(1, 1, 1, 1).device).view(1, 6, 1, 1)
    dz, _ = relu_backward(torch.full_like(y, 3.0), y, backend=backend)
    assert dz.flatten().tolist() == [0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [pytest.param(float(v), id=v) for v in ("nan", "inf", "-inf")])
def test_special_gradients_reach_dz_and_the_sum(value, backend):
    require(backend)
    dy, y = image(2, 12, 7, 5), image(2, 12, 7, 5).relu()
    y[1, 3, 2, 2], y[1, 4, 2, 2] = 1.0, 0.0
    dy[1, 3:5, 2, 2] = value
    dz, total = relu_backward(dy, y, backend=backend)
    exact_dz, _ = expected(dy, y)
    torch.testing.assert_close(dz, exact_dz, equal_nan=True, rtol=0, atol=0)
    assert dz[1, 4, 2, 2] == 0, "a masked gradient must not leak"
    torch.testing.assert_close(total[3], torch.full_like(total[3], value), equal_nan=True)
    assert total[4].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    dz, total = relu_backward(image(0, 5, 3, 3, dtype=BF16), image(0, 5, 3, 3, dtype=BF16), backend=backend)
    assert dz.shape == (0, 5, 3, 3)
    assert total.tolist() == [0.0] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend):
    require(backend)
    dy, y = image(3, 70, 9, 9), image(3, 70, 9, 9).relu()
    first, second = relu_backward(dy, y, backend=backend), relu_backward(dy, y, backend=backend)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
