"""What belongs together is looked at on a few tokens, tried at the full length, and counted there."""

import cases
import pytest
import torch
from torch import nn

import hap_hf
from hap_hf.discovery import runs
from hap_hf.evidence.batches import shortened

LONG = 30  # of 32 positions
FAMILIES = [
    "bert",
    "distilbert",
    "deberta_v2",
    "mpnet",
    "modernbert",
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "gemma",
    "t5",
    "bart",
]


@pytest.fixture
def long_batches(monkeypatch):
    monkeypatch.setattr(cases, "TOKENS", LONG)


def whole(batch, most=16):
    """Stand in for the function that shortens, and do not."""


@pytest.mark.parametrize("name", FAMILIES)
def test_few_tokens_tell_the_same_groups_as_all_of_them(name, long_batches, monkeypatch):
    model, batch = cases.build(name), cases.batch_of(name)
    assert batch["input_ids"].shape[1] == LONG
    found = hap_hf.find_groups(model, batch)
    monkeypatch.setattr(runs, "shortened", whole)
    assert found == hap_hf.find_groups(model, batch)  # uses and core_macs included: they are counted at the full length


def lengths_seen(model, batch):
    """Return the lengths that the model is run on in discovery, with whether gradients are enabled."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda m, args, out: seen.append((args[0].shape[1], torch.is_grad_enabled()))
    )
    hap_hf.find_groups(model, batch)
    handle.remove()
    return seen


def test_nothing_is_differentiated_at_the_full_length(long_batches):
    seen = lengths_seen(cases.build("llama"), cases.batch_of("llama"))
    assert {length for length, differentiated in seen if differentiated} == {16}
    # One run to count, two to see what is called in evaluation and in training, one for the output without any
    # removal, five pairs of masked and pruned, one more pair for
    # the heads and one for the neurons, all of them gone.
    assert sum(length == LONG for length, _ in seen) == 18


def test_short_texts_are_looked_at_as_they_are():
    seen = lengths_seen(cases.build("llama"), cases.batch_of("llama"))
    assert {length for length, _ in seen} == {cases.TOKENS}


def test_a_model_that_does_not_run_on_few_tokens_is_looked_at_whole(long_batches):
    model, batch = cases.build("bert"), cases.batch_of("bert")
    expected = hap_hf.find_groups(model, batch)

    def refuse(module, args):
        if args[0].shape[1] < LONG:
            raise ValueError("too short")

    model.bert.embeddings.word_embeddings.register_forward_pre_hook(refuse)
    assert hap_hf.find_groups(model, batch) == expected


class Late(nn.Module):
    """Mixes what two halves of a hidden layer say, in texts of more than twenty tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(50, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.other_up, self.other_down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        hidden = torch.tanh(self.up(h))
        if input_ids.shape[1] > 20:
            hidden = hidden.roll(1, -1) * hidden  # neighbours need each other
        h = h + self.down(hidden)
        return self.head(h + self.other_down(torch.tanh(self.other_up(h))))


def test_what_does_not_hold_at_the_full_length_stays_whole():
    model = Late().double()
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    on_few = hap_hf.find_groups(model, {"input_ids": ids[:, :16]})
    assert len(on_few) == 2  # the control: few tokens alone would let both go
    on_all = hap_hf.find_groups(model, {"input_ids": ids})
    assert len(on_all) == 1
    assert {s.tensor.partition(".")[0] for s in on_all[0].slices} == {"other_up", "other_down"}


def test_the_tokens_kept_are_those_that_are_padded_least():
    mask = torch.zeros(2, 40, dtype=torch.long)
    mask[:, 20:] = 1
    mask[1, :30] = 0
    batch = {"input_ids": torch.arange(80).view(2, 40), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    few = shortened(batch)
    assert few["attention_mask"].shape == (2, 16)
    assert int(few["attention_mask"].sum()) == 16 + 10
    assert torch.equal(few["input_ids"], batch["input_ids"][:, 24:])
    assert few["labels"] is batch["labels"]


def test_texts_of_two_lengths_and_what_lies_along_them_are_cut_alike():
    batch = {
        "input_ids": torch.zeros(2, 40, dtype=torch.long),
        "decoder_input_ids": torch.zeros(2, 20, dtype=torch.long),
        "bbox": torch.zeros(2, 40, 4, dtype=torch.long),
        "pixel_values": torch.zeros(2, 3, 40, 40),
    }
    few = shortened(batch)
    assert {name: tuple(value.shape) for name, value in few.items()} == {
        "input_ids": (2, 16),
        "decoder_input_ids": (2, 16),
        "bbox": (2, 16, 4),
        "pixel_values": (2, 3, 40, 40),
    }
    assert shortened({"pixel_values": batch["pixel_values"]}) is None
