"""The faults that `make mutants` puts into the library, and for each the tests that must notice it."""

from __future__ import annotations

from mutant import Mutant


def _geometry(case: str, backend: str = "triton") -> str:
    return f"tests/test_conv_bn_act.py::test_geometry[{case}-{backend}]"


def _epilogue(case: str, backend: str = "triton") -> str:
    return f"tests/test_conv_bn_act.py::test_epilogue[{case}-{backend}]"


def _address(test: str) -> str:
    return f"tests/test_addresses.py::test_{test}"


def _gradient(case: str) -> str:
    return f"tests/test_gradients.py::test_conv_bn_act_in_float64[{case}-triton]"


#: (name, old text, new text, killers) by file.
_BY_FILE: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/conv_bn_act.py": [
        ("residual sign", "z += tl.load(residual,", "z -= tl.load(residual,", _epilogue("residual")),
        (
            "residual not strided",
            "strided_rows(offs_m, H2, W2, P, Q, STRIDE2)\n        residual =",
            "strided_rows(offs_m, H2, W2, P, Q, 1)\n        residual =",
            _epilogue("residual stride 2 odd size"),
        ),
        (
            "residual read at the output's width",
            "strided_rows(offs_m, H2, W2, P, Q, STRIDE2)\n        residual =",
            "strided_rows(offs_m, H2, Q, P, Q, STRIDE2)\n        residual =",
            _epilogue("residual stride 2 odd size"),
        ),
        ("last row unwritten", "mask_m = offs_m < M\n", "mask_m = offs_m < M - 1\n", _geometry("3x3")),
        (
            "a row too many written",
            "out_mask = mask_m[:, None]",
            "out_mask = (offs_m <= M)[:, None]",
            "tests/test_tiles.py::test_rows_behind_the_last_are_not_written",
        ),
        ("halo off by one above", "(h >= 0)", "(h >= 1)", _geometry("3x3")),
        ("halo off by one at the right", "(w < W)", "(w <= W)", _geometry("3x3")),
        ("padding is 1, not 0", "+ c), mask=x_mask, other=0.0)", "+ c), mask=x_mask, other=1.0)", _geometry("3x3")),
        (
            "scale and shift swapped",
            "z = acc * scale[None, :] + shift[None, :]",
            "z = acc * shift[None, :] + scale[None, :]",
            _epilogue("norm"),
        ),
        (
            "ReLU before the add",
            "    out_mask = mask_m",
            "    if APPLY_RELU:\n        z = nan_relu(z)\n    out_mask = mask_m",
            _epilogue("residual"),
        ),
        ("ReLU forgotten", "    if APPLY_RELU:\n        z =", "    if False:\n        z =", _epilogue("conv relu")),
        ("dilation ignored in the mask", "h = h0 + r * DIL_H", "h = h0 + r", _geometry("3x3 dilation 2")),
        ("dilation ignored in the address", "(r * DIL_H * W", "(r * W", _geometry("3x3 dilation 2")),
        ("a group reads another's channels", "+ group * C + offs_k", "+ offs_k", _geometry("2 groups")),
        (
            "a group reads another's weights",
            "w_ptr + out_channels[None, :]",
            "w_ptr + offs_n[None, :]",
            _geometry("2 groups"),
        ),
        ("tail of K not masked", "if C % BLOCK_K != 0:", "if False:", _geometry("3x3")),
        ("tail of the second K not masked", "if C2 % BLOCK_K != 0:", "if False:", _epilogue("shortcut")),
        (
            "stride of columns used for rows",
            "% P) * STRIDE_H",
            "% P) * STRIDE_W",
            _geometry("3x3 stride 1x3 padding 2x1"),
        ),
        (
            "padding of rows used for columns",
            "STRIDE_W - PAD_W",
            "STRIDE_W - PAD_H",
            _geometry("3x3 stride 1x3 padding 2x1"),
        ),
        ("taps counted by rows", "r = tap // S", "r = tap // R", _geometry("5x2 dilation 1x2")),
        (
            "second shift forgotten",
            "z += acc2 * scale2[None, :] + shift2[None, :]",
            "z += acc2 * scale2[None, :]",
            _epilogue("shortcut"),
        ),
        (
            "second convolution not strided",
            "strided_rows(offs_m, H2, W2, P, Q, STRIDE2)\n        x2_rows",
            "strided_rows(offs_m, H2, W2, P, Q, 1)\n        x2_rows",
            _epilogue("shortcut stride 2 odd size"),
        ),
        (
            "second norm takes the first's eps",
            "mask_n, EPS2, ACC",
            "mask_n, EPS, ACC",
            "tests/test_properties.py::test_every_norm_has_its_own_eps[triton]",
        ),
        (
            "32-bit rows of x",
            "rows = ((offs_m // (P * Q)).to(tl.int64) * H",
            "rows = ((offs_m // (P * Q)) * H",
            _address("input_of_a_3x3"),
        ),
        ("32-bit weight", ".to(tl.int64) * (R * S * C)", " * (R * S * C)", _address("weight")),
        ("32-bit second weight", ".to(tl.int64) * C2", " * C2", _address("weight_of_the_second_convolution")),
        (
            "32-bit output",
            "y_ptr + offs_m[:, None].to(tl.int64)",
            "y_ptr + offs_m[:, None]",
            _address("pointwise_input_and_output"),
        ),
    ],
    "kernels/epilogue.py": [
        ("eps forgotten", "tl.sqrt(var + EPS)", "tl.sqrt(var)", _epilogue("eps 0.1")),
        (
            "convolution bias not scaled",
            "shift = (shift - tl.load(mean",
            "shift = shift + (-tl.load(mean",
            _epilogue("bias norm relu"),
        ),
        (
            "NaN dropped by the instruction",  # the interpreter keeps it all the same: only the machine code tells
            "tl.PropagateNan.ALL",
            "tl.PropagateNan.NONE",
            "tests/test_codegen.py::test_gates_hold_and_nothing_is_worse_than_the_kept_table[sm_80]",
        ),
        (
            "NaN dropped by a comparison",
            "tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)",
            "tl.where(z > 0, z, 0.0)",
            "tests/test_conv_bn_act.py::test_nan_in_x_reaches_its_neighbours_only[triton]",
        ),
        ("32-bit rows", "return offs_m.to(tl.int64)", "return offs_m", _address("residual[1]")),
        ("32-bit strided rows", "(n.to(tl.int64) * H", "(n * H", _address("residual[2]")),
    ],
    "kernels/bn_act.py": [
        (
            "residual norm ignored",
            "z += residual * scale2[None, :] + shift2[None, :]",
            "z += residual",
            "tests/test_bn_act.py::test_parity[residual norm-triton]",
        ),
        (
            "residual norm takes the first's eps",
            "mask_c, EPS2, ACC",
            "mask_c, EPS, ACC",
            "tests/test_properties.py::test_every_norm_has_its_own_eps[triton]",
        ),
        ("32-bit offsets", "offs_m[:, None].to(tl.int64) * C", "offs_m[:, None] * C", _address("bn_act")),
    ],
    "kernels/relu_backward.py": [
        (
            "gradient passes where the output is 0",
            "y.to(ACC) <= 0.0,",
            "y.to(ACC) < 0.0,",
            "tests/test_relu_backward.py::test_zero_output_passes_nothing_and_nan_passes_all[triton]",
        ),
        (
            "gradient stopped where the output is NaN",
            "tl.where(y.to(ACC) <= 0.0, 0.0, dz.to(ACC))",
            "tl.where(y.to(ACC) > 0.0, dz.to(ACC), 0.0)",
            "tests/test_relu_backward.py::test_zero_output_passes_nothing_and_nan_passes_all[triton]",
        ),
        ("32-bit offsets", "offs_m[:, None].to(tl.int64) * C", "offs_m[:, None] * C", _address("relu_backward")),
    ],
    "fused_resblock/gradients.py": [
        (
            "dbeta unmasked twice",
            "else total.to(norm.bias.dtype)",
            "else 2 * total.to(norm.bias.dtype)",
            _gradient("3x3"),
        ),
        ("dgamma without the mean", "(dot + centre * total)", "dot", _gradient("3x3")),
        ("dgamma without the bias", "bias.to(wide) - norm.mean", "-norm.mean", _gradient("bias norm relu")),
        ("dgamma without eps", "norm.var.to(wide) + norm.eps)", "norm.var.to(wide))", _gradient("3x3")),
        ("dbias not scaled", "else total * scale)", "else total)", _gradient("bias norm relu")),
        ("dx not scaled", "scaled.to(x.dtype)", "weight.to(x.dtype)", _gradient("1x1")),
        ("dW not scaled", "dw if scale is None else dw * scale[:, None, None, None]", "dw", _gradient("1x1")),
        (
            "residual's gradient not strided",
            "grad[:, :, :: stride[0], :: stride[1]] = dz",
            "grad[:, :, : dz.shape[2], : dz.shape[3]] = dz",
            _gradient("residual stride 2 even size"),
        ),
    ],
    "fused_resblock/ops.py": [
        (
            "shortcut's dgamma forgotten",
            "need[15] or need[19]",
            "need[15]",
            "tests/test_gradients.py::test_one_gradient_of_the_shortcut_alone[shortcut.norm.weight-triton]",
        ),
        (
            "second derivative without the sums",
            "grad = ddz + dtotal.to(ddz.dtype)[:, None, None]",
            "grad = ddz",
            "tests/test_gradcheck.py::test_conv_bn_act_second[3x3-eager]",
        ),
    ],
    "fused_resblock/backends/folding.py": [
        (
            "cache ignores the version",
            "(id(t), t._version, t.data_ptr(), t.stride())",
            "(id(t), t.data_ptr(), t.stride())",
            "tests/test_mutants.py::test_edit_of_one_number_is_seen[onednn]",
        ),
        (
            "folded bias not scaled",
            "conv.bias.to(wide) * scale",
            "conv.bias.to(wide)",
            _epilogue("bias norm relu", "onednn"),
        ),
        ("folded without eps", "norm.var.to(dtype) + norm.eps", "norm.var.to(dtype)", _epilogue("eps 0.1", "onednn")),
    ],
    "fused_resblock/recognize.py": [
        (
            "in-place operations not checked",
            "        if self._in_place(node):\n            self._check_in_place(node)\n",
            "",
            "tests/test_recognize.py::test_kept_with_its_reason[in-place on a shared tensor]",
        ),
        (
            "shortcut taken for the residual",
            "if joined.main.conv is None and (elementwise or joined.main.norm is None):",
            "if True:",
            "tests/test_recognize.py::test_same_on_every_backend",
        ),
        (
            "norm of a shortcut without a convolution dropped",
            " and (elementwise or joined.main.norm is None):",
            ":",
            "tests/test_recognize.py::test_same_on_every_backend",
        ),
        (
            "start of a slice ignored",
            "step.start in (None, 0) and ",
            "",
            "tests/test_recognize.py::test_same_on_every_backend",
        ),
    ],
}

MUTANTS = tuple(
    Mutant(name, file, old, new, (killer,)) for file, faults in _BY_FILE.items() for name, old, new, killer in faults
)
