"""Settings of the whole suite: Triton's interpreter, NaN in unwritten memory, torchvision beside a CPU-only torch."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import pytest


def _make_torchvision_importable() -> None:
    """Define the two ops that torchvision's CUDA wheel expects to find when it is imported beside a CPU build."""
    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _make_torchvision_importable.library = library  # type: ignore[attr-defined]


_make_torchvision_importable()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that an output that nobody wrote cannot pass for a result; seeds are fixed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
