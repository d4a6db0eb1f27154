"""Quantizing a model: against integers in float64, whatever layers it has, and with everything that can go wrong."""

import copy
import inspect
import math

import pytest
import torch
from channel_nets import NETS
from checkpoints import pruned, single
from torch import nn
from torch.nn import functional

import hap_hf
from hap_hf import BatchError, BitConfig, ConfigError, HapConfig, UnsupportedModelError, quantize_
from hap_hf.layers.grid import weight_codes
from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.layers.kind import LayerKind, register_layer
from hap_hf.layers.linear import Linear
from hap_hf.layers.quantized import Quantized
from hap_hf.model.quantizing import remove_bits_


class Around(nn.Module):
    """One layer, and nothing else."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def randomised(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def codes_of_input(x, range_, bits=8):
    """Return integers, scale and zero point, by the formula and in float64."""
    low, high = range_.double()
    scale = ((high.float() - low.float()) / (2**bits - 1)).double()
    zero_point = torch.round(-low / scale)
    return torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1) - zero_point, scale


LAYERS = {
    "linear": (nn.Linear(5, 7), (4, 5), lambda x, w, m: functional.linear(x, w)),
    "bare": (nn.Linear(1, 3, bias=False), (4, 1), lambda x, w, m: functional.linear(x, w)),
    "conv": (
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        (2, 3, 8, 8),
        lambda x, w, m: functional.conv2d(x, w, None, 2, 1),
    ),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6), lambda x, w, m: functional.conv2d(x, w, groups=4)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9), lambda x, w, m: functional.conv1d(x, w, padding=1)),
    "reflected": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        (2, 3, 6, 6),
        lambda x, w, m: functional.conv2d(functional.pad(x, [1] * 4, mode="reflect"), w),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_integers_give(name):
    layer, shape, multiply = LAYERS[name]
    model = Around(randomised(copy.deepcopy(layer))).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    before = model(x)
    quantize_(model, [{"x": x}], BitConfig())
    q_x, s_x = codes_of_input(x, model.layer.input_range)
    q_w, s_w = weight_codes(layer_weight(model), 8, 0)
    sums = multiply(q_x, q_w.double(), model.layer)
    assert torch.equal(sums, sums.round())
    assert sums.abs().max() < 2**31
    dims = (1, -1, *[1] * (len(shape) - 2)) if len(shape) > 2 else (1, -1)
    expected = sums * s_x * s_w.double().view(dims)
    if model.layer.bias is not None:
        expected = expected + model.layer.bias.view(dims)
    ours = model(x)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert 1e-4 < (ours - before).norm() / before.norm() < 0.02


def layer_weight(model):
    return model.layer.get_parameter("weight").detach()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_factors_of_an_implant_are_rounded_and_what_lies_between(rank, transposed):
    implant = randomised(ImplantLinear(6, [(2, 3), (1, 1)], rank, transposed=transposed))
    model = Around(implant).double()
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    float_out = model(x)
    quantize_(model, [{"x": x}], BitConfig(weight_bits=4))
    layer = model.layer
    q_x, s = codes_of_input(x, layer.input_range)

    def dequantized(name, dim=0):
        codes, scales = weight_codes(layer.get_parameter(name).detach(), 4, dim)
        return codes.double() * scales.double().unsqueeze(1 - dim)

    kept = (q_x * s) @ (dequantized("weight", 1) if transposed else dequantized("weight").T)
    hidden, s_h = codes_of_input((q_x * s) @ dequantized("implant_down").T, layer.inner_range)
    implanted = (hidden * s_h) @ dequantized("implant_up").T
    expected = torch.cat([kept[:, :2], implanted[:, :3], kept[:, 2:], implanted[:, 3:]], 1) + layer.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(float_out, expected, atol=1e-3)


def test_an_implanted_convolution_and_an_embedding_are_rounded():
    conv = Around(randomised(ImplantConv2d(3, [(4, 2)], (3, 3), padding=(1, 1))))
    x = torch.randn(2, 3, 6, 6)
    before = conv(x)
    quantize_(conv, [{"x": x}])
    assert 0 < (conv(x) - before).norm() / before.norm() < 0.02
    table = Around(randomised(nn.Embedding(9, 4)))
    quantize_(table, [{"x": torch.arange(9)}], BitConfig(weight_bits=3))
    codes, scales = weight_codes(table.layer.weight.detach(), 3, 0)
    assert torch.equal(table(torch.tensor([[8, 2]])), (codes.float() * scales[:, None])[None, [8, 2]])


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_sixteen_times_finer_is_much_nearer_and_removing_the_bits_puts_the_model_back(name):
    model, batch = pruned(name)
    model.eval()
    with torch.no_grad():
        exact = model(**batch).logits
        errors = []
        for bits in (4, 8):
            quantize_(model, [batch], BitConfig(weight_bits=bits, activation_bits=bits))
            errors.append((model(**batch).logits - exact).norm().item())
            remove_bits_(model)
            assert torch.equal(model(**batch).logits, exact)
            model.config.__dict__.pop("quantization_config")
    assert errors[1] < errors[0] / 4


def test_a_token_of_large_values_spoils_the_others_only_where_they_share_a_range():
    model = Around(randomised(nn.Linear(8, 8)))
    x = torch.randn(16, 8)
    x[0] *= 1000
    exact = model(x)
    errors = {}
    for rounding in ("asymmetric", "symmetric", "per_token"):
        quantized = copy.deepcopy(model)
        quantize_(quantized, [{"x": x}], BitConfig(activations=rounding))
        errors[rounding] = (quantized(x) - exact)[1:].norm().item()
    assert errors["per_token"] < errors["asymmetric"] / 20 < errors["symmetric"] / 20 * 1.5


def test_what_is_left_in_floating_point_is_told_with_the_reason():
    model, batch = single("bart")
    report = quantize_(model, [batch], BitConfig(exclude=["*fc1"]))
    reasons = set(report.left.values())
    assert report.left["model.encoder.layers.0.fc1"] == "excluded"
    assert any("BartScaledWordEmbedding" in why for why in reasons)
    assert report.left["lm_head"].startswith("its weight is also that of a layer")
    assert report.bytes_after < report.bytes_before
    assert "layers quantized" in str(report)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.unused = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    other = quantize_(Attention(), [{"x": torch.randn(2, 3, 8)}])
    assert set(other.plan.layers) == {"head"}
    assert other.left == dict.fromkeys(["attention.out_proj", "unused"], "never called on the batches")


def test_a_layer_that_computes_something_else_than_its_kind_says_stays():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    @register_layer(Doubled)
    class DoubledKind(Linear):
        pass

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 2))
    report = quantize_(model, [{"input": torch.randn(3, 4)}])
    assert "0" in report.left
    assert set(report.plan.layers) == {"1"}

    class Plain(nn.Linear):
        pass

    @register_layer(Plain)
    class PlainKind(LayerKind):
        pass

    assert (
        "no known way"
        in quantize_(nn.Sequential(Plain(4, 4), nn.Linear(4, 2)), [{"input": torch.randn(3, 4)}]).left["0"]
    )


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped", "repeated", "same padding"])
def test_convolutional_networks_are_quantized_whole(name):
    torch.manual_seed(0)
    model, x = NETS[name][0]().eval(), torch.randn(4, 3, 12, 12)
    before = model(x)
    report = quantize_(model, [{next(iter(inspect.signature(model.forward).parameters)): x}])
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(report.plan.layers) == sorted(layers)
    assert not report.left
    assert 0 < (model(x) - before).norm() / before.norm() < 0.1


REFUSED = {
    "half": (lambda: single("bert")[0].half(), UnsupportedModelError, "float32"),
    "float8": (lambda: single("bert")[0].to(torch.float8_e4m3fn), UnsupportedModelError, "float32"),
    "wrapped": (lambda: nn.DataParallel(single("bert")[0]), UnsupportedModelError, "quantize the model inside"),
    "pipeline": (lambda: object(), UnsupportedModelError, "expected a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_quantized_are_refused(name):
    make, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        quantize_(make(), [single("bert")[1]])


def test_nothing_is_half_done_where_batches_or_settings_are_wrong(monkeypatch):
    model, batch = single("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    nan = {**batch, "pixel_values": batch["pixel_values"] * math.nan}
    for batches, config, error, words in (
        ([], BitConfig(), BatchError, "at least one batch"),
        ([nan], BitConfig(), BatchError, "holds NaN"),
        ([batch], BitConfig(exclude=["*"]), ConfigError, "no layer"),
    ):
        with pytest.raises(error, match=words):
            quantize_(model, batches, config)
        assert not any(isinstance(m, Quantized) for m in model.modules())
        assert list(model.state_dict()) == list(before)
        assert getattr(model.config, "quantization_config", None) is None
    quantize_(model, [batch])
    with pytest.raises(UnsupportedModelError, match="that hap_hf quantized"):
        quantize_(model, [batch])
    with pytest.raises(UnsupportedModelError, match="prune first, then quantize"):
        hap_hf.prune(model, [batch], HapConfig(prune_ratio=0.3))


def test_a_constant_input_and_one_that_is_always_zero_are_rounded_to_themselves(caplog):
    model = Around(randomised(nn.Linear(4, 3)))
    for value in (0.0, 0.7, -3.0):
        quantized, x = copy.deepcopy(model), torch.full((5, 4), value)
        quantize_(quantized, [{"x": x}])
        assert torch.isfinite(quantized(x)).all()
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0.05)
    assert "was 0 in all batches" in caplog.text


def test_ranges_are_moving_means_that_hold_zero_or_hold_everything():
    batches = [{"x": torch.tensor([[low, high]])} for low, high in ((1.0, 4.0), (-2.0, 2.0), (3.0, 9.0))]
    low = high = None
    for b in batches:
        lo, hi = b["x"].min().item(), b["x"].max().item()
        low, high = (lo, hi) if low is None else (0.99 * low + 0.01 * lo, 0.99 * high + 0.01 * hi)
    for ranges, expected in (("ema", (min(low, 0), high)), ("minmax", (-2.0, 9.0))):
        model = Around(nn.Linear(2, 2))
        quantize_(model, batches, BitConfig(ranges=ranges))
        torch.testing.assert_close(model.layer.input_range, torch.tensor(expected))
