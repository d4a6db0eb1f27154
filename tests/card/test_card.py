"""The card of a pruned model, written here and pushed to a stand-in of the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documented import bert, text_batches
from huggingface_hub import ModelCard
from plans import plan_of

from hap_hf import HapConfig, apply_plan_, find_groups, prune, record_plan
from hap_hf.card import CardFacts, write_card
from hap_hf.card.section import BEGIN, plan_in_words
from hap_hf.names.plan import PruningPlan

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def pruned():
    model = bert()
    return model, prune(model, text_batches(), HapConfig(target_params=0.5, implant_ratio=0.3, progress=False))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a process saw that pushed to the stand-in."""
    root, file = HELPERS.parents[1], tmp_path_factory.mktemp("pushed") / "seen.json"
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{HELPERS}"}
    done = subprocess.run(
        [sys.executable, HELPERS / "pushed.py", file], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_card_says_what_was_done_and_how_to_load(pruned, tmp_path):
    model, report = pruned
    facts = CardFacts.of(
        model,
        base="me/dense",
        task="text-classification",
        data="train.csv",
        metric="accuracy",
        results={"before": 0.9, "after pruning": 0.8, "after training": 0.85},
        latency=(2.0, 1.25, "of 8 here"),
        pictures=["widths.png"],
    )
    card = ModelCard.load(write_card(facts, tmp_path, "me/smaller"))
    data = card.data.to_dict()
    assert {"hap_hf", "pruned"} <= set(data["tags"])
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        "transformers",
        "me/dense",
        "finetune",
    )
    (entry,) = data["model-index"]
    assert entry["results"][0]["metrics"][0]["value"] == 0.85
    for said in (
        f"| parameters | {report.before.params:,} |",
        "| accuracy | 90.00% | 85.00% |",
        "| accuracy before training again |  | 80.00% |",
        "| milliseconds a batch, of 8 here | 2.0 | 1.2 |",
        "import hap_hf",
        'BertForSequenceClassification.from_pretrained("me/smaller")',
        "![Widths before and after](widths.png)\n\n*A bar for each layer",
        *plan_in_words(report.plan),
    ):
        assert said in card.text


def test_in_a_card_that_is_there_only_the_section_is_renewed(pruned, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nWords of my own.\n")
    facts = CardFacts.of(pruned[0], base="me/dense")
    for _ in range(2):
        card = ModelCard.load(write_card(facts, tmp_path))
    assert card.text.count(BEGIN) == 1
    assert "Words of my own." in card.text
    assert card.data.license == "mit"
    assert card.data.tags == ["mine", *[t for t in card.data.tags if t != "mine"]]
    assert card.data.tags.count("pruned") == 1


def test_a_dense_model_has_no_facts_and_a_folder_is_no_base_of_the_hub(pruned, tmp_path, monkeypatch):
    assert CardFacts.of(bert()) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for base in ("mine", "/a/b/c", "../x", "a b", ""):
        facts = CardFacts.of(pruned[0], base=base)
        assert facts.base_on_the_hub is None
        assert "base_model" not in ModelCard.load(write_card(facts, tmp_path)).data.to_dict()


def test_names_of_strangers_do_not_leave_their_place(pruned, tmp_path):
    facts = CardFacts.of(pruned[0], base="x`|\n# y <script>", metric="a|b", results={"before": 1, "after": 1})
    text = ModelCard.load(write_card(facts, tmp_path, 'q")\nimport os')).text
    assert "<script>" not in text
    assert "\n# y" not in text
    assert 'from_pretrained("q)import os")' in text


def test_pushed_models_carry_card_and_report(seen):
    assert {"README.md", "config.json", "model.safetensors", "pruning_report.json", "pruning_report.md"} <= set(
        seen["pruned"]
    )
    before, after = seen["params"]
    assert f"| parameters | {before:,} | {after:,} (" in seen["card"]
    assert "base_model: me/dense" in seen["card"]
    assert "- pruned" in seen["card"]
    assert BEGIN not in seen["dense card"]


def test_what_was_pushed_is_read_back(seen):
    assert seen["same"]
    assert seen["answer"].startswith("LABEL_")
    assert seen["from a pull request"] == seen["params"][1]


def test_inspect_reads_headers_alone(seen):
    assert seen["inspected"] == seen["params"][1]
    assert seen["whole files"] == []


def test_what_may_not_be_seen_is_told_as_what_it_is(seen):
    for name in ("missing", "private"):
        code, said = seen[name]
        assert code == 1
        assert "has no such model or keeps it private" in said
        assert "hf auth login" in said


def test_the_trainers_card_has_the_section(seen):
    assert {"README.md", "pruning_report.json", "pruning_scores.safetensors"} <= set(seen["trained"])
    assert "Training hyperparameters" in seen["trained card"]
    assert seen["trained card"].count(BEGIN) == 1
    assert "base_model: me/dense" in seen["trained card"]


def test_stages_of_several_rounds_are_one_line_a_kind():
    model = bert()
    for keep in (0.8, 0.8):
        report = prune(model, text_batches(), HapConfig(target_params=keep, method="magnitude", progress=False))
    record_plan(model, type(report.plan)(()))
    lines = plan_in_words(CardFacts.of(model).plan)
    assert lines[0] == "in 2 prunings, of which the table shows the last"
    assert lines[1].startswith("heads: 8 -> ")
    assert len(lines) == 3


def test_layers_with_one_head_left_count_when_others_are_pruned_again(tmp_path):
    model, batch = bert(), text_batches()[0]
    for gone in ([[0], [1, 2, 3]], [[0]]):
        heads = [g for g in find_groups(model, batch) if g.kind == "heads" and g.num_units > 1]
        plan = plan_of(dict(zip(heads, gone, strict=True)))
        apply_plan_(model, plan)
        record_plan(model, plan)
    facts = CardFacts.of(model)
    assert plan_in_words(facts.plan)[1:] == ["heads: 8 -> 3 in 2 layers, 1 to 2 of them in each"]
    write_card(facts, tmp_path)
    none_left = PruningPlan((facts.plan.stages[0], ()))
    assert plan_in_words(none_left)[1:] == ["heads: 8 -> 4 in 2 layers, 1 to 3 of them in each"]


def test_what_an_earlier_pruning_was_worth_goes_and_other_results_stay(pruned, tmp_path):
    said = {"task": "text-classification", "data": "train.csv", "metric": "accuracy"}
    for data, value in (("other.csv", 0.7), ("train.csv", 0.9), ("train.csv", 0.8)):
        facts = CardFacts.of(pruned[0], **{**said, "data": data}, results={"before": 1.0, "after pruning": value})
        card = ModelCard.load(write_card(facts, tmp_path))
    found = {r.dataset_name: r.metric_value for r in card.data.eval_results}
    assert found == {"other.csv": 0.7, "train.csv": 0.8}
    (tmp_path / "README.md").write_text("---\nmodel-index: nonsense\n---\nMine.\n")
    card = ModelCard.load(write_card(facts, tmp_path))
    assert [r.metric_value for r in card.data.eval_results] == [0.8]
