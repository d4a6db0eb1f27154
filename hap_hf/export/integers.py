"""Quantized layers as ONNX writes them down: integers, and operators that turn numbers into them and back."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import ConfigError
from hap_hf.layers.grid import activation_grid, weight_codes
from hap_hf.layers.quantized import Quantized, channel_dim, codes_name, inputs_of, range_name, weight_names
from hap_hf.model.quantizing import quantized_layers
from hap_hf.names.bits import Rounding

_OPSET = 21


class IntegerWeight(nn.Module):
    """A weight as integers and scales: ``DequantizeLinear`` of a constant.

    Args:
        codes: The integers, int8.
        scales: A scale for each entry along ``dim``.
        dim: Dimension of the outputs.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.dim = dim

    def forward(self) -> Tensor:
        """Return the weight."""
        zeros = torch.zeros_like(self.scales, dtype=torch.int8)
        inputs, axis = (self.codes, self.scales, zeros), {"axis": self.dim}
        return _operator("DequantizeLinear", inputs, axis, torch.float32, self.codes.shape)


class IntegerInput(nn.Module):
    """Activations on a grid: ``QuantizeLinear``, and ``DequantizeLinear`` behind it.

    Args:
        scale: Distance of two neighbours.
        zero_point: The integer of 0, uint8 or int8.
        low: Smallest integer.
        high: Largest integer; fewer than 8 bits are clamped.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        limits = torch.iinfo(zero_point.dtype)
        self.ends: tuple[float, float] | None = None
        if (low, high) != (limits.min, limits.max):
            # The operator saturates at 8 bits only. Clamping first is the same: the ends of the range are on the grid.
            self.ends = (low - int(zero_point)) * float(scale), (high - int(zero_point)) * float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded activations.

        Args:
            x: The activations.

        Returns:
            The values on the grid.
        """
        if self.ends is not None:
            x = x.clamp(*self.ends)
        inputs = (x, self.scale, self.zero_point)
        codes = _operator("QuantizeLinear", inputs, {}, self.zero_point.dtype, x.shape)
        inputs = (codes, self.scale, self.zero_point)
        return _operator("DequantizeLinear", inputs, {}, torch.float32, x.shape)


class RoundedWeight(nn.Module):
    """A weight as the numbers that it is rounded to.

    Args:
        values: The numbers.
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self) -> Tensor:
        """Return the weight."""
        return self.values


def _operator(name: str, inputs: Any, attributes: Any, dtype: torch.dtype, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=_OPSET)


def with_rounded_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model that no longer rounds its weights, as they are rounded.

    Args:
        model: A model, quantized or not.

    Returns:
        The copy, for the exporter alone.
    """
    copied = copy.deepcopy(model)
    for _, layer in list(quantized_layers(copied)):
        for name in weight_names(layer):
            layer.add_module(codes_name(name), RoundedWeight(layer.rounded_weight(name).detach()))
    return copied


def with_integers(model: nn.Module) -> nn.Module:
    """Return a copy of a quantized model whose layers can be written down as integers.

    Args:
        model: The quantized model, in float32.

    Returns:
        The copy, for the exporter alone.

    Raises:
        ConfigError: If it is not quantized, or its ranges are not known before its inputs are.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ConfigError(
            "format='onnx-int8' writes the integers of a quantized model, and this one is not; call "
            "hap_hf.quantize_(model, batches) first, or export it with format='onnx'"
        )
    if any(layer.rounding is Rounding.PER_TOKEN and layer.bits.activation is not None for layer in layers.values()):
        raise ConfigError(
            "format='onnx-int8' needs ranges of activations that are known beforehand, and activations='per_token' has "
            "none; quantize with activations='asymmetric', or export with format='onnx'"
        )
    copied = copy.deepcopy(model)
    for _, layer in list(quantized_layers(copied)):
        for name in weight_names(layer):
            dim = channel_dim(layer, name)
            codes, scales = weight_codes(layer.get_parameter(name).detach(), layer.bits.weight, dim)
            layer.add_module(codes_name(name), IntegerWeight(codes, scales, dim))
        for which in inputs_of(layer) if layer.bits.activation is not None else ():
            layer.add_module(codes_name(which), _integer_input(layer, which))
    return copied


def _integer_input(layer: Quantized, which: str) -> IntegerInput:
    low, high = layer.get_buffer(range_name(which))
    symmetric, bits = layer.rounding is Rounding.SYMMETRIC, layer.bits.activation
    assert bits is not None
    grid = activation_grid(low, high, bits, symmetric=symmetric)
    dtype = torch.int8 if symmetric else torch.uint8
    return IntegerInput(grid.scale, grid.zero_point.to(dtype), grid.low, grid.high)
