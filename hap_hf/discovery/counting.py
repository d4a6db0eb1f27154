"""How often the layers of a model are used for a sample, and what it multiplies outside of them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hap_hf.evidence.batches import batch_size, call
from hap_hf.layers.projection import channel_dim, is_grouped, is_projection
from hap_hf.model.state import preserved, restart_random_numbers


@dataclass(frozen=True)
class Counts:
    """What one forward pass over a batch counts.

    Args:
        positions: How often each weight of a convolution or linear layer is applied to a sample, by layer.
        core_macs: Multiply-accumulates per sample in each module outside of these layers, by module.
    """

    positions: Mapping[str, float]
    core_macs: Mapping[str, float]


def count(model: nn.Module, batch: Mapping[str, Any]) -> Counts:
    """Count one forward pass, and leave the model as found.

    Args:
        model: The model, run once in eval mode.
        batch: Keyword arguments of its forward, on its device, at the full length.

    Returns:
        The counts.
    """
    layers = {name: m for name, m in model.named_modules() if is_projection(m) or is_grouped(m)}
    positions: dict[str, float] = defaultdict(float)
    samples = batch_size(batch)

    def add(name: str, module: nn.Module, output: Tensor) -> None:
        positions[name] += output.numel() / output.shape[channel_dim(module)] / samples

    handles = [m.register_forward_hook(lambda m, args, out, n=name: add(n, m, out)) for name, m in layers.items()]
    counter = FlopCounterMode(display=False)
    try:
        # The math kernel, so that attention products are matrix products and get counted.
        with preserved(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            restart_random_numbers(model)
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    totals = {key: sum(ops.values()) for key, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    core = {}
    for name, _ in model.named_modules():
        # A module's total includes all modules in it. What its layers multiply is counted with their weights.
        inside = sum(totals.get(f"{root}.{p}", 0) for p in layers if p.startswith(f"{name}." if name else ""))
        total = totals.get(f"{root}.{name}" if name else root, 0)
        core[name] = (total - inside) / 2 / samples  # torch counts a multiply-accumulate as two operations
    return Counts(positions, core)
