"""On which stream graphs are recorded, with stubs for CUDA's: those of a model on one, to share what they let go of."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fused_resblock import graphs


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def used(monkeypatch):
    """The streams that recordings and warm-ups ran on, in order."""
    streams = []

    def note(stream):
        streams.append(stream)
        return nullcontext()

    graph = SimpleNamespace(replay=None)
    for name, stub in {
        "Stream": Stream,
        "CUDAGraph": lambda: graph,
        "device": lambda device: nullcontext(),
        "graph": lambda graph, pool, stream: note(stream),
        "stream": note,
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return streams


def test_the_graphs_of_a_model_are_recorded_on_one_stream_a_device(used):
    """Which is another model's for no device, and nobody's who warms up: a stream has workspaces of its own."""
    first, second = (graphs.Captured(torch.nn.Identity(), True) for _ in range(2))
    devices = [torch.device("cuda", index) for index in (0, 1)]
    for captured in (first, first, second):
        for device in devices:
            graphs._warm_up(lambda: None, device)
            graphs.record(lambda: None, None, captured._stream_of(device))
    warm, recorded = used[::2], used[1::2]
    assert [stream.device for stream in recorded] == 3 * devices
    assert recorded[:2] == recorded[2:4]
    assert len({id(stream) for stream in used}) == len(warm) + 4
