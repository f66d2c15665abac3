"""Which convolutions and norms a plan may hold, what each of them means, and what must not be on a block's modules."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx, nn

from .frozen_norms import eps_of
from .params import PLAIN_TYPES, Pair, pair
from .plan import Unsupported
from .swap import own_class

#: the dictionaries of a module's call-time hooks
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: what the plans stand for, even if somebody puts something else in its place later
_CONV_FORWARDS = nn.Conv2d.forward, nn.Conv2d._conv_forward
_NORM_FORWARDS = nn.BatchNorm2d.forward, nn.BatchNorm2d._check_input_dim


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether this computes what torchvision's FrozenBatchNorm2d does."""
    return eps_of(module) is not None


def _timm_norm_act(module: nn.Module) -> bool:
    """Whether this is timm's BatchNorm2d with an activation of its own."""
    timm = sys.modules.get("timm.layers.norm_act")
    return timm is not None and own_class(module) in (timm.BatchNormAct2d, timm.FrozenBatchNormAct2d)


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing stops at this module although it is not one of `torch.nn`'s own."""
    return is_frozen_norm(module) or _timm_norm_act(module) or isinstance(module, (nn.Conv2d, nn.BatchNorm2d))


def conv_geometry(module: nn.Module) -> tuple[Pair, Pair, Pair, int]:
    """stride, padding, dilation and groups of a supported convolution.

    Raises:
        Unsupported: for a subclass with a forward of its own, a padding mode other than zeros, uneven padding.
    """
    if not isinstance(module, nn.Conv2d):
        raise Unsupported(f"convolution {type(module).__name__} is not nn.Conv2d")
    cls: Any = own_class(module)
    if "_conv_forward" in module.__dict__:
        raise Unsupported("the _conv_forward of a convolution is overridden on the instance")
    if (cls.forward, cls._conv_forward) != _CONV_FORWARDS:
        raise Unsupported(f"convolution {cls.__name__} is not nn.Conv2d")
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding mode {module.padding_mode!r}")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise Unsupported("padding 'same' is uneven for an even filter")
        padding = (total[0] // 2, total[1] // 2)
    return pair(module.stride), pair(padding), pair(module.dilation), module.groups  # type: ignore[arg-type]


def norm_relu(module: nn.Module) -> bool:
    """Whether a supported norm ends in a ReLU of its own.

    Raises:
        Unsupported: if the module is no batch norm with running statistics, or its activation is not ReLU.
    """
    cls: Any = own_class(module)
    if is_frozen_norm(module):
        return False
    if _timm_norm_act(module):
        if any(hooked(inner) or replaced(inner) for inner in module.children()):
            raise Unsupported(f"hooks or another forward on the activation of {cls.__name__}")
        if not isinstance(module.drop, nn.Identity):
            raise Unsupported(f"{cls.__name__} with {type(module.drop).__name__} inside")
        if isinstance(module.act, nn.Identity):
            relu = False
        elif type(module.act) is nn.ReLU:
            relu = True
        else:
            raise Unsupported(f"activation {type(module.act).__name__} is not ReLU")
    elif isinstance(module, nn.BatchNorm2d) and (cls.forward, cls._check_input_dim) == _NORM_FORWARDS:
        relu = False
    else:
        raise Unsupported(f"{cls.__name__} is not a convolution, ReLU, BatchNorm2d or FrozenBatchNorm2d")
    if getattr(module, "running_mean", None) is None:
        raise Unsupported(f"{cls.__name__} without running statistics")
    return relu


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the norm would use the statistics of the batch if it were called now."""
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return True
    return module.training and isinstance(module, nn.modules.batchnorm._NormBase)


def check_untouched(root: nn.Module) -> None:
    """Raise `Unsupported` if the block holds something that runs only when modules are called: hooks and the like."""
    if "forward" in root.__dict__:
        raise Unsupported("its forward is overridden on the instance")
    for name, module in root.named_modules():
        where = f"{name or 'the block'} ({type(module).__name__})"
        if module is not root and hooked(module):
            raise Unsupported(f"hooks on {where}")
        if module is not root and replaced(module):
            raise Unsupported(f"the forward of {where} is overridden on the instance")
        if isinstance(module, fx.GraphModule):
            raise Unsupported("it was traced by torch.fx, which leaves no modules that are blocks")
        if type(module).__call__ is not nn.Module.__call__:
            raise Unsupported(f"the call of {where} is overridden by its class")
        if torch.nn.utils.parametrize.is_parametrized(module):
            raise Unsupported(f"parametrization on {where}")
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(type(module), attribute):
                raise Unsupported(f"{attribute} of {where} is computed by its class")
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(f"{where} is a ScriptModule")
        if hasattr(module, "_fsdp_wrapped_module") or getattr(module, "_is_fsdp_managed_module", False):
            raise Unsupported(f"{where} is sharded by FSDP")
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and type(tensor) not in PLAIN_TYPES:
                raise Unsupported(f"{key} of {where} is a {type(tensor).__name__}")
            if hasattr(tensor, "ds_id"):
                raise Unsupported(f"{where} is sharded by ZeRO")


def hooked(module: nn.Module) -> bool:
    """Whether the module has call-time hooks of its own."""
    return any(hook_dicts(module))


def replaced(module: nn.Module) -> bool:
    """Whether something was put in the place of the module's forward on the instance."""
    return "forward" in module.__dict__ or "_conv_forward" in module.__dict__


def hook_dicts(module: nn.Module) -> tuple[dict, ...]:
    """The dictionaries that hold a module's call-time hooks; all are empty where there are none."""
    return tuple([getattr(module, name) for name in HOOKS])
