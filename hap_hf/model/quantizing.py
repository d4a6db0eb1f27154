"""Models with quantized layers: made from bits by name, asked for them, and their state as a file holds it."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hap_hf.errors import PlanMismatchError
from hap_hf.host import own_parameters
from hap_hf.layers.quantized import (
    Quantized,
    can_be_quantized,
    inputs_of,
    quantize_layer_,
    range_name,
    unquantize_layer_,
    weight_names,
)
from hap_hf.layers.stored import restored, scale_name, stored, stored_shapes, unpack_before_loading
from hap_hf.model.state import renew_caches
from hap_hf.names.bits import BitPlan, Stored

_UNPACKING = "unpacking"
"""Attribute of a layer that holds the handle of its hook."""


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Yield the quantized layers of a model by name.

    Returns:
        The pairs.
    """
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantized))


def bit_plan_of(model: nn.Module, kind: Stored) -> BitPlan:
    """Return the bits of a model with quantized layers.

    Args:
        model: The model.
        kind: What a file shall hold of their weights.

    Returns:
        The bits by the name of the layer.
    """
    layers = dict(quantized_layers(model))
    rounding = next(iter(layers.values())).rounding
    return BitPlan({name: layer.bits for name, layer in layers.items()}, rounding, kind)


def apply_bits_(model: nn.Module, plan: BitPlan) -> None:
    """Make layers quantized ones, in place; where it fails the model is as it was. Ranges are empty.

    Args:
        model: The model; on the meta device, too.
        plan: Bits by the name of the layer.

    Raises:
        PlanMismatchError: If a name is no layer that can be quantized.
    """
    modules = dict(model.named_modules())
    wrong = [name for name in plan.layers if name not in modules or not can_be_quantized(modules[name])]
    if wrong:
        got = type(modules[wrong[0]]).__name__ if wrong[0] in modules else "nothing of that name"
        raise PlanMismatchError(
            f"the bits do not fit this {type(model).__name__}: {wrong[0]}: expected a layer that can be quantized, got "
            f"{got}" + (f", and {len(wrong) - 1} more" if wrong[1:] else "") + "; apply them to the model they are of"
        )
    seen: set[int] = set()
    for name in plan.layers:
        if id(modules[name]) in seen:
            raise PlanMismatchError(f"the bits name {name} twice; a shared layer has one entry")
        seen.add(id(modules[name]))
    for name, bits in plan.layers.items():
        layer = quantize_layer_(modules[name], bits, plan.rounding)
        vars(layer)[_UNPACKING] = layer.register_load_state_dict_pre_hook(unpack_before_loading)  # type: ignore[no-untyped-call]
    renew_caches(model)


def remove_bits_(model: nn.Module) -> None:
    """Make quantized layers what they were."""
    for _, layer in list(quantized_layers(model)):
        vars(layer).pop(_UNPACKING).remove()
        unquantize_layer_(layer)
    renew_caches(model)


def saved_state(model: nn.Module, state: Mapping[str, Tensor], kind: Stored) -> dict[str, Tensor]:
    """Return a state dict as a file holds it.

    Args:
        model: The model with quantized layers.
        state: Its state dict, or a part of it.
        kind: What the file holds of their weights.

    Returns:
        The tensors by name; those that shared memory still do.
    """
    result = dict(state)
    shared: dict[tuple[Any, ...], Tensor] = {}
    for path, layer in quantized_layers(model):
        for name in weight_names(layer):
            full = f"{path}.{name}"
            if full not in state or state[full].dim() == 6:
                continue
            weight = state[full]
            # Tied weights are found by their memory, and stored once.
            key = (weight.data_ptr(), tuple(weight.shape), layer.bits.weight)
            found = stored(layer, name, weight, codes=kind is Stored.CODES)
            if key in shared and weight.numel():
                found[name] = shared[key]
            shared[key] = found[name]
            result |= {f"{path}.{n}": t for n, t in found.items()}
    return result


def expect_stored_(model: nn.Module, kind: Stored) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Give the weights of quantized layers the shapes in which a file holds them, before it is read.

    Args:
        model: A model without storage.
        kind: What the file holds.

    Returns:
        Shape and dtype of each weight by name, for :func:`unpack_`.
    """
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
    made: dict[int, nn.Parameter] = {}
    for path, layer in quantized_layers(model):
        for name in weight_names(layer):
            weight = layer.get_parameter(name)
            shapes[f"{path}.{name}"] = (weight.shape, weight.dtype)
            expected = stored_shapes(layer, name, codes=kind is Stored.CODES)
            shape, dtype = expected.pop(name)
            if id(weight) not in made:
                new = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), dtype.is_floating_point)
                made[id(weight)] = new
            own_parameters(layer)[name] = made[id(weight)]
            for scale, (size, kind_of_scale) in expected.items():
                layer.register_buffer(scale, torch.empty(size, dtype=kind_of_scale, device="meta"))
    return shapes


def unpack_(model: nn.Module, shapes: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Make weights of what was read, after :func:`expect_stored_`.

    Args:
        model: The model, its weights read.
        shapes: What :func:`expect_stored_` returned.

    Raises:
        PlanMismatchError: If codes, scales or ranges are none that rounding makes.
    """
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # the old one, too, so that its id stays taken
    for path, layer in quantized_layers(model):
        for name in weight_names(layer):
            data = layer.get_parameter(name)
            if data.is_meta:
                raise PlanMismatchError(
                    f"{path}.{name} was left on disk, and a quantized model is read as a whole; load it without "
                    "offloading, on one device"
                )
            scales = cast(Tensor | None, getattr(layer, scale_name(name), None))
            if id(data) not in made:
                shape, dtype = shapes[f"{path}.{name}"]
                value = restored(layer, f"{path}.{name}".rpartition(".")[2], data, scales, shape, dtype)
                made[id(data)] = (data, nn.Parameter(value))
            own_parameters(layer)[name] = made[id(data)][1]
            if scales is not None:
                delattr(layer, scale_name(name))
    check_ranges(model)
    renew_caches(model)


def check_ranges(model: nn.Module) -> None:
    """Check that ranges of activations are finite and hold 0, as they are kept.

    Args:
        model: The model.

    Raises:
        PlanMismatchError: If one does not.
    """
    for path, layer in quantized_layers(model):
        for which in inputs_of(layer):
            found: Any = getattr(layer, range_name(which), None)
            if found is not None and not (bool(found.isfinite().all()) and found[0] <= 0 <= found[1]):
                raise PlanMismatchError(
                    f"{path}.{range_name(which)}: expected a finite range that holds 0, got {found.tolist()}"
                )


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Return the bytes of the tensors of a state dict, those that share memory counted once."""
    sizes = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in state.values()}
    return sum(sizes.values())
