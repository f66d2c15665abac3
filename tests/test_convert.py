"""`fuse`, `unfuse` and `explain` on models: what they change, what they leave, and what happens on errors."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch import nn

import fused_resblock as frb
from fused_resblock.models import randomize_norms
from fused_resblock.reference import BasicBlock, Bottleneck, ResidualBlock


class Silu(zoo.Base):
    """A residual block that is kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def model() -> nn.Module:
    """A model in eval mode whose five blocks are one of each kind."""
    parts = [nn.Conv2d(3, 8, 3), BasicBlock(8, 8), Bottleneck(8, 2), Silu(), zoo.NoNorm(), ResidualBlock(8, 4)]
    names = ["stem", "basic", "bottleneck", "silu", "own", "last"]
    made = nn.Sequential()
    for name, part in zip(names, parts, strict=True):
        made.add_module(name, part)
    return randomize_norms(made).eval()


def classes(of: nn.Module) -> list[str]:
    """The class names of a model's children."""
    return [type(child).__name__ for child in of.children()]


PLAIN = ["Conv2d", "BasicBlock", "Bottleneck", "Silu", "NoNorm", "ResidualBlock"]
FUSED = ["Conv2d", "FusedBasicBlock", "FusedBottleneck", "Silu", "FusedNoNorm", "FusedResidualBlock"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 8)


def test_a_copy_is_fused(x):
    original = model()
    fused = frb.fuse(original)
    assert classes(original) == PLAIN
    assert classes(fused) == FUSED
    assert not set(map(id, original.parameters())) & set(map(id, fused.parameters()))
    torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-5)


def test_inplace_keeps_every_object(x):
    original = model()
    expected = original(x)
    objects = [*original.modules()], [*original.parameters()], [*original.buffers()]
    fused = frb.fuse(original, inplace=True)
    assert fused is original
    after = [*fused.modules()], [*fused.parameters()], [*fused.buffers()]
    assert [[id(o) for o in group] for group in after] == [[id(o) for o in group] for group in objects]
    assert classes(fused) == FUSED
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


def test_isinstance_and_names_hold():
    fused = frb.fuse(model())
    assert isinstance(fused.basic, BasicBlock)
    assert isinstance(fused.basic, frb.FusedBasicBlock)
    assert isinstance(fused.own, zoo.NoNorm)
    assert isinstance(fused.own, frb.FusedBlock)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model().named_modules()]
    assert list(fused.state_dict()) == list(model().state_dict())
    assert "conv1" in repr(fused.basic)


def test_unfuse_gives_back_types_and_bits(x):
    original = model()
    fused = frb.fuse(original)
    fused(x)
    back = frb.unfuse(fused)
    assert back is fused
    assert [type(m) for m in back.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(back(x), original(x))
    for ours, theirs in zip(back.modules(), original.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()


def test_unfuse_of_a_model_that_is_not_fused(x):
    original = model()
    expected = original(x)
    assert torch.equal(frb.unfuse(original)(x), expected)
    assert classes(original) == PLAIN


def test_unfuse_of_blocks_built_as_fused():
    block = frb.FusedBottleneck(8, 2)
    assert type(frb.unfuse(block)) is Bottleneck
    assert not isinstance(block, frb.FusedBlock)


def test_users_subclass_of_a_fused_class_keeps_its_meaning(x):
    class Doubled(frb.FusedBasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    block = randomize_norms(Doubled(8, 8)).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = block(x).detach()
    outer = nn.Sequential(block)
    torch.testing.assert_close(frb.fuse(outer)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(outer)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frb.unfuse(outer)(x), expected, rtol=1e-4, atol=1e-5)


def test_fuse_twice(x):
    once = frb.fuse(model())
    twice = frb.fuse(once)
    assert classes(twice) == FUSED
    assert torch.equal(twice(x), once(x))
    assert frb.fuse(once, backend="eager", inplace=True) is once
    assert {r.backend for r in frb.explain(once)} == {"eager"}
    assert torch.allclose(twice(x), once(x), rtol=1e-4, atol=1e-5)
    assert classes(frb.unfuse(twice)) == PLAIN


def test_whole_model_is_a_block():
    block = randomize_norms(BasicBlock(8, 8)).eval()
    fused = frb.fuse(block)
    assert type(fused) is frb.FusedBasicBlock
    assert [r.name for r in frb.explain(fused)] == [""]
    assert "(model)" in str(frb.explain(fused))


def test_model_without_blocks():
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    assert list(frb.explain(frb.fuse(plain, strict=True))) == []
    assert str(frb.explain(plain)) == "no residual blocks found"


def test_filter_fn_is_asked_for_every_block_once():
    asked = []

    def keep_last(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module).__name__))
        return name == "last"

    fused = frb.fuse(model(), filter_fn=keep_last)
    assert classes(fused) == [*PLAIN[:-1], "FusedResidualBlock"]
    assert sorted(asked) == sorted(zip(("basic", "bottleneck", "silu", "own", "last"), PLAIN[1:], strict=True))


def test_filter_fn_protects_blocks_that_are_fused_already():
    fused = frb.fuse(model(), backend="onednn")
    frb.fuse(fused, backend="eager", inplace=True, filter_fn=lambda name, _: name == "last")
    assert [(r.name, r.backend) for r in frb.explain(fused) if r.name in ("basic", "last")] == [
        ("basic", "onednn"),
        ("last", "eager"),
    ]


def test_strict_names_every_block_and_its_reason():
    original = model()
    with pytest.raises(ValueError, match=r"^model must hold only .* when strict, got silu: .*silu"):
        frb.fuse(original, strict=True, inplace=True)
    assert classes(original) == PLAIN


def test_strict_is_content_with_what_was_left_out():
    frb.fuse(model(), strict=True, filter_fn=lambda name, _: name != "silu")


@pytest.mark.parametrize("option", ["inplace", "strict", "stems", "heads", "frozen"])
def test_options_are_true_or_false(option):
    original = model()
    with pytest.raises(TypeError, match=f"^{option} must be True or False, got 'no'"):
        frb.fuse(original, **{option: "no"})
    assert [type(m) for m in original.modules()] == [type(m) for m in model().modules()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filter_fn": 3}, TypeError, "filter_fn must be a function of a name and a module, got 3"),
        ({"backend": ["triton"]}, TypeError, r"backend must be a string, got \['triton'\]"),
        ({"stages": torch.ones(2)}, ValueError, "stages must be True, False or"),
        ({"stages": 1}, ValueError, "stages must be True, False or"),
    ],
)
def test_other_options(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        frb.fuse(model(), **options)


def test_strict_with_everything_fused():
    frb.fuse(nn.Sequential(BasicBlock(8, 8), ResidualBlock(8, 8)), strict=True)


class Unwilling(zoo.NoNorm):
    """A class that wants to know more of those who derive from it."""

    def __init_subclass__(cls, *, name: str, **kwargs) -> None:
        super().__init_subclass__(**kwargs)


def raising(name: str, module: nn.Module) -> bool:
    """A filter with a bug."""
    if name == "last":
        raise KeyError("a bug in the filter")
    return True


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"filter_fn": raising}, KeyError, id="filter_fn raises"),
        pytest.param({"backend": "fast"}, ValueError, id="unknown backend"),
        pytest.param({"strict": True}, ValueError, id="strict"),
    ],
)
def test_failed_fuse_leaves_the_model_as_it_was(options, error, x):
    original = model()
    expected, attributes = original(x), [dict(vars(m)) for m in original.modules()]
    with pytest.raises(error):
        frb.fuse(original, inplace=True, **options)
    assert classes(original) == PLAIN
    assert [dict(vars(m)) for m in original.modules()] == attributes
    assert torch.equal(original(x), expected)


