"""From a block's `torch.fx` graph to its plan: a block is known by what it computes, not by its name.

The graph must be made of convolutions, norms, ReLUs, identities, average pools, gates, one strided view and exactly one
residual add. Anything else raises `Unsupported` with the reason. What the output does not depend on is left out, so a
block that computes a shortcut but never adds it is not given the textbook meaning.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from . import leaves, nodes
from .gates import gates as find_gates
from .plan import Branch, Plan, Step, Unsupported
from .proxies import RANDOM
from .snapshot import CONSTANT
from .swap import own_class
from .tracing import graph_of, traced

_COPIES = {"contiguous", "clone"}
_READS = {getattr, operator.getitem, "size", "dim"}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)  # dropout: in eval mode


@dataclass(frozen=True)
class _View:
    """`value[:, :, ::stride, ::stride]`."""

    value: int
    stride: int


class _Builder:
    """Walks the live nodes in order, keeping each step open until something needs its value."""

    def __init__(self, block: nn.Module, training: bool, gates: Mapping[str, nn.Module]) -> None:
        self.modules = dict(block.named_modules())
        self.gates = gates
        self.nodes = list(graph_of(block, training, list(gates.values())).nodes)
        self.steps: list[Step] = []
        self.values: dict[fx.Node, int | Step | _View] = {}
        self.alias: dict[fx.Node, fx.Node] = {}
        self.adds = 0

    def build(self) -> tuple[Step, ...]:
        output = self.nodes[-1]
        result = output.args[0]
        if not isinstance(result, fx.Node):
            raise Unsupported("it returns something other than one tensor")
        live = {output}
        for node in reversed(self.nodes):
            if node in live:
                live.update(node.all_input_nodes)
        for node in self.nodes:
            if self._is_identity(node):
                self.alias[node] = self._resolve(node.all_input_nodes[0])
        self.readers = Counter(self._resolve(a) for n in self.nodes if n in live for a in self._reads(n))
        self.all_readers = Counter(self._resolve(a) for n in self.nodes for a in self._reads(n))
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        if len([n for n in inputs if n in live or n.users]) != 1:
            raise Unsupported("it takes other than one input")
        if inputs[0] not in live:
            raise Unsupported("its input is not its first argument")
        for node in self.nodes:
            if node in live and node is not output and node not in self.alias:
                self.values[node] = self._lower(node)
        self._emit(self._resolve(result))
        if self.adds != 1:
            raise Unsupported("its output holds no residual add" if not self.adds else "it has several adds")
        for node in self.nodes:
            if node not in live:
                self._check_unused(node)
        return tuple(self.steps)

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of the node, each as often as it is read; an identity reads nothing, its readers do."""
        if node in self.alias:
            return []
        return [a for a in node.args if isinstance(a, fx.Node)] + [
            a for a in node.kwargs.values() if isinstance(a, fx.Node)
        ]

    def _resolve(self, node: fx.Node) -> fx.Node:
        return self.alias.get(node, node)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_identity(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), _IDENTITIES) or nodes.called(node) in _COPIES

    def _in_place(self, node: fx.Node) -> bool:
        return nodes.in_place(node, self._module(node))

    def _emit(self, node: fx.Node) -> int:
        """The number of the node's value, closing its step if it is still open."""
        value = self.values[node]
        if isinstance(value, _View):
            raise Unsupported("a strided view is used other than as the residual")
        if isinstance(value, Step):
            self.steps.append(value)
            value = self.values[node] = len(self.steps)
        return value

    def _open(self, node: fx.Node) -> Step | None:
        """The node's step if it is open and nothing but the asking node reads it."""
        value = self.values[node]
        return value if isinstance(value, Step) and self.readers[node] == 1 and not value.module else None

    def _check_unused(self, node: fx.Node) -> None:
        """What the output does not depend on may be left out if it does nothing else, and nobody can see its result."""
        if self._in_place(node):
            raise Unsupported("an in-place operation whose result is not used")
        function = nodes.called(node)
        plain = function in _READS or (node.op == "call_function" and function in nodes.ADDS | nodes.RELUS)
        if function is not None and (not plain or node.kwargs.get("out")):
            raise Unsupported(f"its forward calls {nodes.name(node)} and does not use the result")

    def _check_in_place(self, node: fx.Node) -> None:
        """An in-place operation is as good as another only on a tensor that nobody else can see."""
        source = self._resolve(node.all_input_nodes[0])
        if source.op == "placeholder" or isinstance(self.values[source], _View) or self.all_readers[source] > 1:
            raise Unsupported("an in-place operation on a tensor that is read elsewhere")

    def _lower(self, node: fx.Node) -> int | Step | _View:
        if node.op == "placeholder":
            return 0
        if self._in_place(node):
            self._check_in_place(node)
        if node.op == "call_module":
            return self._lower_module(node)
        function = nodes.called(node)
        if function in nodes.ADDS:
            return self._lower_add(node)
        if function in nodes.RELUS:
            return self._lower_relu(node)
        if function is operator.getitem:
            return self._lower_slice(node)
        if node.op == "get_attr":
            made = str(node.target).startswith(CONSTANT)  # in the forward itself
            what = "a tensor" if made else f"the tensor {node.target}"
            raise Unsupported(f"its forward uses {what} outside of a layer")
        raise Unsupported(f"its forward calls {nodes.name(node)}, which is not a convolution, norm, ReLU or add")

    def _lower_module(self, node: fx.Node) -> int | Step | _View:
        path, module = str(node.target), self.modules[str(node.target)]
        source = self._resolve(node.all_input_nodes[0])
        if isinstance(module, nn.Conv2d):
            leaves.conv_geometry(module)
            return Step(Branch(self._emit(source), path))
        if own_class(module) is nn.ReLU:
            return self._lower_relu(node)
        alone = len(node.args) == 1 and not node.kwargs
        if isinstance(module, nn.AvgPool2d) or (path in self.gates and alone):
            return Step(Branch(self._emit(source), None), module=path)
        if isinstance(module, nn.MaxPool2d) and module.kernel_size in (1, (1, 1)) and module.padding in (0, (0, 0)):
            return self._view(source, module.stride)
        relu = leaves.norm_relu(module)
        return replace(self._lower_norm(source, path), relu=relu)

    def _lower_norm(self, source: fx.Node, path: str) -> Step:
        step = self._open(source)
        if step is not None and step.main.conv and not (step.main.norm or step.relu or self._joined(step)):
            return replace(step, main=replace(step.main, norm=path))
        return Step(Branch(self._emit(source), None, path))

    def _lower_relu(self, node: fx.Node) -> Step:
        source = self._resolve(node.all_input_nodes[0])
        step = self._open(source)
        return replace(step, relu=True) if step is not None else Step(Branch(self._emit(source), None), relu=True)

    def _lower_slice(self, node: fx.Node) -> _View:
        source, index = node.args
        full = slice(None)
        if isinstance(index, tuple) and len(index) == 4 and index[:2] == (full, full) and index[2] == index[3]:
            step = index[2]
            if isinstance(step, slice) and step.start in (None, 0) and step.stop is None:
                return self._view(self._resolve(source), step.step)  # type: ignore[arg-type]
        raise Unsupported("a slice other than [:, :, ::s, ::s]")

    def _view(self, source: fx.Node, stride: object) -> _View:
        stride = stride[0] if isinstance(stride, tuple) and len(set(stride)) == 1 else stride
        stride = 1 if stride is None else stride
        if not isinstance(stride, int):
            raise Unsupported(f"a strided view with stride {stride}")
        return _View(self._emit(source), stride)

    @staticmethod
    def _joined(step: Step) -> bool:
        return step.residual is not None or step.shortcut is not None

    def _lower_add(self, node: fx.Node) -> Step:
        terms = [self._resolve(a) for a in self._reads(node)]
        if len(terms) != 2 or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            raise Unsupported("an add of other than two tensors")
        self.adds += 1
        first, second = self._order(*terms)
        step = self._open(first)
        if step is None or step.relu or self._joined(step):
            step = Step(Branch(self._emit(first), None))
        other = self.values[second]
        if isinstance(other, _View):
            return replace(step, residual=other.value, residual_stride=other.stride)
        joined = self._open(second)
        if joined is not None and not (joined.relu or self._joined(joined)):
            elementwise = step.main.conv is None
            if joined.main.conv is None and (elementwise or joined.main.norm is None):
                return replace(step, residual=joined.main.source, residual_norm=joined.main.norm)
            if joined.main.conv is not None and not elementwise and self._is_shortcut(joined.main):
                return replace(step, shortcut=joined.main)
        return replace(step, residual=self._emit(second))

    def _is_shortcut(self, branch: Branch) -> bool:
        conv = self.modules[str(branch.conv)]
        stride, padding, _, groups = leaves.conv_geometry(conv)
        return conv.kernel_size == (1, 1) and padding == (0, 0) and groups == 1 and stride[0] == stride[1]

    def _order(self, a: fx.Node, b: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The term to build the step around first: a convolution, and of two the one furthest from the input."""

        def rank(node: fx.Node) -> tuple[bool, bool, int]:
            step = self._open(node)
            usable = step is not None and not step.relu and not self._joined(step)
            return (usable, step is not None and usable and bool(step.main.conv), step.main.source if step else -1)

        return (a, b) if rank(a) >= rank(b) else (b, a)


def recognize(block: nn.Module) -> Plan:
    """The plan of a residual block.

    Raises:
        Unsupported: with the reason, if the block is anything but conv-norm-act steps, gates and one residual add.
    """
    leaves.check_untouched(block)
    _check_attributes(block)
    gates: Mapping[str, nn.Module] = {}
    try:
        steps = _Builder(block, False, gates).build()
    except Unsupported:
        gates = find_gates(block)  # which takes time
        if not gates:
            raise
        steps = _Builder(block, False, gates).build()
    try:
        eval_only = _Builder(block, True, gates).build() != steps or _has_dropout(block)
    except Unsupported:
        eval_only = True
    return Plan(steps, eval_only)


def _check_attributes(block: nn.Module) -> None:
    """Raise `Unsupported` if the forward may ask a tensor that it does not see as one: its values change unnoticed."""
    for path, module in block.named_modules():
        found = (
            [] if leaves.is_leaf(module) else [name for name, v in vars(module).copy().items() if isinstance(v, Tensor)]
        )
        if found:
            raise Unsupported(f"{path or 'the block'} keeps a tensor in its attribute {found[0]}")


def _has_dropout(block: nn.Module) -> bool:
    return any(isinstance(m, (nn.Dropout, nn.Dropout2d)) for m in block.modules())  # also of p = 0: it may be set


def looks_residual(block: nn.Module) -> bool:
    """Whether a module that could not be planned is a residual block to a reader: two convolutions and an add."""
    if sum(isinstance(m, nn.Conv2d) for m in block.modules()) < 2:
        return False
    try:
        graph, doubt, _ = traced(block, block.training)
    except Unsupported:
        return _has_two_convs(block)
    if doubt == RANDOM and _has_two_convs(block):  # another draw may have given another graph
        return True
    return any(nodes.called(node) in nodes.ADDS for node in graph.nodes)


def _has_two_convs(block: nn.Module) -> bool:
    """Whether two children are convolutions, wrapped by FSDP or not."""
    children = [getattr(child, "_fsdp_wrapped_module", child) for child in block.children()]
    return sum(isinstance(child, nn.Conv2d) for child in children) >= 2
