"""Small convolutional nets, one for every way in which channels of different layers can hang together."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: int) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, padding=settings.pop("dilation", 1) * (kernel // 2), **settings)


class Head(nn.Module):
    """Pooling and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Chain(nn.Sequential):
    """Convolutions one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Residual(nn.Module):
    """Two blocks with a downsampling shortcut in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 6), nn.BatchNorm2d(6)
        self.a1, self.a2, self.b1, self.b2 = conv(6, 5), conv(5, 6), conv(6, 8, stride=2), conv(8, 9)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(5), nn.BatchNorm2d(6), nn.BatchNorm2d(9)
        self.down = nn.Conv2d(6, 9, 1, stride=2, bias=False)
        self.head = Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)), inplace=True)
        x = functional.relu(x + self.bn2(self.a2(functional.relu(self.bn1(self.a1(x))))))
        x = functional.relu(self.down(x) + self.bn3(self.b2(functional.gelu(self.b1(x)))))
        return self.head(x)


class Depthwise(nn.Module):
    """Expand, convolve each channel with a multiplier of two, gate by squeeze and excitation, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7)
        self.dw, self.bn2 = nn.Conv2d(7, 14, 3, padding=1, groups=7), nn.BatchNorm2d(14, affine=False)
        self.reduce, self.gate = nn.Conv2d(14, 4, 1), nn.Conv2d(4, 14, 1)
        self.project, self.head = nn.Conv2d(14, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.dw(functional.hardswish(self.bn1(self.expand(x)))))
        squeezed = functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return self.head(self.project(x * functional.hardsigmoid(self.gate(squeezed))))


class Grouped(nn.Module):
    """Three groups of two channels in the middle, and a group norm of three groups behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = conv(3, 6), conv(6, 6, groups=3), conv(6, 8)
        self.norm, self.head = nn.GroupNorm(4, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.last(functional.relu(self.mid(functional.relu(self.first(x)))))))


class Concatenated(nn.Module):
    """A dense block: every layer reads everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 5), conv(9, 6)
        self.bn, self.head = nn.BatchNorm2d(9), Head(15)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(functional.relu(a))], 1)
        return self.head(torch.cat([ab, self.c(functional.relu(self.bn(ab)))], 1))


class Repeated(nn.Module):
    """A layer beside a function of itself: one source feeds two places of one consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = conv(3, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.last, self.head = conv(12, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.primary(x))
        return self.head(self.last(torch.cat([x, functional.relu(self.cheap(x))], 1)))


class Split(nn.Module):
    """Halves that go different ways, split by a number kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 5
        self.first, self.left, self.last = conv(3, 10), conv(5, 5), conv(10, 4)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.first(x), [self.dim, self.dim], 1)
        return self.head(self.last(torch.cat([functional.relu(self.left(a)), functional.relu(b)], 1)))


class Chunked(nn.Module):
    """A gate: the halves meet again, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = conv(3, 10), conv(5, 4), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.head(self.last(a * torch.sigmoid(b)))


class Flattened(nn.Module):
    """A classifier that reads every position of every channel, as in VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc1, self.fc2 = conv(3, 5, stride=4), nn.Linear(5 * 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.relu(self.fc1(functional.relu(self.first(x)).flatten(1))))


class Normed(nn.Module):
    """ConvNeXt's block: layer norm over channels, an inverted bottleneck, layer scale, a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = conv(3, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 11), nn.Linear(11, 6)
        self.gamma, self.head = nn.Parameter(torch.full((6,), 1e-6)), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(functional.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        return self.head(x + (y * self.gamma).permute(0, 3, 1, 2))


class Scaled(nn.Module):
    """A factor for each channel, and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 6, dilation=2), conv(6, 4)
        self.gamma, self.head = nn.Parameter(torch.full((1, 6, 1, 1), 1e-6)), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.gamma * self.first(x)))


class OneDimensional(nn.Module):
    """Convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.last = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(torch.relu(self.bn(self.first(x.flatten(2))))).mean(2))


def standardised(kind: str) -> Callable[[], nn.Module]:
    """A chain of timm's convolutions with weight standardisation."""

    def build() -> nn.Module:
        import timm.layers

        layer = getattr(timm.layers, kind)
        return Chain(layer(3, 6, 3), nn.ReLU(), layer(6, 5, 3, stride=2), nn.ReLU(), layer(5, 4, 3), Head(4))

    return build


def same_padding() -> nn.Module:
    """A chain of timm's convolutions with padding computed from the input."""
    from timm.layers import Conv2dSame

    return Chain(Conv2dSame(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), Conv2dSame(6, 5, 3, stride=2), Head(5))


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "chain": (lambda: Chain(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(True), conv(6, 5), Head(5)), {"0": 6, "3": 5}),
    "residual": (Residual, {"stem": 6, "a1": 5, "b1": 8, "down": 9}),
    "depthwise": (Depthwise, {"expand": 7, "reduce": 4, "project": 6}),
    "grouped": (Grouped, {"first": 3, "last": 4}),
    "concatenated": (Concatenated, {"a": 4, "b": 5, "c": 6}),
    "repeated": (Repeated, {"primary": 6, "last": 5}),
    "split": (Split, {"first": 5, "left": 5, "last": 4}),
    "chunked": (Chunked, {"first": 5, "last": 4}),
    "flattened": (Flattened, {"first": 5, "": 6}),
    "normed": (Normed, {"": 11}),
    "scaled": (Scaled, {"first": 6, "last": 4}),
    "one dimension": (OneDimensional, {"first": 6, "last": 4}),
    "weight standardisation": (standardised("StdConv2d"), {"0": 6, "2": 5, "4": 4}),
    "weight standardisation, same padding": (standardised("StdConv2dSame"), {"0": 6, "2": 5, "4": 4}),
    "scaled weight standardisation": (standardised("ScaledStdConv2d"), {"0": 6, "2": 5, "4": 4}),
    "scaled, same padding": (standardised("ScaledStdConv2dSame"), {"0": 6, "2": 5, "4": 4}),
    "same padding": (same_padding, {"0": 6, "3": 5}),
}
"""How to build each net, and its groups: first layer that makes the units, and how many there are."""
