"""Each batch counts by its loss terms, so that it does not matter how samples are batched."""

from typing import Any

import pytest
import torch
from scored_models import bert, config, heads, score, text_batch
from transformers import BertForTokenClassification, GPT2Config, GPT2LMHeadModel

import hap_hf.evidence.evidence
from hap_hf.curvature import rademacher
from hap_hf.evidence.losses import count_loss_terms
from hap_hf.names.group import Group, Kind, Role, Slice


@pytest.fixture
def _one_probe_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the probes of all batches the same, so that estimates are exactly linear in the batches' Hessians."""
    monkeypatch.setattr(
        hap_hf.evidence.evidence, "rademacher", lambda tensors, seed, batch, probe: rademacher(tensors, seed, 0, probe)
    )


@pytest.mark.usefixtures("_one_probe_for_all_batches")
def test_splitting_a_batch_with_padded_token_labels_changes_nothing() -> None:
    model = bert(BertForTokenClassification)
    labels = torch.randint(0, 2, (3, 7))
    labels[1, 4:] = -100
    labels[2, 1:] = -100
    batch = text_batch(labels=labels)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    whole, split = (score(model, [heads(0)], b, config(num_probes=2)) for b in ([batch], rows))
    name = heads(0).name
    torch.testing.assert_close(split.sensitivity[name], whole.sensitivity[name], rtol=1e-9, atol=1e-12)
    assert (split.num_loss_terms, split.num_batches) == (7 + 4 + 1, 3)
    assert whole.num_loss_terms == 12


@pytest.mark.usefixtures("_one_probe_for_all_batches")
def test_splitting_a_batch_of_next_token_labels_changes_nothing() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=1,
            n_head=4,
            n_positions=8,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=1,
        )
    ).double()
    slices = tuple(Slice("transformer.h.0.attn.c_attn.weight", (16, 48), 1, 16 * i, 4, Role.PRODUCER) for i in range(3))
    group = Group("heads", Kind.HEADS, 4, slices)
    batch = text_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    whole, split = (score(model, [group], b, config(num_probes=2)) for b in ([batch], rows))
    # transformers computes this loss in float32, whatever the model's dtype
    torch.testing.assert_close(split.sensitivity["heads"], whole.sensitivity["heads"], rtol=1e-5, atol=1e-7)
    assert split.num_loss_terms == whole.num_loss_terms == 6 + 3 + 6


@pytest.mark.parametrize(
    ("batch", "shifted", "terms"),
    [
        ({"labels": torch.tensor([1, 0, -100])}, False, 2),
        ({"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}, False, 3),
        ({"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}, True, 1),
        ({"labels": torch.zeros(4)}, False, 4),
        ({"labels": torch.zeros(4, 3)}, False, 4),
        ({"labels": torch.tensor(1.0)}, False, 1),
        ({"start_positions": torch.zeros(5, dtype=torch.long)}, False, 5),
        ({"flag": True, "input_ids": torch.zeros(2, 9, dtype=torch.long)}, False, 2),
        ({"text": "abc"}, False, 1),
    ],
)
def test_loss_terms_are_labels_that_count_or_samples(batch: dict[str, Any], shifted: bool, terms: int) -> None:
    assert count_loss_terms(batch, shifted=shifted) == terms
