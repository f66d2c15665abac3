"""The convolutions of the ResNet family, as the kernels see them: one row for each distinct fused operation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvShape:
    """One fused convolution: input `[N, channels, size, size]`, filter `kernel` x `kernel`, and its epilogue.

    `residual` adds a tensor of the output's shape; `shortcut` is the channel count of the block's input when the
    downsample branch is accumulated as a second GEMM (its stride is `shortcut_stride`), else 0.
    """

    name: str
    channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    residual: bool = False
    shortcut: int = 0
    shortcut_stride: int = 1

    @property
    def out_size(self) -> int:
        """Rows (and columns) of the output; filters are padded by `kernel // 2`."""
        return -(-self.size // self.stride)

    def weights(self) -> int:
        """How many weights it has, those of a downsample branch included."""
        return self.out_channels * (self.channels // self.groups * self.kernel**2 + self.shortcut)


def bottleneck_shapes(groups: int = 1, width_per_group: int = 64, prefix: str = "bottleneck") -> list[ConvShape]:
    """Every distinct fused convolution of a bottleneck ResNet at 224x224."""
    shapes = []
    inplanes, size = 64, 56
    for stage, planes in enumerate((64, 128, 256, 512), 1):
        width, out = planes * width_per_group // 64 * groups, planes * 4
        stride = 1 if stage == 1 else 2
        small = size // stride
        name = f"{prefix}.l{stage}"
        shapes += [
            ConvShape(f"{name}.first.reduce", inplanes, width, size),
            ConvShape(f"{name}.first.3x3", width, width, size, 3, stride, groups),
            ConvShape(f"{name}.first.expand", width, out, small, shortcut=inplanes, shortcut_stride=stride),
            ConvShape(f"{name}.reduce", out, width, small),
            ConvShape(f"{name}.3x3", width, width, small, 3, 1, groups),
            ConvShape(f"{name}.expand", width, out, small, residual=True),
        ]
        inplanes, size = out, small
    return shapes


def basic_shapes() -> list[ConvShape]:
    """Every distinct fused convolution of ResNet-18 and ResNet-34 at 224x224."""
    shapes = []
    inplanes, size = 64, 56
    for stage, planes in enumerate((64, 128, 256, 512), 1):
        stride = 1 if stage == 1 else 2
        small = size // stride
        name = f"basic.l{stage}"
        if stage > 1:
            shapes += [
                ConvShape(f"{name}.first.conv1", inplanes, planes, size, 3, stride),
                ConvShape(f"{name}.first.conv2", planes, planes, small, 3, shortcut=inplanes, shortcut_stride=stride),
            ]
        shapes += [
            ConvShape(f"{name}.conv1", planes, planes, small, 3),
            ConvShape(f"{name}.conv2", planes, planes, small, 3, residual=True),
        ]
        inplanes, size = planes, small
    return shapes


def wide_shapes() -> list[ConvShape]:
    """Every distinct fused convolution of Wide ResNet-50-2."""
    return bottleneck_shapes(1, 128, "wide")


def odd_shapes() -> list[ConvShape]:
    """Channels that fill no whole step of a loop over them, as RegNets have, on images that cut tiles."""
    return [
        ConvShape("odd.reduce", 208, 72, 14),
        ConvShape("odd.3x3", 72, 104, 14, 3),
        ConvShape("odd.first.3x3", 104, 104, 14, 3, 2),
        ConvShape("odd.expand", 104, 208, 14, residual=True),
        ConvShape("odd.first.expand", 104, 208, 7, shortcut=72, shortcut_stride=2),
        ConvShape("odd.grouped", 112, 112, 14, 3, groups=2),
    ]


def all_shapes() -> list[ConvShape]:
    """ResNet-18 to 152, and ResNeXt-50 32x4d for the grouped form."""
    grouped = [s for s in bottleneck_shapes(32, 4, "resnext") if s.groups > 1]
    return basic_shapes() + bottleneck_shapes() + grouped
