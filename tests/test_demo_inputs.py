"""What the demo reads: the ways in which checkpoints are kept, and pictures of other depths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fused_resblock.demo.inputs import load_pictures, read_weights

STATE = {"conv1.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE},
        {"model_state_dict": STATE},
        {"net": STATE},
        {"model": {"state_dict": STATE}},
        {"state_dict": {"model": STATE}},
        {"module.conv1.weight": torch.ones(2)},
        {"_orig_mod.conv1.weight": torch.ones(2)},
    ],
)
def test_state_dicts_as_training_scripts_keep_them(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").keys() == STATE.keys()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"weights_of_mine": STATE}, "got a dict of 'weights_of_mine'"),
        ([1], "got list"),
        ({1: torch.ones(2)}, "got other keys"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, word):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"^weights must be .*{word}"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "dtype"), [("deep.png", np.uint16), ("deep.tiff", np.float32), ("deeper.tiff", np.int32)]
)
def test_pictures_that_would_be_clipped_to_eight_bits_are_refused(tmp_path, name, dtype):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="^image must be a picture .* more than 8 bits a channel"):
        load_pictures([tmp_path / name])
    image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    assert load_pictures([tmp_path / "grey.png"])[str(tmp_path / "grey.png")].mode == "RGB"
