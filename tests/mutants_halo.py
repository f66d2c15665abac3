"""Faults of the kernels that read their taps from shared memory, and the tests that must notice each."""

from __future__ import annotations

_HALO = "tests/test_halo.py::test_on_hopper_what_no_descriptor_names_and_nan"
_EARLY = "tests/test_launch.py::test_where_a_kernel_may_start_before_the_last_one_has_ended"
_COMPILED = "tests/test_emulate.py::test_compiled_kernels_are_right[90-fp16]"

#: (name, old text, new text, killers) by file.
HALO: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/taps.py": [
        ("column shift forgotten", "[n, p - 1, q + s - 1, c], bar", "[n, p - 1, q, c], bar", _HALO),
        ("rows below are those above", "[n, p + ROWS - 1", "[n, p + ROWS - 2", _HALO),
        (
            "rows and columns of the filter changed over",
            "tap % 3 * HEIGHT + tap // 3",
            "tap // 3 * HEIGHT + tap % 3",
            _HALO,
        ),
        (
            "groups without zeros between them",
            "own = (k // PER_GROUP)[:, None] == (c // PER_GROUP)[None, :]",
            "own = (k < C)[:, None] & (c < C)[None, :]",
            _HALO,
        ),
    ],
    "kernels/dependent.py": [
        ("no wait for the kernel before", "        gdc_wait()\n", "", _COMPILED),
    ],
    "kernels/launch.py": [
        ("early start before Hopper", "target.arch >= 90", "target.arch >= 80", _EARLY + "[cuda-89-12080-None-False]"),
        (
            "early start not switched off",
            'os.environ.get("FUSED_RESBLOCK_PDL") == "0"',
            "False",
            _EARLY + "[cuda-90-12080-0-False]",
        ),
    ],
    "kernels/conv_halo.py": [
        (
            "pixels asked for before the wait",
            "    wait_for_input(PDL)\n    load_halo(x_desc, edge_desc, x_smem, bars.index(1), n, p, q, c, True)\n",
            "    load_halo(x_desc, edge_desc, x_smem, bars.index(1), n, p, q, c, True)\n    wait_for_input(PDL)\n",
            _COMPILED,
        ),
        ("residual forgotten", "z += y_smem.load(MMA)", "z + y_smem.load(MMA)", _HALO),
        ("ReLU forgotten", "if APPLY_RELU:", "if False:", _HALO),
        ("residual not overwritten", "in_place = overwrite and other is not None", "in_place = False", _HALO),
        (
            "next tile's pixels are this one's",
            "bars.index(1), n_next, p_next, q_next,",
            "bars.index(1), n, p, q,",
            _COMPILED,
        ),
    ],
    "kernels/expand_shift_halo.py": [
        ("first chunk of the residual for all", "[n, p, q, place * C]", "[n, p, q, 0]", _HALO),
        ("reduce takes the first chunk's filters", "w1_smem.index(j)", "w1_smem.index(0)", _HALO),
        ("next chunk's product is the first's", "following = (j + 1) % CHUNKS", "following = 0", _HALO),
        ("ReLU before the add", "y = nan_relu(z).to(dtype)", "y = z.to(dtype)", _HALO),
        (
            "next tile's residual is this one's",
            "other_desc, [n_next, p_next, q_next, place",
            "other_desc, [n, p, q, place",
            _COMPILED,
        ),
        ("downsample's chunk is the first", "w2_smem.index(following)", "w2_smem.index(0)", _COMPILED),
        ("chunk before is overwritten", "coming = j - 1 + BUFFERS", "coming = j + BUFFERS", _COMPILED),
    ],
    "kernels/halo.py": [
        (
            "last boxes forgotten",
            "-(-rows // SIDE), -(-columns // SIDE)",
            "rows // SIDE, columns // SIDE",
            "tests/test_halo.py::test_boxes_cover_every_image",
        ),
        (
            "joined groups mixed up",
            "wide[:, group, :, group] = own[:, group]",
            "wide[:, group, :, 0] = own[:, group]",
            "tests/test_halo.py::test_joined_groups_compute_the_same",
        ),
        (
            "a padding of 2 taken",
            "(conv.stride, conv.padding, conv.dilation) != ((1, 1), (1, 1), (1, 1))",
            "(conv.stride, conv.dilation) != ((1, 1), (1, 1))",
            "tests/test_halo.py::test_convolutions_that_it_takes",
        ),
    ],
}
