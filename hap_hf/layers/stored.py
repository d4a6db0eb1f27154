"""What a file holds of the weights of quantized layers, and the way back."""

from typing import cast

import torch
from torch import Tensor, nn

from hap_hf.errors import PlanMismatchError
from hap_hf.layers.grid import largest_code, packed, packed_shape, unpacked, weight_codes
from hap_hf.layers.quantized import Quantized, channel_dim, weight_names


def scale_name(name: str) -> str:
    """Return the name of the scales of a weight in files."""
    return f"{name}_scale"


def stored(module: Quantized, name: str, weight: Tensor, *, codes: bool) -> dict[str, Tensor]:
    """Return what a file holds of a weight, by name.

    Args:
        module: The layer.
        name: Name of the weight.
        weight: Its value.
        codes: Whether codes and scales are stored, or the weight itself; of neither has ``name`` the weight's shape.

    Returns:
        The tensors.
    """
    if not codes:
        return {name: weight.detach().reshape(weight.shape[0], weight.shape[1:].numel(), 1, 1, 1, 1)}
    integers, scales = weight_codes(weight, module.bits.weight, channel_dim(module, name))
    return {name: packed(integers, module.bits.weight), scale_name(name): scales}


def stored_shapes(module: Quantized, name: str, *, codes: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor of :func:`stored`."""
    weight = module.get_parameter(name)
    if not codes:
        return {name: ((weight.shape[0], weight.shape[1:].numel(), 1, 1, 1, 1), weight.dtype)}
    return {
        name: (packed_shape(weight.shape, module.bits.weight), torch.uint8),
        scale_name(name): ((weight.shape[channel_dim(module, name)],), torch.float32),
    }


def restored(
    module: Quantized, name: str, data: Tensor, scales: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Return the weight that :func:`stored` was given, rounded if codes were stored.

    Args:
        module: The layer.
        name: Name of the weight.
        data: What was stored under its name.
        scales: What was stored beside it; None where the weight itself was stored.
        shape: The weight's shape.
        dtype: The weight's dtype.

    Returns:
        The weight.

    Raises:
        PlanMismatchError: If the codes or the scales are none of that many bits.
    """
    if scales is None:
        return data.reshape(shape).to(dtype)
    bits, n = module.bits.weight, largest_code(module.bits.weight)
    codes = unpacked(data.to(torch.uint8), bits, shape)
    if codes.numel() and codes.amax() > n:
        raise PlanMismatchError(f"{name}: expected codes of {bits} bits from {-n} to {n}, got {int(codes.amax())}")
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise PlanMismatchError(f"{scale_name(name)}: expected finite scales above 0, got others")
    view = [-1 if d == channel_dim(module, name) else 1 for d in range(len(shape))]
    return codes.to(dtype) * scales.to(dtype).view(view)


def unpack_before_loading(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Let ``load_state_dict`` read what a file holds: codes copied into weights would be a wrong model, in silence.

    Args:
        module: A quantized layer.
        state_dict: What is loaded; weights take the place of what is stored.
        prefix: Name of the layer and a dot.
        *rest: What else torch passes to such a hook.
    """
    own = cast(Quantized, module)
    for name in weight_names(own):
        weight, data = own.get_parameter(name), state_dict.get(prefix + name)
        if data is not None and data.dim() == 6 and weight.dim() != 6:
            scales = state_dict.pop(prefix + scale_name(name), None)
            state_dict[prefix + name] = restored(own, name, data, scales, weight.shape, weight.dtype)
