"""Fused residual blocks for PyTorch: `fuse(model)` makes a ResNet faster and leaves everything else as it was."""

from . import functional, models, reference
from .backends import clear_caches
from .backends.tuned import load_config
from .convert import fuse, unfuse
from .explain import BlockReport, Explanation, explain
from .graphs import Captured, capture
from .modules import FusedBasicBlock, FusedBlock, FusedBottleneck, FusedPreActBottleneck, FusedResidualBlock
from .tuning import tune
from .version import __version__

__all__ = [
    "BlockReport",
    "Captured",
    "Explanation",
    "FusedBasicBlock",
    "FusedBlock",
    "FusedBottleneck",
    "FusedPreActBottleneck",
    "FusedResidualBlock",
    "__version__",
    "capture",
    "clear_caches",
    "explain",
    "functional",
    "fuse",
    "load_config",
    "models",
    "reference",
    "tune",
    "unfuse",
]
