"""The shapes and options of a fused convolution that every kernel and backend is tested with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from cases import ConvCase

GEOMETRIES = {
    "1x1": ConvCase(kernel=(1, 1), padding=0),
    "1x1 stride 2": ConvCase(kernel=(1, 1), padding=0, stride=2),
    "1x1 stride 2 even size": ConvCase(kernel=(1, 1), padding=0, stride=2, size=(8, 6)),
    "1x1 stride 3": ConvCase(kernel=(1, 1), padding=0, stride=3),
    "1x1 stride 2x1": ConvCase(kernel=(1, 1), padding=0, stride=(2, 1)),
    "1x1 padding 1": ConvCase(kernel=(1, 1), padding=1),
    "1x1 padding 1x0 stride 2": ConvCase(kernel=(1, 1), padding=(1, 0), stride=2),
    "3x3": ConvCase(),
    "3x3 padding 0": ConvCase(padding=0),
    "3x3 padding beyond the filter": ConvCase(padding=3),
    "3x3 stride 2": ConvCase(stride=2),
    "3x3 stride 2 even size": ConvCase(stride=2, size=(8, 6)),
    "3x3 stride 1x3 padding 2x1": ConvCase(stride=(1, 3), padding=(2, 1)),
    "3x3 stride beyond the filter": ConvCase(stride=4),
    "3x3 dilation 2": ConvCase(dilation=2, padding=2),
    "3x3 dilation 3x1 stride 2": ConvCase(dilation=(3, 1), padding=(3, 1), stride=2),
    "3x3 dilation beyond the image": ConvCase(dilation=4, padding=4, size=(3, 3)),
    "7x7 stride 2 of 3 channels": ConvCase(kernel=(7, 7), stride=2, padding=3, channels=3, size=(11, 9)),
    "1x3": ConvCase(kernel=(1, 3), padding=(0, 1)),
    "3x1": ConvCase(kernel=(3, 1), padding=(1, 0)),
    "2x2 stride 2": ConvCase(kernel=(2, 2), padding=0, stride=2),
    "5x2 dilation 1x2": ConvCase(kernel=(5, 2), padding=(2, 1), dilation=(1, 2)),
    "filter as large as the image": ConvCase(kernel=(7, 5), padding=0),
    "2 groups": ConvCase(groups=2),
    "4 groups stride 2 residual": ConvCase(groups=4, stride=2, bias=True, residual=1),
    "depthwise": ConvCase(channels=6, out_channels=6, groups=6),
    "1x1 depthwise times 2": ConvCase(channels=6, out_channels=12, groups=6, kernel=(1, 1), padding=0),
    "4 groups dilation 2 strided residual": ConvCase(groups=4, dilation=2, padding=2, residual=2),
    "3x3 of a 1x1 image": ConvCase(size=(1, 1)),
    "1x1 of one pixel": ConvCase(size=(1, 1), batch=1, kernel=(1, 1), padding=0),
    "3x3 of one number": ConvCase(size=(1, 1), batch=1, channels=1, out_channels=1),
    "one row": ConvCase(size=(1, 9)),
    "one column stride 2": ConvCase(size=(9, 1), stride=2),
    "batch 1": ConvCase(batch=1),
    "batch 5": ConvCase(batch=5, size=(3, 3)),
    "1 input channel": ConvCase(channels=1),
    "1 output channel": ConvCase(out_channels=1),
    "67 to 33 channels 1x1": ConvCase(channels=67, out_channels=33, kernel=(1, 1), padding=0),
    "37 to 70 channels 3x3": ConvCase(channels=37, out_channels=70, size=(4, 3)),
    "channels over a tile": ConvCase(channels=130, out_channels=140, kernel=(1, 1), padding=0, size=(3, 3)),
    "pixels over a tile": ConvCase(batch=1, channels=4, size=(19, 17)),
}

EPILOGUES = {
    "conv": ConvCase(norm=None, relu=False),
    "conv relu": ConvCase(norm=None),
    "conv bias": ConvCase(norm=None, relu=False, bias=True),
    "norm": ConvCase(relu=False),
    "bias norm relu": ConvCase(bias=True),
    "norm without gamma and beta": ConvCase(norm="plain"),
    "norm without beta": ConvCase(norm="gamma"),
    "bias norm without gamma": ConvCase(norm="beta", bias=True),
    "eps 0": ConvCase(norm="eps0", bias=True),
    "eps 0.1": ConvCase(norm="wide eps"),
    "residual": ConvCase(residual=1),
    "residual no relu": ConvCase(residual=1, relu=False),
    "bias residual no norm": ConvCase(residual=1, norm=None, bias=True),
    "residual stride 2 even size": ConvCase(residual=2),
    "residual stride 2 odd size": ConvCase(residual=2, slack=1),
    "residual stride 3 no relu": ConvCase(residual=3, slack=2, relu=False),
    "1x1 stride 2 residual stride 2": ConvCase(residual=2, stride=2, slack=1, kernel=(1, 1), padding=0),
    "shortcut": ConvCase(shortcut=1),
    "shortcut no relu": ConvCase(shortcut=1, relu=False),
    "shortcut stride 2 even size": ConvCase(shortcut=2),
    "shortcut stride 2 odd size": ConvCase(shortcut=2, slack=1),
    "shortcut bias stride 2": ConvCase(shortcut=2, stride=2, bias=True),
    "shortcut bias no norm": ConvCase(shortcut=1, norm=None, bias=True),
    "1x1 shortcut eps 0": ConvCase(shortcut=1, norm="eps0", kernel=(1, 1), padding=0),
    "shortcut of grouped": ConvCase(shortcut=2, groups=4, slack=1),
}


def named(cases: Mapping[str, Any]) -> list[Any]:
    """The values as pytest's parameters, with their names as ids."""
    return [pytest.param(case, id=name) for name, case in cases.items()]
