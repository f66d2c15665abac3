"""Lines in a network's graph: chains of blocks, one behind the other, and a pool that reads the last of them.

In a line chains may wait (`waiting`): between the first chain's call and the pool's the forward does nothing else, and
nothing but the next in the line reads what a chain gives, so nobody can tell when it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .flat import stands_for
from .stage import FusedStage
from .swap import own_class
from .tracing import Traced

POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)
Lines = Mapping[nn.Module, Sequence[nn.Module]]


def find_lines(network: nn.Module, found: Traced | None) -> Lines:
    """The chains that may wait, each with the pool that reads the last of its line and the modules around that.

    Args:
        network: a network of fused blocks.
        found: the graph of its forward, with blocks as single calls; None where it is not known.
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
        around = [module for name, module in modules.items() if f"{nodes[end].target}.".startswith(f"{name}.")]
        lines.update(dict.fromkeys(line, around))
    return lines
