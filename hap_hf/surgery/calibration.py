"""Second moments of layer inputs, for implants that fit the data and not only the weights."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.batches import move_to_model
from hap_hf.curvature.state import preserved
from hap_hf.surgery.projection import on_input


def collect_input_moments(
    model: nn.Module, tensors: Collection[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Return the second moment ``E[x x^T]`` of the inputs of each named weight.

    Args:
        model: The model, left as found.
        tensors: Names of weights of projections.
        batches: Inputs for the model; labels may be there and are not needed.

    Returns:
        A float64 ``[in_features, in_features]`` moment for each name whose layer was called.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            x = x.detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + (x.T @ x).double()
            counts[name] = counts.get(name, 0) + x.shape[0]

        return add

    handles = [on_input(model.get_submodule(t.rpartition(".")[0]), watch(t)) for t in tensors]
    try:
        with preserved(model), torch.no_grad():
            for batch in batches:
                model(**move_to_model(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
