"""Parameters and multiply-accumulates of models, against counts by hand."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hap_hf.discovery import find_groups
from hap_hf.errors import BatchError
from hap_hf.names.outcome import footprint, whole
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.report import measure_size
from hap_hf.surgery import apply_plan_

pytestmark = pytest.mark.fast

LAYERS, HIDDEN, HEADS, INNER, TOKENS, BATCH = 2, 16, 4, 24, 7, 3


def encoder_macs(tokens):
    """Return the MACs per sample of query, key, value, output, up and down, and of the two attention products."""
    matrices = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER
    return LAYERS * (tokens * matrices + 2 * tokens * tokens * HIDDEN)


def bert(attention="sdpa"):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=31,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            max_position_embeddings=16,
            attn_implementation=attention,
        )
    )


def bert_batch():
    ids = torch.randint(0, 31, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_is_counted_as_by_hand_with_attention_products(attention):
    size = measure_size(bert(attention), bert_batch())
    head = HIDDEN * HIDDEN + 2 * HIDDEN  # pooler and classifier see one token
    assert size.macs == pytest.approx(encoder_macs(TOKENS) + head)
    embeddings = (31 + 16 + 2) * HIDDEN + 2 * HIDDEN
    layer = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * INNER + INNER + HIDDEN + 4 * HIDDEN
    assert size.params == embeddings + LAYERS * layer + HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vit_is_counted_as_by_hand_with_its_convolution(attention):
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            image_size=8,
            patch_size=4,
            num_channels=3,
            attn_implementation=attention,
        )
    )
    patches = 4 * 3 * 4 * 4 * HIDDEN
    size = measure_size(model, {"pixel_values": torch.randn(BATCH, 3, 8, 8)})
    assert size.macs == pytest.approx(patches + encoder_macs(5) + 2 * HIDDEN)


def test_a_pruned_model_has_fewer_by_what_the_plan_says():
    model = bert()
    batch = bert_batch()
    before = measure_size(model, batch)
    heads, ffn = find_groups(model, batch)[:2]
    implants = {s.tensor: 1 for s in heads.slices if s.role == "producer"}
    stage = (GroupPlan(heads, "kpik", implants), GroupPlan(ffn, "p" * 9 + "k" * 15))
    apply_plan_(model, PruningPlan((stage,)))
    after = measure_size(model, batch)
    saved = footprint(whole([heads, ffn])) - footprint(stage)
    assert before.params - after.params == saved.params
    assert before.macs - after.macs == pytest.approx(saved.macs)
    assert after.params < before.params


def test_macs_are_per_sample():
    model = bert()
    batch = bert_batch()
    one = {name: value[:1] for name, value in batch.items()}
    assert measure_size(model, batch) == measure_size(model, one)


def test_the_layers_of_torch_are_counted_though_they_run_as_one_op():
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    size = measure_size(Model(), {"x": torch.randn(BATCH, TOKENS, HIDDEN)})
    assert size.macs == pytest.approx(encoder_macs(TOKENS) / LAYERS)


class Products(nn.Module):
    """One of each: a linear layer, a batched product, attention, an einsum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.same = self.weight

    def forward(self, x, scale=None):
        y = functional.linear(x, self.weight)  # 6 * 4 * 5
        z = torch.bmm(y, y.mT)  # 6 * 5 * 6
        attended = functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])  # 2 * 6 * 6 * 5
        return torch.einsum("bij,bkj->bik", z, z).sum() + attended.sum()  # 6 * 6 * 6


def test_each_kind_of_product_is_counted():
    size = measure_size(Products(), {"scale": torch.tensor(1.0), "x": torch.randn(2, 6, 4)})
    assert size.macs == pytest.approx(6 * 4 * 5 + 6 * 5 * 6 + 2 * 6 * 6 * 5 + 6 * 6 * 6)


def test_shared_parameters_count_once():
    assert measure_size(Products(), {"x": torch.randn(2, 6, 4)}).params == 20


def test_the_model_is_left_as_found(capsys):
    model = bert().train()
    model.bert.pooler.eval()
    model.classifier.weight.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    measure_size(model, bert_batch_without_draw())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(torch.get_rng_state(), random_state, rtol=0, atol=0)
    assert capsys.readouterr().out == ""


def bert_batch_without_draw():
    return {"input_ids": torch.arange(14).view(2, 7)}


def test_a_failing_forward_leaves_the_model_as_found():
    model = bert().train()
    with pytest.raises(IndexError, match="index out of range"):
        measure_size(model, {"input_ids": torch.full((1, 3), 1000)})
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("batch", [{"x": torch.randn(2, 6, 4)}, {"x": torch.randn(2, 6, 5)}], ids=["fits", "fails"])
@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_switch_for_fused_layers_is_put_back(batch, enabled, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", enabled)
    with contextlib.suppress(RuntimeError):
        measure_size(Products(), batch)
    assert torch.backends.mha.get_fastpath_enabled() is enabled


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"batch 0: expected tensors in the batch, got a mapping of \[\] to \[\]"),
        ({"x": 3}, r"batch 0: expected tensors in the batch, got a mapping of \['x'\] to \['int'\]"),
        ({"x": torch.tensor(1.0)}, "expected a batch with a tensor of at least one sample"),
        ({"x": torch.zeros(0, 6, 4)}, "expected a batch with a tensor of at least one sample"),
        ({"x": [torch.tensor(1.0)]}, "expected a batch with a tensor of at least one sample"),
    ],
)
def test_a_batch_without_samples_is_an_error(batch, message):
    with pytest.raises(BatchError, match=message):
        measure_size(Products(), batch)


def test_a_pair_of_inputs_and_labels_counts_like_a_mapping():
    x = torch.randn(2, 6, 4)
    assert measure_size(Products(), (x, torch.tensor([0, 1]))) == measure_size(Products(), {"x": x})
