"""What a fused block looked up about its modules, and whether it still holds."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import leaves
from .per_module import is_kept
from .sampling import read, words
from .snapshot import containers, contents, holds_the_same
from .swap import Swapped, own_class
from .touched import listen, now, when

_VERSION, _POINTER, _STRIDE, _NUMEL = attrgetter("_version"), Tensor.data_ptr, Tensor.stride, Tensor.numel
_SETTINGS = (
    *("stride", "padding", "dilation", "groups", "padding_mode"),
    *("kernel_size", "ceil_mode", "return_indices", "inplace"),
)
#: what a layer may hold in its `__dict__`: settings, what `fuse` left there, tensors that are no parameters or buffers
_WATCHED = (
    *("eps", *_SETTINGS, "output_size"),
    *("_fused_plan", "_fused_backend", "_fused_length", "_fused_kernel", "_fused_stale"),
    *("weight", "bias", "running_mean", "running_var"),
)
_SLOTS = ("_modules", "_parameters", "_buffers")  # that a dictionary may be put in the place of
#: the layers that may be in a plan and have settings that it depends on
_PLANNED = (nn.Conv2d, nn.MaxPool2d, nn.ReLU)
#: a buffer of norms that no forward in eval mode reads
COUNTER = "num_batches_tracked"
_OF_ANY_MODULE = {*vars(nn.Module()), "_is_full_backward_hook"}


def _asks_itself(module: nn.Module) -> bool:
    """Whether this is a module of somebody's own within a block, whose forward may ask its attributes.

    A fused block does not: it is planned again where one is set.
    """
    given = "_fused_plan" in module.__dict__ or own_class(module).__module__.startswith("torch.nn.")
    return not given and not leaves.is_leaf(module)


def _collections(modules: Sequence[nn.Module]) -> list[tuple[Any, Any]]:
    """The dictionaries, lists and the like that modules of somebody's own hold in attributes, and what is in each."""
    found = []
    for module in modules:
        if _asks_itself(module) or (isinstance(module, Swapped) and not leaves.is_leaf(module)):
            found += [
                value
                for name, value in vars(module).copy().items()  # to which another thread may add
                if name not in _OF_ANY_MODULE and not name.startswith("_fused_") and not is_kept(value)
            ]
    return [(collection, contents(collection)) for collection in containers(found)]


def _planned_settings(module: nn.Module) -> tuple[Any, ...]:
    """The settings of a layer that a plan holds."""
    return tuple(getattr(module, name, None) for name in _SETTINGS)


