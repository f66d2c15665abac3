"""`conv_bn_act` with tiles moved by the tensor memory accelerator (TMA) of Hopper and Blackwell.

The arithmetic and the traffic are those of `conv_bn_act`; what differs is who moves the data. TMA fetches boxes of the
image straight into the shared memory that the matrix units read, zeros for the padding included, and writes the result
from there: no thread computes an address or a mask or holds data on its way (`boxes`). Programs are persistent: they go
on to their next tile while the last one is still being written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .boxes import Descriptors, choose_box, image_box, matrix_box, tiles_of, unaligned
from .conv_bn_act import bind_conv_bn_act
from .dependent import wait_for_input
from .epilogue import eps_of, layer_vectors, nan_relu, scale_shift
from .gpu import gpu_of
from .launch import Launch, accumulator, dot_precision, interpreted
from .tiles import Tile


@triton.jit
def _conv_tma_kernel(
    x_desc,  # [N, H/STRIDE, STRIDE, W/STRIDE, STRIDE*GROUPS*C]
    other_desc,  # residual [N, P, 1, Q, GROUPS*K]; with SECOND the second convolution's input, as x; or None
    y_desc,  # [N, P, 1, Q, GROUPS*K]
    w_desc,  # [GROUPS*K, R*S*C]
    w2_desc,  # [GROUPS*K, C2], or None
    bias_ptr,  # [GROUPS*K], or None
    mean_ptr,  # [GROUPS*K], or None for no normalisation
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bias2_ptr,
    mean2_ptr,
    var2_ptr,
    gamma2_ptr,
    beta2_ptr,
    TILES_N,  # boxes along the images
    TILES_P,
    TILES_Q,
    C: tl.constexpr,  # input channels of a group
    K: tl.constexpr,  # output channels of a group
    C2: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HALF: tl.constexpr,  # 1 where the stride is 2, else 0
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    SECOND: tl.constexpr,  # whether `other` is convolved
    APPLY_RELU: tl.constexpr,
    ACC: tl.constexpr,  # fp32; fp64 for fp64 inputs
    PRECISION: tl.constexpr,  # of an fp32 dot: "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter has no bf16 dot
    IMAGES: tl.constexpr,  # of a box, as its rows and columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,  # see `dependent`
):
    """y = act(scale*conv(x, w) + shift [+ residual | + scale2*conv1x1(other, w2) + shift2]).

    Accumulates in ACC and rounds once, at the store.
    """
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLUMNS
    tiles_k: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N * GROUPS
    steps: tl.constexpr = R * S * ((C + BLOCK_K - 1) // BLOCK_K)
    # Both operands stay in shared memory if the second is the box, which as the first is copied to registers unless it
    # is a row of pixels of which every channel counts: on Hopper the next one would be loaded into registers that a
    # product may still read. The first has 64 rows at least.
    MASKED: tl.constexpr = C % BLOCK_K != 0 or (SECOND and C2 % BLOCK_K != 0)
    FILTERS_FIRST: tl.constexpr = (IMAGES * ROWS > 1 or MASKED) and BLOCK_N >= 64
    ACC_M: tl.constexpr = BLOCK_N if FILTERS_FIRST else BLOCK_M
    ACC_N: tl.constexpr = BLOCK_M if FILTERS_FIRST else BLOCK_N
    tiles = TILES_N * TILES_P * TILES_Q * tiles_k
    wait_for_input(PDL)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        group = (tile % tiles_k) // (tiles_k // GROUPS)  # neighbours share their pixels in L2
        k = (tile % (tiles_k // GROUPS)) * BLOCK_N
        channel = group * K + k
        pixels = tile // tiles_k
        q = (pixels % TILES_Q) * COLUMNS
        p = (pixels // TILES_Q % TILES_P) * ROWS
        n = (pixels // (TILES_Q * TILES_P)) * IMAGES
        acc = tl.zeros((ACC_M, ACC_N), ACC)
        for step in range(steps):
            # all taps of a channel block before the next block: the taps' overlap is still in L2
            c = (step // (R * S)) * BLOCK_K
            tap = step % (R * S)
            h = tap // S * DIL_H - PAD_H  # of the tap, from the pixel STRIDE*p
            w = tap % S * DIL_W - PAD_W
            parity = (w & HALF) * (GROUPS * C) + group * C + c
            x = x_desc.load([n, p + (h >> HALF), h & HALF, q + (w >> HALF), parity]).reshape(BLOCK_M, BLOCK_K)
            filters = w_desc.load([channel, tap * C + c])
            if C % BLOCK_K != 0:  # what lies behind the channels belongs to the next tap or pixel
                inside = c + tl.arange(0, BLOCK_K) < C
                x = tl.where(inside[None, :], x, tl.zeros_like(x))
            if UPCAST:
                x = x.to(tl.float32)
                filters = filters.to(tl.float32)
            if FILTERS_FIRST:
                acc = tl.dot(filters, x.T, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc = tl.dot(x, filters.T, acc, input_precision=PRECISION, out_dtype=ACC)
        offs = channel + tl.arange(0, BLOCK_N)
        mask = k + tl.arange(0, BLOCK_N) < K
        scale, shift = scale_shift(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, offs, mask, EPS, ACC)
        z = (acc.T if FILTERS_FIRST else acc) * scale[None, :] + shift[None, :]
        if SECOND:
            acc2 = tl.zeros((ACC_M, ACC_N), ACC)
            for c in range(0, C2, BLOCK_K):
                x2 = other_desc.load([n, p, 0, q, c]).reshape(BLOCK_M, BLOCK_K)
                filters2 = w2_desc.load([channel, c])
                if C2 % BLOCK_K != 0:
                    x2 = tl.where((c + tl.arange(0, BLOCK_K) < C2)[None, :], x2, tl.zeros_like(x2))
                if UPCAST:
                    x2 = x2.to(tl.float32)
                    filters2 = filters2.to(tl.float32)
                if FILTERS_FIRST:
                    acc2 = tl.dot(filters2, x2.T, acc2, input_precision=PRECISION, out_dtype=ACC)
                else:
                    acc2 = tl.dot(x2, filters2.T, acc2, input_precision=PRECISION, out_dtype=ACC)
            scale2, shift2 = scale_shift(bias2_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, offs, mask, EPS2, ACC)
            z += (acc2.T if FILTERS_FIRST else acc2) * scale2[None, :] + shift2[None, :]
        elif other_desc is not None:
            z += other_desc.load([n, p, 0, q, channel]).reshape(BLOCK_M, BLOCK_N).to(ACC)
        if APPLY_RELU:
            z = nan_relu(z)
        y = z.to(y_desc.dtype).reshape(IMAGES, ROWS, 1, COLUMNS, BLOCK_N)
        y_desc.store([n, p, 0, q, channel], y)


def refusal(x, conv, other, epilogue, tile: Tile) -> str | None:
    """Why the kernel cannot run a convolution; None when it can."""
    k = conv.weight.shape[0]
    item = x.element_size()
    branch = epilogue.shortcut
    for image, layer in ((x, conv), (other, branch)):
        if layer is None:
            continue
        if layer.stride not in ((1, 1), (2, 2)):
            return f"stride {layer.stride}"
        if layer.stride == (2, 2) and (image.shape[2] % 2 or image.shape[3] % 2):
            return "a stride of 2 on an image of odd height or width"
        if layer.weight.shape[1] * item % 16 or image.shape[1] * item % 16:
            return "channels that are no multiple of 16 bytes, as descriptors ask"
    if k * item % 16:
        return "channels that are no multiple of 16 bytes, as descriptors ask"
    if conv.groups > 1 and (k // conv.groups) % tile.block_n:
        return "a tile over the edge of a group"
    if other is not None and branch is None and epilogue.residual_stride != 1:
        return "a strided residual"
    return None


def bind_conv_tma(x, conv, other, epilogue, tile: Tile, *, overwrite: bool = False):
    """Prepare `_conv_tma_kernel` for parameters and shapes; arguments and result are those of `bind_conv_bn_act`.

    A call with an activation that is no multiple of 16 bytes into its memory runs `conv_bn_act`.

    Args:
        x, conv, other, epilogue: see `bind_conv_bn_act`; `refusal` must be None.
        tile: its `persistent` is at least 1.
        overwrite: write the result over a residual.
    """
    n, channels, h, w = x.shape
    k, c, r, s = conv.weight.shape
    p, q = conv.output_size(h, w)
    branch = epilogue.shortcut
    plain = (r, s) == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
    if plain and (branch is None or branch.stride == (1, 1)):  # pixels need not be told apart
        n, h, w, p, q = 1, 1, n * h * w, 1, n * p * q
    stride2 = 1 if branch is None else branch.stride[0]
    channels2 = k if branch is None else branch.weight.shape[1]
    size, size2 = (n, h, w, channels), (n, p * stride2, q * stride2, channels2)
    box = choose_box(tile.block_m, n, p, q)
    block_k = min(tile.block_k, max(16, triton.next_power_of_2(c)))
    tiles = (-(-n // box.images), -(-p // box.rows), -(-q // box.columns))
    count = tiles_of(box, n, p, q) * triton.cdiv(k // conv.groups, tile.block_n) * conv.groups
    programs = min(count, tile.persistent * gpu_of(x.device).multiprocessors)
    norm2 = None if branch is None else branch.norm
    launch = Launch(
        _conv_tma_kernel,
        (programs,),
        (
            matrix_box(conv.weight, k, r * s * c, (tile.block_n, block_k)),
            None if branch is None else matrix_box(branch.weight, k, channels2, (tile.block_n, block_k)),
            *layer_vectors(conv),
            *layer_vectors(branch),
            *tiles,
            *(c, k // conv.groups, channels2, conv.groups, r, s, conv.stride[0] - 1, *conv.padding, *conv.dilation),
            *(eps_of(conv.norm), eps_of(norm2), branch is not None, epilogue.relu),
            *(accumulator(x.dtype), dot_precision(x.dtype), interpreted() and x.dtype == torch.bfloat16),
            *(box.images, box.rows, box.columns, tile.block_n, block_k, programs),
        ),
        x.device,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    by_pointers = bind_conv_bn_act(x, conv, other, epilogue, Tile(64, 32, block_k, 4, 2))
    shape = conv.output_shape(x)
    dtype, device = x.dtype, x.device
    other_block = tile.block_n if branch is None else block_k
    in_place = overwrite and other is not None and branch is None
    of_x = Descriptors(image_box, size, conv.stride[0], box, block_k)
    of_other = Descriptors(image_box, size2, stride2, box, other_block)
    of_y = Descriptors(image_box, (n, p, q, k), 1, box, tile.block_n)

    def run(x, other):
        if unaligned(x, other):
            return by_pointers(x, other)
        y = other if in_place else torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        launch(of_x(x), None if other is None else of_other(other), of_y(y))
        return y

    return run
