"""Faults of the kernels that load through rings, and the tests that must notice each."""

from __future__ import annotations

from mutants_tail_ring import TAIL_RING

_COMPILED = "tests/test_ring_compiled.py::test_compiled_kernel_is_right[fp16]"
_SPECIAL = "tests/test_ring_compiled.py::test_scales_of_all_sizes_nan_and_what_no_descriptor_names"
_RESIDUALS = "tests/test_ring_compiled.py::test_residuals_that_are_overwritten_nan_and_what_no_descriptor_names"
_TAKES = "tests/test_ring.py::test_convolutions_that_it_takes"

#: (name, old text, new text, killers) by file.
RING: dict[str, list[tuple[str, str, str, str]]] = {
    **TAIL_RING,
    "kernels/conv_pair.py": [
        (
            "slot under way overwritten",
            "acc = warpgroup_mma_wait(1, [acc])",
            "acc = warpgroup_mma_wait(2, [acc])",
            _COMPILED,
        ),
        ("phase never turns", "            phase ^= 1\n", "            phase ^= 0\n", _COMPILED),
        ("next tile's loads are this one's", "            tile += PROGRAMS\n", "            tile += 0\n", _COMPILED),
        ("second GEMM starts anew", "adds = now >= 0 if SECOND else now > 0", "adds = now > 0", _COMPILED),
        ("channels of x go on from those of h", "        c -= STEPS * w_desc.block_shape[1]\n", "", _COMPILED),
        ("pixels asked for before the wait", "    wait_for_input(PDL)\n", "", _COMPILED),
        ("piece that leaves is overwritten", "tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)", _COMPILED),
        ("ratio by a scale of 0", "tl.where(tl.abs(scale2) < small, small, scale2)", "scale2", _SPECIAL),
        ("no scale at all", "tl.where(base == 0.0, 0.0, scale / base)", "scale / base", _SPECIAL),
        ("ReLU of both forgotten", "if APPLY_RELU:", "if False:", _COMPILED),
    ],
    "kernels/conv_ring.py": [
        (
            "slot under way overwritten by one GEMM's loads",
            "acc = warpgroup_mma_wait(1, [acc])",
            "acc = warpgroup_mma_wait(2, [acc])",
            _COMPILED,
        ),
        ("residual not waited for", "mbarrier.wait(come.index(place), turned)", "pass", _RESIDUALS),
        ("residual's phase never turns", "turned ^= 1", "turned ^= 0", _RESIDUALS),
        ("residual over a piece that leaves", "tma.store_wait(LAG)", "tma.store_wait(LAG + 1)", _RESIDUALS),
        ("residual of another tile", "    tile += turn // PIECES * PROGRAMS\n", "", _RESIDUALS),
        ("piece that leaves is overwritten without a residual", "tma.store_wait(BUFFERS - 1)", "pass", _COMPILED),
        (
            "overwritten unasked",
            "in_place = overwrite and other is not None",
            "in_place = other is not None",
            _RESIDUALS,
        ),
        ("residual asked for before the wait", "    wait_for_input(PDL)\n", "", _COMPILED),
        ("ReLU of one GEMM forgotten", "if APPLY_RELU:", "if False:", _COMPILED),
    ],
    "kernels/ring.py": [
        (
            "a stride of the first 1x1 taken",
            "(conv.stride, conv.padding, conv.groups) != ((1, 1), (0, 0), 1)",
            "(conv.padding, conv.groups) != ((0, 0), 1)",
            _TAKES,
        ),
        (
            "channels of the branch unasked",
            " or (branch is not None and branch.weight.shape[1] % WIDTH)",
            "",
            _TAKES,
        ),
        (
            "a residual with too few pieces",
            "return 0 if fit < pieces else min(fit, 2 * pieces)",
            "return min(fit, 2 * pieces)",
            "tests/test_ring.py::test_a_residual_needs_room_for_all_pieces_of_a_tile",
        ),
    ],
}
