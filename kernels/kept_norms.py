"""Scales and shifts of norms in the shared memory of a Gluon kernel, formed once a program."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .epilogue import scale_shift
from .taps import view


@gluon.jit
def keep_norm(
    norm,  # as `norm_vectors` makes it
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    EPS: gl.constexpr,
):
    """Put a layer's scale and shift where every tile finds them."""
    scales, shifts = norm
    SIZE: gl.constexpr = scales.shape[0]
    offs = gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs, offs < SIZE, EPS, tl.float32)
    scales.store(scale)
    shifts.store(shift)


@gluon.jit
def norm_vectors(SIZE: gl.constexpr):
    """Shared memory for the scales and shifts of a layer's channels."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float32, [SIZE], LINE), gl.allocate_shared_memory(gl.float32, [SIZE], LINE)


@gluon.jit
def _piece(vector, piece, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Some channels of a vector, for a matrix of as many columns."""
    pieces = view(vector, [vector.shape[0] // WIDTH, WIDTH], vector.layout)
    return pieces.index(piece).load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def scaled(sums, norm, piece):
    """sums * scale + shift, for a piece of as many channels as the sums have columns."""
    WIDTH: gl.constexpr = sums.shape[1]
    LAYOUT: gl.constexpr = sums.type.layout
    return sums * _piece(norm[0], piece, WIDTH, LAYOUT) + _piece(norm[1], piece, WIDTH, LAYOUT)
