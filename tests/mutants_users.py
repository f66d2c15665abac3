"""Faults in gradients, and in what holds when users change weights or filter; the tests that must notice each."""

from __future__ import annotations

_USER = "tests/test_user_changes.py::test_"
_GATES = "tests/test_gates.py::test_"
_SMALL = "tests/test_small.py::test_"
_FILTER = "tests/test_filter.py::test_"


def _gradient(case: str) -> str:
    return f"tests/test_gradients.py::test_conv_bn_act_in_float64[{case}-triton]"


#: (name, old text, new text, killers) by file.
USERS: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/gates.py": [
        (
            "a gate may change its input",
            "isinstance(_module(source, modules), _FRESH) and",
            "",
            _GATES + "what_is_no_gate[ChangesAView]",
        ),
        ("a gate may write its output", '"out" in node.kwargs or ', "", _GATES + "what_is_no_gate[WritesItsInput]"),
        (
            "a gate may look at strides",
            "or nodes.name(node) in nodes.OF_LAYOUT ",
            "",
            _GATES + "what_is_no_gate[LooksAtStrides]",
        ),
        (
            "a gate in train mode is another",
            "all(_is_gate(module, mode) for mode in (False, True))",
            "_is_gate(module, False)",
            _GATES + "what_is_no_gate[ChangesItsInputInTraining]",
        ),
        (
            "a gate may scale something else",
            "return any(factor is x or _scales(factor, x) for factor in result.args)",
            "return True",
            _GATES + "what_is_no_gate[ScalesSomethingElse]",
        ),
        (
            "a gate's view takes channels_last",
            "return module(x.contiguous())",
            "raise",
            _GATES + "same_without_gradients[channels_last-eager-gate of gates]",
        ),
        (
            "a gate's norm trains unseen",
            "return any(map(leaves.uses_batch_statistics, norms))",
            "return False",
            _GATES + "a_gate_s_norm_in_train_mode_is_the_block_s_own_business[Normed]",
        ),
    ],
    "fused_resblock/backends/layouts.py": [
        (
            "the first size's layout for all",
            "found = None if layout is None else self.get(layout)",
            "found = next(iter(self.values()), None)",
            "tests/test_packed_layouts.py::test_sizes_that_want_the_same_layout_share_a_weight",
        ),
        (
            "a layout by the convolution alone",
            "*conv[3:], x.shape, torch",
            "*conv[3:], torch",
            "tests/test_packed_layouts.py::test_sizes_that_want_the_same_layout_share_a_weight",
        ),
        (
            "a weight for every size",
            "if layout is None and self:",
            "if False:",
            "tests/test_packed_layouts.py::test_sizes_that_want_the_same_layout_share_a_weight",
        ),
    ],
    "fused_resblock/nodes.py": [
        (
            "in place by a flag",
            'return bool(given.get("inplace"))',
            "return False",
            _GATES + "what_is_no_gate[ChangesItsInputByName]",
        ),
    ],
    "fused_resblock/backends/small.py": [
        ("small in 16 bits", "x.dtype == torch.float32 and ", "", _SMALL + "what_is_not_small[bf16]"),
        (
            "many products are small",
            " and k * c * r * s * p * q <= PRODUCTS",
            "",
            _SMALL + "what_is_not_small[many products]",
        ),
        (
            "a small residual at stride 1",
            "z += strided(other, stride)",
            "z += strided(other, 1)",
            _SMALL + "parity[1x1-relu-strided residual]",
        ),
        (
            "no ReLU behind a small convolution",
            "return z.relu_() if relu else z",
            "return z",
            _SMALL + "parity[3x3-relu-none]",
        ),
    ],
    "fused_resblock/backends/guarded.py": [
        (
            "a tile that cannot be bound raises",
            "except Exception as error:  # a tile that no kernel can have",
            "except ZeroDivisionError as error:",
            "tests/test_tuned.py::test_a_measured_tile_that_does_not_run_gives_way_with_one_warning",
        ),
    ],
    "fused_resblock/backends/triton.py": [
        (
            "a table's tile for another kernel",
            "if entry is not None and entry.tile and not takes(",
            "if False and not takes(",
            "tests/test_stage_kernel.py::test_off_unless_a_table_says_so",
        ),
        (
            "norms told apart by themselves alone",
            "(*norm[:4], bias) if conv is None else (conv.weight, *norm[:4], bias)",
            "(*norm[:4], bias)",
            "tests/test_compiled_weights.py::test_norms_of_two_convolutions_in_the_same_memory",
        ),
    ],
    "fused_resblock/backends/eager.py": [
        (
            "by hand without shift",
            "scale[:, None, None] + shift[:, None, None]",
            "scale[:, None, None]",
            "tests/test_transforms.py::test_norm_by_hand_is_torchs[fp64-affine]",
        ),
    ],
    "fused_resblock/gradients.py": [
        (
            "a strided gradient is no batch",
            "dz.new_zeros(n, height, width, channels)",
            "torch.zeros(n, height, width, channels)",
            "tests/test_user_changes.py::test_batched_gradients_through_a_strided_branch[auto]",
        ),
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
            "parameters that a graph edits",
            "return uncached() if bits == UNCACHED or computed",
            "return uncached() if bits == UNCACHED",
            "tests/test_compiled_weights.py::test_parameters_that_a_graph_edits[bn1.weight]",
        ),
        (
            "tangent of the gradient lost",
            "if not torch.compiler.is_compiling() and dual((dy,)):",
            "if False:",
            "tests/test_user_changes.py::test_a_tangent_of_the_gradient_that_comes_in",
        ),
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
    "fused_resblock/runner.py": [
        (
            "the first convolution's channels are the block's",
            "step.main.check(x, autocast)",
            "step.main.tensors(x, autocast)",
            _GATES + "a_gate_that_widens_its_input",
        ),
        (
            "channels as the layer was built",
            "return conv.weight.shape[1] * conv.groups",
            "return len(vars(conv).setdefault('_once', conv.weight.shape[1] * conv.groups * [0]))",
            _USER + "channels_pruned_in_place_after_a_call",
        ),
        (
            "weights of any class",
            "any(map(is_traceable_wrapper_subclass, self.parameters()))",
            "False",
            _USER + "weights_that_become_tensors_of_another_class",
        ),
    ],
    "fused_resblock/params.py": [
        (
            "a tuple of one has two",
            "int(value[-1])",
            "int(value[1])",
            _USER + "a_setting_in_a_tuple_of_one[padding-value0]",
        ),
    ],
    "fused_resblock/convert.py": [
        (
            "a failing fuse leaves classes behind",
            '                object.__setattr__(module, "__class__", cls)\n',
            "                pass\n",
            "tests/test_failing_fuse.py::test_the_model_is_as_it_was[conv1-StubbornConv-False-False]",
        ),
        (
            "the copy is one of inference tensors",
            "    with torch.inference_mode(False):\n",
            "    if True:\n",
            "tests/test_lifecycle.py::test_the_copy_made_in_inference_mode_is_an_ordinary_model",
        ),
        (
            "filter asked after the first change",
            "    left_out = set() if filter_fn is None else _left_out(model, networks, filter_fn, stems, heads)\n"
            "    if not inplace:\n        model = _copied(model)\n",
            "    if not inplace:\n        model = _copied(model)\n"
            "    left_out = set() if filter_fn is None else _left_out(model, networks, filter_fn, stems, heads)\n",
            _FILTER + "filter_fn_is_given_the_modules_of_the_model_and_not_of_its_copy",
        ),
        (
            "a copy in the mode in which it comes",
            "            module.train(modes[name])\n",
            "            pass\n",
            "tests/test_lifecycle.py::test_a_feature_extractor_is_joined[False-False]",
        ),
        (
            "heads left out are fused",
            "if prefix + path not in left_out:\n                    fuse_head",
            "if True:\n                    fuse_head",
            _FILTER + "filter_fn_is_given_the_modules_of_the_model_and_not_of_its_copy",
        ),
    ],
    "kernels/convolution.py": [
        (
            "branch read at the stride of no residual",
            "epilogue._replace(shortcut=None, residual_stride=1)",
            "epilogue._replace(shortcut=None)",
            "tests/test_tiles.py::test_a_stride_of_no_residual_is_not_that_of_the_branch",
        ),
    ],
    "kernels/tables.py": [
        (
            "an entry too far away",
            "REACH = 4.0",
            "REACH = 400.0",
            "tests/test_tables.py::test_nearest_within_a_factor_of_four",
        ),
        (
            "cuDNN's copy of the weights is free",
            '    if fastest != "cudnn" or not others:\n',
            "    if True:\n",
            "tests/test_tables.py::test_cudnn_wins_where_it_is_worth_a_second_copy_of_the_weights",
        ),
        (
            "cuDNN only where its weights are few",
            ' if pays or us[others[0]] >= CUDNN_FACTOR * us["cudnn"] else ',
            " if pays else ",
            "tests/test_tables.py::test_cudnn_wins_where_it_is_worth_a_second_copy_of_the_weights",
        ),
        (
            "a loop is split as much over more pixels",
            "halvings = max(0, round(log2(pixels / self.pixels)))",
            "halvings = 0",
            "tests/test_tables.py::test_a_split_loop_is_split_less_where_there_are_more_pixels",
        ),
    ],
    "fused_resblock/backends/tuned.py": [
        (
            "an entry's tile is that of its own pixels",
            "return None if entry is None else entry.at(pixels)",
            "return entry",
            "tests/test_tuned.py::test_a_tile_is_that_for_the_pixels_asked_for",
        ),
        (
            "rows that a corrected table left out stay in force",
            "if table.path not in read_again",
            "if table.path",
            "tests/test_tuning.py::test_a_second_table_of_the_same_file_takes_the_place_of_the_first",
        ),
    ],
}
