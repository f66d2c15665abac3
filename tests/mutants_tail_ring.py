"""Faults of the kernel that runs a bottleneck's tail through two rings of loads, and the tests that must notice each."""

from __future__ import annotations

_COMPILED = "tests/test_tail_ring.py::test_compiled_kernel_is_right[fp16]"
_SPECIAL = "tests/test_tail_ring.py::test_residuals_that_are_overwritten_nan_and_what_no_descriptor_names[ring]"
_HALO = "tests/test_halo.py::test_on_hopper_what_no_descriptor_names_and_nan"
_WIDE = "tests/test_tail_ring.py::test_residuals_that_are_overwritten_nan_and_what_no_descriptor_names[wide]"
_TAKES = "tests/test_tail_ring.py::test_tails_that_it_takes"
_CHANNELS = "tests/test_tail_ring.py::test_channels_and_tiles_that_it_takes"
_SPILLS = "tests/test_tail_ring.py::test_sixteen_warps_are_not_asked_to_spill"

#: (name, old text, new text, killers) by file.
TAIL_RING: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/expand_shift_ring.py": [
        (
            "slots of the taps under way overwritten",
            "acc = warpgroup_mma_wait(1, [acc])",
            "acc = warpgroup_mma_wait(2, [acc])",
            _COMPILED,
        ),
        ("wide reduce's first channels twice", "second, norm1, n, p, q, 2)", "second, norm1, n, p, q, 0)", _COMPILED),
        (
            "y that leaves is overwritten by the next residual",
            "                tma.store_wait(0)\n                box =",
            "                box =",
            _SPECIAL,
        ),
        ("g that leaves is overwritten by h2", "        tma.store_wait(0)  # the last g has left\n", "", _COMPILED),
        ("pixels of a tail asked for before the wait", "    wait_for_input(PDL)\n", "", _COMPILED),
        ("ReLU of h2 forgotten", "h2.index(piece).store(nan_relu(z)", "h2.index(piece).store((z)", _COMPILED),
    ],
    "kernels/expand_shift_wide.py": [
        (
            "slots of the wide taps under way overwritten",
            "acc = warpgroup_mma_wait(1, [acc])",
            "acc = warpgroup_mma_wait(2, [acc])",
            _COMPILED,
        ),
        (
            "y that leaves is overwritten by the next wide residual",
            "            tma.store_wait(0)  # the chunk before this one has been read\n",
            "",
            _WIDE,
        ),
        (
            "g goes out by a slot that is under way",
            "(slot + PIXEL_STAGES - 1) % PIXEL_STAGES",
            "slot",
            _COMPILED,
        ),
        (
            "g that leaves is overwritten by the next taps",
            "            if tap == 0:\n                tma.store_wait(0)  # the last y or g has left\n",
            "",
            _COMPILED,
        ),
        (
            "filters of the reduce under way overwritten",
            "                sums = warpgroup_mma_wait(1, [sums])\n",
            "                sums = warpgroup_mma_wait(2, [sums])\n",
            _COMPILED,
        ),
        ("wide ReLU of h2 forgotten", "nan_relu(scaled(acc, norm, 0))", "scaled(acc, norm, 0)", _COMPILED),
        ("wide residual forgotten", " + buffer.load(MMA).to(gl.float32)", "", _COMPILED),
        ("pixels of a wide tail asked for before the wait", "    wait_for_input(PDL)\n", "", _COMPILED),
    ],
    "kernels/tail_moves.py": [
        ("phase of both rings never turns", "        phase ^= 1\n", "        phase ^= 0\n", _COMPILED),
        ("tap of another channel block", "step % 9 * C + step // 9 * WIDTH", "step % 9 * C", _COMPILED),
        ("residual of the first chunk alone", "(step - TAPS) * other_desc", "0 * other_desc", _COMPILED),
        ("wide reduce's first filters twice", "(part - 1) * C", "0", _COMPILED),
    ],
    "kernels/tail_call.py": [
        ("residual not overwritten", "other if overwrite else", "other if False else", _HALO),
        ("tail overwrites unasked", "y = other if overwrite else", "y = other if True else", _SPECIAL),
    ],
    "kernels/tail_ring.py": [
        (
            "a ring too short for a chunk",
            "tile.chunk_stages < max(2, 1 + reduced // (2 * WIDTH))",
            "tile.chunk_stages < 2",
            _CHANNELS,
        ),
        ("sixteen warps that spill", "triton_release() >= (3, 9)", "False", _SPILLS),
        ("a branch is not looked at", '    if second:\n        return "a downsample branch"\n', "", _CHANNELS),
        ("more shared memory than there is", "> SHARED - 1024", "> 2 * SHARED", _CHANNELS),
        (
            "padding of the 3x3 unasked",
            "(r, s, *conv[3:]) != (3, 3, (1, 1), (1, 1), (1, 1), 1)",
            "(r, s, conv.stride, *conv[5:]) != (3, 3, (1, 1), (1, 1), 1)",
            _TAKES,
        ),
    ],
}
