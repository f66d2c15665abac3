"""fp32 weights as TF32 matrix units take them: rounded once, the user's own untouched; and what TF32 is held against."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, FP16, FP32, FP64, make_norm, require
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu import check, stems
from benchmarks.gpu.operations import build, own, precision
from benchmarks.harness import parity
from benchmarks.shapes import ConvShape
from fused_resblock.backends import triton
from fused_resblock.backends.folding import uncached
from fused_resblock.functional import conv_bn_act
from fused_resblock.kernels import stem
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.halo import join_groups
from fused_resblock.kernels.pool import POOL
from fused_resblock.kernels.tf32 import tf32_weight
from fused_resblock.params import Conv
from fused_resblock.tf32_unit import to_tf32

INF, NAN = float("inf"), float("nan")


def cut(t: Tensor) -> Tensor:
    """What a matrix unit makes of fp32."""
    return (t.view(torch.int32) & -0x2000).view(FP32)


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, with TF32 allowed."""
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    with precision("tf32"):
        yield


def filters(dtype: torch.dtype = FP32, groups: int = 1) -> Tensor:
    return torch.randn(32, 32 // groups, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)


# rounding


def test_weights_are_rounded_to_nearest():
    weight = filters()
    exact = weight.double() * (1 + 2**-10 / 3)
    rounded = tf32_weight(weight)
    assert torch.equal(cut(rounded), rounded)
    assert ((rounded.double() - exact).abs() <= 2.0 ** (exact.abs().log2().floor() - 11) * (1 + 1e-3)).all()
    assert rounded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.0, 2.0**-126, INF, -INF, torch.finfo(FP32).max, 3.402e38])
def test_weights_that_are_kept(value):
    weight = torch.tensor([value])
    assert torch.equal(tf32_weight(weight).view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -0x400000])
def test_nan_is_kept(bits):
    assert cut(tf32_weight(torch.tensor([bits], dtype=torch.int32).view(FP32))).isnan().all()


@pytest.mark.parametrize("layers", [1, 3, 12])
def test_the_error_is_that_of_an_ideal_unit_however_many_layers_there_are(layers):
    x = torch.randn(512, 64)
    weights = [torch.randn(64, 64) * (2 / 64) ** 0.5 for _ in range(layers)]

    def through(of_x, of_weight, dtype: torch.dtype) -> Tensor:
        y = x.to(dtype)
        for weight in weights:
            y = (of_x(y) @ of_weight(weight).to(dtype)).relu()
        return y

    exact = through(lambda t: t, lambda t: t, FP64)
    ideal, units, only_cut = (
        (through(*pair, FP32) - exact).square().mean().sqrt()
        for pair in ((to_tf32, to_tf32), (cut, tf32_weight), (cut, cut))
    )
    assert units < 1.25 * ideal
    assert only_cut > 2 * ideal


# where weights are prepared


@pytest.mark.parametrize("groups", [1, 8])
def test_a_weight_is_rounded_once_and_the_users_own_is_untouched(groups, compiled):
    weight = filters(groups=groups)
    before, conv = weight.clone(), Conv(weight, padding=(1, 1), groups=groups)
    joined = triton.joined_groups(32, 32, groups)

    def expected() -> Tensor:
        return tf32_weight(join_groups(weight, groups, joined))

    first = triton.prepare(conv, FP32, joined).weight
    assert triton.prepare(conv, FP32, joined).weight is first
    assert torch.equal(first, expected())
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight.mul_(3)
    assert torch.equal(triton.prepare(conv, FP32, joined).weight, expected())


def test_a_switch_of_the_setting_between_calls_is_seen(compiled):
    conv = Conv(filters(), padding=(1, 1))
    for _ in range(2):
        assert torch.equal(triton.prepare(conv, FP32).weight, tf32_weight(conv.weight))
        with precision("ieee"):
            assert triton.prepare(conv, FP32).weight is conv.weight


@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=str)
def test_other_dtypes_are_as_they_were(dtype, compiled):
    weight = filters(dtype)
    assert triton.prepare(Conv(weight), dtype).weight is weight
    assert torch.equal(triton.prepare(Conv(weight.float()), dtype).weight, weight.float().to(dtype))


