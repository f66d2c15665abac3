"""Settings of the whole suite: Triton's interpreter, NaN in unwritten memory, torchvision beside a CPU-only torch."""

import functools
import gc
import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

import pytest
import quick_interpreter

from fused_resblock import stem, trusted


def _make_torchvision_importable() -> None:
    """Define the two ops that torchvision's CUDA wheel expects to find when it is imported beside a CPU build.

    Only where it cannot be imported as it is: a torchvision that fits its torch defines them itself, and a second
    definition ends the process.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _make_torchvision_importable.library = library  # type: ignore[attr-defined]


_make_torchvision_importable()


if importlib.util.find_spec("triton"):
    quick_interpreter.quicken()


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector, which some tests call, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def stems_of_any_size(monkeypatch):
    """Stems run as one on the small images of tests, too."""
    monkeypatch.setattr(stem, "SMALL", 0)


@pytest.fixture(autouse=True)
def reference_gradients_without_onednn(monkeypatch):
    """Take torch's own gradients without oneDNN, whose 3.12 corrupts the heap in some that the small tests ask for.

    The weight gradient of a channels_last 1x1 with stride 2 and 8 input channels writes past its buffer.
    """

    def guarded(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            with torch.backends.mkldnn.flags(enabled=False):
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch.autograd, "backward", guarded(torch.autograd.backward))
    monkeypatch.setattr(torch.autograd, "grad", guarded(torch.autograd.grad))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that an output that nobody wrote cannot pass for a result; seeds are fixed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    tf32 = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
    if tf32:  # fp32 is held against fp32: of some shapes cuDNN computes in TF32, of others not
        torch.backends.cudnn.allow_tf32 = False
    yield
    if tf32:
        torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def known(monkeypatch):
    """The networks of tests are trusted."""
    tests = {"frozen_networks", "test_odd_tensors", "test_one_function", "test_function_changes"}
    monkeypatch.setattr(trusted, "_PACKAGES", trusted._PACKAGES | tests)
