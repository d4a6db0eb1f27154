"""Convolutions with implants: aligned with the kernel's centre, best in the sense of least squares, ordinary to run."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from hap_hf.errors import UnsupportedModelError
from hap_hf.layers import implant_conv
from hap_hf.layers.implant_conv import ImplantConv2d, patch_moment, pointwise_rows
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.layers.kind import kind_of
from hap_hf.layers.projection import known

MODES = ["zeros", "reflect", "replicate", "circular"]
KERNELS = [(3, 3), (1, 3), (5, 3), (2, 2), (4, 3), (2, 5)]
PADDINGS = [(0, 0), (1, 1), (2, 1), (0, 3), "same", "valid"]
STRIDES = [(1, 1), (2, 2), (1, 3)]
DILATIONS = [(1, 1), (2, 1), (2, 3)]
SIZES = [(9, 13), (12, 14), (11, 16)]
EVERY_SHAPE = [
    (padding, stride, dilation, size)
    for padding, stride, dilation, size in product(PADDINGS, STRIDES, DILATIONS, SIZES)
    if padding != "same" or stride == (1, 1)
]


def implanted(conv, kept, stand_ins=None):
    """Return ``conv`` with its last channels replaced by an implant, of the centre taps unless told."""
    rows = conv.weight.detach()
    layer = ImplantConv2d.from_conv(conv, conv.in_channels, [(kept, conv.out_channels - kept)])
    layer.weight.data.copy_(rows[:kept])
    layer.implant_pointwise.data.copy_(pointwise_rows(rows[kept:]) if stand_ins is None else stand_ins)
    layer.bias = conv.bias
    return layer


def place(x, dim, positions, mode):
    """Return what lies at ``positions`` of ``x``, which may be outside of it, along ``dim``."""
    n = x.shape[dim]
    inside = {
        "zeros": positions.clamp(0, n - 1),
        "replicate": positions.clamp(0, n - 1),
        "circular": positions % n,
        "reflect": (n - 1) - ((n - 1) - positions.abs()).abs(),
    }[mode]
    read = x.index_select(dim, inside)
    if mode == "zeros":
        shape = [1] * x.dim()
        shape[dim] = -1
        read = read * ((positions >= 0) & (positions < n)).double().reshape(shape)
    return read


def implant_by_hand(x, pointwise, conv, num_positions):
    """Return the 1 x 1 convolution of what lies at the centre taps, position by position."""
    for i, dim in enumerate((-2, -1)):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1)
        before = {"same": reach // 2, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else conv.padding[i]
        first = conv.dilation[i] * (conv.kernel_size[i] // 2) - before
        x = place(x, dim, torch.arange(num_positions[i]) * conv.stride[i] + first, conv.padding_mode)
    return torch.einsum("oi,nihw->nohw", pointwise[:, :, 0, 0], x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_geometry_equals_a_reference_written_by_hand(kernel, mode):
    for padding, stride, dilation, size in EVERY_SHAPE:
        conv = nn.Conv2d(
            2, 5, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, dtype=torch.float64
        )
        x = torch.randn(2, 2, *size).double()
        expected = conv(x)
        layer = implanted(conv, kept=3, stand_ins=torch.randn(2, 2, 1, 1))
        by_hand = implant_by_hand(x, layer.implant_pointwise, conv, expected.shape[2:])
        out = layer(x)
        where = f"{padding=} {stride=} {dilation=} {size=}"
        torch.testing.assert_close(out[:, :3], expected[:, :3], rtol=0, atol=1e-12, msg=where)
        torch.testing.assert_close(out[:, 3:] - conv.bias[3:, None, None], by_hand, rtol=0, atol=1e-12, msg=where)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_rows_that_have_only_a_centre_tap_are_reproduced(kernel, mode):
    for padding, stride, dilation, size in EVERY_SHAPE:
        conv = nn.Conv2d(
            2, 5, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, dtype=torch.float64
        )
        centre = conv.weight.detach()[2:, :, kernel[0] // 2, kernel[1] // 2].clone()
        conv.weight.data[2:] = 0
        conv.weight.data[2:, :, kernel[0] // 2, kernel[1] // 2] = centre
        x = torch.randn(2, 2, *size).double()
        where = f"{padding=} {stride=} {dilation=} {size=}"
        torch.testing.assert_close(implanted(conv, kept=2)(x), conv(x), rtol=0, atol=1e-12, msg=where)


def test_rows_with_more_than_a_centre_tap_are_not_reproduced():
    conv, x = nn.Conv2d(2, 5, 3, padding=1).double(), torch.randn(2, 2, 6, 6).double()
    assert (implanted(conv, kept=2)(x) - conv(x))[:, 2:].abs().max() > 0.1


def test_the_order_of_segments_is_kept():
    conv = nn.Conv2d(3, 6, 3, padding=1).double()
    rows, x = conv.weight.detach(), torch.randn(2, 3, 5, 5).double()
    layer = ImplantConv2d.from_conv(conv, 3, [(2, 1), (1, 2)])
    layer.weight.data.copy_(rows[[0, 1, 3]])
    layer.implant_pointwise.data.copy_(pointwise_rows(rows[[2, 4, 5]]))
    layer.bias = conv.bias
    with torch.no_grad():
        for channel in (2, 4, 5):
            centre = conv.weight[channel, :, 1, 1].clone()
            conv.weight[channel] = 0
            conv.weight[channel, :, 1, 1] = centre
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 4])
def test_a_layer_may_consist_of_one_part_only(kept):
    conv, x = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), torch.randn(2, 3, 7, 7).double()
    out = implanted(conv, kept)(x)
    pointwise = functional.conv2d(x, conv.weight[:, :, 1:2, 1:2], conv.bias, stride=2)
    torch.testing.assert_close(out, conv(x) if kept else pointwise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_single_image_needs_no_batch_dimension(padding, mode):
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=padding, padding_mode=mode).double()
    layer, x = implanted(conv, 2), torch.randn(2, 3, 7, 8).double()
    torch.testing.assert_close(layer(x[1]), layer(x)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_channels_last_stays_channels_last(padding):
    conv = nn.Conv2d(3, 6, 3, padding=padding).double()
    layer, x = implanted(conv, 4), torch.randn(2, 3, 7, 8).double()
    expected = layer(x)
    out = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_autocast_gives_the_dtype_of_an_ordinary_convolution():
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert implanted(conv, 2)(x).dtype == conv(x).dtype == torch.bfloat16


def test_gradients_reach_both_parts_and_are_those_of_the_dense_convolution():
    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1).double(), torch.randn(2, 3, 7, 8).double()
    layer = implanted(copy.deepcopy(conv), 3)
    weights = torch.randn(conv(x).shape).double()
    (conv(x) * weights).sum().backward()
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(layer.weight.grad, conv.weight.grad[:3])
    torch.testing.assert_close(layer.implant_pointwise.grad, conv.weight.grad[3:, :, 1:2, 1:2])
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)


def test_parameter_count_by_hand():
    layer = ImplantConv2d(5, [(4, 3), (0, 2)], (3, 1))
    assert sum(p.numel() for p in layer.parameters()) == 4 * 5 * 3 + 5 * 5 + 9
    layer = ImplantConv2d(5, [(4, 3)], (3, 3), bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 5 * 9 + 3 * 5


def test_kept_weights_keep_their_names_and_do_not_load_into_the_dense_layer():
    conv = nn.Conv2d(3, 4, 3)
    state = implanted(conv, 2).state_dict()
    assert {n: list(t.shape) for n, t in state.items()} == {
        "weight": [2, 3, 3, 3],
        "implant_pointwise": [2, 3, 1, 1],
        "bias": [4],
    }
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        conv.load_state_dict(state)


def test_the_layer_has_the_attributes_of_the_convolution_it_replaces():
    conv = nn.Conv2d(3, 4, (3, 5), stride=2, padding=1, dilation=2, padding_mode="circular", dtype=torch.float64).eval()
    layer = ImplantConv2d.from_conv(conv, 2, [(1, 2)])
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "training"):
        assert getattr(layer, name) == getattr(conv, name)
    assert (layer.in_channels, layer.out_channels) == (2, 3)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert ImplantConv2d.from_conv(nn.Conv2d(3, 4, 3, bias=False, device="meta"), 3, [(2, 2)]).weight.is_meta


def test_sizes_follow_the_parameters():
    layer = ImplantConv2d(4, [(3, 2), (1, 1)], (3, 3), dtype=torch.float64)
    layer.weight = nn.Parameter(torch.randn(3, 2, 3, 3).double())
    layer.implant_pointwise = nn.Parameter(torch.randn(2, 2, 1, 1).double())
    layer.bias = nn.Parameter(torch.randn(5).double())
    layer.sync_sizes([(2, 2), (1, 0)])
    assert (layer.in_channels, layer.out_channels, layer.segments) == (2, 5, ((2, 2), (1, 0)))
    assert layer(torch.randn(1, 2, 5, 5).double()).shape == (1, 5, 3, 3)


def test_printing_shows_what_differs_from_an_ordinary_layer():
    assert str(ImplantConv2d(4, [(3, 2)], (3, 3), padding=(1, 1))) == (
        "ImplantConv2d(in_channels=4, segments=[(3, 2)], kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    )
    layer = ImplantConv2d(4, [(3, 2)], (3, 3), padding="same", dilation=(2, 1), padding_mode="reflect")
    assert str(layer).endswith("padding='same', dilation=(2, 1), padding_mode='reflect')")


def ops_of(layer, x):
    graph = torch.export.export(layer, (x,)).graph
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]


@pytest.mark.parametrize("stride", [1, 2])
def test_an_aligned_layer_is_two_convolutions_and_a_concatenation(stride):
    conv = nn.Conv2d(3, 4, 5, stride=stride, padding=4, dilation=2)
    ops = ops_of(implanted(conv, 2), torch.randn(2, 3, 9, 9))
    names = [op.split(".")[1] for op in ops]
    assert sorted(set(names) - {"to", "_assert_tensor_metadata"}) == [
        "add",
        "cat",
        "conv2d",
        "split_with_sizes",
        "view",
    ]
    assert names.count("conv2d") == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_no_layer_indexes_or_scatters(padding, mode):
    conv = nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)
    ops = ops_of(implanted(conv, 2), torch.randn(2, 3, 9, 9))
    assert sum("conv2d" in op for op in ops) == 2
    assert not [op for op in ops if any(word in op for word in ("index", "scatter", "gather"))]


def test_grouped_convolutions_are_refused():
    with pytest.raises(UnsupportedModelError, match="groups=1, got groups=2"):
        ImplantConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), 4, [(2, 2)])


def test_of_convolutions_only_plain_ones_larger_than_one_by_one_take_an_implant():
    class Standardised(nn.Conv2d):
        pass

    for module in (nn.Conv2d(3, 4, 3, stride=2, padding="valid", bias=False), nn.Conv2d(3, 4, (1, 3))):
        assert known(module).takes_implant(module)
    for module in (
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv1d(3, 4, 3),
        nn.Conv3d(3, 4, 3),
        ImplantConv2d(3, [(2, 2)], (3, 3)),
    ):
        assert not known(module).takes_implant(module), module
    for module in (nn.ConvTranspose2d(3, 4, 3), Standardised(3, 4, 3)):
        assert kind_of(module) is None, module


def test_a_linear_layer_takes_an_implant_of_its_own_kind():
    linear = nn.Linear(3, 4)
    assert known(linear).takes_implant(linear)
    assert isinstance(known(linear).implanted(linear, 3, [(2, 2)], 1), ImplantLinear)
    conv = nn.Conv2d(3, 4, 3)
    assert isinstance(known(conv).implanted(conv, 3, [(2, 2)], 1), ImplantConv2d)


def smooth_images(channels=4, size=11, batch=6):
    """Return images whose neighbouring pixels and channels are alike."""
    noise = torch.randn(batch, channels, size, size).double()
    smooth = functional.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False)
    return torch.einsum("oc,nchw->nohw", torch.eye(channels).double() + 0.5 * torch.rand(channels, channels), smooth)


def patches_and_centres(x, conv):
    """Return every patch and its centre pixel, as rows, by ``unfold``."""
    (height, width), channels = conv.kernel_size, x.shape[1]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    before, after = ([3, 2], [3, 3]) if conv.padding == "same" else ([*conv.padding[::-1]], [*conv.padding[::-1]])
    sides = [side for pair in zip(before, after, strict=True) for side in pair]
    patches = functional.unfold(
        functional.pad(x, sides, mode=mode), conv.kernel_size, dilation=conv.dilation, stride=conv.stride
    )
    patches = patches.transpose(1, 2).flatten(0, 1)
    centre = height // 2 * width + width // 2
    return patches, patches.reshape(-1, channels, height * width)[:, :, centre]


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (2, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (3, 2), "padding_mode": "circular"},
    {"kernel_size": (6, 4), "padding": "same", "dilation": (1, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("workspace", [2**26, 1])
def test_the_moment_is_that_of_unfolded_patches(geometry, workspace, monkeypatch):
    monkeypatch.setattr(implant_conv, "_WORKSPACE", workspace)
    conv, x = nn.Conv2d(4, 2, **geometry, dtype=torch.float64), torch.randn(3, 4, 9, 11).double()
    patches, centres = patches_and_centres(x, conv)
    moment, num_positions = patch_moment(x, conv)
    assert num_positions == len(patches)
    torch.testing.assert_close(moment, patches.T @ centres, rtol=1e-12, atol=1e-12)


def test_the_moment_of_one_precision_is_added_up_in_another():
    conv, x = nn.Conv2d(3, 2, 3, padding=1), torch.randn(4, 3, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        moment, _ = patch_moment(x.to(dtype), conv)
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, patch_moment(x.to(dtype).double(), conv)[0], rtol=1e-5, atol=1e-5)


def test_the_moment_of_a_single_image_and_of_an_implanted_layer():
    conv, x = nn.Conv2d(3, 4, 3, stride=2).double(), torch.randn(1, 3, 8, 8).double()
    expected, num_positions = patch_moment(x, conv)
    for moment, number in (patch_moment(x[0], conv), patch_moment(x, implanted(conv, 2))):
        assert number == num_positions == 9
        assert torch.equal(moment, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_stand_ins_are_the_least_squares_solution_on_the_patches(geometry):
    conv, x = nn.Conv2d(4, 5, **geometry, dtype=torch.float64), smooth_images()
    patches, centres = patches_and_centres(x, conv)
    expected = torch.linalg.lstsq(centres, patches @ conv.weight.flatten(1).T).solution.T
    pointwise = pointwise_rows(conv.weight, patch_moment(x, conv)[0])
    torch.testing.assert_close(pointwise[:, :, 0, 0], expected, rtol=0, atol=1e-9)


def output_error(conv, x, pointwise):
    return (implanted(conv, 0, pointwise)(x) - conv(x)).square().mean().item()


def test_least_squares_beats_the_centre_tap_where_neighbours_are_alike():
    conv, x = nn.Conv2d(4, 5, 3, padding=1).double(), smooth_images()
    rows = conv.weight
    least_squares = output_error(conv, x, pointwise_rows(rows, patch_moment(x, conv)[0]))
    assert least_squares < 0.7 * output_error(conv, x, pointwise_rows(rows))
    assert least_squares < 0.7 * output_error(conv, x, torch.zeros(5, 4, 1, 1))


def test_least_squares_is_the_centre_tap_where_pixels_are_independent():
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    white = torch.zeros(3, 9, 3).double()
    white[:, 4] = torch.eye(3)
    torch.testing.assert_close(pointwise_rows(conv.weight, white.flatten(0, 1)), pointwise_rows(conv.weight))


def test_the_scale_of_the_moment_does_not_matter():
    conv, x = nn.Conv2d(4, 5, 3, padding=1).double(), smooth_images()
    total, num_positions = patch_moment(x, conv)
    torch.testing.assert_close(pointwise_rows(conv.weight, total / num_positions), pointwise_rows(conv.weight, total))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dead_and_dependent_input_channels_do_no_harm(dtype):
    conv, x = nn.Conv2d(4, 5, 3, padding=1).double(), smooth_images()
    x[:, 1] = 0
    x[:, 3] = 2 * x[:, 0] - x[:, 2]
    patches, centres = patches_and_centres(x, conv)
    shortest = torch.linalg.lstsq(centres, patches @ conv.weight.flatten(1).T, driver="gelsd").solution.T
    pointwise = pointwise_rows(conv.weight, patch_moment(x.to(dtype), conv)[0])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(pointwise[:, :, 0, 0], shortest, rtol=0, atol=tolerance)


def test_a_layer_that_saw_only_zeros_gets_zeros():
    assert not pointwise_rows(torch.randn(2, 3, 3, 3), torch.zeros(27, 3)).any()


def test_stand_ins_take_the_dtype_of_the_rows_and_share_no_memory_with_them():
    rows = torch.randn(2, 3, 3, 3, dtype=torch.bfloat16)
    assert pointwise_rows(rows, torch.rand(27, 3).double()).dtype == torch.bfloat16
    pointwise = pointwise_rows(rows)
    assert torch.equal(pointwise[:, :, 0, 0], rows[:, :, 1, 1])
    assert pointwise.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
