"""The machine that runs PTX: single instructions against Python, and that what a GPU would not do is a fault."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ptx.grid import Fault, GlobalMemory
from benchmarks.ptx.matrix import _fragment_a, _fragment_b, _scattered, _sums, swizzled
from benchmarks.ptx.operands import bf16
from benchmarks.ptx.parse import parse
from benchmarks.ptx.profile import Profile
from benchmarks.ptx.run import Compiled, launch

HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 out, .param .u64 .ptr .global .align 1 in)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [out];
    ld.param.b64 %rd2, [in];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
"""


def executed(
    body: str,
    given: np.ndarray,
    late: bool = False,
    shared: int = 256,
    profile: Profile | None = None,
    early: bool = False,
    settled: bool = False,
    threads: int = 64,
) -> np.ndarray:
    """64 words written by two warps, or more, that were given 64 words."""
    memory = GlobalMemory()
    parameters = {
        "out": memory.add(np.zeros(256, np.uint8)),
        "in": memory.add(given.astype("<u4").view(np.uint8), 0, settled),
    }
    memory.seal()
    head = HEAD.replace(".reqntid 64", f".reqntid {threads}")
    kernel = Compiled(parse(head + body + "\n    ret;\n$L__func_end0:\n}\n"))
    options = {"late": late, "apart": False, "serialized": False, "early": early, "notes": set(), "profile": profile}
    launch(kernel, (1, 1, 1), threads, parameters, memory, shared, **options)
    return memory.read_back(parameters["out"], 256).view("<u4").copy()


def signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def quotient(a: int, b: int) -> int:
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add.s32 %r3, %r2, %r4": lambda a, b: a + b,
    "sub.s32 %r3, %r2, %r4": lambda a, b: a - b,
    "mul.lo.s32 %r3, %r2, %r4": lambda a, b: a * b,
    "mul.hi.s32 %r3, %r2, %r4": lambda a, b: (signed(a) * signed(b)) >> 32,
    "mul.hi.u32 %r3, %r2, %r4": lambda a, b: (a * b) >> 32,
    "and.b32 %r3, %r2, %r4": lambda a, b: a & b,
    "xor.b32 %r3, %r2, %r4": lambda a, b: a ^ b,
    "shl.b32 %r3, %r2, %r4": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r3, %r2, %r4": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 %r3, %r2, %r4": lambda a, b: signed(a) >> min(b, 31),
    "bfe.u32 %r3, %r2, 3, 5": lambda a, b: (a >> 3) & 31,
    "bfe.s32 %r3, %r2, 28, 4": lambda a, b: signed(a) >> 28,
    "max.u32 %r3, %r2, %r4": max,
    "min.s32 %r3, %r2, %r4": lambda a, b: min(signed(a), signed(b)),
    "prmt.b32 %r3, %r2, %r4, 0x5410U": lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "setp.lt.s32 %p1, %r2, %r4; selp.b32 %r3, 1, 2, %p1": lambda a, b: 1 if signed(a) < signed(b) else 2,
}
WORDS = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from([0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))


@pytest.mark.parametrize("code", [pytest.param(code, id=code.split()[0]) for code in ARITHMETIC])
@settings(max_examples=20, deadline=None)
@given(words=st.lists(WORDS, min_size=64, max_size=64))
def test_integers(code, words):
    body = f"""
    ld.global.b32 {{ %r2 }}, [ %rd4 + 0 ];
    xor.b32 %r5, %r1, 1;
    mad.wide.u32 %rd5, %r5, 4, %rd2;
    ld.global.b32 {{ %r4 }}, [ %rd5 + 0 ];
    {code};
    st.global.b32 [ %rd3 + 0 ], {{ %r3 }};"""
    expected = [ARITHMETIC[code](words[i], words[i ^ 1]) & 0xFFFFFFFF for i in range(64)]
    assert executed(body, np.array(words)).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(words=st.lists(st.integers(-1000, 1000), min_size=64, max_size=64))
def test_division_goes_towards_zero(words):
    body = """
    ld.global.b32 { %r2 }, [ %rd4 + 0 ];
    div.s32 %r3, %r2, 7;
    rem.s32 %r4, %r2, 7;
    mad.lo.s32 %r5, %r3, 1000, %r4;
    st.global.b32 [ %rd3 + 0 ], { %r5 };"""
    found = executed(body, np.array(words, np.int32).view(np.uint32)).view(np.int32)
    assert found.tolist() == [quotient(w, 7) * 1000 + w - 7 * quotient(w, 7) for w in words]


def test_maximum_with_and_without_nan():
    nan = np.full(64, np.nan, np.float32).view(np.uint32)
    body = """
    ld.global.b32 {{ %r2 }}, [ %rd4 + 0 ];
    max{0}.f32 %r3, %r2, 0f3F800000;
    st.global.b32 [ %rd3 + 0 ], {{ %r3 }};"""
    assert np.isnan(executed(body.format(".NaN"), nan).view(np.float32)).all()
    assert (executed(body.format(""), nan).view(np.float32) == 1).all()


def test_branches_join_again():
    body = """
    setp.lt.u32 %p1, %r1, 5;
    mov.b32 %r2, 0;
    @%p1 bra $L__BB0_2;
    mov.b32 %r2, 100;
    bra.uni $L__BB0_3;
$L__BB0_2:
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p2, %r2, %r1;
    @%p2 bra $L__BB0_2;
$L__BB0_3:
    add.s32 %r2, %r2, 1000;
    st.global.b32 [ %rd3 + 0 ], { %r2 };"""
    assert executed(body, np.zeros(64)).tolist() == [1001, 1002, 1003, 1004, 1005] + [1100] * 59


