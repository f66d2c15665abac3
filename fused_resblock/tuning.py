"""The fastest tile of every convolution of a model on this machine's GPU, searched offline: `tune`.

For each distinct convolution that the fused model runs on an example, the tiles of least predicted time are compiled,
held against PyTorch's result, and timed beside cuDNN and eager; likewise the stem as one kernel; then each tail of a
block, and each block, as one, with every tile, beside its convolutions one by one. The winners go into a table
(`kernels.tables`). None of this happens unless it is asked for, and never inside of a CUDA graph's capture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, on_cuda
from .backends import asked, tuned, whole
from .backends.asked import Asked
from .convert import blocks, fuse
from .kernels import tables
from .kernels.gpu import gpu_of
from .kernels.tiles import Tile
from .modules import FusedBlock
from .progress import bar as progress_bar
from .tf32_unit import Tf32Unit
from .tuned_file import Growing, key_of, path_of

#: tiles that are tried for a convolution
TRIED = 16
#: milliseconds in which a way is warmed up, and timed
WARM_UP, MEASURE = 5, 25
#: how much less time than anything else a kernel for a tail or a block has to take
MARGIN = 0.98
#: images whose results are checked
CHECKED = 4

#: the operations in the order in which they are tuned, each beside the winners of those before
KINDS = ("stem", "convolution", "tail", "block")
Ways = Mapping[str, Callable[[], Any]]


def median_us(call: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, with L2 flushed before each."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=WARM_UP, rep=MEASURE, return_mode="median"))


def tune(
    model: nn.Module, example: Tensor, *, out: str | os.PathLike[str] | None = None, progress: bool = True
) -> Path:
    """Search the fastest tiles for a model's convolutions and write them to a table.

    What the table holds already, measured with these versions, is not measured again: the search can be interrupted at
    any time and goes on where it was. Rows of other versions are let go, with a warning. At its end the table is in
    force; another process takes it by `load_config`, or with `FUSED_RESBLOCK_CONFIG_DIR` naming its folder.

    Args:
        model: in eval mode, on a CUDA device. If it has no fused blocks yet, a fused copy is tuned.
        example: an input; tuned is for its batch, image size and dtype, and what is found serves up to four times as
            many pixels and down to a quarter.
        out: the table's file; None for one named after the GPU in `FUSED_RESBLOCK_CONFIG_DIR`, or else in the current
            folder.
        progress: whether to show a progress bar (if tqdm is installed).

    Returns:
        The table's path.

    Raises:
        TypeError: if model is no `nn.Module`, example no tensor or `out` no path.
        ValueError: if the model is in train mode, on another device than example or without residual blocks, or `out`
            is another GPU's table, or none at all.
        RuntimeError: if there is no CUDA device, or a CUDA graph is being captured.
    """
    on_cuda.check("tune", model, example)
    table = Growing(path_of(out, example.device), example.device)
    if not any(isinstance(module, FusedBlock) for module in model.modules()):
        if next(blocks(model), None) is None:
            raise ValueError("model must hold residual blocks, got none")
        model = fuse(model)
    here = torch.cuda.device(example.device) if example.is_cuda else nullcontext()
    with torch.no_grad(), here:
        for kind in KINDS:
            todo = [found for found in _asked(model, example) if found.kind == kind and not table.knows(found)]
            with progress_bar(len(todo), desc=f"{kind}s", disable=not (progress and todo)) as bar:
                for found in todo:
                    table.add(found, _winner(found))
                    bar.update()
            tuned.load_config(table.write())
    return table.path


def _asked(model: nn.Module, example: Tensor) -> list[Asked]:
    """The distinct operations of a forward; all is bound anew, so that each is seen.

    Of two forwards: in the second one a chain of blocks knows which one comes behind it.
    """
    backends.clear_caches()
    try:
        with torch.no_grad(), asked.recording() as found:
            model(example)
            model(example)
    finally:  # tails have been bound conv by conv
        backends.clear_caches()
    return list({key_of(one): one for one in found}.values())


def _winner(found: Asked) -> dict[str, Any]:
    if found.kind in ("tail", "block"):
        return tail_winner(found) if found.kind == "tail" else block_winner(found)
    return stem_winner(found) if found.kind == "stem" else convolution_winner(found)


def convolution_winner(found: Asked) -> dict[str, Any]:
    """The fastest backend of a convolution, and the fastest tile: what a table's row holds besides its key."""
    from .kernels.convolution import bind_convolution, likely_tiles

    x, other = found.inputs()
    (conv,) = found.layers
    arguments = backends.triton.prepared(x, conv, other, found.epilogue)
    ways: dict[str, Callable[[], Any]] = {}
    for tile in likely_tiles(*arguments, gpu_of(x.device))[:TRIED]:
        of_tile = backends.triton.prepared(x, conv, other, found.epilogue, tile)
        ways[str(tile)] = partial(bind_convolution, *of_tile, tile)
    for name in ("cudnn", "eager"):
        module = backends.BACKENDS[name]
        if module.unavailable() is None:
            ways[name] = lambda m=module: m.bind_conv_bn_act(x, conv, other, found.epilogue, False)  # type: ignore[misc]
    times = _times(found, ways, x, other)
    n, outputs, p, q = conv.output_shape(x)

    def scratch_us(tile: str) -> float:
        return tables.scratch_us(Tile.parse(tile), max(conv.stride) > 1, n * p * q, outputs)

    tile, best = _fastest(times, "triton", backends.BACKENDS, scratch_us)
    branch = found.epilogue.shortcut
    weight_bytes = sum(layer.weight.nbytes for layer in (conv, branch) if layer is not None)
    return {"backend": tables.winner(best, weight_bytes) if best else "eager", "tile": tile, "us": best}


