"""Discovery beyond the families: what it must refuse, what it must leave whole, and that it touches nothing."""

import copy
import logging

import pytest
import torch
import transformers as hf
from cases import DECODER, batch_of, build, lm_batch, randomise_
from plans import plan_of
from reference import masked
from torch import nn

from hap_hf.discovery import LeftWhole, discover, find_groups
from hap_hf.discovery.families import runs
from hap_hf.errors import BatchError, UnsupportedModelError
from hap_hf.evidence.batches import few_samples
from hap_hf.names.group import Kind
from hap_hf.surgery import apply_plan_, collect_input_moments

pytestmark = pytest.mark.fast


class Block(nn.Module):
    """A residual FFN block with a choice of what lies between its projections."""

    def __init__(self, between, width=12):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, width)
        self.between = between
        self.down = nn.Linear(width, 8)

    def forward(self, x):
        return x + self.down(self.between(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between an embedding and a classifier."""

    def __init__(self, *blocks):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, labels=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def net_batch():
    return {"x": torch.randn(3, 4, 5).double()}


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh(), nn.ReLU6(), nn.Hardswish(), nn.Dropout(0.5)])
def test_neurons_are_found_whatever_elementwise_function_lies_between(activation):
    model = randomise_(Net(Block(activation), Block(activation, 6))).double()
    groups = find_groups(model, net_batch())
    assert [g.num_units for g in groups] == [12, 6]
    assert [g.name for g in groups] == ["blocks.0:ffn", "blocks.1:ffn"]


def test_a_norm_over_the_hidden_layer_keeps_it_whole():
    model = randomise_(Net(Block(nn.LayerNorm(12)), Block(nn.GELU()))).double()
    assert [g.name for g in find_groups(model, net_batch())] == ["blocks.1:ffn"]


def test_a_parameter_for_each_neuron_is_cut_with_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(1, 12, 1))

        def forward(self, x):
            return nn.functional.gelu(x) * self.scale[0, :, 0]

    model = randomise_(Net(Block(Scaled()))).double().eval()
    batch = net_batch()
    (group,) = find_groups(model, batch)
    assert [s.dim for s in group.slices if s.tensor.endswith("scale")] == [1]
    with masked(model, {group: [1, 5]}), torch.no_grad():
        expected = model(**batch)
    apply_plan_(model, plan_of({group: [1, 5]}))
    torch.testing.assert_close(model(**batch), expected, rtol=0, atol=1e-12)


def test_what_depends_on_the_number_of_a_neuron_is_left_whole(caplog):
    class Ramp(nn.Module):
        def forward(self, x):
            return x * torch.arange(1, x.shape[-1] + 1)

    model = randomise_(Net(Block(Ramp()), Block(nn.GELU()))).double()
    with caplog.at_level(logging.INFO, logger="hap_hf"):
        found = discover(model, net_batch())
    assert [g.name for g in found.groups] == ["blocks.1:ffn"]
    assert found.left_whole[0] == LeftWhole(
        ("blocks.0:ffn",), "removing units there does not equal masking them", Kind.FFN
    )
    assert "left whole: blocks.0:ffn: removing units there does not equal masking them" in caplog.text
    assert [f"left whole: {entry}" for entry in found.left_whole] == [record.getMessage() for record in caplog.records]


def test_each_layer_is_left_whole_for_one_reason():
    class Ramp(nn.Module):
        def forward(self, x):
            return x * torch.arange(1, x.shape[-1] + 1)

    model = randomise_(Net(Block(Ramp()), Block(nn.GELU()))).double()
    found = discover(model, net_batch())
    assert [(entry.names, entry.kind) for entry in found.left_whole] == [
        (("blocks.0:ffn",), Kind.FFN),
        (("embed", "head"), None),
    ]


def test_what_is_missing_of_the_wanted_kinds_is_told_apart_from_what_was_found_elsewhere():
    config = hf.BloomConfig(vocab_size=53, hidden_size=24, n_layer=2, n_head=4)
    model = randomise_(hf.BloomForCausalLM(config)).double().eval()
    found = discover(model, lm_batch())
    assert {g.kind for g in found.groups} == {Kind.FFN}
    (entry,) = found.missing(tuple(Kind))
    assert entry.kind is Kind.HEADS
    assert len(entry.names) == 2
    assert found.missing([Kind.FFN]) == []


def test_projections_called_by_keyword_are_found_pruned_and_calibrated():
    class Named(Block):
        def forward(self, x):
            return x + self.down(input=self.between(self.up(input=self.norm(x))))

    model, batch = randomise_(Net(Named(nn.GELU()))).double().eval(), net_batch()
    (group,) = find_groups(model, batch)
    assert group.num_units == 12
    assert collect_input_moments(model, ["blocks.0.up.weight"], [batch])["blocks.0.up.weight"].shape == (8, 8)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.blocks[0].down.weight[:, [1, 5]] = 0
    apply_plan_(model, plan_of({group: [1, 5]}))
    torch.testing.assert_close(model(**batch), expected(**batch), rtol=0, atol=1e-12)


def test_a_hidden_layer_that_is_also_read_elsewhere_is_left_whole():
    class Leaky(Block):
        def forward(self, x):
            hidden = torch.relu(self.up(self.norm(x)))
            return x + self.down(hidden) + hidden.sum(-1, keepdim=True)

    model = randomise_(Net(Leaky(None), Block(nn.GELU()))).double()
    assert [g.name for g in find_groups(model, net_batch())] == ["blocks.1:ffn"]


def test_a_weight_that_is_also_used_directly_is_left_whole():
    class Direct(Block):
        def forward(self, x):
            return super().forward(x) + x @ self.up.weight.sum(0)[:, None]

    model = randomise_(Net(Direct(nn.GELU()), Block(nn.GELU()))).double()
    assert [g.name for g in find_groups(model, net_batch())] == ["blocks.1:ffn"]


def test_tied_projections_are_left_whole():
    model = randomise_(Net(Block(nn.GELU()), Block(nn.GELU()), Block(nn.GELU()))).double()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert [g.name for g in find_groups(model, net_batch())] == ["blocks.2:ffn"]


def test_neurons_that_are_dead_on_the_batch_are_found_all_the_same():
    model = randomise_(Net(Block(nn.ReLU()))).double()
    with torch.no_grad():
        model.blocks[0].up.bias.fill_(-1e3)
    assert [g.num_units for g in find_groups(model, net_batch())] == [12]


def test_slopes_computed_from_head_numbers_keep_heads_whole():
    config = hf.BloomConfig(vocab_size=53, hidden_size=24, n_layer=2, n_head=4)
    model = randomise_(hf.BloomForCausalLM(config)).double().eval()
    groups = find_groups(model, lm_batch())
    assert {g.kind for g in groups} == {Kind.FFN}


def test_a_norm_across_all_heads_keeps_them_whole():
    model = randomise_(hf.Olmo2ForCausalLM(hf.Olmo2Config(**DECODER))).double().eval()
    assert {g.kind for g in find_groups(model, lm_batch())} == {Kind.FFN}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own use
def test_live_adapters_are_refused_by_name():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"], r=2))
    with pytest.raises(UnsupportedModelError, match=r"PeftModel with live adapters; merge them first"):
        find_groups(model, batch_of("bert"))
    merged = model.merge_and_unload()
    assert len(find_groups(merged, batch_of("bert"))) == 4


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_model_is_left_as_found(name):
    model, batch = build(name).train(), batch_of(name)
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    before = copy.deepcopy(model)
    tensors = {n: id(p) for n, p in model.named_parameters()}
    rng = torch.get_rng_state()
    find_groups(model, batch)
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    counts = {n: v for n, m in model.named_modules() for v in [vars(m).get("num_attention_heads")] if v}
    assert set(counts.values()) <= {4}


def test_the_groups_do_not_depend_on_the_attention_kernel():
    model, batch = build("bert"), batch_of("bert")
    found = find_groups(model, batch)
    model.set_attn_implementation("eager")
    assert find_groups(model, batch) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_finds_the_same(dtype):
    model, batch = build("llama"), batch_of("llama")
    assert find_groups(model.to(dtype), batch) == find_groups(model.double(), batch)


def test_multiply_accumulates_of_a_head_by_hand():
    group = find_groups(build("bert"), batch_of("bert"))[0]
    tokens, hidden, head = 9, 24, 6
    assert group.core_macs == 2 * tokens * tokens * head  # scores and context
    assert group.macs_per_unit == 4 * tokens * hidden * head + 2 * tokens * tokens * head


def test_wrapped_models_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(UnsupportedModelError, match=r"wrapped in DistributedDataParallel.*model\.module"):
        find_groups(DistributedDataParallel(build("bert")), batch_of("bert"))
    with pytest.raises(UnsupportedModelError, match="wrapped in DataParallel"):
        find_groups(nn.DataParallel(build("bert")), batch_of("bert"))


def test_compiled_models_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"compiled model.*torch\.compile on the result"):
        find_groups(torch.compile(build("bert")), batch_of("bert"))


def test_quantized_models_are_refused():
    model = build("bert")
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="quantized BertForSequenceClassification"):
        find_groups(model, batch_of("bert"))


def test_integer_weights_are_refused():
    model = Net(Block(nn.GELU())).double()
    model.head.weight = nn.Parameter(model.head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"head\.weight holds torch\.int8"):
        find_groups(model, net_batch())


def test_models_without_storage_are_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        find_groups(build("bert").to("meta"), batch_of("bert"))


def test_a_model_that_gives_nan_is_refused_since_nothing_could_be_verified():
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    with pytest.raises(UnsupportedModelError, match="holds NaN"):
        find_groups(model, batch_of("bert"))


def test_a_model_with_nothing_to_remove_is_refused_with_what_was_looked_for():
    model = nn.Linear(3, 2)
    message = r"attention heads .* FFN neurons .* convolution channels .* among 1 linear layers"
    with pytest.raises(UnsupportedModelError, match=message):
        find_groups(model, {"input": torch.randn(2, 3)})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (2.5, "expected a mapping, got float; pass mappings of argument names to tensors"),
        ({}, r"expected tensors in the batch, got a mapping of \[\] to \[\]"),
        ({"x": [1, 2]}, r"expected tensors in the batch, got a mapping of \['x'\] to \['list'\]"),
        ((torch.randn(2, 3),) * 3, r"expected a mapping or a pair of tensors, got a tuple of 3 \(Tensor, Tensor, Ten"),
        ("text", "got the string 'text', as of a single batch; put it in a list"),
    ],
)
def test_batches_that_are_no_mappings_of_tensors_are_refused(batch, message):
    with pytest.raises(BatchError, match=message):
        find_groups(build("bert"), batch)


def test_a_pair_of_inputs_and_labels_is_a_batch_too():
    model, x = randomise_(Net(Block(nn.GELU()))).double(), net_batch()["x"]
    assert find_groups(model, (x, torch.tensor([0, 1, 2]))) == find_groups(model, {"x": x})


def test_few_samples_are_taken_only_where_all_tensors_have_samples():
    batch = {"a": torch.zeros(5, 2), "b": torch.zeros(5), "c": None}
    assert {k: v.shape[0] for k, v in few_samples(batch).items() if v is not None} == {"a": 2, "b": 2}
    assert few_samples({"a": torch.zeros(5), "b": torch.zeros(4)})["a"].shape[0] == 5


def test_runs_of_indices():
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
