"""Faults of whole bottlenecks as one kernel, and of the chains that they run in, and the tests that must notice each."""

from __future__ import annotations

_COMPILED = "tests/test_bottleneck.py::test_compiled_kernel_is_right"
_BANDS = "tests/test_bottleneck.py::test_programs_of_several_bands"
_SPECIAL = "tests/test_bottleneck.py::test_nan_is_kept"
_TABLE = "tests/test_whole.py::test_where_a_table_says_so"
_RESIDUAL, _BRANCH = f"{_COMPILED}[channels0]", f"{_COMPILED}[channels1]"

#: (name, old text, new text, killers) in `chain.py`
CHAIN: list[tuple[str, str, str, str]] = [
    (
        "a block in front of others that pay for its reduce",
        "self._measured(number + 3, whole.like(x, layers.output_shape(x)), backend) is not None",
        "True",
        _TABLE,
    ),
    (
        "a reduce computed twice",
        "            tail = tail._replace(reduce=None)  # the block behind it computes its own\n",
        "            pass\n",
        "tests/test_whole.py::test_a_tail_in_front_computes_no_reduce_that_nobody_reads",
    ),
    (
        "blocks where tails are asked for",
        "if stage_kernel is False and len(set(names)) == 1 else {}",
        "if stage_kernel is not None and len(set(names)) == 1 else {}",
        "tests/test_whole.py::test_off_where_tails_are_asked_for_or_nothing_is",
    ),
    (
        "a block's input kept",
        "self._append(passed_on, base + 2, -1, y, also=base)",
        "self._append(passed_on, base + 2, -1, y)",
        "tests/test_whole.py::test_a_blocks_input_dies_behind_it",
    ),
    (
        "weights of another dtype",
        "return layers if same and all(",
        "return layers if all(",
        "tests/test_whole.py::test_weights_of_another_dtype_are_the_users_error",
    ),
    (
        "blocks of several backends",
        "if stage_kernel is False and len(set(names)) == 1 else {}",
        "if stage_kernel is False else {}",
        "tests/test_whole.py::test_off_in_chains_of_several_backends",
    ),
]
#: likewise, by file
BOTTLENECK: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/bottleneck_rows.py": [
        ("rows of h1 in the order of their making", "line = oldest + tap // 3", "line = tap // 3", _RESIDUAL),
        ("taps of a row begin at one column", "BLOCK_M + tap % 3)", "BLOCK_M + 1)", _RESIDUAL),
        ("column to the left of an image is not zero", "inside = (column >= 0) & ", "inside = ", _RESIDUAL),
        ("column to the right of an image is not zero", " & (column < W)", "", _RESIDUAL),
        ("row above an image is not zero", " & (above + row >= 0)", "", _RESIDUAL),
        ("row below an image is not zero", " & (above + row < H)", "", _RESIDUAL),
        ("y a row too low", "at_y = n, above + row - 1", "at_y = n, above + row", _RESIDUAL),
        (
            "filters that are being multiplied overwritten",
            "acc = warpgroup_mma_wait(1, [acc])\n                    if step > 0:\n",
            "acc = warpgroup_mma_wait(2, [acc])\n                    if step > 0:\n",
            _RESIDUAL,
        ),
        (
            "y that leaves is overwritten by the next row's pixels",
            "                    tma.store_wait(0)\n                    box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)\n                    leaving = 0\n",
            "                    box = load_pixels(x_desc, pool, box, sizes, PIECES, PROGRAMS)\n                    leaving = 0\n",
            _BANDS,
        ),
        (
            "y that leaves is overwritten by the next residual",
            "                        tma.store_wait(0)  # the last chunk has been read\n",
            "",
            _RESIDUAL,
        ),
        (
            "pixels of the downsample branch asked for too early",
            "                if SECOND:  # its pixels have been multiplied for the last time\n",
            "                if not SECOND:\n",
            _BRANCH,
        ),
        ("pixels asked for before the wait", "    wait_for_input(PDL)\n", "", _RESIDUAL),
        (
            "filters that stay not waited for",
            "        for stage in gl.static_range(FILTER_STAGES):\n",
            "        for stage in gl.static_range(0):\n",
            _RESIDUAL,
        ),
        ("ReLU of h2 forgotten", "nan_relu(scaled(acc, norm, 0))", "(scaled(acc, norm, 0))", _RESIDUAL),
        (
            "a norm of the wrong layer",
            "gamma2_ptr, beta2_ptr, EPS2)",
            "gamma3_ptr, beta3_ptr, EPS2)",
            _BRANCH,
        ),
    ],
    "kernels/bottleneck_moves.py": [
        ("residual of the row below", "above + row - again", "above + row", _RESIDUAL),
        ("residual a column to the left", "0, again - 1, step", "0, -1, step", _RESIDUAL),
        ("next band of another program", "            band += PROGRAMS\n", "            band += 1\n", _BANDS),
        ("branch's norm is the expand's", "z += scaled(d, norms[1], j)", "z += scaled(d, norms[0], j)", _BRANCH),
        ("y of two chunks in the same memory", "out.index(j % 2)", "out.index(0)", _BRANCH),
        ("all chunks of y at the first one's place", "0, 0, j * WIDTH]", "0, 0, 0]", _RESIDUAL),
        ("NaN dropped from y", "memory.store(nan_relu(z)", "memory.store(gl.maximum(z, 0.0)", _SPECIAL),
        (
            "filters of a band's first rows in other ones",
            "if step == gl.where(row < 2,",
            "if step == gl.where(row < 1,",
            _RESIDUAL,
        ),
    ],
    "kernels/bottleneck.py": [
        (
            "no column to the right of a row",
            "(columns + 1).bit_length()",
            "columns.bit_length()",
            "tests/test_bottleneck.py::test_columns_of_a_step",
        ),
        (
            "releases that let no matrix begin within another",
            "    if not gpu_of(x.device).rows:\n",
            "    if not gpu_of(x.device).gluon:\n",
            "tests/test_bottleneck.py::test_other_chips_and_releases",
        ),
        (
            "strided branch taken",
            'for name, pointwise in (("first", reduce), ("last", expand), ("downsample", shortcut)):',
            'for name, pointwise in (("first", reduce), ("last", expand)):',
            "tests/test_bottleneck.py::test_blocks_that_it_takes",
        ),
        (
            "rows wider than a step",
            "return None if x.shape[3] <= widest else",
            "return None if x.shape[3] <= widest + 1 else",
            "tests/test_bottleneck.py::test_blocks_that_it_takes",
        ),
    ],
    "fused_resblock/backends/whole.py": [
        ("blocks that a table knows to be slower", "not entry.faster or ", "", _TABLE),
        (
            "a place that no descriptor names",
            "        if not unaligned(x):\n",
            "        if True:\n",
            "tests/test_whole.py::test_a_place_in_memory_that_no_descriptor_names",
        ),
        (
            "steady tail without the reduce",
            "x, layers.shortcut, following, backend",
            "x, layers.shortcut, None, backend",
            "tests/test_whole.py::test_what_a_block_is_timed_against",
        ),
    ],
    "benchmarks/gpu/tails.py": [
        (
            "the time of a block's tail lost",
            'MARK = "joint"',
            'MARK = "tail"',
            "tests/test_gpu_blocks.py::test_the_time_of_its_tail_is_kept",
        ),
        (
            "what broke the GPU met again",
            "if name not in lost:",
            "if name:",
            "tests/test_gpu_blocks.py::test_what_broke_the_gpu_is_not_met_again",
        ),
    ],
    "fused_resblock/tail.py": [
        (
            "a reduce of a block on another backend",
            "runners[place + 1].steps[0] if names[place + 1] == names[place] else None",
            "runners[place + 1].steps[0]",
            "tests/test_explain_stages.py::test_each_block_of_a_chain_runs_on_its_own_backend",
        ),
        (
            "a block that reads elsewhere",
            "== (0, 1, 2, 0):",
            "[:3] == (0, 1, 2):",
            "tests/test_whole.py::test_only_blocks_in_that_order",
        ),
    ],
}
