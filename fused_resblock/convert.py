"""`fuse` and `unfuse`: give the residual blocks of a model their fused class, and take it away again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from . import backends
from .flat import know
from .formats import Spread
from .frozen import Freezable
from .graph_modules import FusedGraphModule, fuse_network
from .head import Classifier, GlobalPool, find_heads, fuse_head
from .modules import FusedBlock, fuse_block
from .network import FusedNetwork, fuse_stem, know_graph
from .per_module import forget
from .plan import Plan, Unsupported
from .recognize import looks_residual, recognize
from .stage import FusedStage, fuse_stage, is_stage
from .stem import StemConv, StemFollower
from .stems import find_networks, find_stems, opened, worth_it
from .swap import swapped_class, undo
from .tracing import Traced

_LEFT_OUT = "left out by filter_fn"
#: of all classes that `fuse` gives
_MIXINS = (FusedBlock, FusedStage, FusedNetwork, FusedGraphModule, StemConv, StemFollower, GlobalPool, Classifier)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def fuse(
    model: nn.Module,
    *,
    backend: str = "auto",
    inplace: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    stages: bool | str = True,
    stems: bool = True,
    heads: bool = True,
    frozen: bool = False,
) -> nn.Module:
    """Make the residual blocks of a model fast.

    Each module whose `torch.fx` graph is conv-norm-ReLU steps and one residual add becomes an instance of a fused
    subclass of its own class: the same object with the same parameters, buffers, submodules, hooks and `state_dict`.
    Nothing is copied or folded into the parameters, so training, `load_state_dict` and `.to()` go on as before.

    Args:
        model: any module; torchvision's and timm's ResNets, or a class of your own.
        backend: "auto", "triton", "cudnn", "onednn" or "eager", for all blocks of this call.
        inplace: change `model` itself; otherwise a deep copy is changed and `model` stays as it is.
        filter_fn: called with the name and the module, as `model` has it, of each block, of each convolution that
            begins a stem, and of the pool and the classifier of a head; False leaves it alone.
        strict: raise if a residual block that filter_fn does not leave out could not be fused.
        stages: also run the blocks of an `nn.Sequential` (`layer1` and so on) as one chain; see `FusedStage`. Where a
            measured table says that it is faster, a bottleneck, or its tail and the head of the next one, are then one
            kernel; "kernel" asks for it of tails wherever it can run. False here, and for `stems` and `heads`, leaves
            what an earlier call has made as it is: `unfuse` first to be rid of it.
        stems: also run a convolution, its norm, its ReLU and a max-pool that stand outside of blocks as one operation.
        heads: also run the global average pool and the classifier behind the blocks faster; in fp16 and bf16 on a CPU.
        frozen: promise that weights, statistics, modules, settings and hooks stay as they are, as `torch.compile` has
            it with `freezing`. What was made of them is then used without looking, and a change is not noticed, until
            the next `load_state_dict`, `.to()`, `fuse`, or forward under autograd or in train mode.

    Returns:
        The fused model. `explain` says what became of each block.

    Raises:
        TypeError: if model is not an `nn.Module`, filter_fn no function, or an option but `stages` of another type.
        ValueError: if the backend's name is unknown, or `stages` neither True, False nor "kernel"; in strict mode, if a
            residual block was not fused.
        RuntimeError: if the backend is not available on this machine.

    On an error the model is as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(stages, bool) and not (isinstance(stages, str) and stages == "kernel"):
        raise ValueError(f'stages must be True, False or "kernel", got {stages!r}')
    options = {"inplace": inplace, "strict": strict, "stems": stems, "heads": heads, "frozen": frozen}
    for option, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{option} must be True or False, got {value!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of a name and a module, got {filter_fn!r}")
    backends.check_name(backend)
    found = list(blocks(model, filter_fn))  # everything that can fail comes before the first change
    kept = [(name, outcome) for name, _, outcome in found if isinstance(outcome, str) and outcome != _LEFT_OUT]
    if strict and kept:
        reasons = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in kept)
        raise ValueError(f"model must hold only blocks that can be fused when strict, got {reasons}")
    networks = list(_networks(model, found)) if stems or heads or frozen else []
    left_out = set() if filter_fn is None else _left_out(model, networks, filter_fn, stems, heads)
    if not inplace:
        model = _copied(model)
    with _all_or_nothing(model):
        within = tuple(f"{path}." for path, _, _ in found)
        planned = {path: isinstance(outcome, Plan) for path, _, outcome in found}
        for name, (graph, *_) in networks:
            network, prefix = model.get_submodule(name), f"{name}." if name else ""
            for path in find_heads(network, graph) if heads else ():
                if prefix + path not in left_out:
                    fuse_head(network.get_submodule(path), backend)
            inner = {path[len(prefix) :]: plan for path, plan in planned.items() if path.startswith(prefix)}
            fused = any(inner.values())
            spread = Spread(network, graph, inner)
            rows = spread.unnoticed(find_stems(network, graph)) if stems else []
            pays = worth_it(network, rows, fused, spread.nchw)
            rows = [stem for stem in rows if prefix + stem[0] not in left_out] if pays else []
            if rows:
                fuse_network(network)
                network.__dict__["_fused_format"] = spread.returned(rows)
            for stem in rows:
                fuse_stem(network, stem, backend, many=not fused or (prefix + stem[0]).startswith(within))
        for name, _, outcome in found:
            if isinstance(outcome, Plan):
                fuse_block(model.get_submodule(name), outcome, backend)
        for module in filter(is_stage, model.modules()) if stages else ():
            fuse_stage(module, kernel=stages == "kernel")
        for name, traced in networks:
            network = model.get_submodule(name)
            if frozen and not isinstance(network, (FusedNetwork, FusedStage)):
                fuse_network(network)
            if isinstance(network, FusedNetwork):
                know_graph(network, traced)
                know(network, traced, frozen)
        for module in model.modules():
            if isinstance(module, Freezable):
                module.freeze(frozen)
    return model


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give modules their classes and attributes back if what is done within fails: a class may refuse its change."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
            vars(module).clear()
            vars(module).update(attributes)
        raise


