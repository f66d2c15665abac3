"""On which stream graphs are recorded, with stubs for CUDA's: one a device, so that they share what they let go of."""

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
    graphs._stream.cache_clear()
    yield streams
    graphs._stream.cache_clear()


def test_every_graph_of_a_device_is_recorded_where_it_was_warmed_up(used):
    devices = [torch.device("cuda", index) for index in (0, 1, 0)]
    for device in devices:
        graphs._warm_up(lambda: None, device)
        graphs.record(lambda: None, None, device)
    assert [stream.device for stream in used] == [device for device in devices for _ in range(2)]
    assert len({id(stream) for stream in used}) == 2
