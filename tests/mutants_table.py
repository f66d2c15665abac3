"""The faults that `make mutants` puts into the library, and for each the tests that must notice it."""

from __future__ import annotations

from mutant import Mutant
from mutants_bottleneck import BOTTLENECK
from mutants_changes import CHANGES
from mutants_functions import FUNCTIONS
from mutants_halo import HALO
from mutants_kernels import KERNELS
from mutants_on_cuda import ON_CUDA
from mutants_results import RESULTS
from mutants_ring import RING
from mutants_stages import STAGES
from mutants_stems import STEMS
from mutants_users import USERS


def _epilogue(case: str, backend: str = "triton") -> str:
    return f"tests/test_conv_bn_act.py::test_epilogue[{case}-{backend}]"


def _next_chain(change: str) -> str:
    return f"tests/test_handover_changes.py::test_change_of_the_next_chain[{change}]"


_HEAD = "tests/test_head.py::test_"

#: (name, old text, new text, killers) by file.
_BY_FILE: dict[str, list[tuple[str, str, str, str]]] = {
    **KERNELS,
    **BOTTLENECK,
    **STAGES,
    **STEMS,
    **FUNCTIONS,
    **HALO,
    **RING,
    **USERS,
    **ON_CUDA,
    **RESULTS,
    "fused_resblock/head.py": [
        (
            "heads in fp32",
            'if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):',
            'if device != "cpu":',
            _HEAD + "where_it_does_not_apply",
        ),
        (
            "heads under autocast",
            " or dispatch.autocast_dtype(x) is not None",
            "",
            _HEAD + "other_inputs_of_the_classifier",
        ),
        (
            "classifier of any class",
            " and intact(_MIXINS[own_class(self)], self)",
            "",
            _HEAD + "changes_are_seen[weight of its class]",
        ),
    ],
    **CHANGES,
    "kernels/gpu.py": [
        (
            "pixels in registers that are written anew",
            "return self.capability != 90 or block_n >= 64",
            "return True",
            "tests/test_choice.py::test_tiles_whose_pixels_pass_through_registers_are_left_out",
        ),
    ],
    "fused_resblock/programs.py": [
        (
            "programs outlive the caches",
            "if kept.caches != backends.generation:",
            "if False:",
            "tests/test_caches.py::test_programs_go_with_the_caches[asked]",
        ),
        (
            "frozen for ever",
            "known = frozen and kept.generation == now",
            "known = frozen",
            "tests/test_frozen.py::test_what_ends_the_promise[load_state_dict of a block]",
        ),
        (
            "tensors of the next chain not watched",
            "modules, tensors = everything",
            "modules = everything[0]",
            "tests/test_handover_changes.py::test_weights_that_autocast_had_copied",
        ),
        (
            "modules of the next chain not watched",
            "modules, tensors = everything",
            "tensors = everything[1]",
            _next_chain("eps"),
        ),
        (
            "a guard that watches less is kept",
            "if kept is None or not kept.watched.issuperset(modules[1:]):",
            "if kept is None:",
            "tests/test_handover_changes.py::test_a_hook_that_came_and_went",
        ),
    ],
    "fused_resblock/handover.py": [
        (
            "a chain that is gone is the next one for ever",
            "(link.following is None or link.following() is not None)",
            "True",
            "tests/test_handover_changes.py::test_a_chain_in_the_place_of_the_next_one_is_learnt",
        ),
        (
            "a head under a guard of later",
            "_leave(_links[stage], target, guard, program",
            "_leave(_links[stage], target, programs[target].guard, program",
            "tests/test_handover_changes.py::test_a_head_of_weights_that_change_while_it_is_computed",
        ),
        (
            "a head outlives its activation",
            "if module is not None and head is not None and head.y is y:",
            "if False:",
            "tests/test_handover.py::test_a_head_is_let_go_with_what_it_was_made_of",
        ),
        (
            "another tensor's head",
            "head.y() is not x or ",
            "",
            "tests/test_handover.py::test_only_the_very_tensor_has_a_head[an edited alias-no_grad]",
        ),
        (
            "another block's head",
            " or head.step is not program.ends.first",
            "",
            _next_chain("block replaced by a fused one"),
        ),
        (
            "a head of weights before a change",
            "if own is None or own.guard is not head.guard:",
            "if own is None:",
            "tests/test_handover_changes.py::test_a_head_that_waited_while_its_weights_changed[weights]",
        ),
        (
            "a head of the tensor before an edit",
            "return y._version, y.data_ptr(), y.stride(), stream, *read(words([y])[0])",
            "return y.data_ptr(), y.stride(), stream",
            "tests/test_handover.py::test_only_the_very_tensor_has_a_head[edited in place-no_grad]",
        ),
        (
            "edits that are not recorded",
            "stream, *read(words([y])[0])",
            "stream",
            "tests/test_handover.py::test_only_the_very_tensor_has_a_head[edited through NumPy-no_grad]",
        ),
        (
            "a head of other settings",
            " or head.signature != signature(x)",
            "",
            "tests/test_handover.py::test_settings_changed_in_between",
        ),
        (
            "a head in another graph",
            "if head.capture is not _capture(x):",
            "if False:",
            "tests/test_handover.py::test_a_head_is_not_taken_into_another_graph",
        ),
        (
            "edits in inference mode not recorded",
            "with torch.inference_mode(False), torch.no_grad():",
            "with torch.no_grad():",
            "tests/test_handover.py::test_only_the_very_tensor_has_a_head[edited in place-inference]",
        ),
        (
            "another thread's head",
            "class _Thread(threading.local):",
            "class _Thread:",
            "tests/test_handover.py::test_threads_do_not_take_each_others_heads",
        ),
    ],
    "fused_resblock/backends/few_images.py": [
        (
            "rows above a window are not pooled",
            "    torch.maximum(above[:, :, 1:], x[:, :, 1:-1:2], out=above[:, :, 1:])\n",
            "",
            "tests/test_few_images.py::test_the_pool_is_torchs_to_the_bit_and_keeps_nan",
        ),
        (
            "a stem of one image is pooled by torch",
            "p % 2 or q % 2 or k == 1",
            "p % 2 or q % 2 or k == 1 or n == 1",
            "tests/test_few_images.py::test_one_image_is_pooled_likewise",
        ),
        (
            "signed numbers are pooled as integers",
            "as_integers = relu and ",
            "as_integers = ",
            "tests/test_few_images.py::test_numbers_of_16_bits_are_pooled_to_the_bit[torch.bfloat16-False]",
        ),
    ],
    "fused_resblock/backends/folding.py": [
        (
            "cache ignores the version",
            "(id(t), t._version, when(t), ",
            "(id(t), when(t), ",
            "tests/test_mutants.py::test_edit_of_one_number_is_seen[onednn]",
        ),
        (
            "folded bias not scaled",
            "conv.bias.to(wide) * scale",
            "conv.bias.to(wide)",
            _epilogue("bias norm relu", "onednn"),
        ),
        ("folded without eps", "norm.var.to(dtype) + norm.eps", "norm.var.to(dtype)", _epilogue("eps 0.1", "onednn")),
    ],
    "fused_resblock/generators.py": [
        (
            "what was drawn is not put back",
            "            torch.set_rng_state(self._torch)\n",
            "            pass\n",
            "tests/test_random_numbers.py::test_fuse_and_a_schedule_draw_nothing",
        ),
        (
            "only what torch drew counts",
            "        if self._states() != self._others:\n            self.seen = True\n",
            "        if self._states() != self._others:\n",
            "tests/test_random_numbers.py::test_a_network_that_draws_is_not_one_function",
        ),
    ],
    "fused_resblock/recognize.py": [
        (
            "a wrapped convolution is none",
            'getattr(child, "_fsdp_wrapped_module", child)',
            "child",
            "tests/test_kept.py::test_a_child_wrapped_by_fsdp_is_named",
        ),
        (
            "what is not used does nothing",
            "                self._check_unused(node)\n",
            "                pass\n",
            "tests/test_forwards.py::test_what_is_done_to_a_tensor_in_passing[out=-False]",
        ),
        (
            "tensors in attributes are not looked for",
            "    _check_attributes(block)\n",
            "",
            "tests/test_forwards.py::test_what_a_forward_asks_of_its_block_changes[tensor-block]",
        ),
        (
            "in-place operations not checked",
            "        if self._in_place(node):\n            self._check_in_place(node)\n",
            "",
            "tests/test_recognize.py::test_kept_with_its_reason[in-place on a shared tensor]",
        ),
        (
            "shortcut taken for the residual",
            "if joined.main.conv is None and (elementwise or joined.main.norm is None):",
            "if True:",
            "tests/test_recognize.py::test_same_on_every_backend",
        ),
        (
            "norm of a shortcut without a convolution dropped",
            " and (elementwise or joined.main.norm is None):",
            ":",
            "tests/test_recognize.py::test_same_on_every_backend",
        ),
        (
            "start of a slice ignored",
            "step.start in (None, 0) and ",
            "",
            "tests/test_recognize.py::test_kept_with_its_reason[strided slice with a start]",
        ),
    ],
}

MUTANTS = tuple(
    Mutant(name, file, old, new, (killer,)) for file, faults in _BY_FILE.items() for name, old, new, killer in faults
)
