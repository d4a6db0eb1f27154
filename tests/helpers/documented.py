"""What the examples of the documents begin with: tiny models, under the names that a reader's own would have."""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    default_data_collator,
)

collator = default_data_collator

NUM_TOKENS = 60


def bert(**changes: int) -> nn.Module:
    """Return a BERT of two layers with four heads and 48 neurons each, for two classes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=NUM_TOKENS, max_position_embeddings=32, num_labels=2, **(sizes | changes))
    torch.manual_seed(0)
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    """Return a Llama of two layers, each with two key/value heads and two query heads for each of them."""
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def texts(number: int, length: int = 8) -> list[dict[str, Tensor]]:
    """Return samples as a tokenised dataset has them: the label is whether the first token is a large one."""
    ids = torch.randint(NUM_TOKENS, (number, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(length, dtype=torch.long)
    return [{"input_ids": x, "attention_mask": mask, "labels": (x[0] >= NUM_TOKENS // 2).long()} for x in ids]


def text_batches(number: int = 2, size: int = 6) -> list[dict[str, Tensor]]:
    """Return batches as a collator makes them."""
    samples = texts(number * size)
    return [collator(samples[i : i + size]) for i in range(0, len(samples), size)]


def causal_batches(number: int = 2, size: int = 4) -> list[dict[str, Tensor]]:
    """Return batches for a language model, whose labels are its inputs."""
    return [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in text_batches(number, size)]


def image_pairs(number: int = 2, size: int = 4, pixels: int = 8, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of images and labels, as torch's loaders give them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, pixels, pixels, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def save_bert(name: str) -> None:
    """Save a BERT under ``name`` in the working directory."""
    bert().save_pretrained(name)


def save_timm(name: str, architecture: str = "test_resnet") -> None:
    """Save a network of timm inside transformers' wrapper under ``name`` in the working directory."""
    torch.manual_seed(0)
    TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=10)).save_pretrained(name)


class Network(nn.Module):
    """Three convolutions and a classifier, as a reader's own network."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.conv3, self.fc = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv3(self.conv2(self.conv1(x).relu()).relu()).relu().mean((2, 3)))


def save_weights(name: str, architecture: str = "test_resnet") -> None:
    """Save the weights of a network of timm in ``name`` in the working directory."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(architecture, num_classes=10).state_dict(), Path(name))
