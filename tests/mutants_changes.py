"""The faults that `make mutants` puts into what notices changes and traces, and the test that must notice each."""

from __future__ import annotations

_FROZEN = "tests/test_frozen.py::test_"
_ANSWERS = "tests/test_proxies.py::test_what_a_tensor_answers"
_PASSING = "tests/test_forwards.py::test_what_is_done_to_a_tensor_in_passing"
_CHANGES = "tests/test_forwards.py::test_what_a_forward_asks_of_its_block_changes"
_THREADS = "tests/test_threads.py::test_"
_TOUCHED = "tests/test_touched.py::test_"
_COMPILED = "tests/test_compiled_weights.py::test_"
_SETTINGS = "tests/test_settings.py::test_"
_EDITS = "tests/test_edits_by_hand.py::test_"
_ODD = "tests/test_odd_tensors.py::test_"

#: (name, old text, new text, killers) by file.
CHANGES: dict[str, list[tuple[str, str, str, str]]] = {
    "fused_resblock/dispatch.py": [
        (
            "weights of a graph kept",
            "if not all(isinstance(weight, torch.nn.Parameter) for weight in weights):",
            "if False:",
            _COMPILED + "weights_written_again_by_inductor",
        ),
        (
            "weights of a module not kept",
            "if not all(isinstance(weight, torch.nn.Parameter) for weight in weights):",
            "if True:",
            _COMPILED + "weights_of_a_module_are_cached[Bottleneck]",
        ),
    ],
    "fused_resblock/frozen.py": [
        (
            "weights that somebody gives a frozen network for a call",
            "if frame.f_code is _FUNCTIONAL_CALL:",
            "if False:",
            _EDITS + "functional_call_of_a_frozen_network[1]",
        ),
        (
            "frozen in train mode",
            "return self._fused_frozen and not self.training",
            "return self._fused_frozen",
            _FROZEN + "in_train_mode_everything_is_asked",
        ),
        (
            "a promise about what was asked before it",
            "_generation[0] += 1\n        self.__dict__.pop",
            "pass\n        self.__dict__.pop",
            _FROZEN + "an_edit_before_the_promise",
        ),
        (
            "frozen while attributes change",
            "        super().__setattr__(name, value)\n        Freezable.look_again(self)",
            "        super().__setattr__(name, value)",
            _FROZEN + "what_ends_the_promise[new convolution]",
        ),
        (
            "frozen while a state is loaded",
            "            self.register_load_state_dict_post_hook(_loaded)\n",
            "",
            _THREADS + "states_that_are_loaded_beside_a_forward",
        ),
        (
            "training leaves no trace",
            "            touch([*self.parameters(), *self.buffers()])",
            "            pass",
            _TOUCHED + "train_mode_is_time_for_any_edit[BasicBlock]",
        ),
    ],
    "fused_resblock/watch.py": [
        (
            "a dictionary walked while another thread adds to it",
            "in vars(module).copy().items()",
            "in vars(module).items()",
            _THREADS + "a_block_that_gets_its_programs_while_another_thread_looks_at_it",
        ),
        (
            "a fused network in another is never asked",
            'own_class(module).__module__.startswith("torch.nn.")',
            "isinstance(module, Swapped)",
            _ODD + "an_attribute_of_a_fused_network_within_another[black images first]",
        ),
        (
            "filters that are cut off",
            "for state in (_VERSION, _POINTER, _NUMEL)",
            "for state in (_VERSION, _POINTER)",
            _EDITS + "filters_cut_off[default]",
        ),
        (
            "modules in another order",
            "list(map(tuple, self._containers)) == self._contained",
            "list(map(len, self._containers)) == list(map(len, self._contained))",
            "tests/test_function_changes.py::test_change[blocks in another order]",
        ),
        (
            "modules in another dictionary",
            "for m in inner for name in (*_WATCHED, *_SLOTS) if",
            "for m in inner for name in _WATCHED if",
            "tests/test_function_changes.py::test_change[blocks in another dictionary]",
        ),
        (
            "a ReLU that is in place now",
            '"return_indices", "inplace"',
            '"return_indices"',
            _EDITS + "change[ReLU in place-block]",
        ),
        (
            "the size that a pool gives",
            '*("eps", *_SETTINGS, "output_size"),',
            '*("eps", *_SETTINGS),',
            "tests/test_function_changes.py::test_output_size_of_a_pool_in_16_bits",
        ),
        (
            "a pool that returns indices",
            '"ceil_mode", "return_indices",',
            '"ceil_mode",',
            "tests/test_function_changes.py::test_a_pool_that_returns_indices",
        ),
        (
            "settings of pools are not looked at",
            "_PLANNED = (nn.Conv2d, nn.MaxPool2d, nn.ReLU)",
            "_PLANNED = (nn.Conv2d, nn.ReLU)",
            "tests/test_late_changes.py::test_a_pool_that_was_a_strided_view_and_is_none_any_more",
        ),
        (
            "weights that are plain attributes",
            '    *("weight", "bias", "running_mean", "running_var"),\n',
            "",
            "tests/test_user_changes.py::test_a_weight_that_is_a_plain_attribute_and_is_assigned_again[0.conv1-weight]",
        ),
        (
            "what a dictionary holds is not compared",
            "            and all(holds_the_same(*pair) for pair in self._collections)\n",
            "",
            _CHANGES + "[dictionary-block]",
        ),
        (
            "settings of the module that a program lies on",
            "        if not all(map(is_, map(root.get, self._root_names), self._root_values)):",
            "        if False:",
            "tests/test_stem.py::test_change[pool's stride]",
        ),
        (
            "a cycle of a module and its guard",
            "        self._root = weakref.ref(modules[0])",
            "        self._root = lambda root=modules[0]: root",
            "tests/test_caches.py::test_memory_is_freed_at_once",
        ),
        (
            "defaults of a class are no settings",
            "for attributes in (*defaults, found)",
            "for attributes in (found,)",
            _SETTINGS + "change[what the class sets-in a copy-compiled]",
        ),
        (
            "settings not asked where it is traced",
            "            if getattr(modules[name], key, None) != value:",
            "            if False:",
            _SETTINGS + "change[a flag-after a call-exported]",
        ),
        (
            "forward of an instance not asked where it is traced",
            " or leaves.replaced(modules[name]):",
            ":",
            _SETTINGS + "change[forward on the instance-after a call-compiled]",
        ),
    ],
    "fused_resblock/modules.py": [
        (
            "a promise ended without gradients",
            "        if torch.is_grad_enabled():\n            self.look_again()",
            "        self.look_again()",
            _FROZEN + "a_block_within_a_forward_of_its_own_ends_no_promise",
        ),
        (
            "inputs in every layout are dense",
            " or (isinstance(x, Tensor) and x.layout is not torch.strided)",
            "",
            _ODD + "an_input_in_the_layout_of_mkldnn",
        ),
        (
            "an attribute of a block that is deleted",
            "        super().__delattr__(name)\n        self.replan()",
            "        super().__delattr__(name)",
            _EDITS + "change[attribute deleted-block]",
        ),
        (
            "changed before it was first called",
            "            if layout(self) != self._fused_layout or state is not None:",
            "            if state is not None:",
            _SETTINGS + "change[a flag-before the first call-called]",
        ),
    ],
    "fused_resblock/proxies.py": [
        (
            "isinstance answered",
            "            if not known or _names_tensor(caller):\n",
            "            if False:\n",
            _ANSWERS + "[Block-isinstance-]",
        ),
        (
            "any attribute is there",
            "        self._check(name)\n        return Attribute(self, name)",
            "        return Attribute(self, name)",
            _ANSWERS + "[Block-hasattr-]",
        ),
        (
            "attributes of a tensor may be set",
            "        if name not in (",
            "        if False and name not in (",
            "tests/test_forwards.py::test_an_attribute_of_a_result",
        ),
        (
            "values may be looked up",
            "        return id(self)\n\n",
            "        return id(self)\n\n    __hash__ = fx.Proxy.__hash__\n\n",
            _ANSWERS + "[Block-shape in a set-]",
        ),
        (
            "what no proxy answers is called",
            '        if not _is_within(_module_of(frame), ("torch", *_KNOWING)):',
            "        if False:",
            _ANSWERS + "[Block-grad mode-]",
        ),
    ],
    "fused_resblock/tracing.py": [
        (
            "an ordered dictionary is a plain one",
            "if type(a) is OrderedDict and not self._strict:",
            "if False:",
            "tests/test_one_function.py::test_dictionaries[OrderedDict-default]",
        ),
        (
            "hooks run while their network is traced",
            "            twin.__dict__.update((name, OrderedDict()) for name in leaves.HOOKS if name in twin.__dict__)\n",
            "",
            "tests/test_tracing.py::test_hooks_do_not_run",
        ),
        (
            "proxies stay in objects",
            "        shared.clean()\n",
            "",
            "tests/test_tracing.py::test_objects_of_the_network_keep_nothing",
        ),
        (
            "other threads traced",
            "            return forward(*args, **kwargs)",
            "            pass",
            _THREADS + "other_threads_run_while_one_traces",
        ),
        (
            "two traces at once",
            "        with _one_at_a_time:",
            "        if True:",
            _THREADS + "one_traces_after_the_other",
        ),
        (
            "a refusal that the forward catches",
            "if self._strict and self.reason is not None:",
            "if False:",
            _ANSWERS + "[Block-index-]",
        ),
        (
            "an error of a layer that the forward catches",
            "self.reason = self.reason or str(error) or type(error).__name__",
            "pass",
            _ANSWERS + "[Block-another layer-]",
        ),
        (
            "buffers are no tensors of the graph",
            "self._strict = self.proxy_buffer_attributes = strict",
            "self._strict = strict",
            _CHANGES + "[buffer-block]",
        ),
        (
            "grad mode set to what it is",
            "if func is torch._C._set_grad_enabled:",
            "if False:",
            "tests/test_proxies.py::test_modes_of_the_forward_are_seen_in_whatever_modes_it_is_fused[enable_grad-]",
        ),
        (
            "autocast off where it is off",
            "torch.is_inference_mode_enabled(), depth, *autocast",
            "torch.is_inference_mode_enabled(), *autocast",
            "tests/test_proxies.py::test_modes_of_the_forward_are_seen_in_whatever_modes_it_is_fused[no autocast-]",
        ),
        (
            "original traced",
            '            twin.__dict__["training"] = training',
            '            module.__dict__["training"] = training',
            _THREADS + "what_is_traced_stays_as_it_is",
        ),
    ],
}