class Watch:
    """Notices what a plan cannot see: modules replaced by hand, hooks and forwards added after fusing.

    Args:
        root: a block.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        inner = modules[1:]
        self._children = [(m._modules, name, child, type(child)) for m in modules for name, child in m._modules.items()]
        self._contained = [(m._modules, tuple(m._modules)) for m in modules]
        self._dictionaries = [(m, m._modules) for m in inner]
        self._planned = [(m, _planned_settings(m)) for m in inner if isinstance(m, _PLANNED)]
        self._inner = inner
        own = [m.__dict__ for m in inner if _asks_itself(m) and not isinstance(m, Swapped)]
        self._own = [
            (d, len(d), [(name, value) for name, value in d.copy().items() if name != "training"]) for d in own
        ]
        self._collections = _collections(modules)

    def same_modules(self) -> bool:
        """Whether every module is still where it was, of the same class and with the same settings."""
        for modules, name, child, cls in self._children:
            if modules.get(name) is not child or type(child) is not cls:
                return False
        if any(module._modules is not modules for module, modules in self._dictionaries):
            return False
        if any(tuple(modules) != names for modules, names in self._contained):
            return False
        for attributes, size, before in self._own:
            if len(attributes) != size or any(attributes.get(name) is not value for name, value in before):
                return False
        if not all(holds_the_same(*pair) for pair in self._collections):
            return False
        return all(_planned_settings(module) == settings for module, settings in self._planned)

    def obstacle(self) -> str | None:
        """Why inner modules must be called one by one; None when they need not."""
        if any(map(leaves.hooked, self._inner)):
            return "hooks on inner modules"
        if any(map(leaves.replaced, self._inner)):
            return "the forward of an inner module is overridden on the instance"
        return "global module hooks" if nn.modules.module._has_any_global_hook() else None


class Guard:
    """Whether everything is as it was when a program was bound: modules, settings, modes, hooks and tensors.

    It asks what `Watch` asks, and of every tensor what `folding.TensorCache` asks, but of flat lists that built-in
    functions walk: that takes a tenth of the time, and it is asked at every call. It holds the memory of CPU tensors,
    which it reads: a tensor may be given other memory by another thread in the midst of it.

    Args:
        modules: all that take part, without repetition; the first one, which the program belongs to, is not kept alive.
        tensors: everything that went into the program.
        all_modes: whether `training` matters of every module, and not of norms alone.

    Raises:
        RuntimeError: if a tensor is an inference tensor, which does not record its changes.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor], all_modes: bool) -> None:
        inner = self._modules = list(modules[1:])
        slots = [places for m in modules for places in (m._modules, m._parameters, m._buffers)]
        entries = [(places, name) for places in slots for name in places if name != COUNTER]
        entries += [(m.__dict__, name) for m in inner for name in (*_WATCHED, *_SLOTS) if name in m.__dict__]
        own = [m for m in inner if _asks_itself(m)]
        given = [(m.__dict__, name) for m in own for name in m.__dict__.copy() if not name.startswith("_fused_")]
        entries += [entry for entry in given if entry[1] != "training"]
        entries += [(m.__dict__, "training") for m in inner if all_modes or "eps" in m.__dict__]
        self._places, self._names = [place for place, _ in entries], [name for _, name in entries]
        self._values = [place[name] for place, name in entries]
        root = vars(modules[0])  # not kept: this guard lies in it, and a cycle would not be freed at once
        self._root = weakref.ref(modules[0])
        self._root_names = [name for name in (*_WATCHED, *_SLOTS) if name in root]
        self._root_names += ["training"] if all_modes or "eps" in root else []
        self._root_values = list(map(root.get, self._root_names))
        self._types = list(map(type, inner))
        self._containers = [m._modules for m in modules if not leaves.is_leaf(m)]
        self._contained = list(map(tuple, self._containers))  # in the order in which a `Sequential` calls them
        self._own = [m.__dict__ for m in own if not isinstance(m, Swapped)]  # a network tells by `_fused_stale`
        self._sizes = list(map(len, self._own))
        self._attributes = [m.__dict__ for m in inner]
        self._convs = [m.__dict__ for m in inner if isinstance(m, nn.Conv2d)]
        self._collections = _collections(modules)
        self._tensors = list(tensors)
        self._filters = [t for t in tensors if t.dim() > 1]
        listen()
        self._now = now()
        self._when = list(map(when, self._tensors))
        self._states = self._states_now()
        self._words, self._storages = words(self._tensors)
        # one copy touches them all at once; one after the other they would be as many misses of the cache in a row
        hooks = [hooks for m in inner for hooks in leaves.hook_dicts(m)]
        touched = (*self._places, *self._values, *inner, *hooks, *self._attributes, *self._tensors, *self._words)
        self._touched = list({id(thing): thing for thing in touched}.values())
        self._seen = read(self._words)

    def _states_now(self) -> tuple[list[Any], ...]:
        """Version, place and size of each tensor, and how each filter lies in memory."""
        tensors = self._tensors
        states = [list(map(state, tensors)) for state in (_VERSION, _POINTER, _NUMEL)]
        return *states, list(map(_STRIDE, self._filters))

    def _untouched(self) -> bool:
        """Whether what was touched since is other tensors."""
        latest = now()
        if list(map(when, self._tensors)) != self._when:
            return False
        self._now = latest
        return True

    def holds(self) -> bool:
        """Ask everything again."""
        self._touched.copy()  # into the cache
        root = vars(self._root())
        if not all(map(is_, map(root.get, self._root_names), self._root_values)):
            return False
        try:
            if not all(map(is_, map(getitem, self._places, self._names), self._values)):
                return False
        except KeyError:
            return False
        return (
            list(map(type, self._modules)) == self._types
            and list(map(tuple, self._containers)) == self._contained
            and list(map(len, self._own)) == self._sizes
            and not any(any(map(dict.get, self._attributes, repeat(name))) for name in leaves.HOOKS)
            and not any(map(contains, self._attributes, repeat("forward")))
            and not any(map(contains, self._convs, repeat("_conv_forward")))
            and not nn.modules.module._has_any_global_hook()
            and (self._now == now() or self._untouched())
            and self._states_now() == self._states
            and read(self._words) == self._seen
            and all(holds_the_same(*pair) for pair in self._collections)
        )


#: path, class and settings of a module
Entry = tuple[str, type, tuple[tuple[str, Any], ...]]
_PLAIN = (bool, int, float, str, type(None))


def layout(block: nn.Module) -> tuple[Entry, ...]:
    """Path, class and settings of every module in the block: what `unchanged` compares where identities cannot be.

    It is copied and pickled with the block. Settings are plain values: numbers, strings, and tuples,
    lists and dictionaries of them.
    """
    return tuple((name, type(module), _settings(module)) for name, module in block.named_modules() if name)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    found = dict(vars(module))
    if _asks_itself(module):
        classes = type(module).__mro__
        defaults = [vars(cls) for cls in reversed(classes[: classes.index(nn.Module)])]
        found = {name: value for attributes in (*defaults, found) for name, value in attributes.items()}
        names = [name for name in found if name not in _OF_ANY_MODULE and not name.startswith(("__", "_fused_"))]
    else:
        names = [name for name in _SETTINGS if name in found]
    return tuple((name, copy.deepcopy(found[name])) for name in names if _is_plain(found[name]))


def _is_plain(value: object) -> bool:
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return all(map(_is_plain, value)) if isinstance(value, tuple | list) else isinstance(value, _PLAIN)


def unchanged(block: nn.Module, expected: tuple[Entry, ...]) -> bool:
    """Whether the block's modules have their classes and settings, and no hooks; `torch.compile` can trace this."""
    modules = dict(block.named_modules())
    if len(modules) != len(expected) + 1:
        return False
    for name, cls, settings in expected:
        if name not in modules or type(modules[name]) is not cls or leaves.replaced(modules[name]):
            return False
        for key, value in settings:
            if getattr(modules[name], key, None) != value:
                return False
        for hooks in leaves.hook_dicts(modules[name]):
            if len(hooks) > 0:
                return False
    return True


def untraceable(x: object) -> bool:
    """Whether the block's own forward must be recorded node by node: a `torch.fx` proxy or `torch.jit.trace`."""
    return isinstance(x, fx.Proxy) or torch.jit.is_tracing()
