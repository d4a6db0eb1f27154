"""Settings are checked when they are made, survive JSON, and say what was meant where there is none of a name."""

import dataclasses
import json
import logging
import math

import pytest

from hap_hf import (
    GGN,
    Amount,
    Coupling,
    GGNQuadratic,
    Hessian,
    HessianSplit,
    Hvp,
    Magnitude,
    MaskFisher,
    MaskGGN,
    Params,
    Units,
    __version__,
)
from hap_hf.config import HapConfig
from hap_hf.criteria import Criterion, known_criteria
from hap_hf.errors import ConfigError, HapError
from hap_hf.evidence.precision import Precision
from hap_hf.names.group import Kind
from hap_hf.surgery.calibration import ImplantInit


def test_strings_stand_for_enums_and_criteria():
    config = HapConfig(prune_ratio=0.5, kinds="ffn", method="magnitude", precision="fp16", implant_init="zero")
    assert config.kinds == (Kind.FFN,)
    assert (config.method, config.precision, config.implant_init) == (
        Magnitude(),
        Precision.FP16,
        ImplantInit.ZERO,
    )
    assert isinstance(config.method, Magnitude)
    assert config.criterion is config.method
    assert HapConfig(prune_ratio=0.5, kinds=["ffn", Kind.HEADS], exclude="a*").exclude == ("a*",)


@pytest.mark.parametrize("name", known_criteria())
def test_every_criterion_can_be_named_or_given(name):
    by_name, given = (
        HapConfig(prune_ratio=0.5, method=name),
        HapConfig(prune_ratio=0.5, method=known_criteria()[name]()),
    )
    assert by_name == given
    assert isinstance(by_name.criterion, Criterion)
    assert by_name.criterion.name == name


@pytest.mark.parametrize(
    "method",
    [
        "random",
        MaskGGN(num_output_probes=None),
        MaskFisher(),
        GGN(coupling="filter", num_output_probes=3),
        GGNQuadratic(),
        Hessian(num_probes=32, stop_share=0.05, hvp="finite_difference", coupling="joint"),
        HessianSplit(hvp=Hvp.FORWARD_OVER_REVERSE, num_output_probes=None),
        Magnitude(coupling=Coupling.JOINT),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "amount",
    [
        {"prune_ratio": 0.5},
        {"target_params": 0.3},
        {"target_macs": 0.99},
        {"amount": Amount("params", 0.25)},
        {"amount": Amount(Units(), 1)},
    ],
    ids=str,
)
def test_settings_survive_json(amount, method):
    config = HapConfig(**amount, implant_ratio=0.2, kinds="heads", exclude=["a", "b*"], method=method, max_batches=3)
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = HapConfig.from_dict(json.loads(text))
    assert again == config
    assert again.criterion == config.criterion
    assert type(again.criterion) is type(config.criterion)
    assert again.asked == config.asked


def test_a_dict_holds_plain_values_only():
    values = HapConfig(amount=Amount("macs", 0.5), method=Hessian(hvp="finite_difference")).to_dict()
    assert values["hap_hf"] == __version__
    assert values["method"] == {
        "name": "hessian",
        "num_probes": 8,
        "stop_share": None,
        "hvp": "finite_difference",
        "coupling": "sum",
    }
    assert values["amount"] == {"what": {"name": "macs"}, "keep": 0.5}
    assert set(values) == {"hap_hf", *(f.name for f in dataclasses.fields(HapConfig))}

    def assert_plain(value):
        assert type(value) in {str, int, float, bool, list, dict, type(None)}
        if isinstance(value, (list, dict)):
            for inner in value if isinstance(value, list) else [*value, *value.values()]:
                assert_plain(inner)

    assert_plain(values)


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="prune_ratio"):
        HapConfig(prune_ratio=0.5).prune_ratio = 0.6
    with pytest.raises(dataclasses.FrozenInstanceError, match="num_output_probes"):
        HapConfig(prune_ratio=0.5).criterion.num_output_probes = 2


