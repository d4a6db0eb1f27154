"""The CIFAR models of the pruning papers, registered with timm.

Importing this package, which needs timm, is what lets ``timm.create_model("cifar_resnet56")`` find them, and in
transformers ``TimmWrapperConfig(architecture="cifar_resnet56", num_labels=10)``, and ``from_pretrained`` on what such a
wrapper saved. They classify images of any size from 8 x 8 up.

| names | what they are |
|---|---|
| ``cifar_resnet20``, ``32``, ``44``, ``56``, ``110`` | ResNet, 16/32/64 channels, padding shortcuts |
| ``cifar_wide_resnet32_4`` | the same with 32 layers, 64/128/256 channels and projection shortcuts |
| ``cifar_preresnet29``, ``cifar_preresnet56`` | pre-activation bottlenecks |
| ``cifar_wide_resnet28_8``, ``cifar_wide_resnet28_10`` | Wide ResNet, pre-activation |
| ``cifar_vgg16_bn``, ``cifar_vgg19_bn`` | VGG with batch norm and one linear layer |

There are no weights to download. A ``TimmWrapperForImageClassification`` made from a config draws all weights anew,
with a standard deviation of 0.02; to train one from the initial values of these models, load those into its
``timm_model``.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.
    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    Wang et al., "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019.
    Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, University of Toronto, 2009.
"""

from hap_hf.cifar.model import CifarModel
from hap_hf.cifar.preresnet import CifarPreResNet
from hap_hf.cifar.resnet import CifarResNet, PaddingShortcut
from hap_hf.cifar.vgg import CifarVGG

__all__ = ["CifarModel", "CifarPreResNet", "CifarResNet", "CifarVGG", "PaddingShortcut"]
