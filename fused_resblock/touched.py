"""Edits of tensors that their version counters do not record: steps of fused optimizers, batch norm in train mode.

What was computed from tensors asks `when` they were last touched, besides their versions. A touch is noted after the
edit, by address of the storage, so that views of a storage are touched with it and nothing is kept alive.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .params import PLAIN_TYPES

LIMIT = 100_000  # addresses

_lock = threading.Lock()
_now = [0]
_when: dict[int, int] = {}
_forgotten = [0]  # of an address that is not known: as late as the last that was let go


def now() -> int:
    """Another number after each touch."""
    return _now[0]


def when(tensor: Tensor) -> int:
    """The number of the last touch of a tensor's storage, or a later one."""
    return _when.get(tensor.untyped_storage().data_ptr(), _forgotten[0]) if _when or _forgotten[0] else 0


def touch(tensors: Iterable[Tensor | None]) -> None:
    """Note that tensors may have been edited in a way that their version counters do not record."""
    known = [t for t in tensors if t is not None and type(t) in PLAIN_TYPES]
    addresses = {t.untyped_storage().data_ptr() for t in known if t.layout is torch.strided}  # others have no storage
    with _lock:  # two at once would share a number, and what asks between them would miss the second
        if len(_when) > LIMIT:
            _forgotten[0] = _now[0]
            _when.clear()
        number = _now[0] + 1
        _when.update(dict.fromkeys(addresses, number))
        _now[0] = number


def touch_statistics(norms: Iterable[nn.Module]) -> None:
    """Touch the running statistics of norms that update them at each call, as those in train mode do."""
    running: list[Any] = [norm for norm in norms if norm.training and getattr(norm, "running_mean", None) is not None]
    if running:
        touch([statistic for norm in running for statistic in (norm.running_mean, norm.running_var)])


@functools.cache
def listen() -> None:
    """Touch what fused optimizers step over, from now on; also what optimizers of others do, who may use any kernel."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    own = type(optimizer).__module__.startswith("torch.optim")
    groups = [group for group in optimizer.param_groups if not own or group.get("fused")]
    if groups:
        touch([p for group in groups for p in group["params"]])
