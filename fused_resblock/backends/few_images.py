"""A stem on a CPU, a few images at a time: what lies between convolution and max-pool then stays in the cache.

PyTorch's max-pool also computes the places of the maxima, 8 bytes each, which nobody reads here. Behind a ReLU, numbers
of 16 bits are pooled as the integers that the same bits are: those have the same order, and a maximum of their own in
the CPU, where PyTorch widens bf16 and fp16 to fp32 (16 images of 64x112x112, 2 cores: 1.3 ms in place of 3.1). A NaN
that oneDNN's fused ReLU has left, which makes it 0 on x86, is the greatest of all, or the least if its sign is set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.pool import is_stem_pool
from ..params import Bound, Conv, Epilogue
from . import onednn

#: bytes of the convolution's output that are computed at a time, for each thread: what the cache of a core holds
CACHED = 2 << 20


def bind_stem(x: Tensor, conv: Conv, relu: bool, pool: tuple[Any, ...]) -> Bound | None:
    """See `backends.bind_stem`; None also for one channel, another pool than 3x3 of stride 2, odd outputs."""
    n, k, p, q = conv.output_shape(x)
    if not is_stem_pool(pool) or p % 2 or q % 2 or k == 1:
        return None
    cached, image = CACHED * torch.get_num_threads(), k * p * q * x.element_size()
    few = max((i for i in range(1, n + 1) if n % i == 0 and i * image <= cached), default=1)
    run = onednn.bind_conv_bn_act(x[:few], conv, None, Epilogue(relu=relu), False)
    as_integers = relu and x.element_size() == 2

    def stem(x: Tensor, _: Tensor | None) -> Tensor:
        size = n, k, p // 2, q // 2
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for images, pooled in zip(x.split(few), y.split(few), strict=True):
            z = run(images, None)
            if as_integers:
                _max_pool(z.view(torch.int16), pooled.view(torch.int16))
            else:
                _max_pool(z, pooled)
        return y

    return stem


def _max_pool(x: Tensor, y: Tensor) -> None:
    """y = maxpool3x3(x) of stride 2 and padding 1, of even height and width: along the rows, then along the columns.

    Overwrites x.
    """
    above = x[:, :, 0::2]
    torch.maximum(above, x[:, :, 1::2], out=above)
    torch.maximum(above[:, :, 1:], x[:, :, 1:-1:2], out=above[:, :, 1:])
    torch.maximum(above[..., 0::2], above[..., 1::2], out=y)
    torch.maximum(y[..., 1:], above[..., 1:-1:2], out=y[..., 1:])
