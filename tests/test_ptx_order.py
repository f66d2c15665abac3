"""The order in which the machine runs threads and lands copies: what a program forgets to wait for shows."""

from __future__ import annotations

import numpy as np
import pytest
from test_ptx import executed

EXCHANGE = """
    mov.b32 %r2, global_smem;
    mad.lo.s32 %r3, %r1, 4, %r2;
    st.shared.b32 [ %r3 + 0 ], {{ %r1 }};
    {barrier}
    xor.b32 %r4, %r1, 32;
    mad.lo.s32 %r5, %r4, 4, %r2;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [ %rd3 + 0 ], {{ %r6 }};"""


@pytest.mark.parametrize("late", [False, True])
def test_a_missing_barrier_shows(late):
    other = [i ^ 32 for i in range(64)]
    assert executed(EXCHANGE.format(barrier="bar.sync 0;"), np.zeros(64), late).tolist() == other
    assert executed(EXCHANGE.format(barrier=""), np.zeros(64), late).tolist() != other


IN_PLACE = """
    and.b32 %r2, %r1, 63;
    mad.wide.u32 %rd5, %r2, 4, %rd1;
    mad.wide.u32 %rd6, %r2, 4, %rd2;
    ld.global.b32 %r3, [%rd6];
    {barrier}
    add.s32 %r3, %r3, 1;
    st.global.b32 [%rd6], %r3;
    st.global.b32 [%rd5], %r3;
"""


def test_a_missing_barrier_between_warps_that_hold_the_same_shows():
    """Of four warps the last two read what the first two write, in place."""
    words = np.arange(64)
    expected = (words + 1).tolist()
    for barrier, seen in (("bar.sync 0;", {False}), ("", {False, True})):
        found = [executed(IN_PLACE.format(barrier=barrier), words, late, threads=128) for late in (False, True)]
        assert {result.tolist() != expected for result in found} == seen


COPY = """
    mov.b32 %r2, global_smem;
    mad.lo.s32 %r3, %r1, 4, %r2;
    cp.async.ca.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], 0x4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r6, [%r3];
    st.global.b32 [ %rd3 + 0 ], {{ %r6 }};"""


def test_a_missing_wait_shows():
    words = np.arange(64) + 7
    for late in (False, True):
        assert executed(COPY.format(wait="cp.async.wait_group 0;"), words, late).tolist() == words.tolist()
    for wait in ("", "cp.async.wait_group 1;"):
        assert executed(COPY.format(wait=wait), words, late=True).tolist() != words.tolist()
