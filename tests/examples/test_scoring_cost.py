"""The benchmark of what scoring costs."""

import pytest
import scoring_cost
from scoring_cost import STAGES, Work, do, stage_of
from transformers import BertConfig, BertForSequenceClassification

TINY = ["--shapes", "1x32", "--batch", "3", "--tokens", "8", "--repeats", "1", "--probes", "2"]


def test_every_stage_is_a_row_beside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_cost, "alone", do)
    rows = [line.split(" | ") for line in scoring_cost.main([*TINY, "--batches", "2"]).splitlines()[2:9]]
    assert [(row[2], row[3]) for row in rows] == [("2", stage) for stage in STAGES]
    assert all(float(row[4]) >= 0 and float(row[5]) > 0 for row in rows)
    several = scoring_cost.main([*TINY, "--batches", "1", "3", "--stages", "mask_fisher"]).splitlines()[2:6]
    assert [tuple(line.split(" | ")[2:4]) for line in several] == [
        (number, stage) for number in ("1", "3") for stage in ("training", "mask_fisher")
    ]


def test_what_hessian_costs_is_that_of_one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(
        scoring_cost, "_seconds", lambda call, batches: (call(batches) and None) or float(next(ticks) + 1)
    )
    cost = do(Work("hessian", 1, 32, 1, 3, 8, 2, 1, 1))
    assert (cost.seconds, cost.passes) == (1.0 / 2, 1.0 / 2.0 / 2)


@pytest.mark.parametrize(("stage", "precision"), [("mask_ggn", "fp32"), ("mask_ggn@bf16", "bf16")])
def test_a_stage_scores_in_its_precision(stage: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(scoring_cost, "score_groups", lambda evidence, groups, config: seen.append((evidence, config)))
    model = BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=40)
    )
    stage_of(Work(stage, 1, 32, 1, 3, 8, 2, 1, 1), model)([])
    assert [(c.criterion.name, e.precision.value) for e, c in seen] == [("mask_ggn", precision)]
