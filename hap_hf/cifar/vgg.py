"""VGG for CIFAR, with batch norm and a single linear layer."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from hap_hf.cifar.model import CifarModel, default_cfgs_of

__all__ = ["CifarVGG"]  # register_model appends the names of the models


class CifarVGG(CifarModel):
    """VGG for CIFAR as pruning papers use it: five stages of 3 x 3 convolutions, each with batch norm and ReLU.

    Four max poolings lie between the stages, and the mean over the 2 x 2 pixels left of an image of 32 x 32 goes into
    the one linear layer. The names count the three linear layers of the original, so VGG-16 has 13 convolutions.
    Poolings round up, which changes nothing at 32 x 32 and lets images of 8 x 8 pass.

    Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
    configurations D and E; without biases of the convolutions and with this end as in the code of network slimming
    (cifar/network-slimming/models/vgg.py in Eric-mingjie/rethinking-network-pruning) and of EigenDamage.

    Args:
        num_convs: Convolutions in each stage.
        widths: Channels of each stage.
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for a model that returns the pooled features.
        global_pool: timm's name of the global pooling.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        num_convs: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(in_chans, num_classes)
        layers: list[nn.Module] = []
        channels = in_chans
        for stage, (convs, width) in enumerate(zip(num_convs, widths, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for _ in range(convs):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self._finish(global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling, a sixteenth of the images in height and in width, rounded up."""
        features: Tensor = self.features(x)
        return features


default_cfgs = default_cfgs_of(["cifar_vgg16_bn", "cifar_vgg19_bn"], first_conv="features.0", pool_size=2)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16, 13 convolutions, 14.7 million parameters."""
    args = {"num_convs": (2, 2, 3, 3, 3), **kwargs}
    return build_model_with_cfg(CifarVGG, "cifar_vgg16_bn", pretrained, **args)


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-19, 16 convolutions, 20.0 million parameters."""
    args = {"num_convs": (2, 2, 4, 4, 4), **kwargs}
    return build_model_with_cfg(CifarVGG, "cifar_vgg19_bn", pretrained, **args)
