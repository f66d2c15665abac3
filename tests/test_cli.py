"""The command line: what the commands print, and that a user's mistake is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resblock
from fused_resblock import __version__, backends, cli, doctor, machine, models, tuned_file


def run(argv: list[str]) -> int:
    """The exit code of one command, whether argparse or the command itself ended it."""
    try:
        return cli.main(argv)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are no picture, no checkpoint, and a checkpoint of another network."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    torch.save([1, 2], folder / "list.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    state = models.resnet18(num_classes=4).state_dict()
    fc = state["fc.weight"]
    torch.save(state | {"fc.weight": fc * float("inf")}, folder / "infinite.pt")
    torch.save(state | {"fc.weight": fc.int()}, folder / "integers.pt")
    torch.save(state | {"fc.weight": fc[:0], "fc.bias": fc[:0, 0]}, folder / "nothing.pt")
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:1]
    torch.save(state, folder / "reshaped.pt")
    return folder


@pytest.fixture
def files(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with those files."""
    pytest.importorskip("PIL")
    for file in originals.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "no-command": ("", "the following arguments are required"),
    "unknown-command": ("bake", "invalid choice: 'bake'"),
    "unknown-option": ("demo --speed 9", "unrecognized arguments: --speed 9"),
    "abbreviated-option": ("demo --skip-d", "unrecognized arguments: --skip-d"),
    "batch-0": ("demo --batch 0", "batch must be from 1 to 4096, got 0"),
    "batch-word": ("demo --batch two", "argument --batch: invalid int value: 'two'"),
    "batch-below-images": (
        "demo --batch 1 --image a --image b",
        "batch must be at least the number of images, 2, got 1",
    ),
    "runs-0": ("demo --runs 0", "runs must be from 1 to 1000000, got 0"),
    "unknown-dtype": ("demo --dtype int8", "invalid choice: 'int8'"),
    "unknown-model": ("demo --model resnet18,resnet9", "model must be one of resnet18, resnet34,"),
    "no-gpu": ("demo --device cuda", "device must be available, got 'cuda': torch sees no CUDA device"),
    "tune-no-gpu": ("tune", "tune must have a CUDA device, got none"),
    "tune-batch-0": ("tune --batch 0", "batch must be from 1 to 4096, got 0"),
    "tune-unknown-model": ("tune --model resnet9", "model must be one of resnet18, resnet34,"),
    "nothing-left": ("demo --skip-digits --skip-photos", "skip-digits and skip-photos must not both be given"),
    "plot-of-nothing": ("demo --skip-photos --plot a.png", "plot must be given without skip-photos"),
    "plot-suffix": ("demo --plot a.txt", "plot must end in one of .png, .svg, .pdf, got 'a.txt'"),
    "plot-nowhere": ("demo --plot absent/a.png", "plot must be a file that can be written, got 'absent/a.png'"),
    "json-folder": ("demo --json .", "json must be a file that can be written, got '.'"),
    "image-absent": ("demo --image absent.jpg", "image must be a picture that Pillow reads, got 'absent.jpg'"),
    "image-text": ("demo --image text.jpg", "image must be a picture that Pillow reads, got 'text.jpg'"),
    "image-cut-off": ("demo --image cut.png", "image must be a picture that Pillow reads, got 'cut.png'"),
    "weights-two-models": ("demo --weights linear.pt", "model must be a single network when weights are given"),
    "weights-absent": (
        "demo --model resnet18 --weights x.pt",
        "weights must be a file that can be read, got 'x.pt': No such",
    ),
    "weights-text": (
        "demo --model resnet18 --weights text.pt",
        "weights must be a state_dict that torch.save wrote, got 'tex",
    ),
    "weights-list": ("demo --model resnet18 --weights list.pt", "weights must be a state_dict of tensors, alone or as"),
    "weights-other": (
        "demo --model resnet18 --weights linear.pt",
        "weights must fit resnet18, got 102 missing, 2 unex",
    ),
    "weights-infinite": (
        "demo --model resnet18 --weights infinite.pt",
        "weights must be finite, got NaN or infinity in 'fc.",
    ),
    "weights-integers": (
        "demo --model resnet18 --weights integers.pt",
        "weights must be dense and floating-point, got ",
    ),
    "weights-no-class": (
        "demo --model resnet18 --weights nothing.pt",
        "weights must have at least 1 class in 'fc.weight'",
    ),
    "weights-of-nothing": (
        "demo --skip-photos --model resnet18 --weights a.pt",
        "weights must be given without skip-photos",
    ),
    "image-of-nothing": ("demo --skip-photos --image a.png", "image must be given without skip-photos"),
    "plot-read-only": ("demo --plot /proc/a.png", "plot must be a file that can be written, got '/proc/a.png'"),
    "batch-enormous": ("demo --batch 99999999999", "batch must be from 1 to 4096, got 99999999999"),
    "weights-shape": ("demo --model resnet18 --weights reshaped.pt", "1 differently shaped tensors, 'layer1.0.conv1.w"),
    "explain-model": ("explain --model vgg", "model must be one of resnet18, resnet34,"),
    "explain-backend": ("explain --backend fast", "backend must be one of auto, triton, cudnn, onednn, eager, got 'fa"),
    "explain-no-gpu": ("explain --device cuda", "device must be available, got 'cuda'"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line(
    line: str, message: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("command", ["demo", "explain"])
def test_environment_names_an_unknown_backend(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "fast")
    assert run([command]) == 2
    assert "FUSED_RESBLOCK_BACKEND must be one of" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the checks raise is the user's mistake."""

    def broken() -> int:
        raise ValueError("a bug")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["doctor"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"fused_resblock {__version__}\n"


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_explain_lists_every_block(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--model", "resnet18", "--backend", backend]) == 0
    out = capsys.readouterr().out
    assert all(f"layer{stage}.{block} " in out for stage in (1, 2, 3, 4) for block in (0, 1))


@pytest.mark.parametrize("held", [True, False])
def test_an_interrupted_search_says_where_it_goes_on(
    held: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object, out: Path) -> None:
        if held:
            out.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned_file, "check_out", lambda out, device: tmp_path / out)
    monkeypatch.setattr(torch, "randn", lambda *size, **options: None)
    monkeypatch.setattr(models, "build", lambda name: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, "to", lambda module, *args: module)
    monkeypatch.setattr(fused_resblock, "tune", interrupted)
    assert run(["tune", "--out", "t.json"]) == 130
    goes_on = f"; the same command goes on with what is in {tmp_path / 't.json'}" if held else ""
    assert capsys.readouterr().err == f"fused-resblock: interrupted{goes_on}\n"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_RESBLOCK_BACKEND", raising=False)
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, machine.cpu_name(), "TRITON_INTERPRET", "float32", "bfloat16", *backends.BACKENDS):
        assert word in out


def test_doctor_tells_what_does_not_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FUSED_RESBLOCK_BACKEND", raising=False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "does_not_fit.py").write_text("raise RuntimeError('operator does not exist\\n...')")
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.setattr(doctor, "_IMPORTED", ("does_not_fit", "not_there"))
    monkeypatch.setenv("FUSED_RESBLOCK_CONFIG_DIR", str(tmp_path))
    assert run(["doctor"]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM: ")]
    assert len(problems) == 2
    assert "broken.json" in problems[0]
    assert problems[1].endswith(f"must fit torch {torch.__version__}, got RuntimeError: operator does not exist")
    for folder in ("absent", "a" * 5000):
        monkeypatch.setenv("FUSED_RESBLOCK_CONFIG_DIR", str(tmp_path / folder))
        assert run(["doctor"]) == 1
        assert capsys.readouterr().out.count("FUSED_RESBLOCK_CONFIG_DIR must name a folder, got ") == 1


def test_end_of_a_pipe() -> None:
    command = f"{sys.executable} -m fused_resblock explain --model resnet18 | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("name")


def test_doctor_obeys_and_reports_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "eager")
    assert run(["doctor"]) == 0
    assert "forced" in capsys.readouterr().out
    monkeypatch.setenv("FUSED_RESBLOCK_BACKEND", "fast")
    assert run(["doctor"]) == 1
    assert "PROBLEM: FUSED_RESBLOCK_BACKEND must be one of" in capsys.readouterr().out


def test_hint_on_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for name in (
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TOP_PAD_",
        "LD_PRELOAD",
    ):
        monkeypatch.delenv(name, raising=False)
    assert any("MALLOC_" in hint for hint in doctor.hints())
    monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so.2")
    assert not doctor.hints()
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert not doctor.hints()


def test_module_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "fused_resblock", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fused_resblock {__version__}\n"), done.stderr


def test_stamp_names_what_a_measurement_needs() -> None:
    stamp = machine.stamp()
    assert stamp["cpu"]
    assert stamp["torch"] == str(torch.__version__)
    assert stamp["threads"] == torch.get_num_threads()
    assert {"gpu", "driver", "python", "triton", "commit", "malloc", "fused_resblock"} <= stamp.keys()
