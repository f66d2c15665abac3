"""The faults that `make mutants` puts into benchmarks and their results, and the test that must notice each."""

from __future__ import annotations

_RECORDS = "tests/test_gpu_records.py::test_"
_DAMAGED = "tests/test_damaged_results.py::test_"

#: (name, old text, new text, killers) by file.
RESULTS: dict[str, list[tuple[str, str, str, str]]] = {
    "benchmarks/roofline.py": [
        (
            "stages predicted as within a body",
            "itemsize, chip, [n])[0]",
            "itemsize, chip)[0]",
            "tests/test_cost.py::test_stages_are_alone",
        ),
    ],
    "benchmarks/unchanged.py": [
        (
            "every kept row believed",
            "if key[:LETTERS] == name:",
            "if name:",
            "tests/test_codegen.py::test_only_what_is_made_from_something_else_is_compiled_again",
        ),
    ],
    "benchmarks/gpu/records.py": [
        (
            "what ended its process is run again",
            'status="crash", note="its process was ended")',
            'status="error", note="its process was ended")',
            _RECORDS + "what_ran_when_its_process_was_ended_is_a_crash",
        ),
        (
            "a crash of another commit",
            'if known.get("marks") == self.marks and isinstance',
            "if isinstance",
            _RECORDS + "what_ran_when_its_process_was_ended_is_a_crash",
        ),
        (
            "times that are no numbers",
            "if len(fields) != len(self.columns) or not all(_finite(row[name]) for name in times):",
            "if len(fields) != len(self.columns):",
            _RECORDS + "times_that_are_none_do_not_count[nan]",
        ),
    ],
    "benchmarks/gpu/bench.py": [
        (
            "a smaller batch forgotten by the next run",
            "            todo += _halved(case, table, todo)  # if that was never begun\n",
            "",
            "tests/test_gpu_bench.py::test_half_the_batch_is_measured_by_the_next_run_if_there_was_no_time",
        ),
        (
            "errors of another kind end the step",
            "except Exception as error:  # of a model, a peer or a compiler",
            "except RuntimeError as error:",
            "tests/test_gpu_bench.py::test_an_error_of_any_kind_ends_one_case_alone",
        ),
    ],
    "benchmarks/gpu/compiling.py": [
        (
            "tiles that nobody has begun to compile fail",
            "list(open_jobs)[:processes]",
            "list(open_jobs)",
            "tests/test_gpu_runner.py::test_a_compiler_that_does_not_end_costs_the_tile_that_it_compiles_alone",
        ),
    ],
    "benchmarks/result_tables.py": [
        (
            "a row that was cut within a number",
            'text[: text.rfind("\\n") + 1]',
            "text",
            _DAMAGED + "rows_that_were_cut_short_do_not_count",
        ),
    ],
    "benchmarks/readme_tables.py": [
        (
            "rows that a later run has replaced",
            "return list(found.values())",
            "return rows",
            _DAMAGED + "what_a_later_run_has_found_goes",
        ),
    ],
    "kernels/choice.py": [
        (
            "filters of a halo kernel counted twice",
            "itemsize, 0, residual=residual)",
            "itemsize, programs, residual=residual)",
            "tests/test_choice.py::test_filters_of_a_halo_kernel_come_from_l2_once",
        ),
    ],
}
