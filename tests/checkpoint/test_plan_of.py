"""The plan of a model, and that of a checkpoint whose weights are not read."""

import pytest
from checkpoints import pruned, single

from hap_hf import ConfigError, plan_of


def test_the_plan_of_a_folder_is_that_of_its_model(tmp_path):
    model, _ = pruned("bert")
    model.save_pretrained(tmp_path)
    assert plan_of(tmp_path) == plan_of(str(tmp_path)) == plan_of(model) is not None
    single("bert")[0].save_pretrained(tmp_path / "dense")
    assert plan_of(tmp_path / "dense") is None
    with pytest.raises(ConfigError, match="there is no folder"):
        plan_of("./nothing")
    for wrong in (None, 3, pruned):
        with pytest.raises(ConfigError, match="expected a model, or the folder or name of a checkpoint, got"):
            plan_of(wrong)
