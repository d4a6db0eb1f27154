"""Small models, groups written by hand and batches for the tests of curvature and scores."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from hap_hf import HapConfig, Scores, known_criteria, score_groups
from hap_hf.names.group import Group, Kind, Role, Slice

GENERATOR = torch.Generator().manual_seed(1)
BATCH = {
    "x": torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR),
    "labels": torch.tensor([0, 1, 1, 1, 0, 0]),
}
FFN = Group(
    "net:ffn",
    Kind.FFN,
    4,
    (
        Slice("up.weight", (4, 3), 0, 0, 1, Role.PRODUCER),
        Slice("up.bias", (4,), 0, 0, 1, Role.ALIGNED),
        Slice("down.weight", (2, 4), 1, 0, 1, Role.CONSUMER),
    ),
)


class Net(nn.Module):
    """A classifier with one hidden layer that computes its loss as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """Return logits, and the loss if there are labels."""
        logits = self.down(torch.tanh(self.up(x)))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def net(seed: int = 0) -> Net:
    """Return the classifier in float64."""
    torch.manual_seed(seed)
    return Net().double()


def config(**settings: Any) -> HapConfig:
    """Return a config without a progress bar, for HAP's formula with all weights of a unit as one vector.

    Settings of the criterion are written beside the others.
    """
    settings = {"prune_ratio": 0.5, "method": "hessian", "progress": False, **settings}
    if isinstance(settings["method"], str) and settings["method"] in known_criteria():
        criterion = known_criteria()[settings["method"]]
        own = {f.name for f in fields(criterion)}
        given = {"coupling": "joint", **settings} if "coupling" in own else settings
        settings["method"] = criterion(**{k: v for k, v in given.items() if k in own})
        settings = {k: v for k, v in settings.items() if k not in own}
    return HapConfig(**settings)


def score(model: nn.Module, groups: Any, batches: Any, config: HapConfig, **how: Any) -> Scores:
    """Return the scores of some groups on some batches."""
    return score_groups(config.evidence(model, batches, **how), groups, config)


def bert(kind: type = BertForSequenceClassification, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Return a tiny BERT in float64."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "initializer_range": 0.3,
        "attn_implementation": attention,
        **changes,
    }
    return kind(BertConfig(**settings)).double()


def heads(layer: int) -> Group:
    """Return the attention heads of one layer of that BERT."""
    prefix = f"bert.encoder.layer.{layer}.attention"
    inner = [f"{prefix}.self.{n}" for n in ("query", "key", "value")]
    return Group(
        f"{prefix}:heads",
        Kind.HEADS,
        4,
        (
            *(Slice(f"{n}.weight", (16, 16), 0, 0, 4, Role.PRODUCER) for n in inner),
            *(Slice(f"{n}.bias", (16,), 0, 0, 4, Role.ALIGNED) for n in inner),
            Slice(f"{prefix}.output.dense.weight", (16, 16), 1, 0, 4, Role.CONSUMER),
        ),
    )


def text_batch(rows: int = 3, **labels: Tensor) -> dict[str, Tensor]:
    """Return token ids with padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(1, 50, (rows, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, **labels}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that must not change, with identities."""
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad ids": [id(p.grad) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "parameters": [(id(p), p.tolist()) for p in model.parameters()],
        "buffers": [
            (n, id(b), None if b is None else b.tolist()) for m in model.modules() for n, b in m._buffers.items()
        ],
        "random state": torch.get_rng_state().tolist(),
    }