def test_a_config_error_is_a_value_error_too():
    assert issubclass(ConfigError, HapError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of prune_ratio, target_params, .* and amount, got none"),
        (
            {"prune_ratio": 0.5, "target_macs": 0.5},
            r"exactly one of .*, got \{'prune_ratio': 0.5, 'target_macs': 0.5\}",
        ),
        ({"target_params": 0.5, "target_macs": 0.5}, "exactly one of"),
        ({"target_params": 0.5, "amount": Amount("params", 0.5)}, "exactly one of"),
        ({"amount": 0.5}, r"amount must be an Amount, got 0.5; for example Amount\('params', 0.5\)"),
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
        ({"prune_ratio": 0.5, "max_batches": 0}, "max_batches must be an integer of at least 1, got 0"),
        ({"prune_ratio": 0.5, "num_passes": 0}, "num_passes must be an integer of at least 1, got 0"),
        ({"prune_ratio": 0.5, "seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"prune_ratio": 0.5, "seed": True}, "seed must be an integer of at least 0, got True"),
        ({"prune_ratio": 0.5, "seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"prune_ratio": 0.5, "progress": "no"}, "progress must be True or False, got 'no'"),
        ({"prune_ratio": 0.5, "compensate": 1}, "compensate must be True, False or None, got 1"),
        ({"prune_ratio": 0.5, "kinds": ()}, "kinds is empty"),
        ({"prune_ratio": 0.5, "kinds": "conv"}, r"kinds must be one of \['heads', 'ffn', 'channels'\], got 'conv'"),
        ({"prune_ratio": 0.5, "kinds": 3}, "kinds must be a string or a sequence of strings, got 3"),
        ({"prune_ratio": 0.5, "exclude": [3]}, "exclude must hold strings, got 3"),
        (
            {"prune_ratio": 0.5, "method": "hesian"},
            "method must be one of .*'hessian'.*, got 'hesian'; did you mean 'hessian'",
        ),
        ({"prune_ratio": 0.5, "method": None}, "method must be one of .*, got None"),
        ({"prune_ratio": 0.5, "method": ["hessian"]}, r"method must be one of .*, got \['hessian'\]"),
        ({"prune_ratio": 0.5, "method": {}}, "method must be one of .*, got None"),
        ({"prune_ratio": 0.5, "method": Hessian}, r"got the class Hessian; write method=Hessian\(\)"),
        ({"prune_ratio": 0.5, "method": {"name": "hessian", "probes": 2}}, "hessian has no setting probes; it has"),
        ({"prune_ratio": 0.5, "method": {"name": "hessian", 1: 2}}, "hessian has no setting 1; it has"),
        ({"prune_ratio": 0.5, "precision": 16}, "precision must be one of .*, got 16"),
        ({"prune_ratio": 0.5, "implant_init": "SVD"}, "implant_init must be one of .*, got 'SVD'"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        HapConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hessian(num_probes=1), "num_probes must be an integer of at least 2, got 1"),
        (lambda: HessianSplit(num_probes=1), "num_probes must be an integer of at least 2, got 1"),
        (lambda: Hessian(stop_share=1.5), r"stop_share must lie in \(0, 1\), got 1.5"),
        (lambda: Hessian(hvp="forward"), "hvp must be one of .*'double_backward'.*, got 'forward'"),
        (lambda: MaskGGN(num_output_probes=0), "num_output_probes must be an integer of at least 1, got 0"),
        (lambda: GGN(num_output_probes=1.0), "num_output_probes must be an integer of at least 1, got 1.0"),
        (lambda: GGN(coupling="max"), r"coupling must be one of \['joint', 'sum', 'filter'\], got 'max'"),
        (lambda: Magnitude(coupling=None), "coupling must be one of .*, got None"),
        (lambda: Amount("params", 0), r"an amount keeps a share in \(0, 1\), got 0"),
        (lambda: Amount("params", 50), r"an amount keeps a share in \(0, 1\), got 50"),
        (lambda: Amount("param", 0.5), r"counted in one of \['macs', .*'params', 'units'.* got 'param'"),
    ],
)
def test_settings_of_criteria_and_amounts_are_checked_when_they_are_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "settings", [{"prune_ratio": 0}, {"prune_ratio": 0.5, "implant_ratio": 1, "max_group_ratio": 1}]
)
def test_the_ends_that_belong_to_the_range_are_accepted(settings):
    assert HapConfig(**settings).prune_ratio == settings["prune_ratio"]


def test_unknown_names_are_an_error():
    with pytest.raises(
        ConfigError, match=r"unknown settings \['prune_rate'\]; did you mean 'prune_ratio'\?; known are .*'prune_ratio'"
    ):
        HapConfig.from_dict({"prune_rate": 0.5})


@pytest.mark.parametrize("make", [lambda s: HapConfig(**s), HapConfig.from_dict], ids=["HapConfig", "from_dict"])
@pytest.mark.parametrize(
    ("name", "owners"),
    [
        ("num_probes", [r"method=Hessian\(num_probes=\.\.\.\)", r"method=HessianSplit\(num_probes=\.\.\.\)"]),
        ("num_output_probes", [r"method=MaskGGN\(num_output_probes=\.\.\.\)", "GGNQuadratic"]),
        ("coupling", [r"method=Magnitude\(coupling=\.\.\.\)"]),
        ("hvp", [r"method=Hessian\(hvp=\.\.\.\)"]),
        ("stop_share", [r"method=HessianSplit\(stop_share=\.\.\.\)"]),
    ],
)
def test_a_setting_of_a_criterion_says_where_it_belongs(make, name, owners):
    with pytest.raises(ConfigError, match=rf"{name}.*: it belongs to a criterion, write method=") as caught:
        make({"prune_ratio": 0.5, "method": "hessian", name: 2})
    for owner in owners:
        assert caught.match(owner)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("prune_ration", "prune_ratio"),
        ("target_param", "target_params"),
        ("max_batch", "max_batches"),
        ("implants_ratio", "implant_ratio"),
    ],
)
def test_a_typo_is_told_from_what_was_meant(typed, meant):
    with pytest.raises(ConfigError, match=f"HapConfig has no setting '{typed}'; did you mean '{meant}'\\?$"):
        HapConfig(**{"prune_ratio": 0.5, typed: 0.5})


