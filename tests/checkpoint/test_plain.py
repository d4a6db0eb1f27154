"""Modules that are no models of transformers: saved and loaded with their plan, nothing pickled, nothing half done."""

import copy
import json

import pytest
import torch
from channel_nets import NETS
from safetensors.torch import load_file, save_file
from torch import nn

from hap_hf import (
    ConfigError,
    HapConfig,
    PlanFormatError,
    PlanMismatchError,
    UnsupportedModelError,
    load_pruned_,
    plan_of,
    prune,
    save_pruned,
)

pytestmark = pytest.mark.fast

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, torch.tensor([0, 1, 2, 0]))


class Tied(nn.Module):
    """Two names for one weight, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.twin = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 3), nn.Linear(6, 3)
        self.twin.weight = self.fc.weight
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, x):
        h = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.fc(h) + self.twin(h) + self.shift


BUILD = {"residual": NETS["residual"][0], "depthwise": NETS["depthwise"][0], "tied": Tied}


def pruned(name, **settings):
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    prune(model, [BATCH], HapConfig(prune_ratio=0.5, method="random", progress=False, **settings))
    return model


@pytest.mark.parametrize("implant_ratio", [0.0, 0.5])
@pytest.mark.parametrize("name", BUILD)
def test_what_is_saved_is_loaded_bit_for_bit_and_pruned_on(name, implant_ratio, tmp_path):
    model = pruned(name, implant_ratio=implant_ratio)
    save_pruned(model, tmp_path / "first")
    assert {f.name for f in (tmp_path / "first").iterdir()} == {"model.safetensors", "plan.json"}
    torch.manual_seed(1)
    again = BUILD[name]().eval()
    assert load_pruned_(again, tmp_path / "first") == plan_of(again) == plan_of(model)
    assert torch.equal(again(IMAGES), model(IMAGES))
    prune(again, [BATCH], HapConfig(prune_ratio=0.3, method="random", progress=False))
    save_pruned(again, tmp_path / "second")
    last = BUILD[name]().eval()
    assert len(load_pruned_(last, tmp_path / "second").stages) == 2
    assert torch.equal(last(IMAGES), again(IMAGES))


def test_a_copy_carries_the_plan_and_a_dense_module_has_none(tmp_path):
    model = pruned("residual")
    assert plan_of(copy.deepcopy(model)) == plan_of(model)
    dense = BUILD["residual"]()
    assert plan_of(dense) is None
    with pytest.raises(ConfigError, match=r"carries no plan.*safetensors\.torch\.save_model"):
        save_pruned(dense, tmp_path)
    with pytest.raises(UnsupportedModelError, match="vanilla"):
        save_pruned(model, tmp_path, vanilla=True)


def test_another_head_after_pruning_drops_the_record_with_a_word(caplog):
    model = pruned("residual")
    model.head.fc = nn.Linear(model.head.fc.in_features, 2)
    prune(model, [(IMAGES, torch.tensor([0, 1, 1, 0]))], HapConfig(prune_ratio=0.3, method="random", progress=False))
    assert len(plan_of(model).stages) == 1
    assert "only what is pruned from now on is recorded" in caplog.text


def other_module(folder, model):
    return BUILD["depthwise"]()


def pruned_already(folder, model):
    return copy.deepcopy(model)


def no_plan(folder, model):
    (folder / "plan.json").unlink()


def no_weights(folder, model):
    (folder / "model.safetensors").unlink()


def no_json(folder, model):
    (folder / "plan.json").write_text("{" * 5000)


def pickle_instead(folder, model):
    torch.save(model.state_dict(), folder / "model.safetensors")


def other_plan(folder, model):
    plan = json.loads((folder / "plan.json").read_text())
    plan["stages"] = []
    (folder / "plan.json").write_text(json.dumps(plan))


def missing_tensor(folder, model):
    tensors = load_file(folder / "model.safetensors")
    del tensors["a1.weight"]
    save_file(tensors, folder / "model.safetensors")


def more_tensors(folder, model):
    save_file({**load_file(folder / "model.safetensors"), "x": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (other_module, PlanMismatchError),
        (pruned_already, PlanMismatchError),
        (no_plan, PlanFormatError),
        (no_weights, PlanMismatchError),
        (no_json, PlanFormatError),
        (pickle_instead, PlanMismatchError),
        (other_plan, PlanMismatchError),
        (missing_tensor, PlanMismatchError),
        (more_tensors, PlanMismatchError),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_module_as_it_was(spoil, error, tmp_path):
    model = pruned("residual")
    save_pruned(model, tmp_path)
    target = spoil(tmp_path, model) or BUILD["residual"]()
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(error):
        load_pruned_(target, tmp_path)
    after = target.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())
