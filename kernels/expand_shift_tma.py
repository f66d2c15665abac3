"""`expand_shift` with tiles moved by the tensor memory accelerator (TMA) of Hopper and Blackwell.

The same arithmetic and traffic. Boxes of the image, chunks of the residual and all filters come by TMA straight into
the shared memory that the matrix units read, and output chunks leave by it while the next one is computed (`boxes`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .boxes import Descriptors, choose_box, image_box, matrix_box, tiles_of
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .expand_shift import bind_expand_shift
from .launch import Launch, accumulator, dot_precision, interpreted
from .tail_call import tail_call
from .tiles import StageTile


@triton.jit
def _expand_shift_tma_kernel(
    h_desc,  # [N, H/STRIDE, STRIDE, W/STRIDE, STRIDE*C] input of the 3x3
    other_desc,  # residual [N, P, 1, Q, K]; with SECOND the input of the downsample branch, as h; see `boxes`
    y_desc,  # [N, P, 1, Q, K] output of the block
    g_desc,  # [N, P, 1, Q, G] output of the next block's reduce, or None
    w_desc,  # [C, R*S*C]
    w3_desc,  # [K, C]
    w2_desc,  # [K, C2] of the downsample branch, or None
    w1_desc,  # [G, K] of the next reduce, or None
    bias_ptr,  # [C], or None
    mean_ptr,  # [C], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bias3_ptr,  # [K], or None
    mean3_ptr,
    var3_ptr,
    gamma3_ptr,
    beta3_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    bias1_ptr,  # [G], or None
    mean1_ptr,
    var1_ptr,
    gamma1_ptr,
    beta1_ptr,
    TILES_P,  # boxes along rows and columns of an image
    TILES_Q,
    C: tl.constexpr,
    K: tl.constexpr,
    C2: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HALF: tl.constexpr,  # 1 where the 3x3 has stride 2, else 0
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    EPS: tl.constexpr,
    EPS3: tl.constexpr,
    EPS2: tl.constexpr,
    EPS1: tl.constexpr,
    SECOND: tl.constexpr,
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    IMAGES: tl.constexpr,  # of a box, as its rows and columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # expanded channels a chunk
    BLOCK_K: tl.constexpr,  # input channels a step of the 3x3 and of the downsample branch
    TAP_STAGES: tl.constexpr,
    CHUNK_STAGES: tl.constexpr,
    HELD: tl.constexpr,  # whether the downsample branch's input is loaded once, and not for every chunk
    PDL: tl.constexpr,  # see `dependent`
):
    """h2 = relu(bn(conv3x3(h))); y = relu(bn3(h2 W3) + (other | bn2(other W2))); g = relu(bn1(y W1)).

    Sums in ACC. h2 and y are rounded to their dtype, as they would be between kernels; g once, at the store.
    """
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLUMNS
    dtype = y_desc.dtype
    pixels = tl.program_id(0)
    q = (pixels % TILES_Q) * COLUMNS
    p = (pixels // TILES_Q % TILES_P) * ROWS
    i = (pixels // (TILES_Q * TILES_P)) * IMAGES
    offs_c = tl.arange(0, C)
    acc = tl.zeros((BLOCK_M, C), ACC)
    wait_for_input(PDL)
    for step in tl.range(0, R * S * (C // BLOCK_K), num_stages=TAP_STAGES):
        # all taps of a channel block before the next block: the taps' overlap is still in L2
        c = (step // (R * S)) * BLOCK_K
        tap = step % (R * S)
        h = tap // S - PAD_H  # of the tap, from the pixel STRIDE*p
        w = tap % S - PAD_W
        x = h_desc.load([i, p + (h >> HALF), h & HALF, q + (w >> HALF), (w & HALF) * C + c]).reshape(BLOCK_M, BLOCK_K)
        filters = w_desc.load([0, tap * C + c])
        if UPCAST:
            x = x.to(tl.float32)
            filters = filters.to(tl.float32)
        acc = tl.dot(x, filters.T, acc, input_precision=PRECISION, out_dtype=ACC)
    scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs_c, offs_c < C, EPS, ACC)
    h2 = nan_relu(acc * scale[None, :] + shift[None, :]).to(dtype)  # [BLOCK_M, C]
    if UPCAST:
        h2 = h2.to(tl.float32)

    if SECOND and HELD:
        x2 = other_desc.load([i, p, 0, q, 0]).reshape(BLOCK_M, C2)
        if UPCAST:
            x2 = x2.to(tl.float32)
    offs_g = tl.arange(0, G)
    reduced = tl.zeros((BLOCK_M, G), ACC)
    for n in tl.range(0, K, BLOCK_N, num_stages=CHUNK_STAGES):
        w3 = w3_desc.load([n, 0])  # [BLOCK_N, C]
        if UPCAST:
            w3 = w3.to(tl.float32)
        e = tl.dot(h2, w3.T, input_precision=PRECISION, out_dtype=ACC)
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < K
        scale3, shift3 = scale_shift(bias3_ptr, mean3_ptr, var3_ptr, gamma3_ptr, beta3_ptr, offs_n, mask_n, EPS3, ACC)
        z = e * scale3[None, :] + shift3[None, :]
        if SECOND:
            if HELD:
                w2 = w2_desc.load([n, 0])
                if UPCAST:
                    w2 = w2.to(tl.float32)
                down = tl.dot(x2, w2.T, input_precision=PRECISION, out_dtype=ACC)
            else:
                down = tl.zeros((BLOCK_M, BLOCK_N), ACC)
                for c in range(0, C2, BLOCK_K):
                    part = other_desc.load([i, p, 0, q, c]).reshape(BLOCK_M, BLOCK_K)
                    w2 = w2_desc.load([n, c])
                    if C2 % BLOCK_K != 0:  # with a stride, other pixels lie behind the channels
                        part = tl.where((c + tl.arange(0, BLOCK_K) < C2)[None, :], part, tl.zeros_like(part))
                    if UPCAST:
                        part = part.to(tl.float32)
                        w2 = w2.to(tl.float32)
                    down = tl.dot(part, w2.T, down, input_precision=PRECISION, out_dtype=ACC)
            scale2, shift2 = scale_shift(
                bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs_n, mask_n, EPS2, ACC
            )
            z += down * scale2[None, :] + shift2[None, :]
        else:
            z += other_desc.load([i, p, 0, q, n]).reshape(BLOCK_M, BLOCK_N).to(ACC)
        y = nan_relu(z).to(dtype)
        y_desc.store([i, p, 0, q, n], y.reshape(IMAGES, ROWS, 1, COLUMNS, BLOCK_N))
        if g_desc is not None:
            w1 = w1_desc.load([0, n])  # [G, BLOCK_N]
            if UPCAST:
                y = y.to(tl.float32)
                w1 = w1.to(tl.float32)
            reduced = tl.dot(y, w1.T, reduced, input_precision=PRECISION, out_dtype=ACC)
    if g_desc is not None:
        scale1, shift1 = scale_shift(
            bias1_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, offs_g, offs_g < G, EPS1, ACC
        )
        g = nan_relu(reduced * scale1[None, :] + shift1[None, :]).to(dtype)
        g_desc.store([i, p, 0, q, 0], g.reshape(IMAGES, ROWS, 1, COLUMNS, G))


def bind_expand_shift_tma(h, conv, expand, other, shortcut, reduce, tile: StageTile, *, overwrite: bool = False):
    """Prepare `_expand_shift_tma_kernel`; arguments and result are those of `bind_expand_shift`.

    A call with an activation that is no multiple of 16 bytes into its memory runs `expand_shift`. Besides what
    `expand_shift.refusal` asks, a stride of 2 needs images of even height and width.
    """
    n, c, height, width = h.shape
    k = expand.weight.shape[0]
    p, q = conv.output_size(height, width)
    outputs = 16 if reduce is None else reduce.weight.shape[0]
    stride2 = 1 if shortcut is None else shortcut.stride[0]
    channels2 = k if shortcut is None else shortcut.weight.shape[1]
    box = choose_box(tile.block_m, n, p, q)
    block_k = min(tile.block_k, c)
    held = tile.held and channels2 in (16, 32, 64, 128, 256)  # a box has 256 channels at most
    block2 = channels2 if held else block_k
    layers = (conv, expand, shortcut, reduce)
    taps = conv.weight.shape[2] * conv.weight.shape[3]
    launch = Launch(
        _expand_shift_tma_kernel,
        (tiles_of(box, n, p, q),),
        (
            matrix_box(conv.weight, c, taps * c, (c, block_k)),
            matrix_box(expand.weight, k, c, (tile.block_n, c)),
            None if shortcut is None else matrix_box(shortcut.weight, k, channels2, (tile.block_n, block2)),
            None if reduce is None else matrix_box(reduce.weight, outputs, k, (outputs, tile.block_n)),
            *(v for layer in layers for v in layer_vectors(layer)),
            *(-(-p // box.rows), -(-q // box.columns)),
            *(c, k, channels2, outputs, *conv.weight.shape[2:], conv.stride[0] - 1, *conv.padding),
            *(0.0 if layer is None else eps_of(layer.norm) for layer in layers),
            *(shortcut is not None, accumulator(h.dtype), dot_precision(h.dtype)),
            interpreted() and h.dtype == torch.bfloat16,
            *(box.images, box.rows, box.columns, tile.block_n, block_k, tile.tap_stages, tile.chunk_stages, held),
        ),
        h.device,
        num_warps=tile.num_warps,
        num_stages=max(tile.tap_stages, tile.chunk_stages),
    )
    small = replace(tile, block_m=64, block_n=32, num_warps=4 if c <= 128 else 8, tma=False)
    by_pointers = bind_expand_shift(h, conv, expand, other, shortcut, reduce, small, overwrite=overwrite)
    size, size2 = (n, height, width, c), (n, p * stride2, q * stride2, channels2)
    of_h = Descriptors(image_box, size, conv.stride[0], box, block_k)
    of_other = Descriptors(image_box, size2, stride2, box, tile.block_n if shortcut is None else block2)
    of_y = Descriptors(image_box, (n, p, q, k), 1, box, tile.block_n)
    of_g = Descriptors(image_box, (n, p, q, outputs), 1, box, outputs)

    def described(h, other, y, g):
        return of_h(h), of_other(other), of_y(y), None if g is None else of_g(g)

    return tail_call(launch, h, conv, expand, reduce, overwrite, described, by_pointers)
