"""Putting bypasses beside blocks that were cut."""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import PlanMismatchError
from hap_hf.layers.bypass import Bypass, connect_
from hap_hf.layers.projection import has_implant, input_dim, is_projection, known, output_dim, spatial_dims
from hap_hf.model.change import TensorChange
from hap_hf.model.placement import take_over_placement_
from hap_hf.names.bypass import BYPASS, BypassPlan
from hap_hf.surgery.undo import Undo, remember_, undo_


def takes_bypass(entry: nn.Module, exit_: nn.Module) -> bool:
    """Return whether a low-rank path can lie beside a block.

    Args:
        entry: Its first layer.
        exit_: Its last one.

    Returns:
        True for two linear layers or two convolutions of images, without an implant, of which the last one has no
        bypass yet.
    """
    return (
        all(is_projection(m) and known(m).fixed and not has_implant(m) for m in (entry, exit_))
        and spatial_dims(entry) == spatial_dims(exit_)
        and spatial_dims(entry) in {0, 2}
        and not hasattr(exit_, BYPASS)
    )


def bypass_problems(bypasses: Sequence[BypassPlan], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield what keeps bypasses from being put into a model.

    Args:
        bypasses: Those of one stage, from a source that need not be trusted.
        modules: The modules of the model by name.

    Yields:
        The problems.
    """
    for b in bypasses:
        missing = [name for name in (b.entry, b.exit) if name not in modules]
        if missing:
            yield f"bypass of {b.exit}: expected a layer {missing[0]}, and the model has none of that name"
        elif b.entry == b.exit or not takes_bypass(modules[b.entry], modules[b.exit]):
            kinds = " and ".join(type(modules[name]).__name__ for name in (b.entry, b.exit))
            yield f"bypass of {b.exit}: expected two linear layers or convolutions without one, got {kinds}"
        elif b.spatial_dims != spatial_dims(modules[b.exit]) or (b.stride > 1 and not b.spatial_dims):
            yield (
                f"bypass of {b.exit}: {b.spatial_dims} dimensions and a stride of {b.stride} do not fit a "
                f"{type(modules[b.exit]).__name__}"
            )


@contextmanager
def bypassed(model: nn.Module, bypasses: Sequence[BypassPlan], values: Mapping[str, Tensor]) -> Generator[None]:
    """Let paths lie beside the blocks of a model inside the block.

    Args:
        model: The model, with all its units; no weight of it is touched.
        bypasses: The paths, with the inputs and outputs that there are.
        values: Weights by name.
    """
    undo: Undo = []
    try:
        attach_bypasses_(model, bypasses, (), values, undo)
        yield
    finally:
        undo_(undo)


def attach_bypasses_(
    model: nn.Module,
    bypasses: Sequence[BypassPlan],
    cuts: Sequence[TensorChange],
    values: Mapping[str, Tensor],
    undo: Undo,
) -> list[TensorChange]:
    """Put bypasses beside blocks, in place.

    Args:
        model: The model, cut.
        bypasses: Those of the stage.
        cuts: What became of the tensors in this stage.
        values: Weights by name, with the inputs and outputs that there were before the stage.
        undo: Where the layers are recorded as they were.

    Returns:
        The new tensors.

    Raises:
        PlanMismatchError: If the layers have other sizes than the plan says.
    """
    left = {c.name: c.index for c in cuts}
    changes: list[TensorChange] = []
    for b in bypasses:
        entry, exit_ = model.get_submodule(b.entry), model.get_submodule(b.exit)
        _check_sizes(b, entry, exit_)
        remember_(entry, undo)
        remember_(exit_, undo)
        bypass = _made(b, exit_)
        if not exit_.get_parameter("weight").is_meta:
            for name, dim, owner, along in (
                (f"{b.exit}.{BYPASS}.down.weight", 1, f"{b.entry}.weight", input_dim(entry)),
                (f"{b.exit}.{BYPASS}.up.weight", 0, f"{b.exit}.weight", output_dim(exit_)),
            ):
                if name in values:
                    staying = left.get(owner, {}).get(along)
                    value = values[name] if staying is None else values[name].index_select(dim, staying)
                    target = bypass.get_parameter(name.removeprefix(f"{b.exit}.{BYPASS}."))
                    target.data.copy_(value.view_as(target))
        for new, old in ((bypass.down, entry), (bypass.up, exit_)):
            take_over_placement_(new, old)
        setattr(exit_, BYPASS, bypass)
        connect_(entry, exit_, bypass)
        beside: Tensor = exit_.get_parameter("weight")
        for leaf in ("down.weight", "up.weight"):
            new_one = bypass.get_parameter(leaf).requires_grad_(beside.requires_grad)
            changes.append(TensorChange(f"{b.exit}.{BYPASS}.{leaf}", None, new_one, beside=beside))
            beside = new_one
    return changes


def _check_sizes(b: BypassPlan, entry: nn.Module, exit_: nn.Module) -> None:
    """Check that a bypass fits the layers, once they were cut."""
    inputs = entry.get_parameter("weight").shape[input_dim(entry)]
    outputs = exit_.get_parameter("weight").shape[output_dim(exit_)]
    if (inputs, outputs) != (b.inputs, b.outputs):
        raise PlanMismatchError(
            f"bypass of {b.exit}: expected {b.inputs} inputs and {b.outputs} outputs, got {inputs} and {outputs}; "
            "apply the plan to the model it was made for"
        )


def _made(b: BypassPlan, exit_: nn.Module) -> Bypass:
    """Return a bypass that adds nothing yet, with the device, dtype and mode of a layer."""
    old = exit_.get_parameter("weight")
    placed = {"bias": False, "device": old.device, "dtype": old.dtype}
    if b.spatial_dims:
        down = _blank(nn.Conv2d, b.inputs, b.rank, kernel_size=1, stride=b.stride, **placed)
        up = _blank(nn.Conv2d, b.rank, b.outputs, kernel_size=1, **placed)
    else:
        down, up = _blank(nn.Linear, b.inputs, b.rank, **placed), _blank(nn.Linear, b.rank, b.outputs, **placed)
    if not old.is_meta:
        # With zeros in both neither would get a gradient. A generator of its own: the training's numbers go on.
        generator = torch.Generator(old.device).manual_seed(0)
        nn.init.kaiming_uniform_(down.get_parameter("weight"), a=math.sqrt(5), generator=generator)
        nn.init.zeros_(up.get_parameter("weight"))
    return Bypass(down, up).train(exit_.training)


def _blank(kind: type[nn.Module], *sizes: int, **settings: Any) -> nn.Module:
    """Return a layer whose weights are uninitialised memory; no random numbers are drawn for them."""
    layer: nn.Module = nn.utils.skip_init(kind, *sizes, **settings)  # type: ignore[no-untyped-call]
    return layer
