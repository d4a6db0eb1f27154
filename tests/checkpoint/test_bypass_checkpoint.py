"""Checkpoints of models with bypasses."""

import json
import subprocess
import sys

import pytest
import torch
from bypasses import bypassed_plan
from cases import batch_of, build
from plans import plan_of as plan_with
from reference import logits
from transformers import AutoModel, AutoModelForSequenceClassification

from hap_hf import ConfigError, PruningPlan, find_groups, plan_of, save_pruned, train_only_implants_
from hap_hf.checkpoint import record_plan
from hap_hf.layers.bypass import Bypass
from hap_hf.names.bypass import BypassPlan
from hap_hf.surgery import apply_plan_


@pytest.fixture(scope="module")
def pruned():
    model, batch = build("bert"), batch_of("bert")
    plan, values, _ = bypassed_plan(model, batch)
    apply_plan_(model, plan, bypass_values=values)
    record_plan(model, plan)
    return model, batch, plan


def test_a_model_with_bypasses_comes_back_bit_for_bit(pruned, tmp_path):
    model, batch, plan = pruned
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert plan_of(again) == plan
    assert sum(isinstance(m, Bypass) for m in again.modules()) == len(plan.bypasses[0]) > 0
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]["plan"]
    assert entry["format"] == 3
    # Without the bypasses in the plan it is another model, and says so.
    assert PruningPlan.from_dict(entry) == plan
    entry["stages"][0]["bypasses"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 2 * len(plan.bypasses[0])
    assert not torch.equal(logits(found, batch), logits(model, batch))


def test_a_later_round_on_the_directions_and_the_model_without_its_head_come_back(tmp_path):
    model, batch = build("bert"), batch_of("bert")
    plan, values, _ = bypassed_plan(model, batch)
    apply_plan_(model, plan, bypass_values=values)
    groups = find_groups(model, batch)
    assert any("bypass" in g.name for g in groups)
    later = plan_with({g: [0] for g in groups if g.num_units > 1})
    apply_plan_(model, later)
    record_plan(model, plan.then(later))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        alone = AutoModel.from_pretrained(tmp_path).eval()(**inputs).last_hidden_state
        assert torch.equal(alone, model.bert(**inputs).last_hidden_state)


def test_without_hap_hf_it_does_not_load(pruned, tmp_path):
    pruned[0].save_pretrained(tmp_path)
    code = (
        "import transformers, sys; transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]); "
        "assert 'hap_hf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_a_plain_checkpoint_is_refused_by_name(pruned, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot hold bypasses, and .*output"):
        save_pruned(pruned[0], tmp_path, vanilla=True)
    assert not list(tmp_path.iterdir())


def test_bypasses_can_be_trained_alone(pruned):
    model, _, plan = pruned
    names = train_only_implants_(model)
    assert set(names) == {n for b in plan.bypasses[0] for n in b.shapes}
    model.requires_grad_(True)


HOSTILE = {
    "a rank of none": (4, 0, "rank must lie"),
    "more directions than inputs": (4, 25, "rank must lie"),
    "no name": (0, "a/../b", "is no dotted tensor or attribute name"),
    "many dimensions": (6, 4, "spatial dimensions must lie"),
    "a huge stride": (5, 2**40, "stride must lie"),
    "endless use": (7, float("inf"), "uses must be a finite number"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bypasses_of_strangers_are_checked(pruned, case):
    place, value, message = HOSTILE[case]
    data = pruned[2].to_dict()
    data["stages"][0]["bypasses"][0][place] = value
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_dict(data)


def test_two_bypasses_of_one_layer_are_refused(pruned):
    data = pruned[2].to_dict()
    data["stages"][0]["bypasses"] *= 2
    with pytest.raises(ValueError, match="two bypasses that end at one layer"):
        PruningPlan.from_dict(data)


def test_names_and_sizes_of_a_bypass():
    bypass = BypassPlan("a.first", "a.last", 6, 4, 2, 2, 2, 9.0)
    assert bypass.shapes == {"a.last.bypass.down.weight": (2, 6, 1, 1), "a.last.bypass.up.weight": (4, 2, 1, 1)}
    assert (bypass.params, bypass.macs) == (20, 180)
    assert BypassPlan.from_list(bypass.to_list(), "here") == bypass
    assert bypass.renamed("x.".__add__).exit == "x.a.last"
