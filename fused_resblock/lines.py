"""Lines in a network's graph: chains of blocks, one behind the other, and a pool that reads the last of them.

In a line chains may wait (`waiting`): the forward does nothing between their calls, and nothing but the next one reads
what they give, so that neither can be told from what it would be if each ran when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from .flat import stands_for
from .modules import FusedBlock
from .stage import FusedStage
from .swap import own_class
from .tracing import Traced

POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)
Lines = Mapping[nn.Module, Sequence[nn.Module]]


def find_lines(network: nn.Module, found: Traced | None, stems: Sequence[Sequence[str]]) -> Lines:
    """The chains that may wait, each with the pool that reads the last of its line and the modules around that.

    Args:
        network: a network of fused blocks.
        found: the graph of its forward, with blocks as single calls; None where it is not known.
        stems: the names of the modules of its stems.
    """
    if found is None or found.doubt is not None or found.unseen is not None:
        return {}
    modules = dict(network.named_modules())
    nodes = list(found.graph.nodes)
    called = [modules.get(str(node.target)) if node.op == "call_module" else None for node in nodes]
    last = {list(stage.children())[-1]: stage for stage in modules.values() if isinstance(stage, FusedStage)}
    lines: dict[nn.Module, Sequence[nn.Module]] = {}
    for end, pool in enumerate(called):
        if pool is None or own_class(pool) not in POOLS:
            continue
        start, line = end, []
        while start > 0 and (stage := last.get(called[start - 1])) is not None:  # type: ignore[arg-type]
            blocks = list(stage.children())
            before = start - len(blocks)
            read = slice(before, start + 1)
            once = before >= 0 and called.count(blocks[0]) == 1
            if not once or not stands_for(nodes[read], called[read], [*blocks, called[start]]):
                break
            line.append(stage)
            start = before
        if _is_fresh(nodes[start].args[0], modules, stems):
            around = [module for name, module in modules.items() if f"{nodes[end].target}.".startswith(f"{name}.")]
            lines.update(dict.fromkeys(line, around))
    return lines


def _is_fresh(x: object, modules: Mapping[str, nn.Module], stems: Sequence[Sequence[str]]) -> bool:
    """Whether a value is a tensor of its own, nobody else's, that one node reads: a pool's, a block's or a stem's."""
    if not isinstance(x, fx.Node) or x.op != "call_module" or len(x.users) != 1:
        return False
    module = modules[str(x.target)]
    return isinstance(module, FusedBlock) or own_class(module) in POOLS or x.target in [stem[-1] for stem in stems]
