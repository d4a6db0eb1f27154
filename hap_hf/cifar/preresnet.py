"""Pre-activation ResNets for CIFAR: deep ones of bottlenecks, wide ones of basic blocks."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.cifar.model import CifarModel, default_cfgs_of

__all__ = ["CifarPreResNet", "PreActBasicBlock", "PreActBottleneck"]  # register_model appends the names of the models


class PreActBasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each after batch norm and ReLU, beside a shortcut.

    A shortcut that changes the shape is a 1 x 1 convolution of the input after batch norm and ReLU, as in the code of
    Zagoruyko and Komodakis (repository szagoruyko/wide-residual-networks, pytorch/resnet.py).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: Input, ``[batch, in_channels, height, width]``.

        Returns:
            Output, ``[batch, out_channels, height / stride, width / stride]``, rounded up.
        """
        active = functional.relu(self.bn1(x))
        out: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class PreActBottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, each after batch norm and ReLU, beside a shortcut.

    A shortcut that changes the shape is a 1 x 1 convolution of the input as it came, as in the code of network
    slimming, EigenDamage and HAP.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the 3 x 3 convolution and of the shortcut.
        expansion: How many times fewer channels the 3 x 3 convolution has than the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = out_channels // expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: Input, ``[batch, in_channels, height, width]``.

        Returns:
            Output, ``[batch, out_channels, height / stride, width / stride]``, rounded up.
        """
        out: Tensor = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(functional.relu(self.bn2(out)))
        out = self.conv3(functional.relu(self.bn3(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class CifarPreResNet(CifarModel):
    """Pre-activation ResNet for CIFAR: a convolution, three stages of blocks, batch norm and ReLU, a classifier.

    **Bottlenecks.** A depth of 9n + 2, with n blocks a stage, counts the convolutions but those of shortcuts, and the
    linear layer. A depth such as 56 could also be 6n + 2 with basic blocks. But the code of network slimming
    (cifar/network-slimming/models/preresnet.py in Eric-mingjie/rethinking-network-pruning), of EigenDamage and of HAP
    (models/presnet.py in alecwangcq/EigenDamage-Pytorch and yaozhewei/HAP) has bottlenecks at every depth, and that of
    bearpaw/pytorch-classification (models/cifar/preresnet.py) from 44 on. Their widths differ: in network slimming, as
    in He et al., the first convolution has 16 channels and a bottleneck inside a quarter of its output's, ``stem=16,
    expansion=4``; in EigenDamage and HAP the first has 64 and a bottleneck is as wide inside as outside, ``stem=64,
    expansion=1``, which makes PreResNet-29 nine times as large.

    **Basic blocks**, for Wide ResNets. A depth of 6n + 4 counts all convolutions, those of the three shortcuts too, but
    not the linear layer. The widths are 16, 32 and 64 times the widening factor, and the first convolution is not
    widened. There is no dropout inside the blocks.

    Reference: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; Zagoruyko and Komodakis, "Wide
    Residual Networks", BMVC 2016.

    Args:
        num_blocks: Blocks in each stage.
        stem: Channels of the first convolution.
        widths: Channels at the end of each stage.
        expansion: How many times fewer channels there are inside a bottleneck; None for basic blocks.
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for a model that returns the pooled features.
        global_pool: timm's name of the global pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        num_blocks: int,
        stem: int,
        widths: Sequence[int],
        expansion: int | None,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, num_classes)

        def block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
            if expansion is None:
                return PreActBasicBlock(in_channels, out_channels, stride)
            return PreActBottleneck(in_channels, out_channels, stride, expansion)

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            first = block(in_channels, out_channels, stride)
            return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))

        self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        self.layer1 = stage(stem, widths[0], 1)
        self.layer2 = stage(widths[0], widths[1], 2)
        self.layer3 = stage(widths[1], widths[2], 2)
        self.bn = nn.BatchNorm2d(widths[2])
        self._finish(global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling, a quarter of the images in height and in width."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return functional.relu(self.bn(x))


default_cfgs = default_cfgs_of(
    ["cifar_preresnet29", "cifar_preresnet56", "cifar_wide_resnet28_8", "cifar_wide_resnet28_10"],
    first_conv="conv1",
    pool_size=8,
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarPreResNet:
    return build_model_with_cfg(CifarPreResNet, name, pretrained, **kwargs)


@register_model
def cifar_preresnet29(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """PreResNet-29 of EigenDamage and HAP: three bottlenecks a stage, as wide inside, 2.9 million parameters."""
    args = {"num_blocks": 3, "stem": 64, "widths": (64, 128, 256), "expansion": 1, **kwargs}
    return _create("cifar_preresnet29", pretrained, **args)


@register_model
def cifar_preresnet56(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """PreResNet-56 of network slimming's code: six bottlenecks a stage, expansion four, 0.59 million parameters."""
    args = {"num_blocks": 6, "stem": 16, "widths": (64, 128, 256), "expansion": 4, **kwargs}
    return _create("cifar_preresnet56", pretrained, **args)


@register_model
def cifar_wide_resnet28_8(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Wide ResNet-28, four basic blocks a stage, widened by 8, 23.4 million parameters."""
    args = {"num_blocks": 4, "stem": 16, "widths": (128, 256, 512), "expansion": None, **kwargs}
    return _create("cifar_wide_resnet28_8", pretrained, **args)


@register_model
def cifar_wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Wide ResNet-28, four basic blocks a stage, widened by 10, 36.5 million parameters."""
    args = {"num_blocks": 4, "stem": 16, "widths": (160, 320, 640), "expansion": None, **kwargs}
    return _create("cifar_wide_resnet28_10", pretrained, **args)
