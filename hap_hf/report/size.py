"""How large a model is: parameters, and multiply-accumulates that a batch takes."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import as_batch, batch_size, call, move_to_model
from hap_hf.host import tree_leaves
from hap_hf.model.state import preserved, restart_random_numbers


@dataclass(frozen=True)
class ModelSize:
    """How large something is.

    Args:
        params: Number of parameters, shared ones counted once.
        macs: Multiply-accumulates per sample of the batch it was measured on.
    """

    params: int
    macs: float


def measure_size(model: nn.Module, batch: Any) -> ModelSize:
    """Count the parameters of ``model`` and its multiply-accumulates per sample of ``batch``.

    Counted are matrix products, convolutions and the two products of attention, whatever implements it: fused kernels
    are replaced by plain ones for this one pass. The model is left as found.

    Args:
        model: Any model that runs on the batch.
        batch: Keyword arguments of its forward, or a pair of inputs and labels; a sample is one entry of its first
            tensor, or of a list.

    Returns:
        Both numbers.

    Raises:
        BatchError: If the batch holds no tensor with samples.
    """
    batch = as_batch(model, batch)
    if not any(isinstance(t, Tensor) and t.dim() for t in tree_leaves(dict(batch))) or not batch_size(batch):
        raise BatchError(
            f"expected a batch with a tensor of at least one sample, got {sorted(map(str, batch))} without; "
            "pass a mapping of argument names to tensors, as a Hugging Face collator gives it"
        )
    counter = FlopCounterMode(display=False)
    # The counter knows operators: a fused one would count as nothing.
    with preserved(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _without_fused_layers(), counter:
        restart_random_numbers(model)
        call(model, move_to_model(model, batch))
    # The counter counts a multiply-accumulate as two operations.
    return ModelSize(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2 / batch_size(batch))


@contextmanager
def _without_fused_layers() -> Generator[None, None, None]:
    """Keep torch's own transformer layers from running as one op, which no counter sees into."""
    # A switch of the whole process, so it must go back to where it was.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
