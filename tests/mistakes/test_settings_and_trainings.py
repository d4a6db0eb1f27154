"""What people ask for by mistake, in settings and in trainings: each is told what to ask for instead.

That a model guesses, as one with a new head does, is in ``tests/evidence/test_guessing.py``.
"""

import pytest
import transformers as hf
from decisions import assert_same_state
from trainings import make_trainer, samples, tiny_bert

from hap_hf import ConfigError, HapConfig, HessianPruner, prune

pytestmark = pytest.mark.fast


def batches():
    return [hf.default_data_collator(samples()[:8])]


HALF = {"target_params": 0.5}
SETTINGS = {
    "a slip": ({"target_param": 0.5}, "HapConfig has no setting 'target_param'; did you mean 'target_params'"),
    "milliseconds": ({"target_latency": 0.5}, "has no setting 'target_latency'; did you mean 'target_macs'"),
    "includes": ({**HALF, "includes": "*"}, "did you mean 'include'"),
    "probes of a criterion": ({**HALF, "num_probes": 4}, r"write .*method=Hessian\(num_probes="),
    "two amounts": (
        {**HALF, "prune_ratio": 0.5},
        r"exactly one of .*; for example HapConfig\(prune_ratio=0.5\)",
    ),
    "no amount": ({}, r"got none; for example HapConfig\(prune_ratio=0.5\)"),
    "a method": ({**HALF, "method": "hesian"}, r"method must be one of \[.*\] or a Criterion.*did you mean 'hessian'"),
    "a kind": ({**HALF, "kinds": "head"}, r"kinds must be one of \['heads', 'ffn', 'channels'\].*did you mean 'heads'"),
    "per cent": ({"target_params": 50}, r"must lie in \(0, 1\), got 50; it is a share, so write 0.5 for 50%"),
    "a number of parameters": ({"target_params": 10000}, r"must lie in \(0, 1\), got 10000$"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_none_is_answered_with_the_one_that_is(name):
    settings, message = SETTINGS[name]
    with pytest.raises(ConfigError, match=message):
        HapConfig(**settings)


PRUNINGS = {
    "too little": ({"target_params": 0.01}, "smallest share of the prunable part is .*; ask for no less, or loosen"),
    "too little of all": ({"target_model_params": 0.01}, r"cannot be reached: .*embeddings.*; ask for more than 0\."),
    "no stars": ({**HALF, "exclude": "layer.0"}, r"exclude patterns .*'\*layer.0\*' matches \['bert.encoder.layer.0"),
    "no stars, included": ({**HALF, "include": "layer.0"}, r"include patterns .*'\*layer.0\*' matches \['bert.encoder"),
    "nothing left": ({**HALF, "exclude": "*"}, "leaves none of 4 groups of the kinds"),
    "a kind that is not there": (
        {**HALF, "kinds": "channels"},
        r"no groups of the kinds .*, only \['ffn', ",
    ),
}


@pytest.mark.parametrize("name", PRUNINGS)
def test_what_a_model_does_not_have_is_answered_with_what_it_has(name):
    settings, message = PRUNINGS[name]
    model = tiny_bert()
    with pytest.raises(ConfigError, match=message):
        prune(model, batches(), HapConfig(**settings, method="magnitude", progress=False))
    assert_same_state(model, tiny_bert())


@pytest.mark.parametrize("given", [0.5, HapConfig], ids=["a number", "the class"])
def test_settings_that_are_none_are_answered_with_an_example(given):
    for call in (lambda: prune(tiny_bert(), batches(), given), lambda: HessianPruner(given)):
        with pytest.raises(ConfigError, match=r"or a HapConfig, got .*; for example HapConfig\(target_params=0.5\)"):
            call()


def quick():
    return HapConfig(target_params=0.7, method="magnitude", progress=False, max_batches=1)


CALLBACKS = {
    "a setting of the config": (
        lambda: HessianPruner(target_params=0.5),
        r"no setting 'target_params': write HessianPruner\(HapConfig\(target_params=\.\.\.\)\)",
    ),
    "a slip": (lambda: HessianPruner(quick(), num_round=2), "no setting 'num_round'; did you mean 'num_rounds'"),
    "neither": (HessianPruner, r"expected a config, or a plan .*: HessianPruner\(HapConfig\(target_params=0.5\)\)"),
    "step and epoch": (lambda: HessianPruner(quick(), step=1, epoch=1), "at most one of step and epoch"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_cannot_be_made_says_how_to_make_one(name):
    make, message = CALLBACKS[name]
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_class_in_place_of_an_object_is_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a config, or a plan to carry out, got neither: HessianPruner\("):
        make_trainer(tmp_path, tiny_bert(), HessianPruner)


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            {"step": 9},
            "after 9 steps and the training ends after 2; prune earlier, in fewer rounds, or train",
        ),
        ({"step": 1, "num_rounds": 3}, "round 3 of 3 would come after 3 steps and the training ends after 2"),
    ],
)
def test_a_round_behind_the_end_is_refused_before_the_first_step(when, message, tmp_path):
    model = tiny_bert()
    trainer = make_trainer(tmp_path, model, HessianPruner(quick(), **when), max_steps=2)
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same_state(model, tiny_bert())
