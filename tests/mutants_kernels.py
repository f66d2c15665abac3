"""The faults that `make mutants` puts into the kernels of single operations, and for each the test that must notice it."""

from __future__ import annotations


def address(test: str) -> str:
    """The test of the addresses behind 2^31 elements of that name."""
    return f"tests/test_addresses.py::test_{test}"


def _plain(case: str) -> str:
    return f"tests/test_tiles.py::test_without_tma[{case}]"


def _split(case: str, programs: int = 3) -> str:
    return f"tests/test_tiles.py::test_forced_tile[{case}-32x16x16.w4.s1.k{programs}]"


def _boxes(case: str, tile: str = "32x16x32.w4.s1.p1") -> str:
    return f"tests/test_tiles.py::test_boxes[{case}-{tile}]"


#: (name, old text, new text, killers) by file.
KERNELS: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/cost.py": [
        (
            "nothing hinders a program",
            "** (1 / HINDRANCE) if hindered else max(times)",
            "** (1 / HINDRANCE) if False else max(times)",
            "tests/test_cost.py::test_times_that_hinder_each_other_add_up_by_the_fourth_power",
        ),
    ],
    "kernels/conv_bn_act.py": [
        ("residual sign", "z += tl.load(residual,", "z -= tl.load(residual,", _plain("residual")),
        (
            "residual not strided",
            "rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)",
            "rows2 = strided_rows(offs_m, H2, W2, P, Q, 1)",
            _plain("residual stride 2 odd size"),
        ),
        (
            "residual read at the output's width",
            "rows2 = strided_rows(offs_m, H2, W2, P, Q, STRIDE2)",
            "rows2 = strided_rows(offs_m, H2, Q, P, Q, STRIDE2)",
            _plain("residual stride 2 odd size"),
        ),
        ("last row unwritten", "mask_m = offs_m < M\n", "mask_m = offs_m < M - 1\n", _plain("3x3")),
        (
            "a row too many written",
            "out_mask = mask_m[:, None]",
            "out_mask = (offs_m <= M)[:, None]",
            "tests/test_tiles.py::test_rows_behind_the_last_are_not_written",
        ),
        ("halo off by one above", "(h >= 0)", "(h >= 1)", _plain("3x3")),
        ("halo off by one at the right", "(w < W)", "(w <= W)", _plain("3x3")),
        ("padding is 1, not 0", "+ c), mask=x_mask, other=0.0)", "+ c), mask=x_mask, other=1.0)", _plain("3x3")),
        (
            "scale and shift swapped",
            "z = acc * scale[None, :] + shift[None, :]",
            "z = acc * shift[None, :] + scale[None, :]",
            _plain("norm"),
        ),
        (
            "ReLU before the add",
            "        if other_ptr is not None:",
            "        if APPLY_RELU:\n            z = nan_relu(z)\n        if other_ptr is not None:",
            _plain("residual"),
        ),
        ("ReLU forgotten", "        if APPLY_RELU:\n", "        if False:\n", _plain("conv relu")),
        ("dilation ignored in the mask", "h = h0 + r * DIL_H", "h = h0 + r", _plain("3x3 dilation 2")),
        ("dilation ignored in the address", "(r * DIL_H * W", "(r * W", _plain("3x3 dilation 2")),
        ("a group reads another's channels", "+ group * C + offs_k", "+ offs_k", _plain("2 groups")),
        (
            "a group reads another's weights",
            "w_ptr + out_channels[None, :]",
            "w_ptr + offs_n[None, :]",
            _plain("2 groups"),
        ),
        ("tail of K not masked", "if C % BLOCK_K != 0:", "if False:", _plain("3x3")),
        ("tail of the second K not masked", "if C2 % BLOCK_K != 0:", "if False:", _plain("shortcut")),
        (
            "stride of columns used for rows",
            "% P) * STRIDE_H",
            "% P) * STRIDE_W",
            _plain("3x3 stride 1x3 padding 2x1"),
        ),
        (
            "padding of rows used for columns",
            "STRIDE_W - PAD_W",
            "STRIDE_W - PAD_H",
            _plain("3x3 stride 1x3 padding 2x1"),
        ),
        ("taps counted by rows", "r = tap // S", "r = tap // R", _plain("5x2 dilation 1x2")),
        (
            "second shift forgotten",
            "z += acc2 * scale2[None, :] + shift2[None, :]",
            "z += acc2 * scale2[None, :]",
            _plain("shortcut"),
        ),
        (
            "second convolution not strided",
            "x2_rows = other_ptr + rows2[:, None] * C2",
            "x2_rows = other_ptr + offs_m[:, None] * C2",
            _plain("shortcut stride 2 odd size"),
        ),
        (
            "second norm takes the first's eps",
            "mask_n, EPS2, ACC",
            "mask_n, EPS, ACC",
            "tests/test_tiles.py::test_every_norm_has_its_own_eps",
        ),
        ("a share of the loop counted twice", "begin = tl.program_id(1) * share", "begin = 0", _split("3x3 2 groups")),
        (
            "a share of the loop left out",
            "share: tl.constexpr = (steps + SPLIT - 1) // SPLIT",
            "share: tl.constexpr = steps // SPLIT",
            _split("1x1 ragged in all three", 2),
        ),
        ("32-bit partial sums", "tl.program_id(1).to(tl.int64) * M", "tl.program_id(1) * M", address("partial_sums")),
        (
            "32-bit rows of x",
            "rows = ((offs_m // (P * Q)).to(tl.int64) * H",
            "rows = ((offs_m // (P * Q)) * H",
            address("input_of_a_3x3"),
        ),
        ("32-bit weight", ".to(tl.int64) * (R * S * C)", " * (R * S * C)", address("weight")),
        ("32-bit second weight", ".to(tl.int64) * C2", " * C2", address("weight_of_the_second_convolution")),
        (
            "32-bit output",
            "y_ptr + offs_m[:, None].to(tl.int64)",
            "y_ptr + offs_m[:, None]",
            address("pointwise_input_and_output"),
        ),
    ],
    "kernels/conv_tma.py": [
        (
            "a masked row is the first operand",
            "(IMAGES * ROWS > 1 or MASKED)",
            "(IMAGES * ROWS > 1)",
            "tests/test_emulate.py::test_compiled_kernels_are_right[90-fp16]",
        ),
        ("box not moved by the tap", "p + (h >> HALF)", "p", _boxes("3x3")),
        ("parity of the row forgotten", "h & HALF, q", "0, q", _boxes("3x3 stride 2")),
        ("parity of the column forgotten", "(w & HALF) * (GROUPS * C)", "0", _boxes("3x3 stride 2")),
        (
            "padding of rows used for columns",
            "% S * DIL_W - PAD_W",
            "% S * DIL_W - PAD_H",
            _boxes("3x3 dilated, wide padding"),
        ),
        ("dilation ignored", "tap // S * DIL_H", "tap // S", _boxes("3x3 dilated, wide padding")),
        ("tail of K not masked", "if C % BLOCK_K != 0:", "if False:", _boxes("3x3 stride 2")),
        (
            "tail of the second K not masked",
            "if C2 % BLOCK_K != 0:",
            "if False:",
            "tests/test_tiles.py::test_pixels_that_a_strided_shortcut_skips_may_be_nan",
        ),
        ("a group reads another's channels", "+ group * C + c", "+ c", _boxes("3x3 2 groups", "16x16x16.w4.s1.p1")),
        (
            "a group takes another's filters",
            "channel = group * K + k",
            "channel = k",
            _boxes("3x3 2 groups", "16x16x16.w4.s1.p1"),
        ),
        ("residual forgotten", "elif other_desc is not None:", "elif False:", _boxes("1x1 residual")),
        ("ReLU forgotten", "        if APPLY_RELU:\n", "        if False:\n", _boxes("3x3")),
        (
            "second shift forgotten",
            "else acc2) * scale2[None, :] + shift2[None, :]",
            "else acc2) * scale2[None, :]",
            _boxes("shortcut"),
        ),
        (
            "a program stops after its first piece",
            "tl.range(tl.program_id(0), tiles, PROGRAMS",
            "tl.range(tl.program_id(0), PROGRAMS, PROGRAMS",
            "tests/test_tiles.py::test_programs_that_take_several_pieces",
        ),
        (
            "images of a box not counted",
            "(pixels // (TILES_Q * TILES_P)) * IMAGES",
            "pixels // (TILES_Q * TILES_P)",
            _boxes("five small images", "16x16x16.w4.s1.p1"),
        ),
        (
            "misaligned activation not noticed",
            "if unaligned(x, other):",
            "if False:",
            "tests/test_tiles.py::test_activation_that_no_descriptor_can_name",
        ),
        (
            "odd image not refused",
            "image.shape[2] % 2 or image.shape[3] % 2",
            "False",
            "tests/test_tiles.py::test_what_boxes_cannot_do_is_refused",
        ),
    ],
    "kernels/boxes.py": [
        (
            "rows of a half image too short",
            "stride * w * c, w * c, stride * c, 1",
            "w * c, w * c, stride * c, 1",
            _boxes("3x3 stride 2"),
        ),
        (
            "box with pixels outside",
            "return covered, box.images",
            "return -covered, box.images",
            "tests/test_boxes.py::test_box_covers_with_the_fewest_pixels",
        ),
    ],
    "kernels/epilogue.py": [
        ("eps forgotten", "tl.sqrt(var + EPS)", "tl.sqrt(var)", _plain("eps 0.1")),
        (
            "convolution bias not scaled",
            "shift = (shift - tl.load(mean",
            "shift = shift + (-tl.load(mean",
            _plain("bias norm relu"),
        ),
        (
            "NaN dropped by the instruction",  # the interpreter keeps it all the same: only the machine code tells
            "tl.PropagateNan.ALL",
            "tl.PropagateNan.NONE",
            "tests/test_codegen.py::test_gates_hold_and_nothing_is_worse_than_the_kept_table",
        ),
        (
            "NaN dropped by a comparison",
            "tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)",
            "tl.where(z > 0, z, 0.0)",
            "tests/test_conv_bn_act.py::test_nan_in_x_reaches_its_neighbours_only[triton]",
        ),
        ("32-bit rows", "return offs_m.to(tl.int64)", "return offs_m", address("residual[1]")),
        ("32-bit strided rows", "(n.to(tl.int64) * H", "(n * H", address("residual[2]")),
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
            "tests/test_bn_act.py::test_every_norm_has_its_own_eps",
        ),
        ("32-bit offsets", "offs_m[:, None].to(tl.int64) * C", "offs_m[:, None] * C", address("bn_act")),
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
        ("32-bit offsets", "offs_m[:, None].to(tl.int64) * C", "offs_m[:, None] * C", address("relu_backward")),
    ],
}
