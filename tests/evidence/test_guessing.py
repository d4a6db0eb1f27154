"""The loss of guessing, and the warning that a model does no better."""

import logging
import math

import pytest
import torch
from documented import bert, causal_batches, llama, text_batches
from torch import nn

from hap_hf import Evidence, HapConfig, decide
from hap_hf.evidence.guessing import loss_of_guessing


def evidence(labels, model=None):
    return Evidence.of(model or nn.Linear(2, 2), [{"input": torch.zeros(len(labels), 2), "labels": labels}])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([0, 1] * 10), math.log(2)),
        (torch.tensor([0, 0, 0, 1] * 5), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        (torch.tensor([0, 1, -100] * 10), math.log(2)),  # -100 is no class
        (torch.tensor([3] * 20), None),  # one class tells nothing
        (torch.rand(20), None),  # regression
        (torch.arange(20), None),  # too few of each, and the outputs are not known
    ],
)
def test_the_loss_of_guessing_is_the_entropy_of_the_labels(labels, expected):
    found = loss_of_guessing(evidence(labels))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_it_is_what_the_best_constant_answer_loses():
    labels = torch.tensor([0, 0, 1, 2, 2, 2] * 4)
    answer = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.LBFGS([answer], max_iter=50)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(answer.expand(len(labels), 3), labels)
        value.backward()
        return value

    optimizer.step(loss)
    assert loss_of_guessing(evidence(labels)) == pytest.approx(loss().item(), abs=1e-5)


def test_with_few_labels_a_language_model_is_held_against_its_vocabulary():
    model = llama()
    assert loss_of_guessing(Evidence.of(model, causal_batches())) == pytest.approx(math.log(60))


@pytest.mark.parametrize("learned", [False, True])
def test_only_a_model_that_guesses_is_warned_of(learned, caplog):
    model, batches = bert(), text_batches(4, 8)
    if learned:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for batch in batches * 15:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    config = HapConfig(target_params=0.5, method="taylor", progress=False)
    with caplog.at_level(logging.WARNING, "hap_hf"):
        decision = decide(config.evidence(model, batches), config)
    told = [r.getMessage() for r in caplog.records if "that of guessing" in r.getMessage()]
    assert bool(told) != learned
    assert all("fine-tune it first, and see that the labels are those that it learned" in text for text in told)
    assert (decision.loss < 0.5) == learned