FAULTS = {
    "outside": ("ld.global.b32 { %r2 }, [ %rd4 + 4 ];", "outside of every tensor"),
    "misaligned": ("ld.global.v2.b32 { %r2, %r3 }, [ %rd4 + 0 ];", "misaligned"),
    "shared": ("mov.b32 %r2, global_smem; ld.shared.b32 %r3, [%r2+256];", "at shared 0x500"),
    "barrier": ("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", "a part of"),
    "shuffle": ("setp.lt.u32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "a part of a warp"),
    "no barrier": ("mov.b32 %r2, global_smem; mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;", "no barrier"),
    "for ever": (
        "mov.b32 %r2, global_smem; setp.eq.b32 %p2, %r1, 0; @%p2 mbarrier.init.shared::cta.b64 [%r2], 1; bar.sync 0;"
        " $L__A: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra $L__A;",
        "waits for ever",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_a_gpu_would_not_do(case):
    body, words = FAULTS[case]
    with pytest.raises(Fault, match=words):
        executed(body, np.zeros(64))


@pytest.mark.parametrize("code", ["vote.sync.ballot.b32 %r2, %p1, -1;", "add.sat.s32 %r2, %r1, %r1;", "bar.sync 1;"])
def test_an_instruction_that_is_not_known_is_refused(code):
    with pytest.raises(NotImplementedError):
        executed(code, np.zeros(64))


@pytest.mark.parametrize(("apart", "conflicts"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_and_sectors_are_counted(apart, conflicts):
    profile = Profile()
    body = f"""
    mov.b32 %r2, global_smem;
    mad.lo.s32 %r3, %r1, {4 * apart}, %r2;
    ld.shared.b32 %r4, [%r3];
    ld.global.b32 {{ %r5 }}, [ %rd4 + 0 ];
    st.global.b32 [ %rd3 + 0 ], {{ %r5 }};"""
    executed(body, np.zeros(64), shared=64 * 4 * max(1, apart), profile=profile)
    assert (profile.wavefronts, profile.ideal) == (2 * conflicts, 2)
    assert profile.l2 == profile.device == 512
    assert profile.instructions == 2 * 10


@given(st.floats(width=32))
def test_bf16_is_torchs(value):
    import torch

    ours = bf16(np.array([value], np.float32)).astype(np.uint32) << 16
    theirs = torch.tensor([value], dtype=torch.float32).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours.view(np.float32), theirs, equal_nan=True)


def test_fragments_of_a_matrix_are_where_the_instruction_set_says():
    lane, register = 5, 2  # row 1 and 9, columns 2 and 3; the third register is to the right
    words = np.zeros((1, 32, 4), np.uint32)
    words[0, lane, register] = 0x3C00 | 0x4000 << 16  # 1 and 2 in fp16
    a = _fragment_a(words, "f16")[0]
    assert (a[1, 10], a[1, 11]) == (1, 2)
    assert a.sum() == 3
    b = _fragment_b(words[:, :, 1:3], "f16")[0]  # column 1, rows 10 and 11
    assert (b[10, 1], b[11, 1]) == (1, 2)
    assert b.sum() == 3
    sums = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32)
    assert np.array_equal(_sums(_scattered(sums)), sums)


@pytest.mark.parametrize("fragment", [_fragment_a, _fragment_b])
def test_factors_are_cut_to_tf32_and_not_rounded(fragment):
    registers = 4 if fragment is _fragment_a else 2
    words = np.full((1, 32, registers), 1 + 1.75 * 2.0**-10, np.float32).view(np.uint32)
    assert (fragment(words, "tf32") == 1 + 2.0**-10).all()


def test_swizzles_permute_the_pieces_of_eight_rows():
    at = np.arange(0, 1024, 16)
    for row in (32, 64, 128):
        assert sorted(swizzled(at, row)) == at.tolist()
    assert swizzled(np.array([128 * 3 + 16 * 5]), 128) == 128 * 3 + 16 * (5 ^ 3)
    assert np.array_equal(swizzled(at, 0), at)


@pytest.mark.parametrize(
    ("steps", "settled", "fault"),
    [
        ("launch wait read write", False, None),
        ("read wait write", True, None),
        ("read wait write", False, "an activation is read"),
        ("read write wait", True, "a write"),
        ("some read write", False, "an activation is read"),
    ],
    ids=["waits first", "reads a filter first", "reads first", "writes first", "a thread does not wait"],
)
def test_kernels_that_start_early_wait(steps, settled, fault):
    code = {
        "launch": "griddepcontrol.launch_dependents;",
        "wait": "griddepcontrol.wait;",
        "some": "setp.eq.u32 %p1, %r1, 3;\n    @!%p1 griddepcontrol.wait;",
        "read": "ld.global.b32 %r2, [%rd4];",
        "write": "st.global.b32 [%rd3], %r2;",
    }
    body = "\n    ".join(code[step] for step in steps.split())
    for early in (True, False):
        with pytest.raises(Fault, match=fault) if early and fault else nullcontext():
            assert (executed(body, np.arange(64), early=early, settled=settled) == np.arange(64)).all()


def test_a_tensor_map_begins_and_steps_by_16_bytes():
    pytest.importorskip("triton")
    from benchmarks.ptx.driver import _descriptor, _Memory

    meta = {"block_size": [8, 8], "swizzle": 0}
    for first, stride, fault in ((0, 8, False), (1, 8, True), (0, 9, True)):
        base = torch.zeros(128, dtype=torch.float16)[first:]
        value = SimpleNamespace(base=base, shape=[8, 8], strides=[stride, 1])
        with pytest.raises(Fault, match="16 bytes") if fault else nullcontext():
            _descriptor(value, meta, _Memory(), settled=True)
