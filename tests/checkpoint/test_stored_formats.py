"""Checkpoints that earlier versions wrote, which must load forever."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hap_hf import ImplantLinear, plan_of
from hap_hf.names.plan import FORMAT_VERSION

STORED = sorted((Path(__file__).parent / "stored").glob("format_*"))


@pytest.mark.parametrize("folder", STORED, ids=lambda f: f.name)
def test_a_checkpoint_of_every_format_loads_with_the_logits_that_it_had(folder, tmp_path):
    expected = json.loads((folder / "expected.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids, logits = torch.tensor(expected["input_ids"]), torch.tensor(expected["logits"], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-9, atol=1e-9)
    stages = [[[g.group.name, g.actions] for g in stage] for stage in plan_of(model).stages]
    assert stages == expected["stages"]
    assert any(isinstance(module, ImplantLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["plan"]["format"]) == ("hap_hf", FORMAT_VERSION)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_every_older_format_has_a_stored_checkpoint():
    assert {folder.name for folder in STORED} == {f"format_{number}" for number in range(1, FORMAT_VERSION)}