def test_a_name_like_no_other_has_no_suggestion():
    with pytest.raises(ConfigError, match=r"HapConfig has no setting 'xyzzy'$"):
        HapConfig(prune_ratio=0.5, xyzzy=1)


def test_unknown_names_of_a_newer_version_are_dropped_with_a_warning(caplog):
    config = HapConfig(prune_ratio=0.25, method=Hessian(num_probes=4), seed=3)
    newer = {**config.to_dict(), "hap_hf": "99.0.0", "sparsity": "2:4", "anneal": {"from": 1}}
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        assert HapConfig.from_dict(newer) == config
    (record,) = caplog.records
    assert "hap_hf 99.0.0 wrote settings ['anneal', 'sparsity'] that this one" in record.getMessage()
    assert __version__ in record.getMessage()


def test_known_names_of_a_newer_version_give_no_warning(caplog):
    config = HapConfig(prune_ratio=0.25)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        assert HapConfig.from_dict({**config.to_dict(), "hap_hf": "99.0.0"}) == config
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.0.1", __version__, None, "newest", 99])
def test_unknown_names_of_any_other_version_are_an_error(version):
    values = {**HapConfig(prune_ratio=0.25).to_dict(), "hap_hf": version, "sparsity": "2:4"}
    with pytest.raises(ConfigError, match=r"unknown settings \['sparsity'\]"):
        HapConfig.from_dict(values)


def test_every_setting_has_a_help_text():
    texts = HapConfig.help()
    assert list(texts) == [f.name for f in dataclasses.fields(HapConfig)]
    for name, text in texts.items():
        assert len(text) > 15, name
        assert text.endswith("."), name
        assert text[0].isupper(), name
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("name", known_criteria())
def test_every_setting_of_a_criterion_has_a_help_text(name):
    for field in dataclasses.fields(known_criteria()[name]):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_cost": True}, "per_cost=True needs a budget to count costs by, got prune_ratio"),
        ({"num_passes": 2, "method": "magnitude"}, "num_passes=2 has no meaning with method='magnitude'"),
        ({"num_passes": 3, "method": "random"}, "num_passes=3 has no meaning with method='random'"),
    ],
)
def test_settings_that_nothing_would_read_are_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        HapConfig(prune_ratio=0.5, **settings)


def test_what_is_asked_for_is_one_amount_whatever_setting_asked():
    assert HapConfig(prune_ratio=0.25).asked == Amount(Units(), 0.75)
    assert HapConfig(target_params=0.5).asked == HapConfig(amount=Amount("params", 0.5)).asked == Amount(Params(), 0.5)
    assert HapConfig(target_macs=0.5).asked == Amount("macs", 0.5)
    assert [str(HapConfig(**a).asked) for a in ({"prune_ratio": 0.25}, {"target_params": 0.5})] == [
        "prune_ratio=0.25",
        "target_params=0.5",
    ]


def test_criteria_say_what_is_done_unless_the_settings_do():
    default, hessian = HapConfig(target_params=0.5), HapConfig(target_params=0.5, method="hessian")
    assert (default.passes, default.per, default.compensates) == (2, Params(), True)
    assert (hessian.passes, hessian.per, hessian.compensates) == (1, None, False)
    changed = HapConfig(target_params=0.5, method="hessian", num_passes=2, per_cost=True, compensate=True)
    assert (changed.passes, changed.per, changed.compensates) == (2, Params(), True)
    assert HapConfig(prune_ratio=0.5).per is None


@pytest.mark.parametrize("values", [None, 5, ["prune_ratio"], {1: 2, "a": 3}])
def test_what_is_no_mapping_of_names_is_an_error(values):
    with pytest.raises(ConfigError, match=r"settings must be a mapping|unknown settings"):
        HapConfig.from_dict(values)


@pytest.mark.parametrize(
    "amount",
    [
        0.5,
        {},
        {"what": "params", "keep": 0.5},
        {"what": {"name": "bytes"}, "keep": 0.5},
        {"what": {"name": ["params"]}, "keep": 0.5},
        {"what": {"name": "params", "bits": 8}, "keep": 0.5},
        {"what": {"name": "params"}, "keep": 2},
    ],
)
def test_what_is_no_amount_is_an_error(amount):
    with pytest.raises(ConfigError, match=r"amount|params is no currency with the settings \['bits'\]"):
        HapConfig.from_dict({"amount": amount})
