"""Images, weights and vectors of any layout, and what is kept for a weight: `conv_bn_act` reads numbers, not memory."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, FP32, FP64, ConvCase, cast, require
from test_conv_bn_act import check

from fused_resblock.functional import BatchNorm, conv_bn_act

LAYOUTS = {
    "NCHW": lambda t: t.contiguous(),
    "channel slice": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "NCHW channel slice": lambda t: torch.cat([t, t], 1).contiguous()[:, t.shape[1] :],
    "batch slice": lambda t: torch.cat([t, t])[t.shape[0] :],
    "spatial slice": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4), value=1e4)[:, :, 3:-4, 1:-2],
    "every second": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 3)[::2, :, :, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "odd offset": lambda t: torch.cat([t.new_full((1,), 1e4), t.contiguous().flatten()])[1:].view(t.shape),
    "flipped": lambda t: t.flip(3).flip(3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [pytest.param(f, id=name) for name, f in LAYOUTS.items()])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ConvCase(residual=2, slack=1), id="residual"),
        pytest.param(ConvCase(shortcut=2, stride=2), id="shortcut"),
        pytest.param(ConvCase(kernel=(1, 1), padding=0, channels=1, residual=1, out_channels=1), id="1 channel"),
    ],
)
def test_layouts_of_images_and_weights(case, layout, backend):
    require(backend)
    args = case.build(FP32)
    laid_out = dict(args, x=layout(args["x"]), weight=layout(args["weight"]))
    if case.residual:
        laid_out["residual"] = layout(args["residual"])
    if case.shortcut:
        second = args["shortcut"]
        laid_out["shortcut"] = second._replace(x=layout(second.x), weight=layout(second.weight))
    before = cast(laid_out, FP64)
    y = check(laid_out, backend)
    assert torch.equal(y, conv_bn_act(**args, backend=backend)), "the layout changed the result"
    after = cast(laid_out, FP64)
    assert torch.equal(before["x"], after["x"]), "x was written to"
    assert case.residual is None or torch.equal(before["residual"], after["residual"]), "the residual was written to"


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_that_are_columns_of_a_table(backend):
    require(backend)
    args = ConvCase(bias=True, shortcut=1).build(FP32)

    def column(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t + 100, t - 100], 1)[:, 0]

    def columns(norm: BatchNorm) -> BatchNorm:
        return BatchNorm(*map(column, norm[:4]), norm.eps)

    second = args["shortcut"]
    tables = dict(args, bias=column(args["bias"]), norm=columns(args["norm"]))
    tables["shortcut"] = second._replace(bias=column(second.bias), norm=columns(second.norm))
    check(tables, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_in_several_geometries(backend):
    """What a backend keeps for a weight is good for these arguments only."""
    require(backend)
    weight = ConvCase(channels=4, out_channels=8).build(FP32)["weight"]
    for _ in range(2):
        for options in ({}, {"groups": 2, "channels": 8}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 0}):
            for size in ((5, 4), (9, 12)):
                case = ConvCase(**{"channels": 4, "out_channels": 8, "size": size, "norm": None, **options})
                check({**case.build(FP32), "weight": weight}, backend)
