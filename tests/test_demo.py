"""The demo: the digits network and its checkpoint, the photograph part, its timing, and what it writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_resblock as frb
from fused_resblock import cli

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("PIL", reason="the demo needs Pillow")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

from fused_resblock.demo import digits, inputs, photos, timing, train_digits

CPU = torch.device("cpu")


def test_split_is_fixed_stratified_and_complete() -> None:
    train_images, train_labels, images, labels = digits.load_split()
    assert (len(train_images), len(images)) == (len(train_labels), len(labels)) == (1347, 450)
    assert torch.equal(images, digits.load_split()[2])
    shares = torch.bincount(labels, minlength=10) / torch.bincount(torch.cat([labels, train_labels]), minlength=10)
    assert ((shares - 0.25).abs() < 0.01).all()
    assert images.min() >= -1
    assert images.max() <= 1


def test_checkpoint_is_small_and_as_accurate_as_it_says() -> None:
    assert digits.CHECKPOINT.stat().st_size < 1e6
    net, metadata = digits.load_trained()
    _, _, images, labels = digits.load_split()
    accuracy = (digits.classify(net, images).argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(metadata["held_out_accuracy"], abs=1 / 450)
    assert accuracy > 0.985


def test_digits_agree_and_every_kind_of_block_is_fused() -> None:
    result = digits.compare(CPU, torch.float32)
    assert result["differing"] == 0
    assert result["eager_accuracy"] == result["fused_accuracy"] > 0.985
    assert [block["name"] for block in result["blocks"]] == ["basic", "residual", "bottleneck", "preact"]
    assert all(block["fused"] for block in result["blocks"])


def test_training_learns_repeats_itself_and_is_loaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file in files:
        assert train_digits.main(["--epochs", "1", "--out", str(file)]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    (first, metadata), (second, _) = map(digits.load_trained, files)
    assert metadata["held_out_accuracy"] > 0.3  # chance is 0.1
    assert metadata["epochs"] == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_training_without_epochs() -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train_digits.train(0)


def test_checkpoint_of_another_split(tmp_path: Path) -> None:
    checkpoint = torch.load(digits.CHECKPOINT, weights_only=True)
    torch.save(checkpoint | {"split_seed": 7}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"split_seed must be 0 in other.pt, got 7"):
        digits.load_trained(tmp_path / "other.pt")


def test_distortion_keeps_the_background() -> None:
    blank = torch.full((3, 1, 8, 8), -1.0)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(train_digits.distort(blank, generator), blank)


def test_interleaved_takes_turns_and_reports_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 0.0, 10.0, 0.0, 20.0, 0.0, 2.0, 0.0, 9.0, 0.0, 30.0])
    calls: list[str] = []
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    ticks: list[int] = []
    result = timing.interleaved(ways, 3, CPU, lambda: ticks.append(1))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert result == {"a": 2000.0, "b": 20000.0}
    assert len(ticks) == 3


def test_capture_gives_the_tensors_inside_the_network_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU()))
    x = torch.randn(2, 1, 3, 3)
    captured = photos.capture_inputs(model, ["1", "1.0"], x)
    assert torch.equal(captured["1"], model[0](x))
    assert torch.equal(captured["1.0"], model[0](x))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_of_pictures(batch: int) -> None:
    images = list(inputs.load_pictures().values())
    x = inputs.to_batch(images, batch)
    assert x.shape == (batch, 3, 224, 224)
    assert x.is_contiguous(memory_format=torch.channels_last)
    for i in range(2, batch):
        assert torch.equal(x[i], x[i - 2])


def test_panorama_is_cut_before_it_is_scaled() -> None:
    from PIL import Image

    ramp = Image.linear_gradient("L").rotate(90).resize((30000, 1)).convert("RGB")
    x = inputs.to_batch([ramp], 1)
    assert x.shape == (1, 3, 224, 224)
    assert (x.amax((2, 3)) - x.amin((2, 3))).max() < 0.02  # one colour, as the middle is one pixel


@pytest.mark.parametrize("size", [(256, 256), (320, 256), (256, 300)], ids=str)
def test_picture_that_needs_no_scaling_is_cut(size: tuple[int, int]) -> None:
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
    middle = torch.from_numpy(pixels[top : top + 224, left : left + 224].astype("float32") / 255)
    x = inputs.to_batch([Image.fromarray(pixels)], 1)[0].permute(1, 2, 0)
    torch.testing.assert_close(x * torch.tensor(inputs._STD) + torch.tensor(inputs._MEAN), middle)


def test_weights_under_other_names(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    for name, kept in {
        "plain": state,
        "timm": {"model": state, "epoch": 3},
        "lightning": {"state_dict": state},
    }.items():
        torch.save(kept, tmp_path / name)
        assert inputs.read_weights(tmp_path / name).keys() == state.keys()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "parallel")
    assert inputs.read_weights(tmp_path / "parallel").keys() == state.keys()


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (3, 500)], ids=str)
def test_one_grey_picture_of_any_size(size: tuple[int, int]) -> None:
    from PIL import Image

    x = inputs.to_batch([Image.new("RGB", size, (124, 116, 104))], 1)
    assert x.shape == (1, 3, 224, 224)
    assert x.abs().max() < 0.02  # ImageNet's mean colour


@pytest.mark.parametrize(
    ("name", "dtype"), [("resnet18", torch.float32), ("resnet50", torch.float32), ("resnet50", torch.bfloat16)], ids=str
)
def test_fused_is_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = inputs.make_model(name, None, images).to(dtype)
    x = images.to(dtype)
    with torch.no_grad():
        result = photos.errors(model, model(x), frb.fuse(model)(x), x)
    assert result["parity"], result


def test_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, file = tmp_path / "blocks.png", tmp_path / "results.json"
    argv = ["demo", "--model", "resnet18", "--batch", "1", "--runs", "1", "--plot", str(png), "--json", str(file)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "differing predictions: 0" in out
    assert "weights are random" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    results = json.loads(file.read_text())
    assert results["machine"]["torch"] == str(torch.__version__)
    assert results["digits"]["differing"] == 0
    (photo,) = results["photos"]
    assert (photo["model"], photo["batch"], photo["weights"]) == ("resnet18", 1, "random")
    assert [block["name"] for block in photo["blocks"]] == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert all(block["eager_ms"] > 0 and block["fused_ms"] > 0 for block in photo["blocks"])
    assert all(f"{block['name']} " in out for block in photo["blocks"])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "under-state_dict"])
def test_weights_of_a_user(wrapped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    state = inputs.make_model("resnet18", None, torch.randn(2, 3, 64, 64)).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:7], torch.zeros(7)
    state["fc.bias"][3] = 1e3  # so that every picture is of class 3
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "mine.pt")
    Image.new("L", (30, 40), 200).save(tmp_path / "grey.png")
    files = ["--weights", str(tmp_path / "mine.pt"), "--image", str(tmp_path / "grey.png")]
    assert cli.main(["demo", "--skip-digits", "--model", "resnet18", "--runs", "1", *files]) == 0
    out = capsys.readouterr().out
    assert "weights from mine.pt; classes of the images: [3]" in out
    assert "random" not in out


def wrong(model: nn.Module) -> nn.Module:
    """A copy of the network whose last bias sends every picture to class 1: what a broken fusion might do."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.bias[1] += 100
    return model


@pytest.mark.parametrize(
    ("skip", "message"),
    [("--skip-photos", "classify digits differently"), ("--skip-digits", "resnet18 is less exact fused than eager")],
)
def test_disagreement_fails(
    skip: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frb, "fuse", wrong)
    assert cli.main(["demo", "--model", "resnet18", "--batch", "1", "--runs", "1", skip]) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED:")]
    assert message in failed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_demo_on_a_gpu(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert cli.main(["demo", "--model", "resnet18", "--runs", "2", "--device", "cuda", "--dtype", dtype]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
