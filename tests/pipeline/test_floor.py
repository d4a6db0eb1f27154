"""The smallest model that is good enough."""

import pytest
import torch
from scored_models import bert, snapshot, text_batch

from hap_hf import ConfigError, HapConfig, prune, prune_to_floor

BATCHES = [text_batch(rows=6, labels=torch.tensor([0, 1, 1, 0, 1, 0]))]
LEAST = {"method": "magnitude", "progress": False}


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("needed", [0.8, 0.9])
def test_the_search_closes_in_on_the_floor_and_never_goes_below(needed):
    model, dense = bert(), size(bert())
    drop = (1 - needed) * dense
    found = prune_to_floor(model, BATCHES, size, HapConfig(target_params=0.2, **LEAST), drop=drop, num_trials=7)
    assert found.floor == dense - drop
    assert found.score == size(model) >= found.floor
    good, bad = ([keep for keep, score in found.tried if (score >= found.floor) is wanted] for wanted in (True, False))
    assert len(found.tried) == 7
    assert 0 < min(good) - max(bad) < 0.02
    assert found.score == dict(found.tried)[min(good)]
    assert "floor" in str(found)


def test_the_least_share_is_enough_where_the_floor_allows_it():
    model = bert()
    found = prune_to_floor(model, BATCHES, lambda m: 1.0, HapConfig(target_params=0.3, **LEAST), drop=0.0)
    assert [keep for keep, _ in found.tried] == [0.3]
    by_hand = bert()
    prune(by_hand, BATCHES, HapConfig(target_params=0.3, **LEAST))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_of_a_score_that_rises_and_falls_only_what_was_good_enough_is_taken():
    model, scores = bert(), iter([1.0, 0.0, 0.95, 0.2, 0.99])
    found = prune_to_floor(
        model, BATCHES, lambda m: next(scores), HapConfig(target_params=0.2, **LEAST), drop=0.1, num_trials=4
    )
    assert found.score == 0.99
    assert [round(keep, 6) for keep, _ in found.tried] == [0.2, 0.6, 0.4, 0.5]


@pytest.mark.parametrize(
    ("evaluate", "settings", "message"),
    [
        (lambda m: float(size(m) == size(bert())), {}, "no amount is good enough"),
        (lambda m: float("nan"), {}, "finite number"),
        (size, {"drop": -1}, "drop must be"),
        (size, {"drop": float("nan")}, "drop must be"),
        (size, {"num_trials": 0}, "num_trials"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_the_model_as_it_was(evaluate, settings, message):
    model = bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        prune_to_floor(
            model,
            BATCHES,
            evaluate,
            HapConfig(target_params=0.2, **LEAST),
            **{"drop": 0.0, "num_trials": 2, **settings},
        )
    assert snapshot(model) == before
