"""Progress bars: of what they count, where they are shown, and that nobody needs tqdm."""

from __future__ import annotations

import sys

import pytest
import torch
from chains import CHAINS, chain, image_for

import fused_resblock as frb
from fused_resblock import progress


class Recorded:
    """A bar that notes what it is told."""

    def __init__(self, total: int) -> None:
        self.total, self.n, self.closed = total, 0, False

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def update(self, n: int = 1) -> None:
        assert n > 0
        self.n += n


@pytest.mark.parametrize("stages", [True, "kernel", False])
def test_first_calls_count_their_operations(stages, monkeypatch):
    bars = []

    def first_call(total: int, device: torch.device) -> Recorded:
        bars.append(Recorded(total))
        return bars[-1]

    monkeypatch.setattr(progress, "first_call", first_call)
    reference = chain(CHAINS["layer"][0])
    fused, x = frb.fuse(reference, stages=stages, backend="triton"), image_for(reference)
    with torch.no_grad():
        fused(x)
        assert [(bar.total, bar.n, bar.closed) for bar in bars] == (
            [(3, 3, True)] * 3 if not stages else [(9, 9, True)]
        )
        fused(x)
    assert len(bars) == (3 if not stages else 1), "bound once"


def test_a_first_call_on_a_cpu_has_no_bar():
    assert isinstance(progress.first_call(3, torch.device("cpu")), progress._NoBar)


def test_a_first_call_on_a_gpu_has_one_that_waits(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    asked = []
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: asked.append(options))
    progress.first_call(3, torch.device("cuda"))
    (options,) = asked
    assert (options["total"], options["disable"], options["leave"]) == (3, None, False)
    assert options["delay"] == progress.PATIENCE


def test_an_old_tqdm_does_not_stop_a_first_call(monkeypatch):
    tqdm = pytest.importorskip("tqdm")

    def old(**options):
        raise tqdm.TqdmKeyError(f"Unknown argument(s): {options['delay']}")

    monkeypatch.setattr(tqdm, "tqdm", old)
    assert isinstance(progress.first_call(3, torch.device("cuda")), progress._NoBar)


def test_nobody_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.first_call(3, torch.device("cuda")) as bar:
        bar.update(2)
        assert bar.n == 0
