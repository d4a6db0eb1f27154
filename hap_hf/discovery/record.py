"""One forward pass with the model cut open at every projection.

Each projection's output is replaced by a fresh random leaf, so that autograd sees only what lies between projections:
attention products, activations, norms. Which input channel of which projection depends on which output channel of
which other is then a question about which gradients are exactly zero, whatever the ops in between are called.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hap_hf.curvature.state import preserved
from hap_hf.surgery.implant import ImplantLinear
from hap_hf.surgery.projection import is_projection, output_dim


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


def move_to_model(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``batch`` with its tensors on the device of ``model``.

    Args:
        model: The model.
        batch: Keyword arguments of its forward.

    Returns:
        A new mapping.
    """
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def few_samples(batch: Mapping[str, Any], most: int = 2) -> dict[str, Any]:
    """Return the first samples of ``batch``, where every tensor has as many samples.

    Args:
        batch: Keyword arguments of the model's forward.
        most: Number of samples to keep.

    Returns:
        The smaller batch, or the same one where the tensors disagree on what a sample is.
    """
    sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1:
        return dict(batch)
    return {k: v[:most] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of ``batch``: the leading size of its first tensor.

    Args:
        batch: Keyword arguments of the model's forward.

    Returns:
        The size, 1 where there is no tensor.
    """
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)


@contextmanager
def record(model: nn.Module, batch: Mapping[str, Any], seed: int = 0) -> Iterator[Recording]:
    """Record one forward pass, and leave the model as found.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, on its device.
        seed: Seed of the random leaves.

    Yields:
        The recording, while the model's parameters still require gradients.
    """
    projections = {name: m for name, m in model.named_modules() if is_projection(m)}
    recording = Recording(projections, parameters=dict(model.named_parameters()), batch_size=batch_size(batch))
    generator = torch.Generator().manual_seed(seed)

    def cut(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Positive noise: below zero a ReLU would hide a dependence, far above it a bounded activation would.
            noise = torch.rand(output.shape, generator=generator).mul_(0.9).add_(0.1)
            leaf = noise.to(output.device, output.dtype).requires_grad_()
            recording.inputs[name].append(args[0])
            recording.leaves[name].append(leaf)
            return leaf.clone()  # an in-place activation may write to the clone

        return hook

    handles = [m.register_forward_hook(cut(name)) for name, m in projections.items()]
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
    result = []
    if isinstance(module, ImplantLinear):
        feature = kept = implanted = 0
        for num_kept, num_implanted in module.segments:
            result.append(Segment("weight", out, feature, num_kept, kept))
            result.append(Segment("implant_up", 0, feature + num_kept, num_implanted, implanted))
            feature, kept, implanted = feature + num_kept + num_implanted, kept + num_kept, implanted + num_implanted
        size = feature
    else:
        size = module.weight.shape[out]
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
    result = [Segment("weight", inp, 0, module.weight.shape[inp], 0)]
    if isinstance(module, ImplantLinear):
        result.append(Segment("implant_down", 1, 0, module.implant_down.shape[1], 0))
    return result


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending ``indices`` as runs of consecutive ones.

    Args:
        indices: Ascending integers.

    Returns:
        First index and length of each run.
    """
    result: list[tuple[int, int]] = []
    for i in indices:
        if result and result[-1][0] + result[-1][1] == i:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((i, 1))
    return result
