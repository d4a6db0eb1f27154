"""What all CIFAR models share: the classifier at their end, and how timm describes them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import create_classifier
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional


class CifarModel(nn.Module, ABC):
    """Convolutions, a global pooling and one linear layer, with the methods that timm's models have.

    No method reads a channel number that it stored, so layers may be shrunk in place.

    Args:
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for a model that returns the pooled features.
    """

    global_pool: nn.Module
    linear: nn.Module
    drop_rate: float

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes

    def _finish(self, global_pool: str, drop_rate: float) -> None:
        """Add the classifier, and draw the convolutions' weights as in He et al., ICCV 2015, by fan-out."""
        self.drop_rate = drop_rate
        self.global_pool, self.linear = create_classifier(self.num_features, self.num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def num_features(self) -> int:
        """Channels of the features, those of the last batch norm."""
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, or an identity if there are no classes."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one.

        Args:
            num_classes: Number of classes; 0 for none, so that the model returns the pooled features.
            global_pool: timm's name of a global pooling, such as ``"avg"``; empty for none. Unchanged by default.
        """
        if global_pool is None:
            global_pool = str(self.global_pool.pool_type)
        self.num_classes = num_classes
        self.global_pool, linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.linear = linear.to(next(self.parameters()))

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features before pooling.

        Args:
            x: Images, ``[batch, in_chans, height, width]``.

        Returns:
            Features, ``[batch, num_features, smaller height, smaller width]``.
        """

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits.

        Args:
            x: Features, ``[batch, num_features, height, width]``.
            pre_logits: Whether to stop before the linear layer.

        Returns:
            Logits, ``[batch, num_classes]``, or pooled features, ``[batch, num_features]``.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: Images, ``[batch, in_chans, height, width]``.

        Returns:
            Logits, ``[batch, num_classes]``.
        """
        return self.forward_head(self.forward_features(x))


def default_cfgs_of(names: Iterable[str], first_conv: str, pool_size: int) -> Any:
    """Return timm's descriptions of models without weights to download.

    All share the normalization with ImageNet's statistics, which the published weights of the CIFAR ResNets
    (repository akamaster/pytorch_resnet_cifar10) were trained with.

    Args:
        names: Names the models are registered under.
        first_conv: Name of the first convolution.
        pool_size: Height and width of the features of a 32 x 32 image.

    Returns:
        The descriptions by name, in the form in which ``timm.models.register_model`` reads them.
    """
    cfg = {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "pool_size": (pool_size, pool_size),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "linear",
    }
    return generate_default_cfgs({name: dict(cfg) for name in names})
