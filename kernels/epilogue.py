"""Parts that the kernels share: batch norm as scale and shift, the NaN-keeping ReLU, pixel addresses."""

import triton
import triton.language as tl


@triton.jit
def scale_shift(
    bias_ptr,  # [K] convolution bias, or None
    mean_ptr,  # [K] running mean, or None for no normalisation
    var_ptr,  # [K] running variance
    gamma_ptr,  # [K] or None; without a mean the scale itself
    beta_ptr,  # [K] or None; without a mean the shift itself
    offs,  # [BLOCK] channel indices
    mask,  # [BLOCK] channels that exist
    EPS: tl.constexpr,
    ACC: tl.constexpr,  # accumulator type
):
    """scale, shift with norm(z + bias) = scale*z + shift, both [BLOCK] in ACC.

    scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale; or both as they were formed beforehand, which
    spares each thread three loads and a square root for each of its channels.
    """
    shift = (offs * 0).to(ACC)  # zeros in the layout of `offs`, which Gluon kernels choose
    scale = shift + 1.0
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(ACC)
    if mean_ptr is not None:
        var = tl.load(var_ptr + offs, mask=mask, other=1.0).to(ACC)
        scale = 1.0 / tl.sqrt(var + EPS)
        if gamma_ptr is not None:
            scale = scale * tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(ACC)
        shift = (shift - tl.load(mean_ptr + offs, mask=mask, other=0.0).to(ACC)) * scale
        if beta_ptr is not None:
            shift = shift + tl.load(beta_ptr + offs, mask=mask, other=0.0).to(ACC)
    elif gamma_ptr is not None:
        scale = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(ACC)
        shift = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(ACC)
    return scale, shift


@triton.jit
def nan_relu(z):
    """max(z, 0) that keeps NaN as torch does: `max.NaN.f32`, where a plain maximum would drop it."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def strided_rows(
    offs_m,  # [BLOCK_M] output pixels, n*P*Q + p*Q + q
    H,
    W,
    P,
    Q,
    STRIDE: tl.constexpr,
):
    """Pixel (n, p*STRIDE, q*STRIDE) of an [N, H, W] image for output pixel (n, p, q), as int64 [BLOCK_M]."""
    if STRIDE == 1:
        return offs_m.to(tl.int64)
    n = offs_m // (P * Q)
    p = (offs_m // Q) % P
    q = offs_m % Q
    return (n.to(tl.int64) * H + p * STRIDE) * W + q * STRIDE


def vectors(norm):
    """Mean, variance, gamma and beta as the kernels take them.

    Args:
        norm: a `fused_resblock.params.BatchNorm`, an `Affine` formed of one beforehand, or None.
    """
    if norm is None:
        return (None,) * 4
    return norm[:4] if hasattr(norm, "eps") else (None, None, *norm)


def layer_vectors(conv):
    """Bias and the norm's `vectors` of a convolution; None each where they are absent, or there is no convolution."""
    return (None,) * 5 if conv is None else (conv.bias, *vectors(conv.norm))


def eps_of(norm) -> float:
    """The norm's eps; 0 where there is none to add."""
    return getattr(norm, "eps", 0.0)
