"""What the callback scores on in a Trainer: streams, loaders, losses; the training does not notice."""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.data import IterableDataset
from trainings import Net, config, exact_model, make_trainer, samples
from transformers import Trainer

from hap_hf import ConfigError, HessianPruner
from hap_hf.trainer import scoring_batches


class Stream(IterableDataset):
    """Can be read once: what one reader takes no other gets."""

    def __init__(self):
        self.left = iter(samples())

    def __iter__(self):
        return self.left


class Watching(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        vars(self).setdefault("seen", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def test_scoring_takes_no_sample_of_a_stream_from_the_training(tmp_path):
    pruner = HessianPruner(config(method="taylor"), step=2)
    trainer = make_trainer(tmp_path, exact_model(), pruner, data=Stream(), kind=Watching, max_steps=6)
    trainer.train()
    assert pruner.reports[0].plan.provenance[-1]["num_batches"] == 2
    assert torch.equal(torch.cat(trainer.seen), torch.stack([s["input_ids"] for s in samples()]))


class Generated(Stream):
    def __init__(self):
        self.left = (s for s in samples())


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (Generated, {}, r"Generated without a length.*cannot be copied.*HessianPruner\(config, batches="),
        (Stream, {"max_batches": None}, "max_batches=None asks for all.*Stream has no length"),
    ],
)
def test_streams_that_cannot_be_scored_on_are_refused_before_the_training(tmp_path, data, changes, message):
    trainer = make_trainer(tmp_path, exact_model(), HessianPruner(config(**changes), step=2), data=data(), max_steps=6)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    batches = [hf.default_data_collator(samples()[:8])]
    pruner = HessianPruner(config(**changes), step=2, batches=batches)
    make_trainer(tmp_path, exact_model(), pruner, data=data(), max_steps=3).train()
    assert len(pruner.reports) == 1


def test_loaders_that_do_not_tell_what_batches_are_made_of_are_refused(tmp_path):
    class Batches(Trainer):
        def get_train_dataloader(self):
            whole = [hf.default_data_collator(samples()[i : i + 8]) for i in range(0, 48, 8)]
            return self.accelerator.prepare(torch.utils.data.DataLoader(whole, batch_size=None))

    with pytest.raises(ConfigError, match=r"does not make batches of single samples.*batches="):
        make_trainer(tmp_path, exact_model(), HessianPruner(config(), step=2), kind=Batches).train()


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(samples())


@pytest.mark.parametrize("data", [samples, Endless])
def test_scoring_neither_uses_nor_moves_the_random_numbers_of_the_training(data):
    def noisy(features):
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]  # ruff: ignore[numpy-legacy-random]
        return {**hf.default_data_collator(features), "noise": noise}

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # ruff: ignore[numpy-legacy-random]

    before = states()
    batches = list(scoring_batches(data(), noisy, 4, config(max_batches=3)))
    assert states() == before
    hf.set_seed(7)
    again = list(scoring_batches(data(), noisy, 4, config(max_batches=3)))
    assert [b["noise"] for b in batches] == [b["noise"] for b in again]
    assert len({tuple(b["noise"]) for b in batches}) == 3


def sum_over_items(outputs, labels, num_items_in_batch):
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = sum_over_items(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("own", [{"compute_loss_func": sum_over_items}, {"kind": OwnLoss}], ids=["function", "method"])
def test_losses_that_divide_by_the_number_of_items_are_told_it(tmp_path, own):
    thresholds = []
    for settings in ({}, own):
        pruner = HessianPruner(config(method="taylor"))
        make_trainer(tmp_path, Net(), pruner, max_steps=1, **settings).train()
        thresholds.append(pruner.reports[0].threshold)
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-5)
