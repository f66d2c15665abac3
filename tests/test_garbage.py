"""What a trace collects: its own garbage, and it leaves what others have frozen."""

from __future__ import annotations

import gc

import pytest

from fused_resblock import garbage
from fused_resblock.garbage import old_set_aside


@pytest.fixture
def unknown(monkeypatch):
    """Nobody has asked yet whether anything is frozen."""
    monkeypatch.setattr(garbage, "_frozen_by_others", [])


def test_what_others_have_frozen_stays_so(unknown):
    gc.freeze()
    count = gc.get_freeze_count()
    assert count > 0
    for _ in range(2):
        with old_set_aside():
            assert gc.get_freeze_count() <= count
    assert gc.get_freeze_count() > 0
    assert garbage._frozen_by_others


def test_what_is_old_is_not_looked_at(unknown, monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))

    def fail() -> None:
        with old_set_aside():
            calls.append("within")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert calls == ["freeze", "within", "unfreeze"]
