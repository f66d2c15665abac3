"""The faults that `make mutants` puts into the kernels of stages and stems, and for each the test that must notice it."""

from __future__ import annotations

from mutants_bottleneck import CHAIN
from mutants_kernels import address


def _stage(case: str, tile: str = "16x16x16.w4.s1.c1") -> str:
    return f"tests/test_expand_shift.py::test_every_case[{case}-{tile}]"


def _stem(case: str, tile: str = "2x32") -> str:
    return f"tests/test_stem_kernel.py::test_every_case[{case}-{tile}]"


_HOPPER = "tests/test_stem_hopper.py::test_compiled_kernel_is_right"

#: (name, old text, new text, killers) by file.
STAGES: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/stem_hopper.py": [
        (
            "pair in front forgotten",
            "    z = gl.maximum(z, _before(right, K), propagate_nan=tl.PropagateNan.ALL)\n",
            "",
            _HOPPER,
        ),
        (
            "pooled column in front is the own one",
            "gl.SliceLayout(0, LINES)) - 1, 0)",
            "gl.SliceLayout(0, LINES)), 0)",
            _HOPPER,
        ),
        ("pixels outside not zero", "return gl.where(inside[:, None], z, 0.0)", "return z", _HOPPER),
        ("row below the image", "there = inside & (2 * i + 1 < P)", "there = inside", _HOPPER),
        ("row above forgotten", "    if first > 0:\n", "    if first > first:\n", _HOPPER),
        (
            "products under way are read",
            "    acc = warpgroup_mma_wait(0, [acc])\n    CHANNELS",
            "    CHANNELS",
            _HOPPER,
        ),
        ("filter not waited for", "    mbarrier.wait(bar, 0)\n", "", _HOPPER),
        ("image read before the wait", "    wait_for_input(PDL)\n", "", _HOPPER),
        ("taps in their own order", ".permute(0, 1, 3, 4, 2, 5)", "", _HOPPER),
    ],
    "kernels/expand_shift.py": [
        ("sign of the residual", "z += tl.load(residual,", "z -= tl.load(residual,", _stage("identity")),
        (
            "residual forgotten by a chunk",
            "* K + offs_n[None, :]\n            z +=",
            "* K + offs_n[None, :] - n\n            z +=",
            _stage("ragged chunks"),
        ),
        ("last row unwritten", "mask_m = offs_m < M\n", "mask_m = offs_m < M - 1\n", _stage("identity")),
        ("halo off by one above", "(h0 + r >= 0)", "(h0 + r >= 1)", _stage("identity")),
        ("halo off by one at the right", "(w0 + s < W)", "(w0 + s <= W)", _stage("identity")),
        ("3x3 not strided", "% P) * STRIDE - PAD_H", "% P) - PAD_H", _stage("stride 2, downsample")),
        (
            "ReLU behind the 3x3 forgotten",
            "h2 = nan_relu(acc * scale[None, :] + shift[None, :])",
            "h2 = (acc * scale[None, :] + shift[None, :])",
            _stage("identity"),
        ),
        ("ReLU before the add", "        y = nan_relu(z).to(dtype)", "        y = z.to(dtype)", _stage("identity")),
        ("ReLU of the reduce forgotten", "g = nan_relu(reduced", "g = (reduced", _stage("identity")),
        (
            "reduce of the last chunk only",
            "reduced = tl.dot(y, w1, reduced,",
            "reduced = tl.dot(y, w1,",
            _stage("identity"),
        ),
        (
            "downsample not strided",
            "strided_rows(offs_m, H2, W2, P, Q, STRIDE2)",
            "strided_rows(offs_m, H2, W2, P, Q, 1)",
            _stage("stride 2, downsample"),
        ),
        (
            "tail of the downsample's K not masked",
            "(offs_k < C2 - c) if C2 % BLOCK_K != 0 else (offs_k < BLOCK_K)",
            "offs_k < BLOCK_K",
            _stage("stride 2, downsample"),
        ),
        (
            "expand takes the 3x3's eps",
            "mask_n, EPS3, ACC",
            "mask_n, EPS, ACC",
            "tests/test_expand_shift.py::test_every_norm_has_its_own_eps",
        ),
        (
            "reduce takes the expand's eps",
            "offs_g < G, EPS1, ACC",
            "offs_g < G, EPS3, ACC",
            "tests/test_expand_shift.py::test_every_norm_has_its_own_eps",
        ),
        (
            "second shift forgotten",
            "down * scale2[None, :] + shift2[None, :]",
            "down * scale2[None, :]",
            _stage("stride 2, downsample"),
        ),
        (
            "32-bit rows of h",
            "rows = ((offs_m // (P * Q)).to(tl.int64) * H",
            "rows = ((offs_m // (P * Q)) * H",
            address("stage"),
        ),
        (
            "32-bit residual",
            "other_ptr + offs_m[:, None].to(tl.int64) * K",
            "other_ptr + offs_m[:, None] * K",
            address("stage"),
        ),
        ("32-bit output", "y_ptr + offs_m[:, None].to(tl.int64) * K", "y_ptr + offs_m[:, None] * K", address("stage")),
        (
            "32-bit next input",
            "g_ptr + offs_m[:, None].to(tl.int64) * G",
            "g_ptr + offs_m[:, None] * G",
            address("stage"),
        ),
    ],
    "kernels/expand_shift_tma.py": [
        ("box not moved by the tap", "q + (w >> HALF)", "q", _stage("identity", "16x16x16.w4.s1.c1.t1")),
        ("parity of the row forgotten", "h & HALF, q", "0, q", _stage("stride 2, downsample", "16x16x16.w4.s1.c1.t1")),
        (
            "residual forgotten by a chunk",
            "other_desc.load([i, p, 0, q, n])",
            "other_desc.load([i, p, 0, q, 0])",
            _stage("ragged chunks", "16x16x16.w4.s1.c1.t1"),
        ),
        (
            "reduce of the last chunk only",
            "reduced = tl.dot(y, w1.T, reduced,",
            "reduced = tl.dot(y, w1.T,",
            _stage("identity", "16x16x16.w4.s1.c1.t1"),
        ),
        (
            "ReLU before the add",
            "        y = nan_relu(z).to(dtype)",
            "        y = z.to(dtype)",
            _stage("identity", "16x16x16.w4.s1.c1.t1"),
        ),
        (
            "tail of the downsample's K not masked",
            "if C2 % BLOCK_K != 0:",
            "if False:",
            "tests/test_expand_shift.py::test_pixels_that_a_strided_downsample_skips_may_be_nan",
        ),
        (
            "expand takes the 3x3's eps",
            "mask_n, EPS3, ACC",
            "mask_n, EPS, ACC",
            "tests/test_expand_shift.py::test_every_norm_has_its_own_eps",
        ),
    ],
    "fused_resblock/program.py": [
        (
            "a tail's output taken for the next head",
            "return pair[1]",
            "return pair[0]",
            "tests/test_stage_kernel.py::test_parity[layer-float32]",
        ),
        (
            "a program's input kept to the end",
            "x.pop().contiguous(",
            "x[0].contiguous(",
            "tests/test_handover.py::test_an_input_dies_when_it_was_read_for_the_last_time",
        ),
        (
            "a head kept to the end",
            "values[1], operations = head.pop(), operations[1:]",
            "values[1], operations = head[0], operations[1:]",
            "tests/test_handover.py::test_a_head_dies_when_it_was_read_for_the_last_time",
        ),
    ],
    "fused_resblock/chain.py": [
        *CHAIN,
        (
            "a chain's input written over",
            "tail.other not in (0, main)",
            "tail.other != main",
            "tests/test_overwrite.py::test_output_over_a_residual_that_nobody_reads_any_more[the chain's own input]",
        ),
        (
            "what the 3x3 reads written over",
            "tail.other not in (0, main)",
            "tail.other > 0",
            "tests/test_overwrite.py::test_output_over_a_residual_that_nobody_reads_any_more[the 3x3's input]",
        ),
        (
            "a program's input let go while it is read",
            "return self._last_read.get(value) == len(self.operations)",
            "return value == 0 or self._last_read.get(value) == len(self.operations)",
            "tests/test_handover.py::test_an_input_dies_when_it_was_read_for_the_last_time",
        ),
        (
            "a block's input written over",
            "residual and other not in (0, main)",
            "residual and other != main",
            "tests/test_stage.py::test_parity[ragged-basic-onednn]",
        ),
    ],
    "kernels/stage.py": [
        (
            "tiles that no GPU has timed are chosen",
            " if tail_ring.is_timed(tile)]",
            "]",
            "tests/test_tail_ring.py::test_none_is_chosen_that_no_gpu_has_timed",
        ),
        (
            "odd image not noticed",
            "bind_expand_shift_tma if tile.tma and boxes",
            "bind_expand_shift_tma if tile.tma",
            _stage("stride 2, downsample, odd image", "16x16x16.w4.s1.c1.t1"),
        ),
    ],
    "kernels/stem.py": [
        ("image not moved by the padding", "h = row % HEIGHT - TOP", "h = row % HEIGHT", _stem("7x7 of 3 channels")),
        ("row of the filter skipped", "w_cols + r * TAPS", "w_cols", _stem("7x7 of 3 channels")),
        (
            "shared row of the tile above forgotten",
            "    if first > 0:",
            "    if first > 1 << 20:",
            _stem("7x7 of 3 channels"),
        ),
        (
            "row behind the last pooled",
            "there = mask_q & (tl.full((BLOCK_Q,), 2 * i + 1, tl.int32) < P)",
            "there = mask_q",
            _stem("3x3 of 4 channels, no bias", "8x16"),
        ),
        (
            "column in front of a pair forgotten",
            "tl.gather(right, before, 0)",
            "right",
            _stem("7x7 of 3 channels"),
        ),
        (
            "tiles of columns overlap too little",
            "// tiles_q) * ROWS\n    q0 = (tl.program_id(0) % tiles_q) * (half - 1)",
            "// tiles_q) * ROWS\n    q0 = (tl.program_id(0) % tiles_q) * half",
            _stem("wider than a tile"),
        ),
        (
            "window begins a column early",
            "packed[:, :, int(odd) : s + int(odd), :c]",
            "packed[:, :, :s, :c]",
            _stem("7x7 of 3 channels"),
        ),
    ],
    "fused_resblock/explain.py": [
        (
            "a chain that was not asked for is told of",
            "if not is_stage(module):",
            "if True:",
            "tests/test_explain_stages.py::test_explain_says_why_blocks_are_no_chain[not asked for]",
        ),
    ],
    "fused_resblock/stage.py": [
        (
            "a block that is called twice is noted once",
            "modules: Any = self._modules.values()",
            "modules: Any = self.children()",
            "tests/test_one_function.py::test_a_chain_that_calls_a_block_twice[asked]",
        ),
        (
            "a next chain that is gone is told of",
            "bound.ends.ahead is not None and handover.fits(stage, bound)",
            "bound.ends.ahead is not None",
            "tests/test_handover_changes.py::test_a_chain_in_the_place_of_the_next_one_is_learnt",
        ),
        (
            "a head left for a chain that begins with a whole block",
            "if bound is not None and bound.ends.first is None:",
            "if False:",
            "tests/test_whole.py::test_a_chain_that_begins_with_one_is_left_no_head",
        ),
        (
            "a tail is asked of another block",
            "tails.get(base - 2)",
            "tails.get(base - 3)",
            "tests/test_explain_stages.py::test_explain_says_why_a_tail_is_none",
        ),
        (
            "what was bound before a change is told of",
            "or not guard.holds():",
            "or False:",
            "tests/test_explain_stages.py::test_explain_says_what_a_table_decided",
        ),
    ],
}
