"""The suite's own guards are seen to fail: the parity rule, and the poisoned memory."""

from __future__ import annotations

import pytest
import torch
from parity import assert_parity


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


def test_same_error_passes(exact):
    assert_parity(exact.float(), exact.float(), exact, what="y")
    assert_parity(exact.bfloat16(), exact.bfloat16(), exact, what="y")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda y: y + 1e-4, id="offset"),
        pytest.param(lambda y: y * 1.001, id="scale"),
        pytest.param(lambda y: y.bfloat16().float(), id="lower precision"),
        pytest.param(lambda y: y.where(y != y.max(), torch.nan), id="one NaN"),
        pytest.param(lambda y: y.where(y != y.max(), torch.inf), id="one inf"),
        pytest.param(lambda y: y.roll(1), id="moved"),
        pytest.param(lambda y: y[:3], id="shape"),
        pytest.param(lambda y: y.double(), id="dtype"),
    ],
)
def test_wrong_result_fails(spoil, exact):
    with pytest.raises(AssertionError, match="^y: "):
        assert_parity(spoil(exact.float()), exact.float(), exact, what="y")


def test_oracle_that_is_not_finite_fails(exact):
    exact[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="oracle"):
        assert_parity(exact.float(), exact.float(), exact, what="y")


def test_empty_results_pass():
    empty = torch.empty(0, 3)
    assert_parity(empty, empty, empty.double(), what="y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unwritten_memory_is_nan(dtype):
    assert torch.empty(3, 4, 5, 6, dtype=dtype, memory_format=torch.channels_last).isnan().all()
    assert torch.empty_like(torch.zeros(3, 3, dtype=dtype)).isnan().all()
