"""What a forward holds in a GPU's memory besides weights and images, counted without one.

`python -m benchmarks.activations` or `make activations`.

Networks run on CPU tensors as they would on the GPU of the table of winners that ships, but nothing is launched: every
tensor is allocated as ever and not computed, and torch's profiler tells of each allocation. Eager networks likewise.
What counts is what is held after the first calls (weights in another form, folded norms), and the peak of a call. What
is not seen: workspaces that cuDNN asks for itself.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fused_resblock as frb
from fused_resblock import backends, flatten
from fused_resblock.backends import Problem, cudnn, triton, tuned
from fused_resblock.kernels.gpu import Gpu
from fused_resblock.kernels.launch import Launch
from fused_resblock.models import ARCHITECTURES, build
from fused_resblock.params import output_size

from .result_tables import write_table
from .results import FOLDER

RESULTS = FOLDER / "activations.csv"
HEADERS = ("table", "network", "dtype", "batch", "eager_mib", "fused_mib", "frozen_mib", "held_mib")
BATCHES = (1, 32, 128)
SIZE = 224
WARM_UP = 6  # calls until everything is bound, and a network is one function


def _convolved(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Memory for a convolution's result; `geometry` is stride, padding and dilation."""
    size = output_size(*x.shape[2:], *weight.shape[2:], *geometry)
    empty = partial(torch.empty, dtype=x.dtype, memory_format=torch.channels_last)
    return empty((x.shape[0], weight.shape[0], *size))


@contextmanager
def nothing_computed() -> Iterator[None]:
    """Within this context CPU tensors are taken for those of an H100, and convolutions and norms allocate only."""
    tables = tuple(table for table, _ in tuned.known() if table.gpu == Gpu())
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (Launch, "__call__", lambda launch, *activations: None),
        (backends, "Problem", lambda device, *rest, **more: Problem("cuda", *rest, **more)),
        (backends, "may_be_triton", lambda backend, device: backend in ("auto", "triton")),
        (triton, "unavailable", lambda: None),
        (cudnn, "unavailable", lambda: None),
        (tuned, "_of_gpu", lambda device: tables),
        (torch, "cudnn_convolution_relu", lambda x, w, b, *geometry: _convolved(x, w, *geometry[:3])),
        (torch, "cudnn_convolution_add_relu", lambda x, w, z, a, b, *geometry: _convolved(x, w, *geometry[:3])),
        (F, "conv2d", lambda x, w, b, *geometry: _convolved(x, w, *geometry[:3])),
        (F, "batch_norm", lambda x, *parameters: torch.empty_like(x)),
        (F, "relu", lambda x, inplace: x if inplace else torch.empty_like(x)),
        (flatten, "_equal", lambda mine, others: True),
    ]
    with ExitStack() as stack:
        backends.resolve.cache_clear()
        for place, name, instead in replaced:
            stack.enter_context(patch.object(place, name, instead))
        yield
    backends.resolve.cache_clear()


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call allocates and does not free, and the most that it holds at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
        gc.collect()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most


def count(network: str, batch: int, kind: str) -> tuple[float, float]:
    """MiB that a network's forward in fp16 takes at its peak besides weights and images, and those held between calls.

    `kind` is "eager", "fused" or "frozen".
    """
    with torch.device("meta"):
        model = build(network).eval().to(torch.float16)
    backends.clear_caches()
    gc.collect()  # what is freed later is this network's own
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.empty(batch, 3, SIZE, SIZE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    with nothing_computed(), torch.no_grad():
        if kind != "eager":
            model = frb.fuse(model, inplace=True, frozen=kind == "frozen")

        def warm_up() -> None:
            for _ in range(WARM_UP):
                model(x)

        held, _ = allocated(warm_up)
        _, most = allocated(lambda: model(x))
    return (held + most) / 2**20, held / 2**20


def rows(networks: Sequence[str], batches: Sequence[int]) -> Iterator[list[object]]:
    """A line of the table for each network and batch."""
    table = next(table.name for table, _ in tuned.known() if table.gpu == Gpu())
    for network in networks:
        for batch in batches:
            eager, _ = count(network, batch, "eager")
            fused, held = count(network, batch, "fused")
            frozen, _ = count(network, batch, "frozen")
            yield [table, network, "float16", batch, *(f"{mib:.1f}" for mib in (eager, fused, frozen, held))]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activations", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=tuple(ARCHITECTURES), default=tuple(ARCHITECTURES))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.csv")
    args = parser.parse_args(argv)
    if min(args.batches) < 1:
        parser.error(f"batches must be at least 1, got {min(args.batches)}")
    total = len(args.networks) * len(args.batches)
    lines = list(tqdm(rows(args.networks, args.batches), total=total, disable=None))
    write_table(args.out, HEADERS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
