"""The ResNets of He et al. for CIFAR, and the wide one of the pruning papers."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.cifar.model import CifarModel, default_cfgs_of

__all__ = ["BasicBlock", "CifarResNet", "PaddingShortcut"]  # register_model appends the names of the models


class PaddingShortcut(nn.Module):
    """A shortcut without parameters to more channels and fewer pixels: option A of He et al., CVPR 2016.

    Takes every ``stride``-th pixel and adds channels of zeros. How many channels come in is read from the input, so
    nothing changes here when a channel leaves both stages, and one of the two numbers falls when an added channel
    leaves the wider stage.

    Args:
        channels_before: Zero channels before those of the input.
        channels_after: Zero channels after them.
        stride: Step in height and width.
    """

    def __init__(self, channels_before: int, channels_after: int, stride: int = 2) -> None:
        super().__init__()
        self.channels_before = channels_before
        self.channels_after = channels_after
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded input.

        Args:
            x: Input, ``[batch, channels, height, width]``.

        Returns:
            Output, ``[batch, channels_before + channels + channels_after, height / stride, width / stride]``, the last
            two rounded up.
        """
        sampled = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(sampled, (0, 0, 0, 0, self.channels_before, self.channels_after))

    def extra_repr(self) -> str:
        """Return the sizes, for printing the model."""
        return f"channels_before={self.channels_before}, channels_after={self.channels_after}, stride={self.stride}"


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm, beside a shortcut; ReLU after the addition.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        projection: Whether a shortcut that changes the shape is a 1 x 1 convolution with batch norm (option B) instead
            of a padding (option A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            added = out_channels - in_channels
            self.shortcut = (
                nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
                if projection
                else PaddingShortcut(added // 2, added - added // 2, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: Input, ``[batch, in_channels, height, width]``.

        Returns:
            Output, ``[batch, out_channels, ceil(height / stride), ceil(width / stride)]``.
        """
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(CifarModel):
    """ResNet for CIFAR: a convolution, three stages of basic blocks, a classifier.

    Its depth of 6n + 2, with n blocks a stage, counts the 3 x 3 convolutions and the linear layer. The first block of
    the second and of the third stage halves height and width. The names of its parameters are those of the weights
    published in the repository akamaster/pytorch_resnet_cifar10.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2. Their shortcuts pad;
    the reference code of HAP (repository yaozhewei/HAP, models/resnet.py) projects, at every depth.

    Args:
        num_blocks: Blocks in each stage.
        widths: Channels of each stage.
        projection: Whether shortcuts that change the shape are 1 x 1 convolutions with batch norm instead of paddings.
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for a model that returns the pooled features.
        global_pool: timm's name of the global pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        num_blocks: int,
        widths: Sequence[int] = (16, 32, 64),
        *,
        projection: bool = False,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, num_classes)

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            first = BasicBlock(in_channels, out_channels, stride, projection)
            return nn.Sequential(
                first, *(BasicBlock(out_channels, out_channels, 1, projection) for _ in range(num_blocks - 1))
            )

        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(widths[0], widths[0], 1)
        self.layer2 = stage(widths[0], widths[1], 2)
        self.layer3 = stage(widths[1], widths[2], 2)
        self._finish(global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling, a quarter of the images in height and in width."""
        x = functional.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


default_cfgs = default_cfgs_of(
    [
        "cifar_resnet20",
        "cifar_resnet32",
        "cifar_resnet44",
        "cifar_resnet56",
        "cifar_resnet110",
        "cifar_wide_resnet32_4",
    ],
    first_conv="conv1",
    pool_size=8,
)


def _create(name: str, num_blocks: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, num_blocks=num_blocks, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20, three blocks a stage, 0.27 million parameters."""
    return _create("cifar_resnet20", 3, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32, five blocks a stage, 0.46 million parameters."""
    return _create("cifar_resnet32", 5, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44, seven blocks a stage, 0.66 million parameters."""
    return _create("cifar_resnet44", 7, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56, nine blocks a stage, 0.85 million parameters."""
    return _create("cifar_resnet56", 9, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110, eighteen blocks a stage, 1.7 million parameters."""
    return _create("cifar_resnet110", 18, pretrained, **kwargs)


@register_model
def cifar_wide_resnet32_4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Wide ResNet-32 of HAP and EigenDamage: ResNet-32 with four times the channels, 7.4 million parameters.

    The code of both (models/resnet.py in yaozhewei/HAP and in alecwangcq/EigenDamage-Pytorch) starts from ResNet-32,
    6n + 2 layers with n = 5, multiplies all widths by four, the first convolution's too, and projects shortcuts. Wide
    ResNets as Zagoruyko and Komodakis define them have 6n + 4 layers, which is never 32.

    Returns:
        The model.
    """
    return _create("cifar_wide_resnet32_4", 5, pretrained, **{"widths": (64, 128, 256), "projection": True, **kwargs})
