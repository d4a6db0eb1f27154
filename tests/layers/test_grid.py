"""Rounding: by closed forms, in integers, twice, and with the gradient of the identity where nothing is clamped."""

import pytest
import torch

from hap_hf.layers.grid import (
    Grid,
    activation_grid,
    largest_code,
    packed,
    packed_shape,
    round_activation,
    round_weight,
    unpacked,
    weight_codes,
    weight_scales,
)

BITS = range(2, 9)


def weights(*shape):
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(shape, generator=generator) * spread


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1])
def test_weights_are_rounded_to_the_nearest_multiple_of_their_channels_scale(bits, dim):
    w = weights(13, 7)
    n, q = 2 ** (bits - 1) - 1, round_weight(w, bits, dim)
    closed = w.abs().amax(1 - dim, keepdim=True) / n
    s = weight_scales(w, bits, dim).view_as(closed)
    assert ((s >= closed) & (s <= closed * (1 + 2**-14))).all()
    assert torch.equal(q, (w / s).round().clamp(-n, n) * s)
    assert ((q - w).abs() <= s / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_rounding_twice_is_rounding_once_bit_for_bit(bits):
    w = weights(50, 4, 3, 3)
    q = round_weight(w, bits, 0)
    assert torch.equal(round_weight(q, bits, 0), q)
    assert torch.equal(weight_scales(q, bits, 0), weight_scales(w, bits, 0))
    assert not torch.equal(round_weight(1.01 * q + 0.3 * q.abs().mean(), bits, 0), q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(13, 7), (5, 3, 3, 3), (4, 1), (1, 9), (0, 3), (5, 0)])
def test_codes_times_scales_are_the_rounded_weight_packed_and_unpacked(bits, shape):
    w = weights(*shape)
    codes, scales = weight_codes(w, bits, 0)
    data = packed(codes, bits)
    assert data.dtype is torch.uint8
    assert data.shape == packed_shape(w.shape, bits)
    assert torch.equal(unpacked(data, bits, w.shape), codes.to(torch.int16))
    assert torch.equal(codes.float() * scales.view(-1, *[1] * (w.dim() - 1)), round_weight(w, bits, 0))
    assert not codes.numel() or codes.abs().max() == largest_code(bits)


def test_rows_that_stay_have_the_values_they_had_and_dead_ones_are_zero():
    w = weights(9, 6)
    w[4] = 0
    kept = [0, 3, 4, 8]
    assert torch.equal(round_weight(w, 4, 0)[kept], round_weight(w[kept], 4, 0))
    assert not torch.equal(round_weight(w, 4, 0)[:, :3], round_weight(w[:, :3], 4, 0))
    assert not round_weight(w, 4, 0)[4].any()


def test_scaling_a_channel_scales_its_rounded_weights_as_folding_a_batch_norm_does():
    w = weights(8, 5).double()
    factors = torch.tensor([1.5, -2.0, 0.25, 1.0, -1.0, 3.0, -0.7, 10.0]).double()[:, None]
    ours = round_weight(factors * w, 6, 0)
    # But for the last bits of a scale, which is rounded itself.
    torch.testing.assert_close(ours, factors * round_weight(w, 6, 0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.4, 2.0), (-3.0, -0.5), (0.0, 0.0), (-1e-30, 1e-30)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_is_exact_whatever_the_range(low, high, bits):
    grid = activation_grid(torch.tensor(low), torch.tensor(high), bits, symmetric=False)
    assert 0 <= grid.zero_point <= 2**bits - 1
    zeros = round_activation(torch.zeros(3), grid)
    assert torch.equal(zeros, torch.zeros(3))
    if high > low + 1e-20:
        lo, hi = min(low, 0.0), max(high, 0.0)
        assert grid.scale.item() == pytest.approx((hi - lo) / (2**bits - 1), rel=1e-6)
        inside = torch.linspace(lo, hi, 101)
        assert (round_activation(inside, grid) - inside).abs().max() <= grid.scale * 1.001
        assert grid.zero_point == round(-lo / grid.scale.item())


def test_rounding_is_half_to_even_and_its_gradient_is_that_of_the_clamp():
    x = torch.tensor([-9.0, -0.4, 0.0, 0.24, 0.26, 9.0, 200.0], requires_grad=True)
    grid = Grid(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), 0, 255)
    y = round_activation(x, grid)
    y.sum().backward()
    assert y.tolist() == [-1.5, -0.5, 0.0, 0.0, 0.5, 9.0, 126.0]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    half = torch.tensor([0.25, 0.75, 1.25])
    assert round_activation(half, grid).tolist() == [0.0, 1.0, 1.0]


def test_the_gradient_of_a_weight_goes_straight_through():
    w = weights(4, 5).requires_grad_()
    factors = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    (round_weight(w, 3, 0) * factors).sum().backward()
    assert torch.equal(w.grad, factors)


def test_symmetric_activations_have_no_zero_point_and_tokens_a_scale_each():
    x = torch.tensor([[-1.0, 2.0], [30.0, -40.0]])
    grid = activation_grid(torch.tensor(-1.0), torch.tensor(2.0), 8, symmetric=True)
    assert (grid.zero_point, grid.low, grid.high) == (0, -127, 127)
    low, high = x.aminmax(dim=1)
    rows = activation_grid(low, high, 8, symmetric=False)
    each = torch.stack([round_activation(r, activation_grid(r.min(), r.max(), 8, symmetric=False)) for r in x])
    assert torch.equal(round_activation(x, rows), each)
