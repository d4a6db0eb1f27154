"""The moments of layer inputs that let implants fit the data and not only the weights."""

from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.evidence.batches import as_batch, call, move_to_model
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.layers.projection import known, on_input
from hap_hf.model.state import preserved


class ImplantInit(StrEnum):
    """Initial weights of an implant."""

    SVD = "svd"
    """Best approximation of the replaced rows at the implant's rank, on calibration inputs when there are batches."""
    ZERO = "zero"
    """Silent at first, as in the paper's code: the columns that read the implanted units are zero and learn first."""


def collect_input_moments(
    model: nn.Module,
    tensors: Collection[str],
    batches: Iterable[Any],
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
        kind = known(module)

        def add(x: Tensor) -> None:
            moment, count = kind.input_moment(module, x)
            # Sums and counts, not means: layers may be called several times a batch, and processes have unequal shares.
            sums[name] = sums.get(name, 0) + moment
            counts[name] = counts.get(name, 0) + torch.tensor(count, device="cpu")

        return add

    handles = [on_input(model.get_submodule(t.rpartition(".")[0]), watch(t)) for t in tensors]
    try:
        with preserved(model), torch.no_grad():
            for index, batch in enumerate(batches):
                call(model, move_to_model(model, as_batch(model, batch, index)))
    finally:
        for handle in handles:
            handle.remove()
    counts = processes.summed("numbers of layer inputs", counts)  # of all processes
    return {name: total / counts[name].item() for name, total in processes.summed("layer inputs", sums).items()}
