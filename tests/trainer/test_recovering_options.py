"""Options of the Trainer with both distillation and shrinking units: it ends as with a mask in place of the cut."""

from contextlib import ExitStack

import pytest
import torch
from reference import logits, masked
from test_training_options import CUT, Scaled, checkpointing, of_many_lengths
from trainings import Net, config, exact_model, make_trainer, samples
from transformers import Trainer

from hap_hf import ConfigError, Distill, GrowingReg, HessianPruner


class MaskInstead(HessianPruner):
    """Zeroes the units where they are read when their time has come, and leaves the model as large as it was."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stack = ExitStack()

    def _round(self, args, state, *, model, **kwargs):
        planned, self._growth = self._growth.planned, None
        units = {g.group: [u for u, a in enumerate(g.actions) if a == "p"] for g in planned.plan}
        self.stack.enter_context(masked(model, units))
        self.reports.append(planned)


OPTIONS = {
    "clipping, accumulation, checkpoints": {
        "max_grad_norm": 0.3,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        **checkpointing(use_reentrant=False),
    },
    "label smoothing, groups of one length": {
        "label_smoothing_factor": 0.1,
        "train_sampling_strategy": "group_by_length",
        "data": CUT,
        "data_collator": of_many_lengths,
        "optim": "adamw_torch_fused",
    },
    "small ones": {
        "torch_empty_cache_steps": 1,
        "dataloader_drop_last": True,
        "average_tokens_across_devices": True,
        "remove_unused_columns": False,
        "data": samples(30),
        "optim": "sgd",
        "neftune_noise_alpha": 5.0,
    },
    "fp16": {"fp16": True, "kind": Scaled},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_training_go_together_with_both(tmp_path, name):
    found, exact = {}, name != "fp16"
    batch = {k: torch.stack([s[k] for s in samples()]) for k in ("input_ids", "attention_mask")}
    for kind in (HessianPruner, MaskInstead):
        asked = config(method="magnitude", compensate=False)
        pruner = kind(asked, step=4, regularise=GrowingReg(steps=3, interval=1, ratio=3.0))
        model = exact_model() if exact else exact_model().float()
        settings = {"max_steps": 7, "learning_rate": 1e-3, **OPTIONS[name]}
        trainer = make_trainer(tmp_path, model, pruner, Distill(hidden=0.1), **settings)
        trainer.train()
        found[kind] = logits(trainer.model, batch).double()
        assert len(pruner.reports) == 1
    assert trainer.model.num_parameters() == exact_model().num_parameters()
    torch.testing.assert_close(found[HessianPruner], found[MaskInstead], rtol=0, atol=1e-9 if exact else 0.03)
    if exact:
        plain = make_trainer(tmp_path, exact_model(), max_steps=7, learning_rate=1e-3, **OPTIONS[name])
        plain.train()
        assert (logits(plain.model, batch) - found[HessianPruner]).abs().max() > 1e-4


def test_a_compiled_training_with_both_ends_like_one_that_is_not(tmp_path):
    ended = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        pruner = HessianPruner(config(method="magnitude"), step=3, regularise=GrowingReg(steps=2, interval=1))
        trainer = make_trainer(tmp_path, Net(), pruner, Distill(), max_steps=5, **changes)
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule) == bool(changes)
        ended.append(dict(trainer.model.named_parameters()))
    torch.testing.assert_close(*ended, rtol=0, atol=1e-6)


def test_a_penalty_in_scaled_gradients_is_refused(tmp_path):
    growing = GrowingReg(steps=2, coupled=True, increment=1e-4)
    pruner = HessianPruner(config(), step=4, regularise=growing)
    trainer = make_trainer(tmp_path, exact_model().float(), pruner, fp16=True, kind=Scaled)
    with pytest.raises(ConfigError, match="coupled=True adds to gradients, which fp16=True scales"):
        trainer.train()
    assert isinstance(trainer, Trainer)
