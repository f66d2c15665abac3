"""Fused residual blocks for PyTorch: `fuse(model)` makes a ResNet faster and leaves everything else as it was."""

from . import functional, models, reference
from .backends import clear_caches
from .convert import fuse, unfuse
from .explain import BlockReport, Explanation, explain
from .modules import FusedBasicBlock, FusedBlock, FusedBottleneck, FusedPreActBottleneck, FusedResidualBlock
from .version import __version__

__all__ = [
    "BlockReport",
    "Explanation",
    "FusedBasicBlock",
    "FusedBlock",
    "FusedBottleneck",
    "FusedPreActBottleneck",
    "FusedResidualBlock",
    "__version__",
    "clear_caches",
    "explain",
    "functional",
    "fuse",
    "models",
    "reference",
    "unfuse",
]