def test_class_that_cannot_be_derived_from(x):
    """Whether it raises or keeps the block, it must not stop half way."""
    made = nn.Sequential(BasicBlock(8, 8), Unwilling(), BasicBlock(8, 8)).eval()
    expected = made(torch.ones(1, 8, 5, 5))
    try:
        frb.fuse(made, inplace=True)
    except Exception:
        assert classes(made) == ["BasicBlock", "Unwilling", "BasicBlock"]
    else:
        assert classes(made) == ["FusedBasicBlock", "Unwilling", "FusedBasicBlock"]
        assert len(frb.explain(made)) == 3
    torch.testing.assert_close(made(torch.ones(1, 8, 5, 5)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [frb.fuse, frb.unfuse, frb.explain], ids=["fuse", "unfuse", "explain"])
@pytest.mark.parametrize(
    "value", [None, BasicBlock, "resnet50", [BasicBlock(8, 8)]], ids=["None", "class", "name", "list"]
)
def test_model_must_be_a_module(function, value):
    with pytest.raises(TypeError, match=rf"^model must be an nn.Module, got {type(value).__name__}$"):
        function(value)


def test_hooks_on_blocks_keep_firing(x):
    original = model()
    called = []
    original.basic.register_forward_pre_hook(lambda m, a: called.append("pre"))
    original.basic.register_forward_hook(lambda m, a, y: called.append("post"))
    original.basic.register_full_backward_hook(lambda m, dx, dy: called.append("backward"))
    original.last.register_forward_hook(lambda m, a, y: y * 2)
    expected = original(x)
    fused = frb.fuse(original, inplace=True)
    assert classes(fused) == FUSED
    called.clear()
    y = fused(x)
    y.sum().backward()
    assert called == ["pre", "post", "backward"]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_shared_block_is_fused_once():
    block = randomize_norms(BasicBlock(8, 8)).eval()
    made = nn.Sequential(block, nn.ReLU(), block)
    fused = frb.fuse(made)
    assert fused[0] is fused[2]
    assert len(frb.explain(fused)) == 1
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(fused(x), made(x), rtol=1e-4, atol=1e-5)


def test_block_inside_of_a_block_that_fuses():
    """The innermost block is the block."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.conv = BasicBlock(8, 8), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.inner(x)) + x

    outer = randomize_norms(Outer()).eval()
    fused = frb.fuse(outer)
    assert [(r.name, r.fused) for r in frb.explain(fused)] == [("inner", True)]
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(fused(x), outer(x), rtol=1e-4, atol=1e-5)
