"""Faults in programs, in chains that wait, and in what they are made of."""

_USES = "tests/test_waiting_uses.py::test_use"
_PENDING = "tests/test_pending.py::test_"
_WAITING = "tests/test_waiting.py::test_"
_LINES = "tests/test_lines.py::test_"

#: (name, old text, new text, killers) by file.
WAITING: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/waiting.py": [
        (
            "what two chains begin with taken by the first",
            "[self._source.read()] if self.followed else self._source.take()",
            "self._source.take()",
            _USES + "[first first-no_grad-False]",
        ),
        (
            "what a chain began with held to the end",
            "[self._source.read()] if self.followed else self._source.take()",
            "[self._source.read()]",
            _WAITING + "an_input_dies_when_it_was_read_for_the_last_time",
        ),
        (
            "a result between not given to who has it",
            "if between is not None and between.computed is None:",
            "if False:",
            _USES + "[last first-no_grad-False]",
        ),
        (
            "an edited result between replaced",
            "if between is not None and between.computed is None:",
            "if between is not None:",
            _USES + "[edited after the next chain-no_grad-False]",
        ),
        (
            "a chain joins behind values that were edited",
            "x.computed is None and not x.followed",
            "not x.followed",
            _USES + "[edited before the next chain-no_grad-False]",
        ),
        (
            "a chain with hooks waits",
            " or hooked(stage) or any(",
            " or any(",
            _WAITING + "hooks_see_values[layer1]",
        ),
        (
            "a chain waits for a pool with hooks",
            "return leaves.hooked(module) or module",
            "return module",
            _WAITING + "who_looks_at_the_pool_s_input_sees_values[False]",
        ),
        (
            "a chain waits for a compiled pool",
            "return leaves.hooked(module) or module._compiled_call_impl is not None",
            "return leaves.hooked(module)",
            _WAITING + "who_looks_at_the_pool_s_input_sees_values[True]",
        ),
        (
            "small inputs wait",
            "isinstance(x, Pending) or x.numel() * x.element_size() >= WORTH",
            "True",
            _WAITING + "small_inputs_do_not_wait",
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
            "a program's input kept to the end",
            "x.pop().contiguous(",
            "x[0].contiguous(",
            "tests/test_waiting.py::test_an_input_dies_when_it_was_read_for_the_last_time",
        ),
        (
            "a program's input let go while it is read",
            "return self._last_read.get(value) == len(self.operations)",
            "return value == 0 or self._last_read.get(value) == len(self.operations)",
            "tests/test_waiting_uses.py::test_use[usual-no_grad-False]",
        ),
        (
            "a head kept to the end",
            "values[1], operations = head.pop(), operations[1:]",
            "values[1], operations = head[0], operations[1:]",
            "tests/test_handover.py::test_a_head_dies_when_it_was_read_for_the_last_time",
        ),
    ],
    "fused_resblock/lines.py": [
        (
            "chains wait although somebody asks for types",
            "found.doubt is not None or found.unseen is not None",
            "found.doubt is not None",
            _LINES + "where_anything_comes_between_nothing_waits[asked_within_a_line]",
        ),
        (
            "chains wait whatever comes between",
            "not stands_for(nodes[read], called[read], [*blocks, called[start]])",
            "called[read] != [*blocks, called[start]]",
            _LINES + "where_anything_comes_between_nothing_waits[pooled_and_read]",
        ),
        (
            "a chain that is called twice waits",
            "before >= 0 and called.count(blocks[0]) == 1",
            "before >= 0",
            _LINES + "where_anything_comes_between_nothing_waits[called_twice]",
        ),
    ],
    "fused_resblock/pending.py": [
        (
            "a reader's inference mode",
            "with torch.inference_mode(self._inference), torch.no_grad():",
            "with torch.no_grad():",
            _WAITING + "results_are_of_the_mode_of_the_call",
        ),
        (
            "the shape of before an edit",
            "func in _METADATA and args[0].computed is None",
            "func in _METADATA",
            _PENDING + "shape_behind_an_edit_in_place",
        ),
        (
            "what hides in a list is asked again and again",
            "with torch._C.DisableTorchFunctionSubclass():  # some",
            "with contextlib.nullcontext():  # some",
            _PENDING + "list_of_a_class_of_its_own",
        ),
        (
            "an edit of what pending work begins with not noticed",
            "if not self._x or (self._seen is not None and self._x[0]._version != self._seen):",
            "if not self._x:",
            _WAITING + "input_changed_before_the_output_was_used",
        ),
        (
            "pending work done on whatever stream",
            "if now == self._stream:",
            "if True:",
            _WAITING + "work_stays_on_the_stream_on_which_it_was_asked_for",
        ),
        (
            "a stream does not wait for pending work",
            "                now.wait_stream(self._stream)\n",
            "",
            _WAITING + "work_stays_on_the_stream_on_which_it_was_asked_for",
        ),
        (
            "memory of pending work free before the other stream is done",
            "                self.computed.record_stream(now)\n",
            "",
            _WAITING + "work_stays_on_the_stream_on_which_it_was_asked_for",
        ),
    ],
    "fused_resblock/network.py": [
        (
            "a stem with something between",
            "readers != [end.next] or end.next.target != following:\n                return False\n            end = end.next",
            "len(readers) != 1 or readers[0].target != following:\n                return False\n            end = readers[0]",
            "tests/test_stem_recognition.py::test_an_edit_of_the_image_that_comes_later[inference_mode]",
        ),
        (
            "chains wait by the graph of before",
            "        know_lines(self, found)\n",
            "",
            _LINES + "a_graph_that_changed_is_asked_again",
        ),
        (
            "chains wait whatever a network is called with",
            "scope(self._fused_lines if alone else None)",
            "scope(self._fused_lines)",
            _LINES + "arguments_that_the_graph_does_not_have",
        ),
    ],
}