def _networks(model: nn.Module, found: Sequence[tuple[str, nn.Module, Plan | str]]) -> Iterator[tuple[str, Traced]]:
    """What `find_networks` finds around blocks; those that `filter_fn` leaves out stay closed."""
    every = {module for _, module, _ in found}
    kept = [module for _, module, outcome in found if isinstance(outcome, str) and outcome != _LEFT_OUT]
    return find_networks(model, every, every - opened(kept))


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in the same modes: torchvision's graph modules, wherever they are, copy themselves into train mode.

    Its tensors are ordinary ones also where it is made in inference mode: others do not record their changes.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.inference_mode(False):
        copied = copy.deepcopy(model)
    for name, module in copied.named_modules():  # a module comes before those in it, whose modes `train` sets, too
        if module.training != modes.get(name, module.training):
            module.train(modes[name])
    return copied


def _left_out(
    model: nn.Module,
    networks: Sequence[tuple[str, Traced]],
    filter_fn: Callable[[str, nn.Module], bool],
    stems: bool,
    heads: bool,
) -> set[str]:
    """The names of the pools, the classifiers and the stems' convolutions that `filter_fn` leaves alone."""
    found = set()
    for name, (graph, *_) in networks:
        network, prefix = model.get_submodule(name), f"{name}." if name else ""
        paths = find_heads(network, graph) if heads else []
        paths += [stem[0] for stem in find_stems(network, graph)] if stems else []
        found |= {prefix + path for path in paths if not filter_fn(prefix + path, network.get_submodule(path))}
    return found


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused block of `model` its own class back, in place, and return the model.

    Parameters, buffers and hooks stay; blocks built as `FusedBasicBlock` and the like become the reference classes.
    A class that somebody derived from one of those has no class behind it to go back to, and stays what it is.
    Nothing may call the model meanwhile.

    Raises:
        TypeError: if model is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Freezable):
            module.freeze(False)
        forget(module)
        for mixin in _MIXINS:
            undo(mixin, module)
    return model


def blocks(
    model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module, Plan | str]]:
    """Every residual block of a model: its name, its module, and its plan or the reason why it has none."""
    yield from _walk("", model, filter_fn, set())


def _walk(
    name: str, module: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None, seen: set[int]
) -> Iterator[tuple[str, nn.Module, Plan | str]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    found = False
    if not isinstance(module, FusedBlock):  # the innermost module that is a block is the block
        for child_name, child in module.named_children():
            for entry in _walk(f"{name}.{child_name}" if name else child_name, child, filter_fn, seen):
                found = True
                yield entry
    if not found:
        outcome = examine(module)
        if outcome is not None:
            if filter_fn is not None and not filter_fn(name, module):
                outcome = _LEFT_OUT
            yield name, module, outcome


def examine(module: nn.Module) -> Plan | str | None:
    """A module's plan, the reason why a residual block has none, or None for anything but a residual block."""
    if isinstance(module, FusedBlock):
        return module._fused_plan or module._fused_reason or "cannot be fused"
    inner = (m for m in module.modules() if m is not module)
    # else it only holds others, as in a graph module; the class of a ScriptModule has no forward at all
    called = getattr(type(module), "forward", None) is not nn.Module.forward
    if isinstance(module, _CONTAINERS) or not called or not any(isinstance(m, nn.Conv2d) for m in inner):
        return None
    try:
        plan = recognize(module)
    except Unsupported as error:
        return str(error) if looks_residual(module) else None
    try:
        swapped_class(FusedBlock, type(module))
    except Exception as error:  # whatever a metaclass or __init_subclass__ may raise
        return f"no class can be derived from {type(module).__name__}: {error}"
    return plan
