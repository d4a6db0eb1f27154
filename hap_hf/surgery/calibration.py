"""Initial weights of implants, and the moments of layer inputs that let them fit the data and not only the weights."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hap_hf.evidence.batches import call, move_to_model
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.layers.implant_conv import ImplantConv2d, patch_moment, pointwise_rows
from hap_hf.layers.implant_linear import ImplantLinear, factor_rows
from hap_hf.layers.projection import on_input, spatial_dims
from hap_hf.model.state import preserved


def collect_input_moments(
    model: nn.Module,
    tensors: Collection[str],
    batches: Iterable[Mapping[str, Any]],
    *,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Return the second moment of the inputs of each named weight.

    For a linear layer that is ``E[x x^T]``, for a convolution ``E[q c^T]`` of patches q and their centres c.

    Args:
        model: The model, left as found.
        tensors: Names of weights of projections.
        batches: Inputs for the model; labels may be there and are not needed.
        processes: The processes whose batches count; ``batches`` are the share of this one.

    Returns:
        A float64 moment for each name whose layer was called, ``[in_features, in_features]`` or
        ``[in_channels * taps, in_channels]``.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        module = model.get_submodule(name.rpartition(".")[0])

        def add(x: Tensor) -> None:
            if spatial_dims(module):
                moment, count = patch_moment(x, cast(nn.Conv2d, module))
            else:
                x = x.detach().flatten(0, -2).float()
                moment, count = (x.T @ x).double(), x.shape[0]
            sums[name] = sums.get(name, 0) + moment
            counts[name] = counts.get(name, 0) + torch.tensor(count, device="cpu")

        return add

    handles = [on_input(model.get_submodule(t.rpartition(".")[0]), watch(t)) for t in tensors]
    try:
        with preserved(model), torch.no_grad():
            for batch in batches:
                call(model, move_to_model(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    counts = processes.summed("numbers of layer inputs", counts)
    return {name: total / counts[name].item() for name, total in processes.summed("layer inputs", sums).items()}


def initial_weights(
    rows: Tensor, implant: ImplantLinear | ImplantConv2d, moment: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the weights with which an implant best stands in for what it replaces.

    Args:
        rows: The weights it replaces, ``[implanted, in_features]`` or ``[implanted, in_channels, kh, kw]``.
        implant: The layer.
        moment: The moment of the layer's inputs, see :func:`collect_input_moments`.

    Returns:
        Values by the name of the implant's parameter.
    """
    if isinstance(implant, ImplantConv2d):
        return {"implant_pointwise": pointwise_rows(rows, moment)}
    up, down = factor_rows(rows, implant.rank, moment)
    return {"implant_up": up, "implant_down": down}
