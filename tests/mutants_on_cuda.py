"""Faults in `tune` and `capture`, and the tests that must notice each."""

from __future__ import annotations

#: (name, old text, new text, killers) by file.
ON_CUDA: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/graphs.py": [
        (
            "captured into a tensor of the inference mode",
            "    @torch.inference_mode(False)  # else",
            "    # else",
            "tests/test_graphs_in_inference_mode.py::test_what_is_captured_there_is_called_anywhere",
        ),
        (
            "the model's own attributes not asked",
            "[owner, *model.modules()]",
            "list(model.modules())",
            "tests/test_graphs.py::test_changed_attributes_of_the_model_itself_are_captured_again",
        ),
        (
            "changed model not captured again",
            "if graph.signature == signature(x) and self._holds():",
            "if True:",
            "tests/test_graphs.py::test_a_changed_model_is_captured_again[edit_in_place]",
        ),
        (
            "result in the graph's memory",
            "if self._copy else",
            "if False else",
            "tests/test_graphs.py::test_results_are_of_their_own_unless_asked_otherwise",
        ),
        (
            "folded weights let go",
            "torch.no_grad(), keeping(kept):",
            "torch.no_grad():",
            "tests/test_graphs.py::test_what_a_graph_reads_stays_in_memory",
        ),
        (
            "a stream for each graph",
            "if device not in self._streams and",
            "if",
            "tests/test_graph_streams.py::test_the_graphs_of_a_model_are_recorded_on_one_stream_a_device",
        ),
    ],
    "fused_resblock/tuning.py": [
        (
            "slowest tile of a tail wins",
            "tile = min(tiles",
            "tile = max(tiles",
            "tests/test_tuning.py::test_the_fastest_tile_of_a_tail_is_in_the_table",
        ),
        (
            "wrong results timed",
            "if run is None or not _right(run(x, other), same, exact):",
            "if run is None:",
            "tests/test_tuning.py::test_a_wrong_way_is_never_a_winner",
        ),
        (
            "a stem that is faster apart leaves its convolution untuned",
            "            tuned.load_config(table.write())\n",
            "        tuned.load_config(table.write())\n",
            "tests/test_tuning.py::test_the_convolution_of_a_stem_that_is_faster_apart_is_tuned_too",
        ),
    ],
    "fused_resblock/tuned_file.py": [
        (
            "a file in the place of a link",
            "target = self.path.resolve()",
            "target = self.path",
            "tests/test_damaged_results.py::test_a_table_that_is_linked_to_stays_where_it_is",
        ),
        (
            "a stem is its convolution",
            " + tables.STEM * (found.pool is not None)",
            "",
            "tests/test_tuning.py::test_a_stem_as_one_kernel_and_apart",
        ),
    ],
}
