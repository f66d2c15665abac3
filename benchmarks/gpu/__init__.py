"""Check, tune, measure and profile on an NVIDIA GPU: `python -m benchmarks.gpu`, or `make gpu`.

Five steps, each under nine minutes and restartable alone; what was measured is on disk at once and is not measured
again. Needs CUDA PyTorch and Triton, no network, and no installed `fused_resblock`.
"""

from . import bootstrap

bootstrap.install()
