"""What `expand_shift_ring` and `expand_shift_wide` have in common: descriptors, arguments, and what stands in."""

from __future__ import annotations

from .boxes import Descriptors, choose_box, tiles_of
from .epilogue import eps_of, layer_vectors
from .expand_shift_tma import bind_expand_shift_tma
from .gpu import gpu_of
from .launch import Launch, interpreted
from .tail_call import tail_call
from .tail_ring import by_boxes
from .taps import matrix_box, strided_box
from .tiles import StageTile


def bind_by_rings(
    kernel, h, conv, expand, other, shortcut, reduce, tile: StageTile, overwrite: bool, constants: tuple[bool, ...] = ()
):
    """Prepare a kernel; arguments and result are those of `bind_expand_shift`.

    A call with an activation that is no multiple of 16 bytes into its memory, and one in the interpreter, which knows
    no Gluon, runs `expand_shift_tma`.

    Args:
        kernel: one of the two.
        h, conv, expand, other, shortcut, reduce: see `bind_expand_shift`; `tail_ring.refusal` must be None.
        tile: `tap_stages` boxes of pixels and `chunk_stages` blocks of filters are in the rings.
        overwrite: see `bind_expand_shift`.
        constants: the last ones of the kernel.
    """
    boxes = by_boxes(tile)
    stand_in = bind_expand_shift_tma(h, conv, expand, other, shortcut, reduce, boxes, overwrite=overwrite)
    if interpreted():
        return stand_in
    n, c, p, q = h.shape
    k, outputs, step = expand.weight.shape[0], 0 if reduce is None else reduce.weight.shape[0], tile.block_k
    box = choose_box(tile.block_m, n, p, q)
    count = tiles_of(box, n, p, q)
    programs = min(count, gpu_of(h.device).multiprocessors)
    layers = (conv, expand, reduce)
    launch = Launch(
        kernel,
        (programs,),
        (
            matrix_box(conv.weight, c, 9 * c, (c, step)),
            matrix_box(expand.weight, k, c, (step, step)),
            None if reduce is None else matrix_box(reduce.weight, outputs, k, (c, step)),
            *(v for layer in layers for v in layer_vectors(layer)),
            *(count, -(-p // box.rows), -(-q // box.columns)),
            *(c, k, outputs),
            *(0.0 if layer is None else eps_of(layer.norm) for layer in layers),
            *(tile.tap_stages, tile.chunk_stages, programs, *constants),
        ),
        h.device,
        num_warps=tile.num_warps,
    )
    sizes = ((n, p, q, channels) for channels in (c, k, k, outputs))
    of_h, of_other, of_y, of_g = (Descriptors(strided_box, size, 1, box, step) for size in sizes)

    def described(h, other, y, g):
        return of_h(h), of_other(other), of_y(y), None if g is None else of_g(g)

    return tail_call(launch, h, conv, expand, reduce, overwrite, described, stand_in)
