"""A convolution, its norm, its ReLU and a max-pool that are modules of their own, run as one operation: a stem.

Each of these modules stays where it is and is called as ever. The convolution returns a `Pending` tensor instead of
computing; those behind it add themselves to what is pending, and the last one computes all of it at once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import backends, dispatch, flat, leaves
from .frozen import Freezable
from .params import BatchNorm, Conv, Epilogue
from .pending import Pending, allowed, scope
from .plan import Unsupported
from .program import Operation, Program
from .programs import Programs
from .swap import Swapped, base_class, intact, swapped_class, undo
from .tracing import graph_of
from .watch import Guard


class FusedNetwork(Freezable):
    """Mixin of a network around blocks: its stems may leave work pending while its forward runs.

    If it is frozen, and called with one tensor, its forward becomes one function; see `flat`.
    """

    _fused_stems: tuple[tuple[str, ...], ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = base_class(cls).forward

        def scoped(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if allowed():
                return own(self, *args, **kwargs)
            with scope():
                return own(self, *args, **kwargs)

        @functools.wraps(own)  # whoever traces the network asks for the names of its arguments
        def forward(self: FusedNetwork, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                self.look_again(*args, *kwargs.values())
                return own(self, *args, **kwargs)
            if self.unasked() and len(args) == 1 and not kwargs and dispatch.plain(args):
                return flat.run(self, functools.partial(scoped, self), args[0])
            return scoped(self, *args, **kwargs)

        cls.forward = forward


class StemConv(Freezable):
    """Mixin of a convolution that begins a stem: it leaves its work to the last module of the stem.

    It computes as ever outside of its network, under autograd, with hooks, while it is traced, and on an input that
    does not fit it.
    """

    def forward(self, input: Tensor) -> Tensor:
        size = self._deferred(input)
        return super().forward(input) if size is None else Pending(input, (self,), size)

    def _deferred(self, x: Tensor) -> tuple[int, ...] | None:
        """The output's shape if the work may be left to others, else None."""
        if torch.is_grad_enabled():
            self.look_again(x)
            return None
        if not dispatch.plain((x,)) or not allowed():
            return None
        weight: Any = self.weight
        if x.dim() != 4 or x.shape[0] == 0 or x.device != weight.device or _hooked(self):
            return None
        if (x.dtype != weight.dtype and dispatch.autocast_dtype(x) is None) or not intact(StemConv, self):
            return None
        try:
            conv = Conv(weight, None, None, *leaves.conv_geometry(self))
        except Unsupported:
            return None
        fits = x.shape[1] == weight.shape[1] * conv.groups and min(conv.output_size(*x.shape[2:])) > 0
        return conv.output_shape(x) if fits else None


