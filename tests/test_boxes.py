"""Boxes of pixels: how many cover an image, and what a descriptor reads of it."""

from __future__ import annotations

import weakref
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fused_resblock.kernels.boxes import Box, Descriptors, choose_box, image_box, tiles_of

SIZES = st.integers(1, 70)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from([16, 64, 128]), st.integers(1, 9), SIZES, SIZES)
def test_box_covers_with_the_fewest_pixels(block_m, images, rows, columns):
    box = choose_box(block_m, images, rows, columns)
    assert box.images * box.rows * box.columns == block_m
    powers = [1 << i for i in range(block_m.bit_length())]
    every = (Box(n, p, q) for n, p, q in product(powers, powers, powers) if n * p * q == block_m)
    fewest = min(tiles_of(other, images, rows, columns) for other in every)
    assert tiles_of(box, images, rows, columns) == fewest


@pytest.mark.parametrize(
    ("block_m", "size", "expected"),
    [
        (128, (1, 1, 128 * 56 * 56), Box(1, 1, 128)),
        (128, (128, 56, 56), Box(2, 8, 8)),
        (64, (128, 7, 7), Box(64, 1, 1)),
        (128, (128, 14, 14), Box(32, 2, 2)),
        (64, (1, 7, 7), Box(1, 8, 8)),
    ],
)
def test_boxes_of_the_networks(block_m, size, expected):
    assert choose_box(block_m, *size) == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_descriptor_of_an_image(stride):
    """Pixel (h, w), channel c lies where the five coordinates say."""
    n, h, w, c = 2, 4, 6, 8
    x = torch.arange(n * h * w * c, dtype=torch.float32).reshape(n, h, w, c)
    desc = image_box(x.permute(0, 3, 1, 2), (n, h, w, c), stride, Box(1, 2, 2), 8)
    seen = x.as_strided(desc.shape, desc.strides)
    for i, row, column in product(range(n), range(h), range(w)):
        start = (column % stride) * c
        part = seen[i, row // stride, row % stride, column // stride, start : start + c]
        assert torch.equal(part, x[i, row, column])


def test_prepared_boxes_are_those_of_any_tensor():
    images = [torch.randn(2, 8, 6, 4).to(memory_format=torch.channels_last) for _ in range(2)]
    arguments = (2, 6, 4, 8), 2, Box(1, 2, 2), 8
    make = Descriptors(image_box, *arguments)
    made = [make(x) for x in images]
    for x, desc in zip(images, made, strict=True):
        assert desc == image_box(x, *arguments)
        assert desc.base is x
    freed = weakref.ref(images[0])
    del images, made, x, desc
    assert freed() is None, "the descriptors keep a tensor alive"
