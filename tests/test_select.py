"""Which backend runs what: the choice as a pure function, the names, the environment variable, and who is called."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, ConvCase, image

import fused_resblock as frb
from fused_resblock import backends
from fused_resblock.backends import Choice, Problem, check_name, conv_problem, resolve, select
from fused_resblock.backends.select import preference
from fused_resblock.functional import bn_act, conv_bn_act

CUDA = Problem("cuda", FP16, channels=64, out_channels=64, pixels=10**6)
REFUSALS = {"triton": None, "cudnn": None, "onednn": "oneDNN takes CPU tensors"}


def problem(**changes) -> Problem:
    """The CUDA problem with changes."""
    return Problem(**{**CUDA.__dict__, **changes})


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        pytest.param(problem(), "triton", id="1x1"),
        pytest.param(problem(kernel=(3, 3)), "triton", id="3x3"),
        pytest.param(problem(kernel=(3, 3), capability=86), "cudnn", id="3x3 without TMA"),
        pytest.param(problem(capability=86), "triton", id="1x1 without TMA"),
        pytest.param(problem(dtype=FP32), "triton", id="fp32"),
        pytest.param(problem(groups=32), "cudnn", id="grouped"),
        pytest.param(problem(channels=3, kernel=(7, 7)), "cudnn", id="3 channels"),
        pytest.param(problem(kind="bn_act", channels=3), "triton", id="bn_act of 3 channels"),
        pytest.param(problem(device="cpu"), "onednn", id="CPU"),
    ],
)
def test_preference(asked, first):
    names = [name for name, _ in preference(asked)]
    assert names[0] == first
    assert len(set(names)) == len(names)
    assert "eager" not in names, "eager is the last resort, not a preference"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "hpu"])
def test_unknown_device_has_no_preference_and_gets_eager(device):
    choice = select(problem(device=device), {})
    assert choice == Choice("eager", f"no fused kernels for {device} tensors")


@pytest.mark.parametrize(
    ("asked", "refusals", "expected"),
    [
        pytest.param(problem(), REFUSALS, "triton", id="first"),
        pytest.param(problem(), {**REFUSALS, "triton": "not installed"}, "cudnn", id="second"),
        pytest.param(problem(groups=2), REFUSALS, "cudnn", id="grouped"),
        pytest.param(problem(groups=2), {**REFUSALS, "cudnn": "not built"}, "triton", id="grouped without cuDNN"),
        pytest.param(problem(), {"triton": "a", "cudnn": "b"}, "eager", id="none"),
        pytest.param(problem(device="cpu"), {"onednn": None}, "onednn", id="CPU"),
        pytest.param(problem(device="cpu"), {"onednn": "no bf16"}, "eager", id="CPU without oneDNN"),
    ],
)
def test_select(asked, refusals, expected):
    assert select(asked, refusals).backend == expected


@pytest.mark.parametrize(
    ("measured", "refusals", "expected"),
    [
        pytest.param("cudnn", REFUSALS, "cudnn", id="before the preferred one"),
        pytest.param("eager", {**REFUSALS, "eager": None}, "eager", id="eager"),
        pytest.param("cudnn", {**REFUSALS, "cudnn": "not built"}, "triton", id="not available any more"),
    ],
)
def test_measured_backend_goes_first(measured, refusals, expected):
    choice = select(CUDA, refusals, measured)
    assert choice.backend == expected
    assert (choice.reason == "fastest when measured") == (measured == expected)


def test_every_refusal_is_in_the_reason():
    reason = select(problem(), {"triton": "no driver", "cudnn": "not built"}).reason
    assert reason == "triton: no driver; cudnn: not built"


def test_select_is_pure():
    refusals = dict(REFUSALS)
    assert select(CUDA, refusals) == select(CUDA, refusals)
    assert refusals == REFUSALS


@pytest.mark.parametrize("name", ["auto", "eager"])
def test_known_name(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["Triton", "cuda", "", "onednn ", "inductor"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=rf"^backend must be one of auto, triton, .*eager, got {name!r}$"):
        check_name(name)


def test_unavailable_name(monkeypatch):
    monkeypatch.setattr(backends.cudnn, "unavailable", lambda: "no CUDA device")
    with pytest.raises(RuntimeError, match=r"^backend must be available on this machine, got 'cudnn': no CUDA device$"):
        check_name("cudnn")


def test_environment_variable_stands_in_for_auto_only(monkeypatch):
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "eager")
    assert check_name("auto") == "eager"
    monkeypatch.setattr(backends.onednn, "unavailable", lambda: None)
    assert check_name("onednn") == "onednn"
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "")
    assert check_name("auto") == "auto"


def test_errors_of_the_environment_variable_name_it(monkeypatch):
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^FUSED_RESBLOCK_BACKEND must be one of .*, got 'fast'$"):
        check_name("auto")
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "cudnn")
    monkeypatch.setattr(backends.cudnn, "unavailable", lambda: "no CUDA device")
    with pytest.raises(RuntimeError, match="^FUSED_RESBLOCK_BACKEND must be available"):
        check_name("auto")


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that are asked to run something, in order."""
    ran = []
    for name, backend in backends.BACKENDS.items():
        for function in ("bind_conv_bn_act", "bind_bn_act"):
            real = getattr(backend, function)

            def spy(*args, _real=real, _name=name, **kwargs):
                ran.append(_name)
                return _real(*args, **kwargs)

            monkeypatch.setattr(backend, function, spy)
    return ran


CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what runs on a machine without a GPU")


@CPU_ONLY
@pytest.mark.parametrize(
    ("backend", "dtype", "ran"),
    [
        pytest.param("triton", FP32, "triton", id="triton"),
        pytest.param("onednn", FP32, "onednn", id="onednn"),
        pytest.param("eager", FP32, "eager", id="eager"),
        pytest.param("onednn", FP64, "eager", id="onednn has no fp64"),
        pytest.param("auto", FP32, "onednn", id="auto"),
        pytest.param("auto", FP64, "eager", id="auto in fp64"),
    ],
)
def test_functions_run_on_the_named_backend(backend, dtype, ran, calls):
    conv_bn_act(**ConvCase().build(dtype), backend=backend)
    assert calls[0] == ran
    calls.clear()
    bn_act(image(1, 2, 3, 3, dtype=dtype), backend=backend)
    assert calls[0] == ran
    calls.clear()
    x = image(1, 2, 3, 3, dtype=dtype).requires_grad_()
    bn_act(x, backend=backend).sum().backward()
    assert calls[0] == ran, "with a gradient"


@CPU_ONLY
@pytest.mark.parametrize("backend", ["triton", "onednn", "eager"])
def test_blocks_run_on_the_backend_of_fuse(backend, calls):
    block = frb.fuse(frb.reference.BasicBlock(4, 4).eval(), backend=backend)
    block(torch.randn(1, 4, 3, 3))
    assert set(calls) - {"eager"} == {backend} - {"eager"}
    assert calls
    assert frb.explain(block)[0].backend == backend


@CPU_ONLY
def test_environment_variable_reaches_functions_and_blocks(monkeypatch, calls):
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "eager")
    block = frb.fuse(frb.reference.BasicBlock(4, 4).eval())
    with torch.no_grad():
        conv_bn_act(**ConvCase().build(FP32))
        assert set(calls) == {"eager"}
        block(torch.randn(1, 4, 3, 3))
    assert set(calls) == {"eager"}, "explain says eager, and so it must be"
    assert frb.explain(block)[0].backend == "eager"


def test_forced_backend_that_cannot_run_a_problem_says_why():
    choice = resolve("onednn", Problem("cuda", FP32))
    assert choice.backend == "eager"
    assert choice.reason.startswith("onednn: ")
    assert resolve("eager", Problem("cpu", FP32)) == Choice("eager", "forced")


@pytest.mark.parametrize("name", ["triton", "cudnn", "onednn"])
def test_refusals_are_sentences_about_the_problem(name):
    module = backends.BACKENDS[name]
    for device in ("cpu", "cuda", "mps"):
        for dtype in (FP16, BF16, FP32, FP64):
            refusal = module.unsupported(Problem(device, dtype))
            assert refusal is None or len(refusal) > 10
    assert module.unsupported(Problem("mps", FP32)) is not None


@pytest.mark.parametrize(
    ("pixels", "reach", "fits"),
    [(2**31 - 8193, 1, True), (2**31 - 8192, 1, False), (1, 2**31 - 1, True), (1, 2**31, False)],
    ids=["most pixels", "too many pixels", "longest reach", "reach too long"],
)
def test_triton_refuses_what_32_bits_cannot_index(pixels, reach, fits):
    refusal = backends.triton.unsupported(Problem("cuda", FP16, pixels=pixels, tap_reach=reach))
    assert (refusal is None) == fits


def test_problem_of_a_convolution():
    found = conv_problem(torch.device("meta"), BF16, (2, 6, 10, 7), (8, 3, 3, 2), (2, 1), (1, 4), (2, 1), 2)
    reach = (2 * 2 * 7 + 1 * 1 + 1) * 6  # rows of 7 pixels between the first and the last tap, then columns
    assert found == Problem("meta", BF16, "conv", 6, 8, (3, 2), 2, 2 * 10 * 7, reach, overpadded=True)


def test_more_output_than_input_pixels_count():
    assert conv_problem(torch.device("meta"), FP32, (1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (2, 2), (1, 1), 1).pixels == 25


def test_dilated_filter_that_lies_in_the_padding_does_not_go_to_onednn():
    """The shape on which oneDNN was seen to crash the process."""
    x, weight = torch.randn(1, 8, 7, 1), torch.randn(8, 8, 3, 1)
    geometry = {"stride": 2, "padding": (0, 1), "dilation": 2}
    expected = torch.nn.functional.conv2d(x, weight, **geometry).relu()
    for _ in range(3):
        y = frb.functional.conv_bn_act(x, weight, **geometry, backend="onednn")
    torch.testing.assert_close(y, expected)