def stem_winner(found: Asked) -> dict[str, Any]:
    """Whether a stem is faster as one kernel than its convolution on a backend and the pool: a row besides its key."""
    x, _ = found.inputs()
    (conv,), pool = found.layers, found.pool

    def apart(module: Any) -> Callable[[Tensor, None], Tensor]:
        run = module.bind_conv_bn_act(x, conv, None, found.epilogue, False)
        return lambda x, other: torch.max_pool2d(run(x, other), *pool)  # type: ignore[misc]

    ways: dict[str, Callable[[], Any]] = {
        "triton": lambda: backends.triton.bind_stem(x, conv, found.epilogue.relu, pool, False)  # type: ignore[arg-type]
    }
    for name in ("cudnn", "eager"):
        if backends.BACKENDS[name].unavailable() is None:
            ways[name] = partial(apart, backends.BACKENDS[name])
    times = _times(found, ways, x, None)
    return {"backend": min(times, key=times.__getitem__, default="eager"), "tile": None, "us": times}


def tail_winner(found: Asked) -> dict[str, Any]:
    """Whether a tail is faster as one kernel than conv by conv, and the tile: a row besides its key."""
    h, other = found.inputs()
    assert other is not None
    (conv, expand), shortcut, reduce = found.layers[:2], found.epilogue.shortcut, found.reduce
    ways: dict[str, Callable[[], Any]] = {}
    for tile in backends.triton.tail_tiles(h, conv, expand, shortcut, reduce):
        ways[str(tile)] = partial(backends.triton.bind_tail, h, conv, expand, other, shortcut, reduce, tile)
    ways["apart"] = lambda: backends.bind_apart(h, conv, expand, other, shortcut, reduce)
    tile_name, best = _fastest(_times(found, ways, h, other), "stage", ("apart",))
    faster = "stage" in best and best["stage"] < MARGIN * best.get("apart", float("inf"))
    return {"faster": faster, "tile": tile_name, "us": best}


def block_winner(found: Asked) -> dict[str, Any]:
    """Whether a block is faster as one kernel than conv by conv or by its tail, and the tile: a row besides its key."""
    x, _ = found.inputs()
    layers = whole.Layers.of(found)
    ways: dict[str, Callable[[], Any]] = {
        str(tile): partial(whole.bind_tile, x, layers, tile) for tile in whole.tiles(x, layers)
    }
    others: Ways = {"apart": partial(whole.apart, x, layers), "tail": partial(whole.by_tail, x, layers)}
    tile_name, best = _fastest(_times(found, {**ways, **others}, x, None), "block", others)
    rest = [best[name] for name in others if name in best]
    faster = "block" in best and best["block"] < MARGIN * min(rest, default=float("inf"))
    return {"faster": faster, "tile": tile_name, "us": best}


def _fastest(
    times: Mapping[str, float],
    kind: str,
    others: Collection[str],
    besides_us: Callable[[str], float] = lambda tile: 0.0,
) -> tuple[str | None, dict[str, float]]:
    """The fastest tile, None where there is none, and times by what a table names: those of `others`, its as `kind`.

    `besides_us` counts for a tile beside its time.
    """
    best = {name: us for name, us in times.items() if name in others}
    tiles = [name for name in times if name not in others]
    tile = min(tiles, key=lambda name: times[name] + besides_us(name), default=None)
    if tile is not None:
        best[kind] = times[tile]
    return tile, best


def _times(found: Asked, ways: Ways, x: Tensor, other: Tensor | None) -> dict[str, float]:
    """The median of each way that compiles, runs and is right, in microseconds."""
    few = x[:CHECKED], None if other is None else other[:CHECKED]
    with Tf32Unit() if backends.triton.in_tf32(x.dtype, x.device) else nullcontext():
        same = found.plain(*few)
    exact = found.plain(*(None if t is None else t.double() for t in few))  # type: ignore[arg-type]
    times = {}
    for name, bind in ways.items():
        try:
            run = bind()
            if run is None or not _right(run(x, other), same, exact):
                continue
            times[name] = median_us(lambda run=run: run(x, other))  # type: ignore[misc]
        except Exception:  # the compiler, the loader, the driver and memory fail in ways of their own: it is not used
            if x.is_cuda:
                torch.cuda.synchronize()  # raises if nothing more will run in this process
    return times


def _right(result: Any, same: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether a result's root mean square error is at most twice that of `same`."""
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    for y, theirs, truth in zip(outputs, same, exact, strict=True):
        ours, own = ((t[:CHECKED].double() - truth).square().mean().sqrt() for t in (y, theirs))
        if not ours <= 2 * own + 1e-6 * truth.abs().max():
            return False
    return True
