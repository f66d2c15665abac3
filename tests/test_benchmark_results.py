"""The benchmarks' CSV files."""

import pytest
import torch
from benchmark_rows import MARKS, latency

from benchmarks import results
from benchmarks.results import Row


def test_csv_round_trip(tmp_path):
    rows = latency("resnet18", "whole", "float32", 1, {"eager": 4.25, "fused": None, "compile": 3.0})
    rows += results.stamped([Row("memory", "resnet50", "whole", "fused", "bfloat16", 16, 224, state_mib=48.5)], MARKS)
    rows.append(Row("latency", "resnet18", "whole", "eager", "float32", 1, 224, note='a, "b"'))
    writer = results.Writer(tmp_path / "x.csv")
    writer.write(rows[:2])
    writer.write(rows[2:])
    back = results.read(tmp_path / "x.csv")
    assert back[3:] == rows[3:]
    assert back[1] == rows[1]
    assert back[0].ratio_to_compile == pytest.approx(4.25 / 3, rel=1e-5)
    assert back[0].batch == 1


def test_a_csv_with_other_columns_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns benchmark, network"):
        results.read(tmp_path / "x.csv")


def test_the_stamp_fills_its_columns():
    row = results.stamped([Row("latency", "resnet18", "whole", "eager", "float32", 1, 224)], results.stamp())[0]
    assert row.cpu
    assert row.torch == str(torch.__version__)
    assert row.cores > 0
    assert row.threads == torch.get_num_threads()
    assert row.amx == ("yes" if "AMX-BF16" in row.cpu_features.split() else "no")
