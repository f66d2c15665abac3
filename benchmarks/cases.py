"""What is measured: networks and parts of them with their inputs, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fused_resblock as frb
from fused_resblock.demo.inputs import make_model

NETWORKS = ("resnet18", "resnet50")
#: all stages, without stem and classifier
BODY = "layer1-4"
PARTS = ("whole", BODY)
STAGES = tuple(f"layer{layer}" for layer in (1, 2, 3, 4))
#: of every stage the two kinds of blocks
BLOCKS = tuple(f"{stage}.{block}" for stage in STAGES for block in (0, 1))
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 16)
SIZE = 224
#: images of which the float64 oracle holds the activations at a time
CHUNK = 32


@dataclass(frozen=True)
class Case:
    """One network or a part of one (see `part_of`), in one dtype, at one batch size."""

    network: str
    part: str = "whole"
    dtype: str = "float32"
    batch: int = 1
    size: int = SIZE

    def __str__(self) -> str:
        return f"{self.network} {self.part} {self.dtype} batch {self.batch}"


@torch.no_grad()
def part_of(model: nn.Module, part: str, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A part of a network, and what the network itself hands it, channels_last, for the input x.

    Args:
        model: a ResNet.
        part: "whole", `BODY`, a stage such as "layer1", or a block such as "layer1.0".
        x: the network's input.
    """
    if part == "whole":
        return model, x
    stages = list(map(model.get_submodule, STAGES))
    first = stages[0] if part == BODY else model.get_submodule(part)
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model(x)
    hook.remove()
    return (nn.Sequential(*stages) if part == BODY else first), seen[0].contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def prepare(case: Case) -> tuple[nn.Module, Tensor]:
    """Build what the case names.

    The weights are random but behave like trained ones, batch norms included (`demo.inputs.make_model`).

    Returns:
        The network, or the part of it, in eval mode and channels_last; and its input, channels_last: `[batch, 3, size,
        size]` from a standard normal distribution, or what the network makes of that in front of the part.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    model = make_model(case.network, None, images).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return part_of(model, case.part, images.to(dtype))


@torch.no_grad()
def exact_output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model makes of x in float64, a few images at a time, from the rounded weights and input."""
    wide = deepcopy(model).double()
    return torch.cat([wide(part.double()) for part in x.split(CHUNK)])


def _eager(model: nn.Module, x: Tensor) -> nn.Module:
    return model


def _fused(model: nn.Module, x: Tensor) -> nn.Module:
    return frb.fuse(model)


def _frozen(model: nn.Module, x: Tensor) -> nn.Module:
    return frb.fuse(model, frozen=True)


def _compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`torch.compile` with weights frozen: batch norms folded, weights packed ahead, as far as Inductor goes on a CPU.

    It is compiled here, on x, because freezing is read from the global configuration at that moment.
    """
    torch._dynamo.reset()  # without this, earlier cases count as recompilations of the same code
    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(x)
    return compiled


#: name -> makes the callable for a model in eval mode and its input.
PROVIDERS: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "eager": _eager,
    "fused": _fused,
    "frozen": _frozen,
    "compile": _compiled,
}


def providers(model: nn.Module, x: Tensor, names: tuple[str, ...] = tuple(PROVIDERS)) -> dict[str, Callable]:
    """The named providers for a model and its input, as `harness.compare` takes them."""
    return {name: partial(PROVIDERS[name], model, x) for name in names}
