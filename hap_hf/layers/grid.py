"""Numbers on a grid of few bits: scales, rounding with straight-through gradients, and codes packed into bytes.

Weights: k bits, symmetric, a scale for each output channel, ``n = 2^(k-1) - 1``,

    s_c = max |w_c| / n,    Q(w) = s_c clamp(round(w / s_c), -n, n).

Activations: k bits, asymmetric, for a range that is stretched to hold 0,

    s = (hi - lo) / (2^k - 1),    z = round(-lo / s),    Q(x) = s (clamp(round(x / s) + z, 0, 2^k - 1) - z),

so that 0, which padding and ReLU make, is exact. Rounding is half to even. Gradients go straight through, and are zero
where the clamp bound.

References: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", CVPR 2018; Chong et al., "Resource efficient neural networks using Hessian based pruning" (EHAP), 2023.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 2.0**-60
"""Scales are no smaller, so that their inverses are finite: dead channels have zeros alone."""


@dataclass(frozen=True)
class Grid:
    """Where activations are rounded to.

    Args:
        scale: Distance of two neighbours, a scalar or one for each row, float32.
        zero_point: The code of 0, int32, shaped like ``scale``.
        low: Smallest code.
        high: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int


def largest_code(bits: int) -> int:
    """Return n, the largest code of a weight of some bits."""
    return int(2 ** (bits - 1)) - 1


def weight_scales(weight: Tensor, bits: int, dim: int) -> Tensor:
    """Return a scale for each output channel.

    A scale has 16 bits of mantissa, rounded up. Its products with codes are then exact in float32, and the scale of
    rounded weights is the scale that rounded them: rounding twice is rounding once, bit for bit.

    Args:
        weight: The weight.
        bits: Bits of a weight, 2 to 8.
        dim: Dimension of the outputs.

    Returns:
        The scales, ``[weight.shape[dim]]``, float32, above 0.
    """
    if not weight.numel():
        return weight.new_full((weight.shape[dim],), _SMALLEST, dtype=torch.float32)
    others = [d for d in range(weight.dim()) if d != dim]
    largest = weight.detach().abs().amax(others) if others else weight.detach().abs()
    mantissa, exponent = torch.frexp((largest.float() / largest_code(bits)).clamp_min(_SMALLEST))
    return torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)


def round_weight(weight: Tensor, bits: int, dim: int) -> Tensor:
    """Return the rounded weight, in its own dtype, with straight-through gradients.

    Args:
        weight: The weight.
        bits: Bits of a weight, 2 to 8.
        dim: Dimension of the outputs.

    Returns:
        The values, in the shape of ``weight``.
    """
    if not weight.numel():
        return weight
    n, scales = largest_code(bits), weight_scales(weight, bits, dim)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, dim, -n, n)


def weight_codes(weight: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return the integers of a rounded weight, and its scales.

    Args:
        weight: The weight, rounded or not.
        bits: Bits of a weight, 2 to 8.
        dim: Dimension of the outputs.

    Returns:
        The codes, int8, in the shape of ``weight``, and the scales of :func:`weight_scales`.
    """
    scales = weight_scales(weight, bits, dim)
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    rounded = round_weight(weight.detach(), bits, dim)
    return (rounded / scales.view(shape).to(rounded.dtype)).round().to(torch.int8), scales


def activation_grid(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Return the grid for activations of a range.

    Args:
        low: Smallest value, a scalar or one for each row.
        high: Largest value, shaped like ``low``.
        bits: Bits of an activation, 2 to 8.
        symmetric: Whether the code of 0 is 0.

    Returns:
        The grid, which holds 0 exactly.
    """
    low, high = low.detach().float().clamp_max(0), high.detach().float().clamp_min(0)
    if symmetric:
        n = largest_code(bits)
        scale = (torch.maximum(-low, high) / n).clamp_min(_SMALLEST)
        return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), -n, n)
    most = 2**bits - 1
    scale = ((high - low) / most).clamp_min(_SMALLEST)
    return Grid(scale, (-low / scale).round().clamp(0, most).to(torch.int32), 0, most)


def round_activation(x: Tensor, grid: Grid) -> Tensor:
    """Return rounded activations, in their own dtype, with straight-through gradients inside of the grid.

    Args:
        x: Activations; where the grid has several scales, ``[rows, features]`` with one for each row.
        grid: Where to round to.

    Returns:
        The values.
    """
    work = x if x.dtype == torch.float64 else x.float()  # half precision has fewer digits than there are codes
    if torch.compiler.is_exporting():
        column = (-1, *[1] * (x.dim() - 1)) if grid.scale.dim() else ()
        shaped = Grid(grid.scale.view(column), grid.zero_point.view(column).float(), grid.low, grid.high)
        return _plain(work, shaped).to(x.dtype)
    if grid.scale.dim():
        rounded = torch.fake_quantize_per_channel_affine(work, grid.scale, grid.zero_point, 0, grid.low, grid.high)
    else:
        rounded = torch.fake_quantize_per_tensor_affine(work, grid.scale, grid.zero_point, grid.low, grid.high)
    return rounded.to(x.dtype)


def _plain(x: Tensor, grid: Grid) -> Tensor:
    """Return rounded values by ordinary operators: torch.export cannot go through those that have gradients."""
    inverse, zero_point = grid.scale.reciprocal().to(x.dtype), grid.zero_point.to(x.dtype)
    codes = ((x * inverse).round() + zero_point).clamp(grid.low, grid.high)
    return (codes - zero_point) * grid.scale.to(x.dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of a weight as bytes, row by row; none of a row's bits is left empty but at its end.

    No layer has six dimensions: who takes the bytes for a weight meets a wrong shape, and not a wrong model.

    Args:
        codes: Integers from -n to n, ``[rows, ...]``.
        bits: Bits of each, 2 to 8.

    Returns:
        ``[rows, ceil(numbers in a row * bits / 8), 1, 1, 1, 1]``, uint8: the codes plus n, lowest bit first.
    """
    shape = packed_shape(codes.shape, bits)
    rows, size = shape[:2]
    unsigned = (codes.reshape(rows, codes.shape[1:].numel()).to(torch.int16) + largest_code(bits)).to(torch.uint8)
    if bits < 8:
        places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
        single = ((unsigned[:, :, None] >> places) & 1).flatten(1)
        single = functional.pad(single, (0, -single.shape[1] % 8)).view(rows, size, 8)
        unsigned = (single * 2 ** torch.arange(8, device=codes.device, dtype=torch.int32)).sum(2).to(torch.uint8)
    return unsigned.view(shape)


def packed_shape(shape: torch.Size, bits: int) -> tuple[int, ...]:
    """Return the shape of :func:`packed` for a weight of some shape."""
    return (shape[0], -(-shape[1:].numel() * bits // 8), 1, 1, 1, 1)


def unpacked(data: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Return what :func:`packed` was given.

    Args:
        data: What :func:`packed` returned, uint8.
        bits: Bits of a code.
        shape: Shape of the weight.

    Returns:
        The codes, int16. Those of strangers may lie beyond n by one.
    """
    unsigned = data.flatten(1)
    if bits < 8:
        eight = torch.arange(8, device=data.device, dtype=torch.uint8)
        single = ((unsigned[:, :, None] >> eight) & 1).flatten(1)[:, : shape[1:].numel() * bits]
        single = single.reshape(shape[0], shape[1:].numel(), bits)
        unsigned = (single * 2 ** torch.arange(bits, device=data.device, dtype=torch.int32)).sum(2)
    return (unsigned.to(torch.int16) - largest_code(bits)).view(shape)
