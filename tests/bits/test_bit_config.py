"""Settings of bits: what they allow, by pattern, and through JSON."""

import pytest
from checkpoints import single

from hap_hf import BitConfig, ConfigError, quantize_
from hap_hf.model.quantizing import quantized_layers


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_bits": 1}, "from 2 to 8"),
        ({"weight_bits": 16}, "from 2 to 8"),
        ({"weight_bits": None}, "from 2 to 8"),
        ({"weight_bits": {"*": 9}}, "from 2 to 8"),
        ({"activation_bits": True}, "from 2 to 8, or None"),
        ({"activations": "affine"}, "must be one of"),
        ({"ranges": "histogram"}, "must be one of"),
        ({"exclude": 3}, "sequence of strings"),
        ({"max_batches": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        BitConfig(**settings)


def test_bits_by_pattern_and_a_config_through_json():
    config = BitConfig(weight_bits={"*attention*": 6, "*.query": 4}, activation_bits={"*": None, "*.key": 8})
    assert BitConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="did you mean 'weight_bits'"):
        BitConfig.from_dict({"weights_bits": 3})
    model, batch = single("bert")
    layers = quantize_(model, [batch], config).plan.layers
    assert layers["bert.encoder.layer.0.attention.self.query"].weight == 4
    assert layers["bert.encoder.layer.0.attention.self.value"].weight == 6
    assert layers["classifier"].weight == 8
    assert layers["classifier"].activation is None
    assert layers["bert.encoder.layer.1.attention.self.key"].activation == 8
    assert hasattr(dict(quantized_layers(model))["bert.encoder.layer.1.attention.self.key"], "input_range")
