"""Faults in networks that run as one function, in what tells of edits, in frozen norms; the tests that must notice."""

from __future__ import annotations

_FLAT = "tests/test_flat.py::test_"
_ONE = "tests/test_one_function.py::test_"
_CHANGES = "tests/test_function_changes.py::test_"
_NORMS = "tests/test_frozen_norms.py::test_"
_ODD = "tests/test_odd_tensors.py::test_"
_TOUCHED = "tests/test_touched.py::test_"
_EDITS = "tests/test_edits_by_hand.py::test_"

#: (name, old text, new text, killers) by file.
FUNCTIONS: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/swap.py": [
        (
            "wrapped forwards die with the swap",
            "return not isinstance(module, mixin)",
            "return False",
            "tests/test_wrapped_forwards.py::test_unfuse[every module-default-fp32]",
        ),
    ],
    "fused_resblock/flat.py": [
        (
            "functions outlive the caches",
            "if self._caches != backends.generation:",
            "if False:",
            "tests/test_caches.py::test_programs_go_with_the_caches[frozen]",
        ),
        (
            "every tensor has memory to look at",
            "if not dispatch.plain(tensors):",
            "if False:",
            _ODD + "tensors_without_memory_of_their_own[wrapped weight-later]",
        ),
        (
            "learning for ever",
            "if self._empty[key] > 2:",
            "if False:",
            _FLAT + "a_network_of_which_nothing_is_fused_stops_learning",
        ),
        (
            "strides of a frozen network's input do not matter",
            "key = (*signature(x), x.stride())",
            "key = signature(x)",
            "tests/test_forwards.py::test_frozen_network_whose_input_lies_otherwise",
        ),
        (
            "own forward told to be a function",
            "    if not reasons:\n",
            "    if functions:\n",
            _FLAT + "explain_tells_why_it_runs_its_own_forward[Asking-another result]",
        ),
        (
            "functions of a network that is not frozen hold for ever",
            "return self._guard is None or self._guard.holds()",
            "return True",
            _CHANGES + "change[stem]",
        ),
        (
            "the guard of a function knows no tensors",
            "self._guard = Guard(modules, tensors, all_modes=True)",
            "self._guard = Guard(modules, [], all_modes=True)",
            _CHANGES + "change[stem]",
        ),
        (
            "functions of a network in parts in train mode",
            "any(module.training for module in modules) or ",
            "",
            _CHANGES + "another_graph_that_gives_the_same_while_it_is_learnt[train mode]",
        ),
        (
            "the graph of what a network was before",
            " or layout(network) != known.layout",
            "",
            _CHANGES + "another_graph_that_gives_the_same_while_it_is_learnt[attribute]",
        ),
        (
            "a graph is forgotten for a hook that came and went",
            " and self._guard is not None and self._guard.holds():",
            ":",
            _CHANGES + "a_hook_while_it_learns",
        ),
        (
            "a network that changes all the time learns all the time",
            "if flat.rests():",
            "if False:",
            _ONE + "a_network_that_changes_all_the_time_is_left_alone",
        ),
        (
            "tensors that are plain attributes",
            ", *attributes]",
            "]",
            _ONE + "a_weight_that_is_no_parameter",
        ),
        (
            "a function for ever after another graph",
            "    _flats.pop(network)\n",
            "",
            _CHANGES + "change[attribute]",
        ),
    ],
    "fused_resblock/flatten.py": [
        (
            "sources of functions kept",
            "    linecache.cache.pop(file, None)\n",
            "",
            _ONE + "sources_of_functions_are_let_go",
        ),
        (
            "learning draws random numbers",
            "with Draws():  # which are put back",
            "if True:",
            _FLAT + "what_is_drawn_while_learning_is_put_back",
        ),
        (
            "a NaN in an image is like nothing",
            "((x == y) | ((x != x) & (y != y))).all()",
            "(x == y).all()",
            _FLAT + "a_nan_in_the_first_images_keeps_no_network_from_becoming_one_function",
        ),
        (
            "function of a frozen network believed",
            'return function if _equal((result, x), expected) else "its graph gives another result"',
            "return function",
            _FLAT + "networks_that_run_their_own_forward[Asking]",
        ),
        (
            "what lies between the parts of a function held",
            "            held = [call(held)]\n        return held[0]",
            "            held.append(call(held[-1:]))\n        return held[-1]",
            "tests/test_activations.py::test_a_function_holds_nothing_that_has_been_read",
        ),
        (
            "parts put together although others read what lies between",
            "len(a.users) == 1 for a, b in pairwise(run)",
            "True for a, b in pairwise(run)",
            _FLAT + "networks_that_become_a_function[Features]",
        ),
        (
            "function of a network with hooks",
            " or any(map(leaves.hooked, list(network.modules())[1:])):",
            ":",
            _FLAT + "hooks_from_before_run",
        ),
    ],
    "fused_resblock/trusted.py": [
        (
            "functions of anybody trusted",
            " and not any(map(_is_foreign, held))",
            "",
            _ONE + "what_is_not_trusted[own function]",
        ),
        (
            "everybody trusted",
            "return all(map(_is_from, classes)) and ",
            "return ",
            _ONE + "what_is_not_trusted[own property]",
        ),
    ],
    "fused_resblock/sampling.py": [
        (
            "words of memory that nobody holds",
            "        storages.append(storage)\n",
            "",
            _EDITS + "words_outlive_the_memory_of_their_tensor",
        ),
        (
            "tensors of a few bytes have no words",
            "tensor.numel() == 0 or",
            "tensor.numel() * tensor.element_size() < 8 or",
            _ODD + "whole_tensors_through_data[norm of one channel]",
        ),
        (
            "words of strided tensors lie as if they were dense",
            "itemsize * _offset(tensor, place)",
            "itemsize * place",
            _ODD + "words_are_of_the_tensor[every second-size1-dtype2]",
        ),
    ],
    "fused_resblock/touched.py": [
        (
            "fused optimizers not heard",
            "    if groups:\n",
            "    if False:\n",
            _TOUCHED + "fused_optimizers[SGD-False]",
        ),
        (
            "optimizers of others not heard",
            'if not own or group.get("fused")',
            'if group.get("fused")',
            _TOUCHED + "optimizers_of_others_may_use_any_kernel",
        ),
        (
            "running statistics not touched",
            "    if running:\n",
            "    if False:\n",
            _TOUCHED + "recalibrated_norms[auto]",
        ),
        (
            "every tensor has a storage",
            " if t.layout is torch.strided}",
            "}",
            _ODD + "tensors_without_memory_of_their_own[sparse buffer-later]",
        ),
    ],
    "fused_resblock/frozen_norms.py": [
        (
            "settings that nobody watches",
            "    if any(name not in _ATTRIBUTES and",
            "    if False and any(name not in _ATTRIBUTES and",
            _NORMS + "fused_in_either_mode[flag]",
        ),
        (
            "settings of a class",
            "None if _has_settings(cls) else _try(cls, told)",
            "_try(cls, told)",
            _NORMS + "fused_in_either_mode[eps of the class]",
        ),
        (
            "one mode tried",
            "for training in (False, True))",
            "for training in (True,))",
            _NORMS + "fused_in_either_mode[mode]",
        ),
        (
            "gradients not tried",
            "(*results, gradient), (expected, expected, scale.expand_as(x))",
            "results, (expected, expected)",
            _NORMS + "fused_in_either_mode[detached]",
        ),
        (
            "buffers may change",
            "return kept and all(",
            "return all(",
            _NORMS + "fused_in_either_mode[updates]",
        ),
        (
            "every eps is that of torchvision",
            "return round(y[0, 0, 0, 0].item() ** -2 - var, 18)",
            "return 1e-5",
            _NORMS + "fused_in_either_mode[maskrcnn-benchmark]",
        ),
    ],
}
