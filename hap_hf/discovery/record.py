"""Forward passes with the model cut open at every projection: one of the example, and of what else there is to see.

Each projection's output is replaced by a fresh random leaf, so that autograd sees only what lies between projections:
attention products, activations, norms, residual adds, concatenations, depthwise convolutions. Which input channel of
which projection depends on which output channel of which other is then a question about gradients, whatever the ops in
between are called.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.discovery.runs import Run
from hap_hf.discovery.whole import LeftWhole
from hap_hf.host import call_hooks, own_buffers, tree_leaves, tree_map_only
from hap_hf.layers.norms import followers, keeps_statistics
from hap_hf.layers.projection import channel_dim, is_grouped, is_projection
from hap_hf.model.state import preserved

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Recording:
    """What the cut-open forward passes left behind.

    Args:
        projections: Every projection by name, called or not.
        grouped: Every grouped convolution by name; these are not cut, their weights are parameters like any other.
        inputs: Inputs of each projection, one for each call, attached to the graph behind them.
        leaves: The leaves that replaced the outputs, likewise.
        parameters: Parameters by name, without the followers. Instead of running statistics, which take no gradient,
            stands a factor of one for each channel, under the name of the running mean.
        followers: Tensors that lie along another one's first dimension by what their layer is: the weight and bias of
            a batch norm along its running mean. A gradient could not tell: that of a bias of attention keys is zero.
        outputs: Tensors that the model returned.
        left_whole: What was seen on the way that cannot be removed, and why.
    """

    projections: dict[str, nn.Module]
    grouped: dict[str, nn.Module]
    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    parameters: dict[str, Tensor] = field(default_factory=dict)
    followers: dict[str, list[str]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    left_whole: list[LeftWhole] = field(default_factory=list)

    def channels(self, name: str) -> int:
        """Return the number of input channels of a projection.

        Args:
            name: Name of the projection; it was called.

        Returns:
            The number, the same in each of its calls.
        """
        return self.inputs[name][0].shape[channel_dim(self.projections[name])]


@contextmanager
def record(model: nn.Module, runs: Sequence[Run]) -> Generator[Recording]:
    """Record forward passes, and leave the model as found.

    Args:
        model: The model; inside the block it computes with other values, and projections return leaves.
        runs: How it is run. A layer that several runs call is seen in all of them.

    Yields:
        The recording, while the model's parameters still require gradients.
    """
    own = next(iter(model.parameters())).dtype
    # Double precision tells apart what a softmax nearly cancels; some models hold to a dtype of their own.
    for dtype in dict.fromkeys((torch.float64, torch.promote_types(own, torch.float32))):
        with ExitStack() as stack:
            led_by = _followers(model)
            led = {n for names in led_by.values() for n in names}
            recording = Recording(
                {n: m for n, m in model.named_modules() if is_projection(m)},
                {n: m for n, m in model.named_modules() if is_grouped(m)},
                parameters={n: p for n, p in model.named_parameters() if n not in led},
                followers=led_by,
            )
            stack.enter_context(preserved(model, dict(model.named_parameters())))
            stack.enter_context(_neutral(model, recording, dtype))
            stack.enter_context(torch.enable_grad())
            if dtype is torch.float64 and own is not torch.float64:
                try:
                    _run(model, runs, recording, dtype)
                except (RuntimeError, TypeError, ValueError) as error:
                    logger.debug("not in double precision: %s", error)
                    continue
            else:
                _run(model, runs, recording, dtype)
            yield recording
            return


def _followers(model: nn.Module) -> dict[str, list[str]]:
    """Return by the name of a tensor those that lie along its first dimension because of what their layer is."""
    result = {}
    for name, module in model.named_modules():
        found = followers(module, grouped=is_grouped(module))
        if found is not None:
            result[f"{name}.{found[0]}"] = [f"{name}.{other}" for other in found[1]]
    return result


def _run(model: nn.Module, runs: Sequence[Run], recording: Recording, dtype: torch.dtype) -> None:
    """Run the model, which is cut open, on floating-point inputs in ``dtype``, and note its outputs."""
    handles = [
        module.register_forward_hook(_scaling(recording, name))
        for name, module in model.named_modules()
        if keeps_statistics(module)
    ]
    try:
        for run in runs:
            batch = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, dict(run.batch))
            tensors = output_tensors(run.output(model, batch))
            recording.outputs += [t for t in tensors if t.is_floating_point() and t.requires_grad]
    finally:
        for handle in handles:
            handle.remove()


def _scaling(recording: Recording, name: str) -> Any:
    """Return a hook that multiplies each channel by a factor of one, so that gradients tell which channel it is."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        key = f"{name}.running_mean"
        # Statistics are buffers, which take no gradient. A factor of one on each channel changes nothing, and has a
        # gradient wherever the channel has one.
        if key not in recording.parameters:
            recording.parameters[key] = torch.ones(
                output.shape[1], dtype=output.dtype, device=output.device, requires_grad=True
            )
        return output * recording.parameters[key].view(-1, *[1] * (output.dim() - 2))

    return hook


