"""Compensation with one sample a batch, as language models are often fed, and with one sample in all."""

import copy
import logging

import torch
import transformers as hf
from decisions import (
    assert_same_state,
    bert,
    config,
    texts,
)
from trainings import samples, tiny_bert

from hap_hf import (
    Compensation,
    MaskGGN,
    apply_plan_,
    carry_out_,
    decide,
    find_groups,
)
from hap_hf.names.group import Role


def readers_of(decision):
    """Return the names of the weights that read what goes."""
    return {s.tensor for g in decision.stage if g.pruned for s in g.group.slices if s.role is Role.CONSUMER}


def test_with_one_sample_a_batch_readers_of_what_goes_are_changed(caplog):
    model, wanted = bert(), config(max_batches=None)
    singles = [hf.default_data_collator([sample]) for sample in samples(16)]
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        decision = decide(wanted.evidence(model, singles), wanted)
    assert "not compensated" not in caplog.text
    own = dict(model.named_parameters())
    changed = {name for name, value in decision.values.items() if not torch.equal(value, own[name])}
    assert readers_of(decision) & changed
    cut = copy.deepcopy(model)
    apply_plan_(cut, decision.plan)
    carry_out_(model, decision)
    now, plain = dict(model.named_parameters()), dict(cut.named_parameters())
    assert {name for name in now if not torch.equal(now[name], plain[name])} == changed


def test_one_sample_a_batch_tells_of_layers_what_one_batch_of_all_samples_tells():
    model, exact = tiny_bert().double(), config(method=MaskGGN(num_output_probes=None), max_batches=None)
    groups = find_groups(model, texts()[0])
    batches = [[hf.default_data_collator([s]) for s in samples(16)], [hf.default_data_collator(samples(16))]]
    moments = [Compensation.measure(exact.evidence(model, b), groups, num_output_probes=None).moments for b in batches]
    assert list(moments[0]) == list(moments[1])
    for name, halves in moments[0].items():
        torch.testing.assert_close(halves, moments[1][name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(halves[0], halves[1]), name


def test_with_one_sample_in_all_nothing_is_changed_and_a_warning_says_why(caplog):
    model, wanted = bert(), config()
    single = [hf.default_data_collator(samples(1))]
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        decision = decide(wanted.evidence(model, single), wanted)
    assert "are not compensated: it takes two samples that reach the loss" in caplog.text
    assert readers_of(decision)
    cut = copy.deepcopy(model)
    apply_plan_(cut, decision.plan)
    carry_out_(model, decision)
    assert_same_state(model, cut)
