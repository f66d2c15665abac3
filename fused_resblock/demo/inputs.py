"""What the photograph part of the demo reads: pictures and checkpoints, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..reference import Bottleneck
from ..table import first_line

#: mean and standard deviation of ImageNet's red, green and blue, with which torchvision's weights were trained.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
SIZE = 224
#: modes of Pillow that `convert` would cut to 8 bits without scaling
_DEEP = ("I", "F")
#: what training scripts call the state_dict in a checkpoint
_KEYS = ("state_dict", "model", "model_state_dict", "net")


def load_pictures(files: Sequence[Path] = ()) -> dict[str, Any]:
    """Read picture files, or scikit-learn's two sample photographs when none is named.

    Returns:
        Name -> RGB `PIL.Image`.

    Raises:
        ValueError: if a file cannot be read as a picture.
    """
    from PIL import Image

    if not files:
        from sklearn.datasets import load_sample_image

        return {name: Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")}
    pictures = {}
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode in _DEEP or picture.mode.startswith("I;"):
                    raise ValueError(f"it has more than 8 bits a channel (mode {picture.mode})")
                pictures[str(file)] = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = first_line(error)
            raise ValueError(f"image must be a picture that Pillow reads, got {str(file)!r}: {reason}") from error
    return pictures


def to_batch(pictures: Sequence[Any], batch: int) -> Tensor:
    """Scale each picture's shorter side to 256, cut out the middle 224x224, normalise, repeat up to `batch`.

    Returns:
        `[batch, 3, 224, 224]` fp32, channels_last.
    """
    import numpy

    images = []
    for picture in pictures:
        half = min(picture.size) * SIZE / 256 / 2  # of the middle, in pixels of the picture
        x, y = (side / 2 for side in picture.size)
        middle = picture.resize((SIZE, SIZE), box=(x - half, y - half, x + half, y + half))
        pixels = torch.from_numpy(numpy.array(middle, dtype=numpy.float32) / 255)
        images.append(((pixels - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1))
    chosen = [images[i % len(images)] for i in range(batch)]
    return torch.stack(chosen).contiguous(memory_format=torch.channels_last)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a `state_dict` that `torch.save` wrote, alone or under "state_dict", "model", "model_state_dict" or "net".

    The prefixes "module." of `DataParallel` and "_orig_mod." of `torch.compile` are left out.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"weights must be a file that can be read, got {str(file)!r}: {error.strerror}") from error
    except Exception as error:  # torch.load has no common base class for its errors, and advises what is unsafe
        raise ValueError(
            f"weights must be a state_dict that torch.save wrote, got {str(file)!r}: no checkpoint, or one "
            "with other objects than tensors, as a whole model is"
        ) from error
    for key in (*_KEYS, *_KEYS):  # one may lie in another
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        what = (
            f"a dict of {', '.join(map(repr, list(loaded)[:5]))}" if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise ValueError(f"weights must be a state_dict of tensors, alone or as {_KEYS}, got {what} in {str(file)!r}")
    if not all(isinstance(key, str) for key in loaded):
        raise ValueError(f"weights must be a state_dict with names, got other keys in {str(file)!r}")
    return {key.removeprefix("_orig_mod.").removeprefix("module."): value for key, value in loaded.items()}


def check_fit(state: dict[str, Tensor], name: str) -> None:
    """Check that a checkpoint's names and shapes are those of the network; the classifier may have any width but 0.

    `num_batches_tracked`, which inference does not read, may be absent.

    Raises:
        ValueError: if a tensor is missing, unexpected, of another shape, or not of finite real numbers.
    """
    if num_classes(state) < 1:
        raise ValueError("weights must have at least 1 class in 'fc.weight', got 0")
    with torch.device("meta"):
        expected = models.build(name, num_classes=num_classes(state)).state_dict()
    needed = {key for key in expected if not key.endswith("num_batches_tracked")}
    missing = sorted(needed - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    reshaped = sorted(key for key in needed & state.keys() if state[key].shape != expected[key].shape)
    if missing or unexpected or reshaped:
        examples = ", ".join(repr(names[0]) for names in (missing, unexpected, reshaped) if names)
        raise ValueError(
            f"weights must fit {name}, got {len(missing)} missing, {len(unexpected)} unexpected and "
            f"{len(reshaped)} differently shaped tensors, {examples} among them"
        )
    for key in sorted(needed):
        value = state[key]
        if value.layout != torch.strided or not value.is_floating_point():
            raise ValueError(f"weights must be dense and floating-point, got {value.layout} {value.dtype} in {key!r}")
        if not value.isfinite().all():
            raise ValueError(f"weights must be finite, got NaN or infinity in {key!r}")


def num_classes(state: dict[str, Tensor]) -> int:
    """The width of the classifier in a checkpoint; 1000 if it has none."""
    weight = state.get("fc.weight")
    return weight.shape[0] if weight is not None and weight.ndim == 2 else 1000


def make_model(name: str, state: dict[str, Tensor] | None, x: Tensor) -> nn.Module:
    """Build a network in eval mode: with the weights of a checkpoint that fits, or else with random ones.

    The random ones come from a fixed seed and are made to behave like trained ones, which a deep random network does
    not: its activations outgrow fp16, or rounding errors grow from block to block. So batch norms get a random gamma
    and beta, the last gamma of each block is made small beside the skip connection, and the running statistics are
    those that the network finds in `x`.
    """
    if state is not None:
        model = models.build(name, num_classes=num_classes(state))
        model.load_state_dict(state, strict=False)
        return model.eval()
    torch.manual_seed(0)
    model = models.build(name)
    models.randomize_norms(model)
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    last_gamma = "bn3.weight" if models.ARCHITECTURES[name][0] is Bottleneck else "bn2.weight"
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(last_gamma):
                parameter.mul_(0.25)
        for norm in norms:
            norm.momentum = 1.0  # the running statistics become those of this one batch
        model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()