@contextmanager
def _neutral(model: nn.Module, recording: Recording, dtype: torch.dtype) -> Generator[None]:
    """Let projections return leaves, and give everything else values that hide no dependence.

    A zero, as in the last batch norm of a residual branch before training, a running mean far above the activations, or
    a saturated gate would make a gradient vanish where there is a dependence.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    values = [p.data for p in parameters]
    names = {id(p): n for n, p in model.named_parameters()}
    cut = {id(p) for module in recording.projections.values() for p in module.parameters(recurse=False)}
    overridden = {name: module.__dict__.get("forward") for name, module in recording.projections.items()}
    try:
        for name, module in recording.projections.items():
            twin, device = _on_meta(module), next(module.parameters()).device
            module.forward = _leaf_in_place_of_output(recording, name, twin, device, generator)
        for p in parameters:
            if id(p) in cut:  # never multiplied with, so it need not take memory in another dtype
                p.data = torch.full((), 0.01, dtype=dtype, device=p.device).expand(p.shape)
            else:
                # Between 0.5 and 1: positive, so that sums do not cancel, and random, so that differences do not.
                noise = torch.rand(p.shape, generator=generator).mul_(0.5).add_(0.5)
                scale = 0.1 if names[id(p)].endswith("bias") else 1.0
                # Over the number of inputs, sums of products stay near one, where no activation is saturated.
                fan_in = max(p.numel() // max(p.shape[0], 1), 1) if p.dim() > 1 else 1
                p.data = noise.mul_(scale / fan_in).to(p.device, dtype)
        for module in model.modules():
            # preserved() puts the tensors back that were there.
            for name, buffer in own_buffers(module).items():
                if buffer is not None and buffer.is_floating_point():
                    own_buffers(module)[name] = buffer.to(dtype)
            if keeps_statistics(module):
                own_buffers(module)["running_mean"] = torch.zeros_like(module.get_buffer("running_mean"))
                own_buffers(module)["running_var"] = torch.ones_like(module.get_buffer("running_mean"))
        yield
    finally:
        # Through .data, so that the parameters stay the objects that optimizers and tied layers hold.
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        for name, module in recording.projections.items():
            module.__dict__.pop("forward", None)
            if overridden[name] is not None:
                module.__dict__["forward"] = overridden[name]


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` without storage, to ask it for the shape of its output."""
    # What deepcopy finds in its memo it does not copy: no storage, and no hooks, which would be called with the twin.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in module.parameters()}
    for hooks in call_hooks(module):
        memo[id(hooks)] = {}
    twin: nn.Module = copy.deepcopy(module, memo)
    twin.__dict__.pop("forward", None)  # accelerate's, for models on several devices, would move inputs to one
    return twin.to(torch.float32)


def _leaf_in_place_of_output(
    recording: Recording, name: str, twin: nn.Module, device: torch.device, generator: torch.Generator
) -> Any:
    """Return a forward that notes its input and gives back a random leaf of the shape of the layer's output."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = next(iter([*args, *kwargs.values()]))
        shape = twin(torch.empty_like(x, device="meta", dtype=torch.float32)).shape
        # Positive noise: below zero a ReLU would hide a dependence, far above it a bounded activation would.
        noise = torch.rand(shape, generator=generator).mul_(0.9).add_(0.1)
        leaf = noise.to(device, x.dtype).requires_grad_()
        recording.inputs[name].append(x)
        recording.leaves[name].append(leaf)
        return leaf.clone()  # an in-place activation may write to the clone

    return forward


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