def test_where_nothing_multiplies_in_tf32(compiled, monkeypatch):
    cpu = torch.device("cpu")
    assert triton.in_tf32(FP32, cpu)
    monkeypatch.setattr(triton, "gpu_of", lambda device: Gpu(40, 75))
    assert not triton.in_tf32(FP32, cpu)
    monkeypatch.undo()
    assert triton.in_tf32(FP32, cpu) == (not triton.interpreting() and triton.tf32_allowed())


def test_the_stems_filter_is_rounded_before_it_is_packed(compiled, monkeypatch):
    found = []
    monkeypatch.setattr(stem, "bind_stem", lambda x, conv, packed: found.append(packed) or (lambda x: x))
    conv = Conv(torch.randn(16, 3, 7, 7), None, make_norm(16), (2, 2), (3, 3))
    for name in ("tf32", "ieee", "tf32"):
        with precision(name):
            triton.bind_stem(torch.empty(1, 3, 20, 20), conv, True, POOL, False)
    rounded, own_values, again = found
    assert torch.equal(rounded, stem.pack_weight(tf32_weight(conv.weight), True))
    assert torch.equal(own_values, stem.pack_weight(conv.weight, True))
    assert torch.equal(again, rounded)


def test_gradients_are_of_the_users_weight(monkeypatch):
    """y is computed with the rounded weight, what is saved for x's gradient is not."""
    require("triton")
    weight = filters().requires_grad_()
    x, dy = torch.randn(2, 32, 5, 5, requires_grad=True), torch.randn(2, 32, 5, 5)

    def run() -> tuple[Tensor, ...]:
        y = conv_bn_act(x, weight, padding=1, relu=False, backend="triton")
        return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))

    with precision("tf32"):
        monkeypatch.setattr(triton, "in_tf32", lambda dtype, device: False)
        plain = run()
        monkeypatch.setattr(triton, "in_tf32", lambda dtype, device: True)
        rounded = run()
        y = F.conv2d(x.double(), tf32_weight(weight.detach()).double(), padding=1)
    assert not torch.equal(plain[0], rounded[0])
    torch.testing.assert_close(rounded[0].double(), y.detach(), rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, plain[1:], rounded[1:]))


def test_weights_that_are_trained_are_rounded_anew(compiled):
    conv = Conv(filters())
    with uncached():
        first = triton.prepare(conv, FP32).weight
        conv.weight.data.mul_(3)  # which no version records
        assert torch.equal(triton.prepare(conv, FP32).weight, tf32_weight(conv.weight))
    assert torch.equal(first.sign(), conv.weight.sign())


# what a result is held against


def test_to_tf32_is_to_nearest_even():
    one, step = 1.0, 2.0**-10
    values = torch.tensor([one + step / 2, one + 1.5 * step, one + 0.51 * step, -one - 0.49 * step])
    assert to_tf32(values).tolist() == [one, one + 2 * step, one + step, -one]


@pytest.mark.parametrize("shape", [ConvShape("", 16, 32, 6, 3), ConvShape("", 16, 32, 5, shortcut=16)], ids=str)
def test_tf32_is_held_against_rounded_factors(shape):
    oracle = check.Oracle("cpu")
    op, ieee, exact = oracle.of(shape, 2, "ieee")
    _, same, _ = oracle.of(shape, 2, "tf32")
    assert torch.equal(ieee, op.plain())
    assert (ieee - exact).abs().max() < 1e-5 < 1e-4 < (same - exact).abs().max() < 1e-2
    branch = op.epilogue.shortcut
    other = None if branch is None else to_tf32(op.other)
    epilogue = op.epilogue._replace(shortcut=branch and branch._replace(weight=to_tf32(branch.weight)))
    rounded = type(op)(to_tf32(op.x), op.conv._replace(weight=to_tf32(op.conv.weight)), other, epilogue)
    assert torch.equal(same, rounded.plain())
    assert parity(same, same, exact)[0] is None


def test_other_dtypes_are_held_against_torch_itself():
    op = build(ConvShape("", 16, 32, 6, 3), 2, FP32, "cpu")
    for name in ("fp16", "bf16", "ieee"):
        assert torch.equal(own(name, op.plain), op.plain())


def test_a_stem_is_held_against_rounded_factors():
    op = stems.operation(20, 2, FP32, "cpu")
    (ieee, exact), (same, _) = (stems.results(op, name) for name in ("ieee", "tf32"))
    assert (same - exact).abs().max() > 50 * (ieee - exact).abs().max()
