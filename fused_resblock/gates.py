"""Modules that scale what they are given, `x * g(x)`: squeeze-and-excitation and its relatives.

A plan runs them as they are. That is the same as the block's own call of them wherever they leave their input alone and
return a tensor of their own, which the graph of their forward tells.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from . import leaves, nodes
from .plan import Unsupported
from .tracing import traced

_PRODUCTS = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
#: layers whose result nobody else has: it may be changed in place
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)


def gates(block: nn.Module) -> dict[str, nn.Module]:
    """The gates within a block by their paths; of those within one another the outermost."""
    found: dict[str, nn.Module] = {}
    for path, module in block.named_modules():
        within = any(path.startswith(f"{outer}.") for outer in found)
        if path and not within and _may_be(module) and all(_is_gate(module, mode) for mode in (False, True)):
            found[path] = module
    return found


def _may_be(module: nn.Module) -> bool:
    return not (type(module).__module__.startswith("torch.nn.") or leaves.is_leaf(module))


def _is_gate(module: nn.Module, training: bool) -> bool:
    try:
        graph, doubt, _ = traced(module, training)
    except Unsupported:
        return False
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if doubt is not None or len(inputs) != 1:
        return False
    modules = dict(module.named_modules())
    *inner, output = graph.nodes
    return _scales(output.args[0], inputs[0]) and all(_leaves_alone(node, modules) for node in inner)


def _scales(result: object, x: fx.Node) -> bool:
    """Whether a node is a product, in memory of its own, of x or of what is such a product."""
    if not isinstance(result, fx.Node) or nodes.called(result) not in _PRODUCTS or result.kwargs:
        return False
    return any(factor is x or _scales(factor, x) for factor in result.args)


def _leaves_alone(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node changes nothing but what a layer has just made, and does not look at strides."""
    if "out" in node.kwargs or nodes.name(node) in nodes.OF_LAYOUT or not _is_torchs(node):
        return False
    if not nodes.in_place(node, _module(node, modules)):
        return True
    source = node.all_input_nodes[0]
    while isinstance(_module(source, modules), nn.Identity):
        source = source.all_input_nodes[0]
    return isinstance(_module(source, modules), _FRESH) and len(source.users) == 1


def _is_torchs(node: fx.Node) -> bool:
    """Whether a node calls nothing of which torch does not say what it does: `torch.fx` can be told to trust others."""
    module = getattr(node.target, "__module__", None) or "torch"
    return node.op != "call_function" or module.partition(".")[0] in ("torch", "_operator", "builtins", "math")


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def trains(gate: nn.Module) -> bool:
    """Whether a norm within a gate would use the statistics of the batch, and update its own, if it were called now."""
    norms = (inner for inner in gate.modules() if isinstance(inner, nn.modules.batchnorm._BatchNorm))
    return any(map(leaves.uses_batch_statistics, norms))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """What a module that a plan runs as it is makes of a channels_last tensor; its `view` may ask for an NCHW one."""
    try:
        return module(x)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return module(x.contiguous())
