"""Units that repeat each other are found, and others are not."""

import pytest
import torch
from cases import batch_of, build
from channel_nets import NETS
from reference import logits
from scored_models import bert, text_batch

from hap_hf import BatchError, ConfigError, similar_units


def by_unit(pairs, group):
    return {p.unit: p for p in pairs if p.group == group}


def test_a_neuron_that_is_a_multiple_of_another_one_is_found_with_its_factor():
    model, batches = build("bert"), [batch_of("bert")]
    first, last = model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.dense
    before = by_unit(similar_units(model, batches, least=0.999), "bert.encoder.layer.0:ffn")
    assert not before
    with torch.no_grad():
        first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
        last.weight[:, 5] *= 3
    found = by_unit(similar_units(model, batches, least=0.999), "bert.encoder.layer.0:ffn")
    assert {u: p.other for u, p in found.items()} == {5: 2, 2: 5}
    assert found[5].explained == pytest.approx(1)
    torch.testing.assert_close(found[5].factor, torch.ones(1, 1, dtype=torch.float64))
    assert str(found[5]) == "bert.encoder.layer.0:ffn: 5 repeats 2 (100.0%)"


def test_a_head_that_is_a_turned_copy_of_another_one_is_found():
    model, batches = build("bert"), [batch_of("bert")]
    attention = model.bert.encoder.layer[1].attention
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        for name in ("query", "key", "value"):
            layer = getattr(attention.self, name)
            turned = turn if name == "value" else torch.eye(6, dtype=torch.float64)
            layer.weight[18:24], layer.bias[18:24] = turned @ layer.weight[:6], turned @ layer.bias[:6]
    pairs = by_unit(similar_units(model, batches, least=0.999), "bert.encoder.layer.1.attention:heads")
    assert {u: p.other for u, p in pairs.items()} == {3: 0, 0: 3}
    torch.testing.assert_close(pairs[3].factor, turn, rtol=1e-6, atol=1e-8)


def test_channels_behind_batch_norm_and_relu_repeat_each_other_up_to_a_factor():
    torch.manual_seed(0)
    net = NETS["chain"][0]().double().eval()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 1.5), net[1].bias.uniform_(-0.5, 0.5)
        net[0].weight[4] = net[0].weight[1]
        for tensor in (net[0].bias, net[1].running_mean, net[1].running_var):
            if tensor is not None:
                tensor[4] = tensor[1]
        net[1].weight[4], net[1].bias[4] = 2 * net[1].weight[1], 2 * net[1].bias[1]
    (pair,) = [p for p in similar_units(net, [{"x": x}], least=0.999) if p.unit == 4]
    assert pair.other == 1
    torch.testing.assert_close(pair.factor, torch.full((1, 1), 2.0, dtype=torch.float64))


def test_a_share_is_what_the_best_factor_leaves_written_out():
    model, batches = bert().eval(), [text_batch()]
    pairs = similar_units(model, batches, least=1e-6)
    pair = next(p for p in pairs if p.group.endswith("0:ffn") and 0.3 < p.explained < 0.9)
    seen = []
    last = model.bert.encoder.layer[0].output.dense
    handle = last.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    logits(model, batches[0])
    handle.remove()
    mine, other = seen[0][:, pair.unit], seen[0][:, pair.other]
    factor = (mine @ other) / (other @ other)
    assert pair.explained == pytest.approx((1 - ((mine - factor * other) ** 2).sum() / (mine @ mine)).item(), rel=1e-4)
    assert pair.factor.item() == pytest.approx(factor.item(), rel=1e-4)


def test_bad_input_is_told():
    model = bert()
    with pytest.raises(BatchError, match="got none"):
        similar_units(model, [])
    for least in (0, 1.5, True, "all"):
        with pytest.raises(ConfigError, match="least must be a share"):
            similar_units(model, [text_batch()], least=least)
