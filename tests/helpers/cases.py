"""Tiny models of every family that the README names, in float64, with random biases and norms.

Zeros and ones, the usual initial values of biases and norms, would hide wrong slices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, TOKENS, BATCH = 53, 9, 3


@dataclass(frozen=True)
class Case:
    """A model to build, a batch for it, and what discovery must find.

    Args:
        build: Builds the model.
        batch: Builds a batch with labels.
        heads: Units of every heads group, in order.
        ffn: Units of every FFN group, in order.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with noise of a size that keeps activations moderate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    return model


def build(case: "str | Case") -> nn.Module:
    """Return the case's model in float64 and eval mode."""
    case = CASES[case] if isinstance(case, str) else case
    torch.manual_seed(0)
    return randomise_(case.build()).double().eval()


def batch_of(case: "str | Case") -> dict[str, Tensor]:
    """Return the case's batch in float64."""
    case = CASES[case] if isinstance(case, str) else case
    return {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}


def text_batch(**labels: Tensor) -> dict[str, Tensor]:
    """Return token ids with padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    ids = torch.randint(3, VOCAB, (BATCH, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, **(labels or {"labels": torch.tensor([0, 1, 1])})}


def lm_batch() -> dict[str, Tensor]:
    """Return token ids with next-token labels."""
    batch = text_batch()
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def seq2seq_batch() -> dict[str, Tensor]:
    """Return source ids and target labels of another length."""
    return {**text_batch(), "labels": lm_batch()["labels"][:, :6].contiguous()}


def image_batch() -> dict[str, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 1])}


ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 2,
}


def _from_config(auto: Any, name: str, config: dict[str, Any]) -> nn.Module:
    config = hf.AutoConfig.for_model(name, **config)
    config.architectures = config.architectures or []  # AutoModel looks into it for a few families
    return auto.from_config(config)


def _case(
    name: str,
    auto: Any,
    batch: Callable[[], dict[str, Tensor]],
    config: dict[str, Any],
    heads: tuple[int, ...] = (4, 4),
    ffn: tuple[int, ...] = (20, 20),
) -> Case:
    return Case(lambda: _from_config(auto, name, config), batch, heads, ffn)


def _text(name: str, heads: tuple[int, ...] = (4, 4), ffn: tuple[int, ...] = (20, 20), **changes: Any) -> Case:
    return _case(
        name, hf.AutoModelForSequenceClassification, text_batch, {**ENCODER, "num_labels": 3, **changes}, heads, ffn
    )


def _causal(name: str, heads: tuple[int, ...] = (2, 2), ffn: tuple[int, ...] = (20, 20), **changes: Any) -> Case:
    return _case(name, hf.AutoModelForCausalLM, lm_batch, {**DECODER, **changes}, heads, ffn)


def _image(name: str, heads: tuple[int, ...] = (4, 4), ffn: tuple[int, ...] = (20, 20), **changes: Any) -> Case:
    return _case(name, hf.AutoModelForImageClassification, image_batch, {**IMAGE, **changes}, heads, ffn)


CASES: dict[str, Case] = {
    "bert": _text("bert"),
    "roberta": _text("roberta"),
    "distilbert": _text("distilbert", dim=24, n_layers=2, n_heads=4, hidden_dim=20),
    "electra": _text("electra", embedding_size=16),
    "mpnet": _text("mpnet", heads=(4,)),
    "deberta_v2": _text(
        "deberta-v2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
    "deberta_v2_own_position_keys": _text(
        "deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=False
    ),
    "albert": _text("albert", heads=(4,), ffn=(20,), embedding_size=16),
    "modernbert": _text(
        "modernbert", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=4
    ),
    "vit": _image("vit"),
    "deit": _image("deit"),
    "dinov2": _image("dinov2", ffn=(48, 48), mlp_ratio=2),
    "dinov2_swiglu": _image("dinov2", ffn=(32, 32), mlp_ratio=2, use_swiglu_ffn=True),
    "beit": _image("beit", use_relative_position_bias=True, layer_scale_init_value=0.5),
    "beit_shared_table": _image("beit", heads=(4,), use_shared_relative_position_bias=True),
    "gpt2": _causal("gpt2", heads=(4, 4), n_embd=24, n_layer=2, n_head=4, n_inner=20, n_positions=32),
    "opt": _causal("opt", heads=(4, 4), ffn_dim=20, word_embed_proj_dim=24),
    "gpt_neox": _causal("gpt_neox", heads=(4, 4)),
    "llama": _causal("llama"),
    "mistral": _causal("mistral", sliding_window=5),
    "qwen2": _causal("qwen2"),
    "qwen3": _causal("qwen3", head_dim=8),
    "gemma": _causal("gemma", head_dim=8),
    "gemma_one_key_head": _causal("gemma", heads=(4, 4), head_dim=8, num_key_value_heads=1),
    "phi": _causal(
        "phi",
        heads=(4, 4),
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2 / 3},
    ),
    "t5": _case(
        "t5",
        hf.AutoModelForSeq2SeqLM,
        seq2seq_batch,
        {
            "vocab_size": VOCAB,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 20,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        heads=(4, 4, 4),
        ffn=(20, 20, 20, 20),
    ),
    "bart": _case(
        "bart",
        hf.AutoModelForSeq2SeqLM,
        seq2seq_batch,
        {
            "vocab_size": VOCAB,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        heads=(4,) * 6,
        ffn=(20,) * 4,
    ),
}
