"""Too little memory while scoring: batches are halved, and the scores are those of smaller batches."""

import logging

import pytest
import torch
import transformers as hf
from cases import randomise_
from scored_models import config as plain
from scored_models import score
from trainings import samples, tiny_model

from hap_hf import BatchError, find_groups
from hap_hf.evidence.losses import model_loss
from hap_hf.evidence.memory import is_out_of_memory

KINDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


def config(**settings):
    """Return settings for two batches as they are given, so that a limit which counted halves would show."""
    return plain(**{"max_batches": 2, **settings})


def batches_of(*sizes):
    """Return batches of the same samples in the same order, whatever the sizes."""
    rows, found = iter(samples()), []
    for size in sizes:
        found.append(hf.default_data_collator([next(rows) for _ in range(size)]))
    return found


def limited(most, error=KINDS[0]):
    """Return a loss for which there is memory for a number of samples, and the sizes that it was asked for."""
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > most:
            raise error
        return model_loss(model, batch)

    return loss, sizes


def after(size, sizes):
    """Return what came after the last batch of a size."""
    return sizes[len(sizes) - sizes[::-1].index(size) :]


def assert_equal_scores(a, b):
    for name, x in a.sensitivity.items():
        assert torch.equal(x, b.sensitivity[name])
        assert torch.equal(a.standard_error[name], b.standard_error[name])
    assert (a.num_batches, a.num_loss_terms) == (b.num_batches, b.num_loss_terms)


@pytest.fixture(scope="module")
def model():
    return tiny_model().double().eval()


@pytest.fixture(scope="module")
def groups(model):
    return find_groups(model, batches_of(2)[0])


@pytest.mark.parametrize("method", ["hessian", "ggn", "taylor", "mask_fisher"])
def test_scores_are_those_of_the_smaller_batches(model, groups, method, caplog):
    settings = config(method=method)
    loss, sizes = limited(4)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        halved = score(model, groups, batches_of(8, 6), settings, loss_fn=loss)
    small = score(model, groups, batches_of(4, 4, 4, 2), config(method=method, max_batches=None))
    assert_equal_scores(halved, small)
    assert "out of memory while scoring a batch of 8 samples; starting anew with at most 4 a batch" in caplog.text
    assert 1 <= sizes.count(8) <= 2  # when the loss is looked at, and when it is scored with
    assert max(after(8, sizes)) == 4
    whole = score(model, groups, batches_of(8, 6), settings)
    assert whole.num_batches == 2
    assert whole.num_loss_terms == halved.num_loss_terms


def test_loss_terms_weigh_the_same_in_halves():
    torch.manual_seed(0)
    shape = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dense = randomise_(hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))).double().eval()
    ids = torch.randint(20, (4, 6))
    labels = ids.clone()
    labels[0, 2:], labels[1], labels[3, :4] = -100, -100, -100  # one sample has no term at all
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    found = find_groups(dense, batch)
    settings = config(method="empirical_fisher")
    whole = score(dense, found, [batch], settings)
    halved = score(dense, found, [batch], settings, loss_fn=limited(2)[0])
    assert (whole.num_batches, halved.num_batches) == (1, 2)
    assert whole.num_loss_terms == halved.num_loss_terms
    for name, x in whole.sensitivity.items():  # sums over samples do not depend on how these are batched
        torch.testing.assert_close(halved.sensitivity[name], x, rtol=1e-9, atol=1e-15)


def test_batches_are_halved_until_they_fit_and_odd_ones_are_rounded_up(model, groups):
    loss, sizes = limited(2)
    settings, small = config(method="taylor"), config(method="taylor", max_batches=None)
    halved = score(model, groups, batches_of(7, 2), settings, loss_fn=loss)
    assert_equal_scores(halved, score(model, groups, batches_of(2, 2, 2, 1, 2), small))
    assert [n for n in sizes if n > 2] == [7, 4] * 2  # when the loss is looked at, and when it is scored with


def test_the_limit_of_batches_counts_those_that_were_given(model, groups):
    settings = config(method="taylor", max_batches=1)
    halved = score(model, groups, batches_of(8, 8), settings, loss_fn=limited(4)[0])
    assert_equal_scores(halved, score(model, groups, batches_of(4, 4), config(method="taylor")))


@pytest.mark.parametrize("error", KINDS, ids=lambda e: type(e).__name__)
def test_every_allocators_error_is_known(model, groups, error):
    loss, _ = limited(4, error)
    assert score(model, groups, batches_of(8), config(method="taylor"), loss_fn=loss).num_batches == 2
    assert is_out_of_memory(error)


def test_other_errors_pass(model, groups):
    loss, sizes = limited(4, RuntimeError("expected scalar type Float but found Half"))
    with pytest.raises(RuntimeError, match=r"loss_fn failed on batch 0, a mapping with .*: expected scalar type"):
        score(model, groups, batches_of(8), config(method="taylor"), loss_fn=loss)
    assert sizes == [8]


def test_a_single_sample_that_does_not_fit_is_refused_with_advice(model, groups):
    with pytest.raises(BatchError, match=r"out of memory while scoring a single sample.*use shorter") as caught:
        score(model, groups, batches_of(4), config(method="taylor"), loss_fn=limited(0)[0])
    assert caught.value.__cause__ is KINDS[0]


def test_batches_whose_loss_is_not_that_of_their_samples_are_not_cut(model, groups):
    calls = []

    def loss(model, batch):
        calls.append(len(batch["labels"]))
        if len(calls) > 4:  # memory runs out after the look at the loss
            raise KINDS[0]
        return model_loss(model, batch) * calls[-1] ** 2

    with pytest.raises(
        BatchError, match="4 samples, which cannot be cut in halves as its loss is not made up of those"
    ):
        score(model, groups, batches_of(4), config(method="taylor"), loss_fn=loss)


def test_tensors_for_all_samples_together_stay_whole(model, groups):
    positions = torch.arange(7)[None]
    batches = [{**b, "position_ids": positions} for b in batches_of(4)]
    halved = score(model, groups, batches, config(method="taylor"), loss_fn=limited(2)[0])
    assert_equal_scores(halved, score(model, groups, batches_of(2, 2), config(method="taylor")))


def test_batches_that_can_be_drawn_once_are_cut_like_others(model, groups):
    loss, sizes = limited(4)
    drawn = score(model, groups, iter(batches_of(8, 6)), config(method="taylor"), loss_fn=loss)
    listed = score(model, groups, batches_of(8, 6), config(method="taylor"), loss_fn=limited(4)[0])
    assert_equal_scores(drawn, listed)
    assert (drawn.num_batches, sizes[0], max(after(8, sizes))) == (4, 8, 4)
