"""Faults in stems and in the networks that hold them; the tests that must notice each."""

from __future__ import annotations

_OPEN = "tests/test_open_blocks.py::test_"
_FORMATS = "tests/test_formats.py::test_"

#: (name, old text, new text, killers) by file.
STEMS: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/stem.py": [
        (
            "a forward on the instance is its class's",
            'return "forward" in module.__dict__ or leaves.hooked',
            "return leaves.hooked",
            "tests/test_wrapped_forwards.py::test_weights_that_a_layer_of_a_stem_has_for_its_call_alone[bn1-later]",
        ),
        (
            "a stem by its class alone",
            "if around is None or does_more",
            "around = around or []\n        if does_more",
            "tests/test_made_by_class.py::test_layers_of_a_stem_and_a_head[before a call-default-fp32]",
        ),
        (
            "stems bound by their last module",
            "first, *followers = chain",
            "*followers, first = chain",
            "tests/test_stem.py::test_stems_that_share_a_relu_are_bound_once",
        ),
        (
            "small stems as one",
            "if every() or self._pays(size):",
            "if True:",
            "tests/test_stems_that_pay.py::test_small_images[20-False-default]",
        ),
        (
            "stems pay by their outputs alone",
            " + _PACKING * weight.numel() >= SMALL",
            " >= SMALL",
            "tests/test_stems_that_pay.py::test_large_weights_pay",
        ),
        (
            "parametrized convolution of a stem told to be one operation",
            "if not intact(StemConv if isinstance(module, StemConv) else StemFollower, module):",
            "if False:",
            "tests/test_stem_recognition.py::test_explain_says_that_a_stem_is_parametrized",
        ),
        (
            "hooks on what a stem is in",
            " or any(map(does_more, around))",
            "",
            "tests/test_stem_recognition.py::test_hooks_on_what_a_stem_is_in_see_tensors[forward]",
        ),
        (
            "the convolution's own change in a stem that is known",
            " or changed(self) is not None",
            "",
            "tests/test_stem.py::test_change[_conv_forward of the convolution]",
        ),
        (
            "a stem's guard without what its modules hold",
            "[inner for module in chain for inner in module.modules()]",
            "list(chain)",
            "tests/test_own_modules.py::test_activation_of_a_norm_in_a_stem[hook]",
        ),
        (
            "many stems on a GPU",
            "return self.unasked() or not self._fused_many",
            "return True",
            _OPEN + "on_a_gpu_only_frozen[True]",
        ),
        (
            "a small stem is small at every size",
            "(x.shape, x.device) == self._fused_small and",
            "self._fused_small and",
            "tests/test_stems_that_pay.py::test_a_larger_image_behind_a_small_one",
        ),
        (
            "a norm of a stem by name",
            "x = args[0] if args and not kwargs else None",
            "(x,) = args",
            "tests/test_stem_recognition.py::test_a_norm_that_is_given_its_input_by_name[default]",
        ),
    ],
    "fused_resblock/leaves.py": [
        (
            "hooks on the activation within a norm",
            "hooked(inner) or replaced(inner)",
            "False",
            "tests/test_own_modules.py::test_activation_of_a_norm_in_a_stem[hook]",
        ),
    ],
    "fused_resblock/network.py": [
        (
            "looked at while it is recorded by torch.jit",
            "any(map(untraceable, (*args, *kwargs.values())))",
            "any(isinstance(x, fx.Proxy) for x in (*args, *kwargs.values()))",
            "tests/test_odd_tensors.py::test_traced_after_an_attribute_was_set",
        ),
        (
            "an attribute of a network that is deleted",
            'super().__delattr__(name)\n        self.__dict__["_fused_stale"] = True',
            "super().__delattr__(name)",
            "tests/test_edits_by_hand.py::test_attribute_of_a_network_deleted",
        ),
        (
            "a stem with something between",
            "if list(end.users) != [end.next] or end.next.target != following:\n                return False\n            end = end.next",
            "if [node.target for node in end.users] != [following]:\n                return False\n            end = next(iter(end.users))",
            "tests/test_stem_recognition.py::test_an_edit_of_the_image_that_comes_later[inference_mode]",
        ),
        (
            "a network is looked at with other stops",
            "found = traced(self, stops=blocks)",
            "found = traced(self)",
            _OPEN + "a_network_whose_attributes_change",
        ),
    ],
    "fused_resblock/formats.py": [
        (
            "weights that lie alike in both formats are in channels_last",
            "return len(plain) > 0 and not told",
            "return False",
            _FORMATS + "formats_as_torch_tells_them_apart[weights1-NCHW]",
        ),
        (
            "a view of what follows a stem",
            "left += node.users.keys() - reached",
            "left += []",
            _FORMATS + "a_view_of_stems[further behind-default]",
        ),
        (
            "what is returned is channels_last",
            "made.get(id(part), part)",
            "part",
            _FORMATS + "what_is_done_to_the_result_of_a_part_is_not_known[default]",
        ),
        (
            "a view behind a fused block",
            "if not (self._blocks.get(str(node.target)) or _forgets(node, self._modules)):",
            "if not _forgets(node, self._modules):",
            _FORMATS + "views_behind_a_fused_block",
        ),
        (
            "what closed blocks do is known",
            'closed = node.op == "call_module" and self._blocks.get(str(node.target)) is False',
            "closed = False",
            _FORMATS + "a_closed_block_may_do_anything",
        ),
    ],
    "fused_resblock/stems.py": [
        (
            "stems in NCHW among convolutions that stay",
            "return fused or on_gpu or not nchw or 2 * len(stems) >= len(convs)",
            "return True",
            "tests/test_stems_that_pay.py::test_networks_in_nchw_of_which_little_is_fused",
        ),
        (
            "half of a network in NCHW",
            " or 2 * len(stems) >= len(convs)",
            "",
            "tests/test_stems_that_pay.py::test_networks_of_which_half_is_stems",
        ),
        (
            "networks without blocks stay as they are",
            " or _may_hold_stems(module)):",
            "):",
            "tests/test_stem_recognition.py::test_a_network_without_blocks[default]",
        ),
        (
            "kept blocks stay closed",
            "return set(filter(_is_open, kept))",
            "return set()",
            _OPEN + "stems_within_a_kept_block[default]",
        ),
        (
            "a block with hooks is open",
            "        leaves.check_untouched(block)\n        graph, doubt",
            "        graph, doubt",
            _OPEN + "blocks_that_stay_closed",
        ),
        (
            "a convolution that is called elsewhere, too",
            "[row for (row, *others) in rows.values() if len(row) > 1 and not others]",
            "[row for calls in rows.values() if len(row := max(calls, key=len)) > 1]",
            "tests/test_stem_recognition.py::test_a_convolution_that_is_called_again[default-inference_mode]",
        ),
    ],
    "fused_resblock/pending.py": [
        (
            "a module that was not expected joins a known stem",
            "expected = None if self.program(module) is None else self._expected",
            "expected = self._expected",
            "tests/test_stem.py::test_change[norm of another stem]",
        ),
        (
            "a reader's inference mode",
            "with torch.inference_mode(self._inference), torch.no_grad():",
            "with torch.no_grad():",
            "tests/test_pending.py::test_values_are_of_the_mode_of_the_call",
        ),
        (
            "the shape of before an edit",
            "func in _METADATA and args[0].computed is None",
            "func in _METADATA",
            "tests/test_pending.py::test_shape_behind_an_edit_in_place",
        ),
        (
            "what hides in a list is asked again and again",
            "with torch._C.DisableTorchFunctionSubclass():  # some",
            "with contextlib.nullcontext():  # some",
            "tests/test_pending.py::test_list_of_a_class_of_its_own",
        ),
    ],
    "fused_resblock/backends/onednn.py": [
        (
            "one column is computed as it stands",
            "q == 1 < p",
            "q == 0 < p",
            "tests/test_one_column.py::test_where_it_applies[one column]",
        ),
        (
            "every convolution to one column is turned",
            " and conv.stride[1] > 1",
            "",
            "tests/test_one_column.py::test_where_it_applies[stride 1]",
        ),
    ],
}
