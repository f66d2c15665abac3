"""Gradients of the fused operations from their inputs and output alone: nothing in between is saved or recomputed.

`dz` is the gradient behind the ReLU, `dy * (y > 0)`, and `total` its sum over N, H, W for each channel. Everything is
made of differentiable torch operations, so second derivatives exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.folding import scale_shift
from .params import BatchNorm, Conv, Pair


def norm_grads(dot: Tensor | None, total: Tensor, norm: BatchNorm | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Gradients for `(mean, var, weight, bias, eps)` of a norm; the first two and eps have none.

    With z the norm's input less the convolution bias, and `dot` the sum of dz*z over the pixels:
    dgamma = (dot + (bias - mean) * total) / sqrt(var + eps), dbeta = total. A `dot` of None: dgamma is not wanted.
    """
    if norm is None:
        return (None,) * 5
    dgamma = None
    if dot is not None and norm.weight is not None:
        wide = total.dtype
        centre = -norm.mean.to(wide) if bias is None else bias.to(wide) - norm.mean.to(wide)
        dgamma = (torch.rsqrt(norm.var.to(wide) + norm.eps) * (dot + centre * total)).to(norm.weight.dtype)
    return None, None, dgamma, None if norm.bias is None else total.to(norm.bias.dtype), None


def _conv_grads(dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, need_x: bool, need_w: bool) -> tuple[Any, Any]:
    """Gradients of x and weight of the plain convolution.

    A strided 1x1 reads every `stride`-th pixel: its gradients are those of a 1x1 with stride 1 on these pixels. oneDNN
    3.12 writes past its buffer in the weight gradient of the strided form with 8 channels. On a CPU with dilated groups
    everything is brought into NCHW: torch 2.13 reads unwritten memory for it in 16 bits in channels_last, batch 1.
    """
    if weight.shape[2:] == (1, 1) and conv.padding == (0, 0) and max(conv.stride) > 1:
        rows, columns = conv.stride
        dx, dw = _conv_grads(dz, x[:, :, ::rows, ::columns], weight, conv._replace(stride=(1, 1)), need_x, need_w)
        return (residual_grad(dx, x.shape, conv.stride) if need_x else None), dw
    if x.device.type == "cpu" and x.dtype.itemsize == 2 and conv.groups > 1 and max(conv.dilation) > 1:
        dz, x, weight = dz.contiguous(), x.contiguous(), weight.contiguous()
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    geometry = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    dx, dw, _ = torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, (need_x, need_w, False))
    return dx, dw


def branch_grads(dz: Tensor, total: Tensor, x: Tensor, conv: Conv, need_x: bool, need_w: bool) -> tuple[Any, ...]:
    """Gradients of x, weight, bias and the norm's five arguments for `norm(conv(x))`.

    With `dW_raw` the weight gradient of the plain convolution for dz: dW = scale*dW_raw, dx is the input gradient for
    the weight scale*W, and the sum of dz*z that dgamma needs is <W, dW_raw> per output channel. That is exact.
    `need_w` asks for the gradients of weight and gamma.
    """
    weight, wide = conv.weight, total.dtype
    scale = None if conv.norm is None else scale_shift(conv.norm, wide)[0]
    scaled = weight if scale is None else weight.to(wide) * scale[:, None, None, None]
    dx: Any = None
    dw: Any = None
    dot = dbias = None
    if need_x or need_w:
        dx, dw = _conv_grads(dz, x, scaled.to(x.dtype), conv, need_x, need_w)
    if need_w:
        dw = dw.to(wide)
        dot = (weight.to(wide) * dw).sum((1, 2, 3))
        dw = (dw if scale is None else dw * scale[:, None, None, None]).to(weight.dtype)
    if conv.bias is not None:
        dbias = (total if scale is None else total * scale).to(conv.bias.dtype)
    return (dx, dw, dbias, *norm_grads(dot, total, conv.norm, conv.bias))


def elementwise_grads(
    dz: Tensor, total: Tensor, x: Any, norm: BatchNorm | None, need_x: bool, need_gamma: bool
) -> tuple[Any, ...]:
    """Gradients of x and the norm's five arguments for `norm(x)`; x may be None where the norm is."""
    if norm is None:
        return dz, *norm_grads(None, total, None, None)
    wide = total.dtype
    dx = (dz.to(wide) * scale_shift(norm, wide)[0][:, None, None]).to(x.dtype) if need_x else None
    dot = (dz.to(wide) * x.to(wide)).sum((0, 2, 3)) if need_gamma else None
    return dx, *norm_grads(dot, total, norm, None)


def residual_grad(dz: Tensor, shape: torch.Size, stride: Pair) -> Tensor:
    """dz at every `stride`-th row and column of `shape`, 0 elsewhere."""
    if stride == (1, 1):
        return dz
    n, channels, height, width = shape
    grad = dz.new_zeros(n, height, width, channels).permute(0, 3, 1, 2)  # of dz, so that it is batched where dz is
    grad[:, :, :: stride[0], :: stride[1]] = dz
    return grad
