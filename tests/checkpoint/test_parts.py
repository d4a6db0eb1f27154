"""A part of a model that is pruned, and a whole whose parts are saved: both load bit for bit, in any order."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from hap_hf import HapConfig, PlanMismatchError, plan_of, prune
from hap_hf.checkpoint.parts import part_of_plan, parts_of, whole_plan
from hap_hf.errors import ConfigError

IDS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 16}
HALF = HapConfig(prune_ratio=0.5, method="random", progress=False)


def clip():
    text = {**TEXT, "eos_token_id": 2, "bos_token_id": 1}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 4}, projection_dim=16
    )
    return hf.CLIPModel(config).eval(), {"input_ids": IDS, "pixel_values": PIXELS}


def t5():
    small = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    config = hf.T5Config(**small, decoder_start_token_id=0, pad_token_id=0)
    return hf.T5ForConditionalGeneration(config).eval(), {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def encoder_decoder():
    bert = hf.BertModel(hf.BertConfig(**TEXT))
    decoder = hf.BertLMHeadModel(hf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    model = hf.EncoderDecoderModel(encoder=bert, decoder=decoder).eval()
    return model, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def classifier():
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT)).eval(), {"input_ids": IDS}


# The whole, and how to get at a part: with a config of its own, with a copy, with the whole's, and with none at all.
PARTS = {
    "a tower of CLIP": (clip, lambda m: m.vision_model, {"pixel_values": PIXELS}),
    "the encoder of T5": (t5, lambda m: m.get_encoder(), {"input_ids": IDS}),
    "the encoder of an encoder-decoder": (encoder_decoder, lambda m: m.encoder, {"input_ids": IDS}),
    "the base of a classifier": (classifier, lambda m: m.bert, {"input_ids": IDS}),
    "layers without a config": (
        classifier,
        lambda m: m.bert.encoder.layer[0],
        {"hidden_states": torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(2))},
    ),
}


def output(model, batch):
    with torch.no_grad():
        out = model.eval()(**batch)
    return next(out[k] for k in ("logits", "logits_per_image", "last_hidden_state") if k in out)


@pytest.mark.parametrize("name", PARTS)
def test_a_whole_of_which_a_part_was_pruned_loads_bit_for_bit(name, tmp_path):
    build, part_of, batch = PARTS[name]
    model, whole_batch = build()
    dense = output(model, whole_batch)
    prune(part_of(model), [batch], HALF)
    expected = output(model, whole_batch)
    assert not torch.allclose(expected, dense)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(output(loaded, whole_batch), expected)
    # The part of a loaded model knows what was done to it, and the whole and the part may be pruned in turns.
    prune(part_of(loaded), [batch], HALF)
    prune(loaded, [whole_batch], HALF)
    prune(part_of(loaded), [batch], HALF)
    loaded.save_pretrained(tmp_path / "second")
    again = type(model).from_pretrained(tmp_path / "second", ignore_mismatched_sizes=True)
    assert torch.equal(output(again, whole_batch), output(loaded, whole_batch))
    assert len(plan_of(again).stages) == 4


def test_a_part_is_saved_and_read_alone_and_out_of_the_whole(tmp_path):
    model, batch = clip()
    prune(model.vision_model, [{"pixel_values": PIXELS}], HALF)
    prune(model, [batch], HALF)
    expected = model.vision_model(PIXELS).pooler_output
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "part")
    for folder in ("whole", "part"):
        for ignore in (False, True):  # what transformers advises where shapes differ, and what fills them at random
            part = hf.CLIPVisionModel.from_pretrained(tmp_path / folder, ignore_mismatched_sizes=ignore).eval()
            assert torch.equal(part(PIXELS).pooler_output, expected)


class Own(nn.Module):
    """A user's module around two models of transformers that came from one config."""

    def __init__(self):
        super().__init__()
        config = hf.BertConfig(**TEXT)
        self.student, self.other, self.head = hf.BertModel(config), hf.BertModel(config), nn.Linear(48, 3)

    def forward(self, input_ids, labels=None):
        both = [m(input_ids).last_hidden_state[:, 0] for m in (self.student, self.other)]
        logits = self.head(torch.cat(both, 1))
        return {"loss": None if labels is None else functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_inside_of_a_plain_module_is_saved_and_loaded_alone(tmp_path):
    model = Own().eval()
    prune(model, [{"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0])}], HALF)
    for name in ("student", "other"):
        part = getattr(model, name)
        part.save_pretrained(tmp_path / name)
        assert torch.equal(
            output(hf.AutoModel.from_pretrained(tmp_path / name), {"input_ids": IDS}), output(part, {"input_ids": IDS})
        )
    assert plan_of(model.student) != plan_of(model.other)
    assert dict(parts_of(model)) == {"student": model.student, "other": model.other}


def test_one_of_two_models_with_one_config_leaves_the_other_dense(tmp_path):
    model = Own().eval()
    before = copy.deepcopy(model.other.state_dict())
    prune(model.student, [{"input_ids": IDS}], HALF)
    assert plan_of(model.other) is None
    model.other.save_pretrained(tmp_path / "other")
    loaded = hf.BertModel.from_pretrained(tmp_path / "other")
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


def test_the_share_of_a_part_and_the_plan_of_the_whole_fit_together():
    model, batch = clip()
    prune(model, [batch], HALF)
    plan = plan_of(model)
    share = part_of_plan(plan, "text_model")
    assert plan_of(model.text_model) == share
    assert {g.group.name for g in share} == {
        g.group.name.removeprefix("text_model.") for g in plan if g.group.name.startswith("text_model.")
    }
    assert whole_plan(model) == plan
    assert part_of_plan(plan, "elsewhere").stages == ()


def test_a_part_that_holds_another_quantization_is_refused_before_anything_is_cut():
    model, batch = clip()
    model.vision_model.config.quantization_config = {"quant_method": "torchao"}
    before = [p.shape for p in model.parameters()]
    with pytest.raises(ConfigError, match="quant_method 'torchao'"):
        prune(model, [batch], HALF)
    assert [p.shape for p in model.parameters()] == before


def test_a_part_that_was_changed_behind_the_plan_is_not_saved(tmp_path):
    model, _ = clip()
    prune(model.vision_model, [{"pixel_values": PIXELS}], HALF)
    dense, _ = clip()
    model.vision_model.encoder.layers = dense.vision_model.encoder.layers
    with pytest.raises(PlanMismatchError):
        model.save_pretrained(tmp_path)
