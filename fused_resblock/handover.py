"""What a chain's last kernel computed of the next chain waits here until that one is called.

The kernel of `kernels.expand_shift` that ends a chain of blocks can compute the first convolution of the next chain as
well, which then need not read the activation again. Which chain is next is seen when one is bound: it is called with
the very tensor that another has just returned. From then on that other one computes the head too, and leaves it here.
It is taken only with that tensor, unchanged, and under the settings that it was computed with.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backends.folding import kept
from .per_module import PerModule
from .program import Program, signature
from .programs import Programs
from .runner import BoundStep
from .sampling import read, words
from .watch import Guard

#: heads in a row that nobody took, after which a chain computes no more of them
PATIENCE = 32

#: the programs of every chain that has run as one
programs: PerModule[Programs] = PerModule("programs")


class Link:
    """Which chain comes behind one, None where none does any more, and how many heads in a row it did not take."""

    def __init__(self, following: nn.Module) -> None:
        self.following: weakref.ref[nn.Module] | None = weakref.ref(following)
        self.unclaimed = 0

    def count(self) -> None:
        """Count one more head, or one more attempt to compute any."""
        self.unclaimed += 1
        if self.unclaimed > PATIENCE:
            self.following = None


class Ahead(NamedTuple):
    """A chain's first step on `y`, computed ahead of its call.

    `guard` is that of the chain's programs when the head was computed: as long as it is in force, and holds, nothing
    that went into the head has changed.
    """

    link: Link
    step: BoundStep
    guard: Guard
    y: weakref.ref[Tensor]
    state: tuple[object, ...]
    signature: tuple[object, ...]
    capture: object
    value: Tensor


_Waiting = weakref.WeakKeyDictionary[nn.Module, Ahead]  # by who may take it


class _Thread(threading.local):
    """What belongs to the forward that a thread is in."""

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[nn.Module], weakref.ref[Tensor]] | None = None  # a chain and what it returned
        self.waiting: _Waiting = weakref.WeakKeyDictionary()


_thread = _Thread()
_links: PerModule[Link] = PerModule("link")


def following(stage: nn.Module) -> nn.Module | None:
    """The chain behind one, where it is known."""
    link = _links.get(stage)
    return None if link is None or link.following is None else link.following()


def attempt(stage: nn.Module) -> nn.Module | None:
    """The chain behind one, whose head is to be computed from now on.

    It counts as if a head had been left: where the next chain changes at every step, as in training, it ends.
    """
    target = following(stage)
    if target is not None:
        _links[stage].count()
    return target


def learn(stage: nn.Module, x: Tensor) -> nn.Module | None:
    """The chain that returned x last, if it is not known yet what comes behind that one: `stage` does."""
    last, _thread.last = _thread.last, None
    before = None if last is None or last[1]() is not x else last[0]()
    if before is None or before is stage or _decided(before):
        return None
    _links[before] = Link(stage)
    return before


def _decided(stage: nn.Module) -> bool:
    """Whether it is known which chain comes behind one, which still lives, or that none is to be given heads."""
    link = _links.get(stage)
    return link is not None and (link.following is None or link.following() is not None)


def fits(stage: nn.Module, program: Program) -> bool:
    """Whether what the program computes of the next chain, if anything, is still for somebody."""
    return program.ends.ahead is None or following(stage) is not None


def note(stage: nn.Module, y: Tensor, program: Program) -> None:
    """Remember what a chain returned, if its last kernel could compute more and it is not known for whom."""
    if program.ends.tail and program.ends.ahead is None and not _decided(stage):
        _thread.last = weakref.ref(stage), weakref.ref(y)


def run(stage: nn.Module, program: Program, x: list[Tensor]) -> Tensor:
    """The program's result, with the head that waits for the chain, and leaving the next chain its head.

    Args:
        stage: the chain.
        program: one of its programs.
        x: holds the input, and is emptied: so that dies when it is read for the last time, if nobody else has it.
    """
    head = _claim(stage, program, x[0]) if _thread.waiting else None
    if program.ends.ahead is None:
        y, _ = program.run(x, head)
        note(stage, y, program)
        return y
    target = following(stage)
    known = None if target is None else programs.get(target)
    guard = None if known is None else known.guard  # of the time before: the next chain may be bound anew meanwhile
    with torch.inference_mode(False), torch.no_grad():  # tensors of the inference mode do not record their changes
        y, ahead = program.run(x, head)
    assert ahead is not None
    if target is not None:
        _leave(_links[stage], target, guard, program.ends.ahead, y, ahead)
    return y


def _leave(link: Link, target: nn.Module, guard: Guard | None, step: BoundStep, y: Tensor, value: Tensor) -> None:
    """Leave the next chain its head."""
    link.count()
    _thread.waiting.pop(target, None)
    if link.following is not None and guard is not None:
        alive = weakref.ref(y, partial(_forget, _thread.waiting, weakref.ref(target)))
        _thread.waiting[target] = Ahead(link, step, guard, alive, _state(y), signature(y), _capture(y), value)


def _forget(waiting: _Waiting, target: weakref.ref[nn.Module], y: weakref.ref[Tensor]) -> None:
    """Let a head go whose `y` is gone: nobody can come with it any more."""
    module = target()
    head = None if module is None else waiting.get(module)
    if module is not None and head is not None and head.y is y:
        waiting.pop(module, None)


def _claim(stage: nn.Module, program: Program, x: Tensor) -> list[Tensor] | None:
    """The head that waits for a chain, alone in a list, if it is one of x and of the program's first step."""
    head = _thread.waiting.pop(stage, None)
    if head is None or head.y() is not x or head.step is not program.ends.first:
        return None
    own = programs.get(stage)
    if own is None or own.guard is not head.guard:  # weights, say, have changed since
        return None
    if head.state != _state(x) or head.signature != signature(x):
        return None
    if head.capture is not _capture(x):
        return None
    head.link.unclaimed = 0
    return [head.value]


def _state(y: Tensor) -> tuple[object, ...]:
    """What an edit of y changes: its version, its place, sampled words of memory on a CPU; and the stream on a GPU."""
    stream = torch.cuda.current_stream(y.device).cuda_stream if y.is_cuda else None
    return y._version, y.data_ptr(), y.stride(), stream, *read(words([y])[0])


def _capture(y: Tensor) -> object:
    """None outside of a CUDA graph's capture; in one by `capture` its list of what is kept; in others always another.

    Only the first kind is known to hold both chains: what one graph computes must not be missing in another.
    """
    if not y.is_cuda or not torch.cuda.is_current_stream_capturing():
        return None
    found = kept()
    return object() if found is None else found
