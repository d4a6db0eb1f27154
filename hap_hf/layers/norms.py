"""Layers whose parameters and statistics lie along the channels of others: norms and embeddings."""

from torch import nn

from hap_hf.host import NormWithStatistics


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether ``module`` normalises by running statistics of each channel.

    Args:
        module: Any module.

    Returns:
        True for batch and instance norms that track them, subclasses included.
    """
    return isinstance(module, NormWithStatistics) and module.running_mean is not None


def followers(module: nn.Module, *, grouped: bool = False) -> tuple[str, tuple[str, ...]] | None:
    """Return which tensors of a layer lie along another one of its tensors, by what the layer is.

    A gradient could not always tell: that of a bias of attention keys is zero.

    Args:
        module: Any module.
        grouped: Whether it is a grouped convolution.

    Returns:
        Name of the tensor that leads and names of those that follow its first dimension; None where nothing follows.
    """
    others: tuple[str, ...]
    if keeps_statistics(module):
        # The mean leads, as a norm need not have a weight.
        leader, others = "running_mean", ("running_var", "weight", "bias")
    elif grouped or isinstance(module, nn.GroupNorm):
        leader, others = "weight", ("bias",)
    else:
        return None
    return leader, tuple(name for name in others if getattr(module, name) is not None)


def is_per_channel(module: nn.Module) -> bool:
    """Return whether all tensors of ``module`` have an entry for each channel.

    Args:
        module: Any module.

    Returns:
        True for batch, instance and group norms.
    """
    return isinstance(module, (NormWithStatistics, nn.GroupNorm))


def group_counter(module: nn.Module) -> str | None:
    """Return the attribute that counts groups of channels which are normalised together.

    Args:
        module: Any module.

    Returns:
        Its name, None where there is none.
    """
    return "num_groups" if isinstance(module, nn.GroupNorm) else None


def sync_sizes_(module: nn.Module) -> None:
    """Let the size attributes of norms and embeddings follow their tensors.

    Args:
        module: Any module; others are left alone.
    """
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, NormWithStatistics):
        # Either may be missing; without both there is nothing that could have been cut.
        sized = module.running_mean if module.weight is None else module.weight
        module.num_features = sized.shape[0] if sized is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
