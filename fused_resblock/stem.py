"""A convolution, its norm, its ReLU and a max-pool that are modules of their own, run as one operation: a stem.

Each of these modules stays where it is and is called as ever. The convolution returns a `Pending` tensor instead of
computing; those behind it add themselves to what is pending, and the last one computes all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, dispatch, flat, leaves
from .frozen import Freezable
from .params import BatchNorm, Conv, Epilogue
from .pending import Expected, Pending, allowed, every
from .per_module import PerModule
from .plan import Unsupported
from .program import Operation, Program
from .programs import Before, Programs
from .swap import Swapped, intact, undone
from .touched import touch_statistics

#: elements below which to leave work to others, 0.1 ms on a CPU, takes more time than it saves: those of the output for
#: each module behind the convolution, 0.15 ns each, and those of the weight, which is packed at every call otherwise
SMALL = 1 << 19
_PACKING = 3  # what packing takes of an element in terms of those


class StemConv(Freezable):
    """Mixin of a convolution that begins a stem: it leaves its work to the last module of the stem.

    It computes as ever outside of its network, under autograd, with hooks or another forward on it or on what a module
    of the stem is in, while it is traced, and on an input that does not fit it. Unless its network becomes one
    function, it does so on a CPU on one that is `SMALL`, and, unless frozen, on a GPU where there are many, as within
    blocks: each takes longer to ask than to launch apart.
    """

    #: what the stem's modules are in; None if it was made by its class alone
    _fused_around: list[nn.Module] | None = None
    #: whether its network has many, which are not worth what each takes to ask on a GPU
    _fused_many = False
    #: the last shape, and where, for which to run as one did not pay
    _fused_small: tuple[torch.Size, torch.device] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if undone(StemConv, self):
            return type(self).forward(self, input)
        pending = self._pending(input)
        return super().forward(input) if pending is None else pending

    def _pending(self, x: Tensor) -> Pending | None:
        """What stands for the output if the work may be left to others, else None."""
        if torch.is_grad_enabled():
            self.look_again(x)
            return None
        if not isinstance(x, Tensor) or ((x.shape, x.device) == self._fused_small and not every()):
            return None
        if not dispatch.plain((x,)) or not allowed():
            return None
        around = self._fused_around
        if around is None or does_more(self) or any(map(does_more, around)) or changed(self) is not None:
            return None
        followers, programs = _programs.get(self) or ((), None)
        program: Any = None if programs is None else programs.find(x, self.unasked())
        if program is not None:
            return Pending(x, (self,), program.size, Expected(followers, program))
        weight: Any = self.weight
        if x.dim() != 4 or x.shape[0] == 0 or x.device != weight.device:
            return None
        if x.dtype != weight.dtype and dispatch.autocast_dtype(x) is None:
            return None
        conv = Conv(weight, None, None, *leaves.conv_geometry(self))
        if x.shape[1] != weight.shape[1] * conv.groups or min(conv.output_size(*x.shape[2:])) <= 0:
            return None
        size = conv.output_shape(x)
        if every() or self._pays(size):
            return Pending(x, (self,), size)
        self.__dict__["_fused_small"] = x.shape, x.device
        return None

    def _pays(self, size: tuple[int, ...]) -> bool:
        """Whether to run as one saves more than it takes: a pass over the output for each module, and the packing."""
        weight: Any = self.weight
        if weight.is_cuda:
            return self.unasked() or not self._fused_many
        return math.prod(size) * (self.__dict__["_fused_length"] - 1) + _PACKING * weight.numel() >= SMALL


class StemFollower(Swapped):
    """Mixin of a norm, ReLU or max-pool of a stem: joins what is pending, and computes it if it is the last one."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if undone(StemFollower, self):
            return type(self).forward(self, *args, **kwargs)
        x = args[0] if args and not kwargs else None
        if type(x) is not Pending:
            return self._alone(*args, **kwargs)
        program = x.program(self)
        if x.computed is not None or (program is None and (does_more(self) or not _joins(self, x.chain))):
            return self._alone(x.value())
        chain = (*x.chain, self)
        if len(chain) < chain[0].__dict__["_fused_length"] and not isinstance(self, nn.MaxPool2d):
            return x.behind(self)
        y = _run(x.source(), chain, program)
        if y is None:
            return super().forward(x.value())
        if getattr(self, "inplace", False):  # whoever holds the input sees what became of it
            x.computed = y
        return y

    def _alone(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        if self.training and not torch.compiler.is_compiling():
            touch_statistics([self])
        return y


def does_more(module: nn.Module) -> bool:
    """Whether something besides the forward of its class runs when the module is called."""
    return "forward" in module.__dict__ or leaves.hooked(module) or bool(nn.modules.module._has_any_global_hook())


def changed(module: nn.Module) -> str | None:
    """Why a module that was made part of a stem cannot be any more; None while it can."""
    if not intact(StemConv if isinstance(module, StemConv) else StemFollower, module):
        return "its class was changed"
    try:
        if isinstance(module, nn.Conv2d):
            leaves.conv_geometry(module)
        elif isinstance(module, nn.MaxPool2d):
            return "it returns indices" if module.return_indices else None
        elif not isinstance(module, nn.ReLU):
            leaves.norm_relu(module)
    except Unsupported as error:
        return str(error)
    return None


def _joins(module: nn.Module, chain: tuple[nn.Module, ...]) -> bool:
    """Whether the module may be computed together with those before it, in its present mode."""
    if changed(module) is not None:
        return False
    if isinstance(module, nn.MaxPool2d):
        return True
    if isinstance(module, nn.ReLU):
        return not isinstance(chain[-1], nn.ReLU)
    return len(chain) == 1 and not leaves.uses_batch_statistics(module)


#: of a stem's convolution, with the modules behind it, which may be part of other stems, too
_programs: PerModule[tuple[tuple[nn.Module, ...], Programs]] = PerModule("stem")


class _Program(Program):
    """That of a stem; `size` is the shape that its convolution gives."""

    def __init__(self, dtype: torch.dtype | None, operations: Sequence[Operation], size: tuple[int, ...]) -> None:
        super().__init__(dtype, operations)
        self.size = size


def _run(x: Tensor, chain: tuple[nn.Module, ...], program: Program | None) -> Tensor | None:
    """The result of a chain of modules on x; None if its parameters are no plain tensors.

    Args:
        x: the input.
        chain: the modules, in order.
        program: what computes them, if that is known.
    """
    if program is None:
        program = _program(x, chain)
    if program is None:
        return None
    flat.note(chain, program, lambda x: program.run(x)[0])
    return program(x)


def _program(x: Tensor, chain: tuple[nn.Module, ...]) -> Program | None:
    """The program of a chain, bound now and kept; None if its parameters are no plain tensors."""
    first, *followers = chain
    conv, relu = _conv_of(chain)
    tensors = [t for t in conv.tensors() if t is not None]
    if not dispatch.plain(tensors):
        return None
    known, programs = _programs.get(first) or ((), None)
    if programs is None or list(map(id, known)) != list(map(id, followers)):
        programs = Programs()
        _programs[first] = tuple(followers), programs
    modules = [inner for module in chain for inner in module.modules()]  # a norm may hold its ReLU
    before = Before(modules, tensors)
    program = _bind(x, chain, conv, relu)
    programs.keep(x, program, before, modules, tensors, all_modes=False)
    return program


def _conv_of(chain: tuple[nn.Module, ...]) -> tuple[Conv, bool]:
    """The chain's convolution with its norm, and whether a ReLU follows."""
    first, *rest = chain
    norm, relu = None, False
    for module in rest:
        if isinstance(module, nn.ReLU):
            relu = True
        elif not isinstance(module, nn.MaxPool2d):
            norm, relu = BatchNorm.of(module), leaves.norm_relu(module)
    return Conv(first.weight, first.bias, norm, *leaves.conv_geometry(first)), relu  # type: ignore[arg-type]


def _bind(x: Tensor, chain: tuple[nn.Module, ...], conv: Conv, relu: bool) -> Program:
    """The chain as a program."""
    first, pool = chain[0], chain[-1] if isinstance(chain[-1], nn.MaxPool2d) else None
    dtype = dispatch.autocast_dtype(x)
    example = backends.dense(x if dtype is None else x.to(dtype))
    backend = backends.check_name(first.__dict__["_fused_backend"])
    settings = () if pool is None else (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    whole = backends.bind_stem(example, conv, relu, settings, backend=backend) if settings else None
    size = conv.output_shape(x)
    if whole is not None:
        return _Program(dtype, [Operation(whole, 0, -1, 1, ())], size)
    run = backends.bind_conv_bn_act(example, conv, None, Epilogue(relu=relu), backend=backend)
    operations = [Operation(run, 0, -1, 1, ())]
    if settings:
        operations.append(Operation(lambda y, _: torch.max_pool2d(y, *settings), 1, -1, 2, (1,)))
    return _Program(dtype, operations, size)