class StemFollower(Swapped):
    """Mixin of a norm, ReLU or max-pool of a stem: joins what is pending, and computes it if it is the last one."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Pending:
            return super().forward(input)
        if input.computed is not None or _hooked(self) or not _joins(self, input.chain):
            return super().forward(input.value())
        chain = (*input.chain, self)
        if len(chain) < chain[0].__dict__["_fused_length"] and not isinstance(self, nn.MaxPool2d):
            return input.behind(self)
        y = _run(input.source(), chain)
        return super().forward(input.value()) if y is None else y


def _hooked(module: nn.Module) -> bool:
    """Whether something besides the forward runs when the module is called."""
    return leaves.hooked(module) or bool(nn.modules.module._has_any_global_hook())


def _joins(module: nn.Module, chain: tuple[nn.Module, ...]) -> bool:
    """Whether the module may be computed together with those before it, in its present mode."""
    if not intact(StemFollower, module):
        return False
    if isinstance(module, nn.MaxPool2d):
        return True
    if isinstance(module, nn.ReLU):
        return not isinstance(chain[-1], nn.ReLU)
    return len(chain) == 1 and not leaves.uses_batch_statistics(module)


_programs: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Programs]] = weakref.WeakKeyDictionary()


def _run(x: Tensor, chain: tuple[nn.Module, ...]) -> Tensor | None:
    """The result of a chain of modules on x; None if its parameters are no plain tensors."""
    last = chain[-1]
    identities = tuple(map(id, chain))  # the guard keeps all but the last alive, so they stay unique
    known, programs = _programs.get(last, (None, None))
    if programs is None or known != identities:
        programs = Programs()
        _programs[last] = identities, programs
    program = programs.find(x, chain[0].unasked())  # type: ignore[operator]
    if program is None:
        program, tensors = _bind(x, chain)
        if not dispatch.plain(tensors):
            return None
        programs.keep(x, program, lambda: Guard(chain[::-1], tensors, all_modes=False))
    flat.note(chain, program, program)
    return program(x)


def _bind(x: Tensor, chain: tuple[nn.Module, ...]) -> tuple[Program, list[Tensor]]:
    """The chain as a program, and the parameters in it."""
    first, *rest = chain
    norm, relu, pool = None, False, None
    for module in rest:
        if isinstance(module, nn.MaxPool2d):
            pool = module
        elif isinstance(module, nn.ReLU):
            relu = True
        else:
            norm, relu = BatchNorm.of(module), leaves.norm_relu(module)
    conv = Conv(first.weight, first.bias, norm, *leaves.conv_geometry(first))  # type: ignore[arg-type]
    dtype = dispatch.autocast_dtype(x)
    example = backends.dense(x if dtype is None else x.to(dtype))
    backend = backends.check_name(first.__dict__["_fused_backend"])
    tensors = [t for t in conv.tensors() if t is not None]
    settings = () if pool is None else (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    whole = backends.bind_stem(example, conv, relu, settings, backend=backend) if settings else None
    if whole is not None:
        return Program(dtype, [Operation(whole, 0, -1, 1, ())]), tensors
    run = backends.bind_conv_bn_act(example, conv, None, Epilogue(relu=relu), backend=backend)
    operations = [Operation(run, 0, -1, 1, ())]
    if settings:
        operations.append(Operation(lambda y, _: torch.max_pool2d(y, *settings), 1, -1, 2, (1,)))
    return Program(dtype, operations), tensors


def find_networks(module: nn.Module, blocks: Collection[nn.Module], name: str = "") -> Iterator[tuple[str, fx.Graph]]:
    """The name and the graph of every network around residual blocks, itself outside of them.

    Where a forward cannot be traced, the modules in it that hold blocks are looked at one by one.
    """
    if module in blocks or not any(m in blocks for m in module.modules()):
        return
    try:
        if not isinstance(module, FusedNetwork):
            swapped_class(FusedNetwork, type(module))
        graph = graph_of(module, blocks)
    except Exception:  # no graph, or no class can be derived from the module's
        for child_name, child in module.named_children():
            yield from find_networks(child, blocks, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, graph


def find_stems(module: nn.Module, graph: fx.Graph) -> list[tuple[str, ...]]:
    """The names, within a network, of the modules of every stem in the graph of its forward; fused ones come first.

    A stem is a convolution followed by a batch norm, a ReLU and a max-pool, some of which may be absent, each of them
    reading the one before it and nothing else reading what lies between.
    """
    modules = dict(module.named_modules())
    fused: tuple[tuple[str, ...], ...] = module._fused_stems if isinstance(module, FusedNetwork) else ()
    found = [stem for stem in fused if isinstance(modules.get(stem[0]), StemConv)]
    for node in graph.nodes:
        names, kind, end = [str(node.target)], 0, node
        if node.op != "call_module" or _kind(modules[names[0]]) != 0:
            continue
        while len(end.users) == 1 and end.next in end.users:
            end = end.next
            following = modules[str(end.target)] if end.op == "call_module" else None
            if following is None or _kind(following) <= kind:
                break
            kind = _kind(following)
            names.append(str(end.target))
        if len(names) > 1:
            found.append(tuple(names))
    return found


def _kind(module: nn.Module) -> int:
    """0 for a convolution, 1 for a norm, 2 for a ReLU, 3 for a max-pool that a stem may hold; -1 for anything else."""
    if isinstance(module, Swapped):
        return -1
    try:
        leaves.check_untouched(module)
        if isinstance(module, nn.Conv2d):
            leaves.conv_geometry(module)
            return 0
        if type(module) is nn.ReLU:
            return 2
        if type(module) is nn.MaxPool2d:
            return -1 if module.return_indices else 3
        leaves.norm_relu(module)
    except Unsupported:
        return -1
    return 1


def fuse_network(network: nn.Module) -> None:
    """Give a network, without any stem so far, the class of one."""
    network.__class__ = swapped_class(FusedNetwork, type(network))
    network.__dict__["_fused_stems"] = ()


def fuse_stem(network: nn.Module, stem: Sequence[str], backend: str) -> None:
    """Give the modules of a stem, which begins with a convolution, and their network the classes that fuse them.

    Args:
        network: the module whose forward calls them.
        stem: their names in the network.
        backend: a backend's name or "auto".
    """
    if not isinstance(network, FusedNetwork):
        fuse_network(network)
    first, *rest = (network.get_submodule(path) for path in stem)
    first.__dict__["_fused_backend"] = backend
    if isinstance(first, StemConv):  # fused before
        return
    network.__dict__["_fused_stems"] += (tuple(stem),)
    first.__class__ = swapped_class(StemConv, type(first))
    first.__dict__["_fused_length"] = len(stem)
    for module in rest:
        if not isinstance(module, StemFollower):  # a ReLU may serve several stems
            module.__class__ = swapped_class(StemFollower, type(module))


def unfuse_stem(module: nn.Module) -> None:
    """Take the class of a stem's module, or of a network with stems, back, if the module is one."""
    for mixin in (FusedNetwork, StemConv, StemFollower):
        if undo(mixin, module):
            for attribute in ("_fused_stems", "_fused_backend", "_fused_length"):
                module.__dict__.pop(attribute, None)


def obstacle(network: FusedNetwork, stem: Sequence[str]) -> str | None:
    """Why the modules of a stem would compute one by one if they were called now; None when they would not."""
    modules = dict(network.named_modules())
    for path in stem:
        module = modules.get(path)
        if not isinstance(module, (StemConv, StemFollower)):
            return f"{path} was replaced"
        if _hooked(module):
            return f"hooks on {path}"
        if "forward" in module.__dict__:
            return f"the forward of {path} is overridden on the instance"
        if hasattr(module, "running_mean") and leaves.uses_batch_statistics(module):
            return "batch statistics (train mode)"
    return None
