"""One forward pass with the model cut open at every projection.

Each projection's output is replaced by a fresh random leaf, so that autograd sees only what lies between projections:
attention products, activations, norms. Which input channel of which projection depends on which output channel of
which other is then a question about which gradients are exactly zero, whatever the ops in between are called.
"""

from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap_hf.batches import batch_size
from hap_hf.curvature.state import preserved
from hap_hf.surgery.projection import is_projection


@dataclass(eq=False)
class Recording:
    """What a cut-open forward pass left behind.

    Args:
        projections: Every projection by name, called or not.
        inputs: Inputs of each projection, one for each call, attached to the graph behind them.
        leaves: The leaves that replaced the outputs, likewise.
        parameters: Parameters by name.
        outputs: Tensors that the model returned.
        batch_size: Number of samples in the batch.
    """

    projections: dict[str, nn.Module]
    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    batch_size: int = 1


@contextmanager
def record(model: nn.Module, batch: Mapping[str, Any]) -> Generator[Recording]:
    """Record one forward pass, and leave the model as found.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, on its device.

    Yields:
        The recording, while the model's parameters still require gradients.
    """
    projections = {name: m for name, m in model.named_modules() if is_projection(m)}
    recording = Recording(projections, parameters=dict(model.named_parameters()), batch_size=batch_size(batch))
    generator = torch.Generator().manual_seed(0)

    def cut(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            # Positive noise: below zero a ReLU would hide a dependence, far above it a bounded activation would.
            noise = torch.rand(output.shape, generator=generator).mul_(0.9).add_(0.1)
            leaf = noise.to(output.device, output.dtype).requires_grad_()
            recording.inputs[name].append(next(iter([*args, *kwargs.values()])))
            recording.leaves[name].append(leaf)
            return leaf.clone()  # an in-place activation may write to the clone

        return hook

    handles = [m.register_forward_hook(cut(name), with_kwargs=True) for name, m in projections.items()]
    try:
        with preserved(model, dict(recording.parameters)), torch.enable_grad():
            output = model(**batch)
            recording.outputs = [t for t in output_tensors(output) if t.is_floating_point() and t.requires_grad]
            for handle in handles:
                handle.remove()
            yield recording
    finally:
        for handle in handles:
            handle.remove()


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, without caches.

    Args:
        output: Whatever the model returned.

    Returns:
        The tensors, nested ones included.
    """
    # Caches hold keys and values for the next call; they may shrink with the heads.
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k != "past_key_values"}
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]
