"""Size attributes of modules that follow their parameters."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.layers.projection import implant_tensors, input_dim, is_projection, num_groups, output_dim, spatial_dims
from hap_hf.names.group import Slice
from hap_hf.names.plan import GroupPlan
from hap_hf.surgery.order import Order

Cuts = Mapping[str, Mapping[int, Sequence[tuple[Slice, GroupPlan]]]]


def segments_left(module: ImplantLinear | ImplantConv2d, path: str, cuts: Cuts) -> list[tuple[int, int]]:
    """Return the segment sizes of a layer that had its implant before this stage.

    Args:
        module: The layer.
        path: Its name.
        cuts: Slices of the stage, with their plans, by tensor and dimension.

    Returns:
        Kept and implanted features of each segment after the stage.
    """

    def left(leaf: str, dim: int, sizes: Sequence[int]) -> list[int]:
        pairs = cuts.get(f"{path}.{leaf}", {}).get(dim)
        survivors = Order(pairs, sum(sizes)).survivors if pairs else torch.arange(sum(sizes))
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        return [int(((survivors >= a) & (survivors < b)).sum()) for a, b in pairwise(bounds.tolist())]

    kept = left("weight", output_dim(module), [k for k, _ in module.segments])
    implanted = left(implant_tensors(module)[1], 0, [i for _, i in module.segments])
    return list(zip(kept, implanted, strict=True))


def sync_sizes(module: nn.Module) -> None:
    """Let the size attributes that torch modules print and check follow their parameters.

    Args:
        module: A module whose parameters were cut.
    """
    if spatial_dims(module):
        weight = module.get_parameter("weight")
        convolution = cast(nn.Conv2d, module)
        convolution.in_channels, convolution.out_channels = weight.shape[1] * num_groups(module), weight.shape[0]
    elif is_projection(module):
        weight = module.get_parameter("weight")
        sizes = weight.shape[input_dim(module)], weight.shape[output_dim(module)]
        names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
        for name, size in zip(names, sizes, strict=True):
            setattr(module, name, size)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.running_mean if module.weight is None else module.weight
        module.num_features = sized.shape[0] if sized is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
