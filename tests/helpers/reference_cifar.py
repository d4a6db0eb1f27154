"""Sizes and graphs of the CIFAR models a second time, from the papers, without importing hap_hf."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


def resnet_size(blocks: int, widths: Sequence[int] = (16, 32, 64), projection: bool = False) -> int:
    total, before = 9 * 3 * widths[0] + 2 * widths[0], widths[0]
    for width in widths:
        total += 9 * before * width + (2 * blocks - 1) * 9 * width**2 + 2 * blocks * 2 * width
        total += before * width + 2 * width if projection and before != width else 0
        before = width
    return total + 10 * before + 10


def preresnet_size(blocks: int, stem: int, expansion: int) -> int:
    total, before = 9 * 3 * stem, stem
    for width in (64, 128, 256):
        inner = width // expansion
        total += before * width if before != width else 0
        for _ in range(blocks):
            total += 2 * before + before * inner + 2 * inner + 9 * inner**2 + 2 * inner + inner * width
            before = width
    return total + 2 * before + 10 * before + 10


def wide_resnet_size(factor: int) -> int:
    total, before = 9 * 3 * 16, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        total += 2 * before + 9 * before * width + before * width + 2 * width + 9 * width**2
        total += 3 * 2 * (2 * width + 9 * width**2)
        before = width
    return total + 2 * before + 10 * before + 10


def vgg_size(channels: Sequence[int]) -> int:
    pairs = zip((3, *channels), channels, strict=False)
    return sum(9 * a * b + 2 * b for a, b in pairs) + 10 * channels[-1] + 10


def normed(w: Weights, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (w[f"{name}.{s}"] for s in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(x, mean, var, weight, bias)


def blocks_of(w: Weights) -> Iterator[tuple[str, int]]:
    """Yield each block's name and stride."""
    for stage in (1, 2, 3):
        for j in range(len({k.split(".")[1] for k in w if k.startswith(f"layer{stage}.")})):
            yield f"layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1


def resnet_features(w: Weights, x: Tensor) -> Tensor:
    x = normed(w, "bn1", functional.conv2d(x, w["conv1.weight"], padding=1)).relu()
    for block, stride in blocks_of(w):
        out = functional.conv2d(x, w[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = functional.conv2d(normed(w, f"{block}.bn1", out).relu(), w[f"{block}.conv2.weight"], padding=1)
        out = normed(w, f"{block}.bn2", out)
        if f"{block}.shortcut.0.weight" in w:
            x = normed(w, f"{block}.shortcut.1", functional.conv2d(x, w[f"{block}.shortcut.0.weight"], stride=stride))
        elif stride == 2:
            edge = (out.shape[1] - x.shape[1]) // 2
            padded = torch.zeros_like(out)
            padded[:, edge : edge + x.shape[1]] = x[:, :, ::2, ::2]
            x = padded
        x = (out + x).relu()
    return x


def bottleneck_features(w: Weights, x: Tensor) -> Tensor:
    x = functional.conv2d(x, w["conv1.weight"], padding=1)
    for block, stride in blocks_of(w):
        out = functional.conv2d(normed(w, f"{block}.bn1", x).relu(), w[f"{block}.conv1.weight"])
        out = normed(w, f"{block}.bn2", out).relu()
        out = functional.conv2d(out, w[f"{block}.conv2.weight"], stride=stride, padding=1)
        out = functional.conv2d(normed(w, f"{block}.bn3", out).relu(), w[f"{block}.conv3.weight"])
        if f"{block}.shortcut.weight" in w:
            x = functional.conv2d(x, w[f"{block}.shortcut.weight"], stride=stride)
        x = out + x
    return normed(w, "bn", x).relu()


def wide_features(w: Weights, x: Tensor) -> Tensor:
    x = functional.conv2d(x, w["conv1.weight"], padding=1)
    for block, stride in blocks_of(w):
        active = normed(w, f"{block}.bn1", x).relu()
        out = functional.conv2d(active, w[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = functional.conv2d(normed(w, f"{block}.bn2", out).relu(), w[f"{block}.conv2.weight"], padding=1)
        if f"{block}.shortcut.weight" in w:
            x = functional.conv2d(active, w[f"{block}.shortcut.weight"], stride=stride)
        x = out + x
    return normed(w, "bn", x).relu()


def vgg_features(w: Weights, x: Tensor) -> Tensor:
    convs = sorted(int(k.split(".")[1]) for k in w if k.startswith("features") and w[k].dim() == 4)
    deep = {13: 3, 16: 4}[len(convs)]  # convolutions in each of the last three stages
    for position, i in enumerate(convs):
        if position in {2, 4, 4 + deep, 4 + 2 * deep}:
            x = functional.max_pool2d(x, 2)
        x = normed(w, f"features.{i + 1}", functional.conv2d(x, w[f"features.{i}.weight"], padding=1)).relu()
    return x


def cifar_logits(name: str, w: Weights, x: Tensor) -> Tensor:
    """Return the logits of the model of that name with these weights."""
    families = {"vgg": vgg_features, "preresnet": bottleneck_features, "wide_resnet28": wide_features}
    features = next((f for family, f in families.items() if family in name), resnet_features)
    return functional.linear(features(w, x).mean((2, 3)), w["linear.weight"], w["linear.bias"])
