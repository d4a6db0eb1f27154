"""Settings are checked when they are made."""

import dataclasses
import json
import math

import pytest

from hap_hf.config import HapConfig, ImplantInit, Method, Precision
from hap_hf.errors import ConfigError, HapError
from hap_hf.names.group import Kind


def test_strings_stand_for_enums():
    config = HapConfig(prune_ratio=0.5, kinds="ffn", method="magnitude", precision="fp16", implant_init="zero")
    assert config.kinds == (Kind.FFN,)
    assert (config.method, config.precision, config.implant_init) == (
        Method.MAGNITUDE,
        Precision.FP16,
        ImplantInit.ZERO,
    )
    assert isinstance(config.method, Method)
    assert HapConfig(prune_ratio=0.5, kinds=["ffn", Kind.HEADS], exclude="a*").exclude == ("a*",)


@pytest.mark.parametrize("amount", [{"prune_ratio": 0.5}, {"target_params": 0.3}, {"target_macs": 0.99}])
def test_settings_survive_json(amount):
    config = HapConfig(**amount, implant_ratio=0.2, kinds="heads", exclude=["a", "b*"], method="random", max_batches=3)
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert HapConfig.from_dict(json.loads(text)) == config


def test_a_dict_holds_plain_values_only():
    for value in HapConfig(prune_ratio=0.5).to_dict().values():
        assert type(value) in {str, int, float, bool, list, type(None)}
        assert all(type(v) is str for v in value) if isinstance(value, list) else True


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="prune_ratio"):
        HapConfig(prune_ratio=0.5).prune_ratio = 0.6


def test_a_config_error_is_a_value_error_too():
    assert issubclass(ConfigError, HapError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of prune_ratio, target_params and target_macs, got none"),
        (
            {"prune_ratio": 0.5, "target_macs": 0.5},
            r"exactly one of .*, got \{'prune_ratio': 0.5, 'target_macs': 0.5\}",
        ),
        ({"target_params": 0.5, "target_macs": 0.5}, "exactly one of"),
        ({"prune_ratio": 1}, r"prune_ratio must lie in \[0, 1\), got 1"),
        ({"prune_ratio": -0.1}, r"prune_ratio must lie in \[0, 1\), got -0.1"),
        ({"prune_ratio": math.nan}, r"prune_ratio must lie in \[0, 1\), got nan"),
        ({"prune_ratio": "0.5"}, r"prune_ratio must be a number in \[0, 1\), got '0.5'"),
        ({"prune_ratio": True}, r"prune_ratio must be a number in \[0, 1\), got True"),
        ({"target_params": 0}, r"target_params must lie in \(0, 1\), got 0"),
        ({"target_params": 1.0}, r"target_params must lie in \(0, 1\), got 1.0"),
        ({"target_macs": math.inf}, r"target_macs must lie in \(0, 1\), got inf"),
        ({"prune_ratio": 0.5, "implant_ratio": 1.1}, r"implant_ratio must lie in \[0, 1\], got 1.1"),
        ({"prune_ratio": 0.5, "implant_ratio": None}, r"implant_ratio must be a number in \[0, 1\], got None"),
        ({"prune_ratio": 0.5, "max_group_ratio": 0}, r"max_group_ratio must lie in \(0, 1\], got 0"),
        ({"prune_ratio": 0.5, "implant_cost": 1}, r"implant_cost must lie in \(0, 1\), got 1"),
        ({"prune_ratio": 0.5, "round_to": 0}, "round_to must be an integer of at least 1, got 0"),
        ({"prune_ratio": 0.5, "round_to": 8.0}, "round_to must be an integer of at least 1, got 8.0"),
        ({"prune_ratio": 0.5, "num_probes": 1}, "num_probes must be an integer of at least 2, got 1"),
        ({"prune_ratio": 0.5, "max_batches": 0}, "max_batches must be an integer of at least 1, got 0"),
        ({"prune_ratio": 0.5, "seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"prune_ratio": 0.5, "seed": True}, "seed must be an integer of at least 0, got True"),
        ({"prune_ratio": 0.5, "seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"prune_ratio": 0.5, "progress": "no"}, "progress must be True or False, got 'no'"),
        ({"prune_ratio": 0.5, "kinds": ()}, "kinds is empty"),
        ({"prune_ratio": 0.5, "kinds": "conv"}, r"kinds must be one of \['heads', 'ffn', 'channels'\], got 'conv'"),
        ({"prune_ratio": 0.5, "kinds": 3}, "kinds must be a string or a sequence of strings, got 3"),
        ({"prune_ratio": 0.5, "exclude": [3]}, "exclude must hold strings, got 3"),
        ({"prune_ratio": 0.5, "method": "hesian"}, "method must be one of .*'hessian'.*, got 'hesian'"),
        ({"prune_ratio": 0.5, "method": None}, "method must be one of .*, got None"),
        ({"prune_ratio": 0.5, "method": ["hessian"]}, r"method must be one of .*, got \['hessian'\]"),
        ({"prune_ratio": 0.5, "precision": 16}, "precision must be one of .*, got 16"),
        ({"prune_ratio": 0.5, "implant_init": "SVD"}, "implant_init must be one of .*, got 'SVD'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        HapConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"prune_ratio": 0}, {"prune_ratio": 0.5, "implant_ratio": 1, "max_group_ratio": 1}]
)
def test_the_ends_that_belong_to_the_range_are_accepted(settings):
    assert HapConfig(**settings).prune_ratio == settings["prune_ratio"]


def test_unknown_names_are_an_error():
    with pytest.raises(ConfigError, match=r"unknown settings \['prune_rate'\]; known are .*'prune_ratio'"):
        HapConfig.from_dict({"prune_rate": 0.5})


@pytest.mark.parametrize("values", [None, 5, ["prune_ratio"], {1: 2, "a": 3}])
def test_what_is_no_mapping_of_names_is_an_error(values):
    with pytest.raises(ConfigError, match=r"settings must be a mapping|unknown settings"):
        HapConfig.from_dict(values)
