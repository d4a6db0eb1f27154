"""Where the tensors of a projection hold its input and output features."""

from dataclasses import dataclass

from torch import nn

from hap_hf.layers.projection import IMPLANTED, implant_tensors, output_dim


@dataclass(frozen=True)
class Segment:
    """Consecutive features of a projection and where one of its tensors holds them.

    Args:
        tensor: Name of the tensor within the module.
        dim: Dimension along which the features lie.
        first_feature: First feature of the run.
        size: Number of features.
        first_index: Index of the first feature along ``dim``.
    """

    tensor: str
    dim: int
    first_feature: int
    size: int
    first_index: int


def output_segments(module: nn.Module) -> list[Segment]:
    """Return where the output features of a projection are stored.

    Args:
        module: A projection.

    Returns:
        Segments of its weight matrices and bias.
    """
    out = output_dim(module)
    weight = module.get_parameter("weight")
    result = []
    if isinstance(module, IMPLANTED):
        feature = kept = implanted = 0
        for num_kept, num_implanted in module.segments:
            result.append(Segment("weight", out, feature, num_kept, kept))
            result.append(Segment(implant_tensors(module)[1], 0, feature + num_kept, num_implanted, implanted))
            feature, kept, implanted = feature + num_kept + num_implanted, kept + num_kept, implanted + num_implanted
        size = feature
    else:
        size = weight.shape[out]
        result.append(Segment("weight", out, 0, size, 0))
    if module.bias is not None:
        result.append(Segment("bias", 0, 0, size, 0))
    return result


def input_segments(module: nn.Module) -> list[Segment]:
    """Return where the input features of a projection are stored.

    Args:
        module: A projection.

    Returns:
        Segments of its weight matrices.
    """
    inp = 1 - output_dim(module)
    result = [Segment("weight", inp, 0, module.get_parameter("weight").shape[inp], 0)]
    if isinstance(module, IMPLANTED):
        down = implant_tensors(module)[0]
        result.append(Segment(down, 1, 0, module.get_parameter(down).shape[1], 0))
    return result
