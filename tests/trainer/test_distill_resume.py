"""Distillation in trainings that are resumed, in several processes, or of which each trial has a model of its own."""

import copy
import shutil

import pytest
import torch
import transformers as hf
from trainings import Net, assert_same, config, make_trainer, samples, tiny_bert, tiny_model

from hap_hf import ConfigError, Distill, HessianPruner

ROUNDS = {"step": 2, "num_rounds": 2, "interval": 3}


def new(folder, distill, build=tiny_model, **changes):
    pruner = HessianPruner(config(method="taylor"), **ROUNDS)
    # The dense model is trained before it becomes the teacher, which is therefore in no file of the user's.
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, **changes}
    return make_trainer(folder, build(), pruner, distill, **settings)


def tied():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1, "vocab_size": 40}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True))


def token_samples():
    return [{**s, "labels": s["input_ids"][:5]} for s in samples()]


CASES = {
    "a model of transformers, its teacher in bf16": {"distill": {"dtype": "bfloat16"}},
    "a module without a config": {"build": Net},
    "tied weights": {"build": tied, "data": token_samples()},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_has_the_same_teacher_and_ends_with_the_same_weights(tmp_path, name):
    case = dict(CASES[name])
    settings = case.pop("distill", {})
    first = Distill(**settings)
    whole = new(tmp_path, first, **case)
    whole.train()
    for step in (1, 4):
        distill = Distill(**settings)
        resumed = new(tmp_path, distill, **case)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(resumed.model, whole.model)
    assert_same(distill._kept, first._kept)
    # The control: with another teacher it would end otherwise.
    shutil.rmtree(tmp_path / "teacher")
    other = new(tmp_path, Distill(copy.deepcopy(case.get("build", tiny_model)()), **settings), **case)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(AssertionError):
        assert_same(other.model, whole.model)


def test_a_teacher_that_is_gone_or_another_is_refused(tmp_path):
    new(tmp_path, Distill()).train()
    shutil.move(tmp_path / "teacher", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"its teacher is not in .*or pass the dense model: Distill\(teacher=...\)"):
        new(tmp_path, Distill()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.move(tmp_path / "elsewhere", tmp_path / "teacher")
    from safetensors.torch import save_file

    save_file(dict(tiny_bert(intermediate_size=20).named_parameters()), tmp_path / "teacher" / "model.safetensors")
    with pytest.raises(ConfigError, match="is not the Trainer's model before pruning"):
        new(tmp_path, Distill()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_it_takes_no_part_in_a_training_that_it_was_removed_from(tmp_path):
    def ended(*callbacks, remove=None):
        trainer = make_trainer(tmp_path, tiny_model(), *callbacks, max_steps=2)
        if remove is not None:
            trainer.remove_callback(remove)
        trainer.train()
        return trainer.model

    distill = Distill(tiny_bert(num_hidden_layers=1))
    assert_same(ended(distill, remove=distill), ended())


def test_each_trial_of_a_search_learns_from_its_own_dense_model(tmp_path):
    kept = []

    class Look(hf.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            kept.append(copy.deepcopy(distill._kept))

    distill, pruner = Distill(), HessianPruner(config(method="magnitude"), step=1)
    widths = iter([24, 24, 20])

    def model_init(trial=None):
        return tiny_bert(num_hidden_layers=1, intermediate_size=next(widths))

    trainer = make_trainer(tmp_path, None, pruner, distill, Look(), model_init=model_init, max_steps=2)
    trainer.train()
    trainer.train()
    shapes = [teacher.bert.encoder.layer[0].intermediate.dense.weight.shape[0] for teacher in kept]
    assert shapes == [24, 20]
