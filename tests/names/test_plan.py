"""Plans: their arithmetic, their JSON, and that JSON from strangers cannot do more than fail."""

import copy
import json
import math
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic_groups import ffn_group, heads_group

from hap_hf.errors import PlanFormatError
from hap_hf.names.actions import decode_actions, encode_actions
from hap_hf.names.group import Counter, Group, ImplantShape, Kind, Role, Slice
from hap_hf.names.outcome import footprint, whole
from hap_hf.names.plan import MAX_PROVENANCE, MAX_STAGES, MAX_UNITS, GroupPlan, PruningPlan

pytestmark = pytest.mark.fast


def example() -> PruningPlan:
    heads, ffn = heads_group("layer.0", 6), ffn_group("layer.0", 40)
    heads = Group(heads.name, heads.kind, 6, heads.slices, (Counter("layer.0.num_heads", 1),), 50.0, may_be_empty=True)
    stage = (
        GroupPlan(heads, "kkippi", {f"layer.0.{p}.weight": 1 for p in "qkv"}),
        GroupPlan(ffn, "k" * 30 + "p" * 10),
    )
    settings = {"method": {"name": "hessian", "num_probes": 8}, "kinds": ["heads", "ffn"], "seed": 3}
    return PruningPlan((stage,), ({"threshold": 0.25, "settings": settings, "target_macs": None, "ok": True},))


def in_format_1(plan):
    """Return what hap_hf 0.1 wrote of a plan: bare lists of groups, and one provenance for all of them."""
    written = plan.to_dict()
    return {
        "format": 1,
        "stages": [stage["groups"] for stage in written["stages"]],
        "provenance": {"threshold": 0.25, "method": "hessian", "seed": 3, "target_macs": None, "ok": True},
    }


def changed(*path, value, data=None):
    """Return the example as a dict with the value at ``path`` replaced."""
    data = json.loads(json.dumps(example().to_dict() if data is None else data))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def old(*path, value):
    """Return the example in format 1 with the value at ``path`` replaced."""
    return changed(*path, value=value, data=in_format_1(example()))


STAGE = ("stages", 0)
GROUP = (*STAGE, "groups", 0)
SLICE = (*GROUP, "slices", 0)
PROVENANCE = (*STAGE, "provenance")


def test_a_plan_survives_json_unchanged():
    text = json.dumps(example().to_dict(), allow_nan=False)
    assert PruningPlan.from_dict(json.loads(text)) == example()
    assert json.dumps(PruningPlan.from_dict(json.loads(text)).to_dict()) == text


def test_a_plan_is_written_in_format_3_with_a_provenance_for_each_stage():
    first, second = example(), PruningPlan(((GroupPlan(ffn_group("x", 4), "kkkp"),),), ({"round": 2},))
    written = first.then(second).to_dict()
    assert written["format"] == 3
    assert [set(stage) for stage in written["stages"]] == [{"groups", "bypasses", "provenance"}] * 2
    assert [stage["provenance"] for stage in written["stages"]] == [dict(first.provenance[0]), {"round": 2}]
    assert [[g["name"] for g in stage["groups"]] for stage in written["stages"]] == [
        ["layer.0:heads", "layer.0:ffn"],
        ["x:ffn"],
    ]
    assert set(written) == {"format", "stages"}


def test_a_plan_of_format_1_is_read_and_its_provenance_goes_to_the_last_stage():
    later = PruningPlan(((GroupPlan(ffn_group("x", 4), "kkkp"),),))
    both = example().then(later)
    data = in_format_1(both)
    plan = PruningPlan.from_dict(json.loads(json.dumps(data)))
    assert plan.stages == both.stages
    assert plan.provenance == ({}, data["provenance"])
    assert PruningPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_plan_without_stages_or_provenance_is_read(version):
    assert PruningPlan.from_dict({"format": version, "stages": []}) == PruningPlan(())
    data = {"format": version, "stages": [[]] if version == 1 else [{"groups": []}]}
    assert PruningPlan.from_dict(data) == PruningPlan(((),), ({},))


def test_a_stage_without_a_provenance_has_an_empty_one():
    stage = (GroupPlan(ffn_group("x", 4), "kkkp"),)
    assert PruningPlan((stage, stage), ({"round": 1},)).provenance == ({"round": 1}, {})
    assert PruningPlan((stage,)) == PruningPlan((stage,), ({},))
    with pytest.raises(ValueError, match="a provenance for each of 1 stages, got 2"):
        PruningPlan((stage,), ({}, {}))


def test_a_plan_survives_copying_and_pickling():
    assert pickle.loads(pickle.dumps(example())) == example()
    assert copy.deepcopy(example()) == example()


@pytest.mark.parametrize("seed", range(20))
def test_run_length_coding_is_undone(seed):
    rng = random.Random(seed)
    actions = "".join(rng.choice("kip") * rng.choice([1, 1, 2, 9, 10, 333]) for _ in range(rng.randint(1, 60)))
    assert decode_actions(encode_actions(actions), len(actions)) == actions
    assert decode_actions(actions, len(actions)) == actions


def test_runs_are_written_as_a_count_and_a_letter():
    assert encode_actions("kkkip" + "k" * 12) == "3kip12k"


def test_units_and_order_list_kept_ones_before_implanted_ones():
    plan = GroupPlan(ffn_group("a", 6), "ikpkip")
    assert (plan.units("k"), plan.units("i"), plan.units("p")) == ([1, 3], [0, 4], [2, 5])
    assert plan.order() == [1, 3, 0, 4]


def test_units_are_counted_by_what_happens_to_them():
    plan = GroupPlan(ffn_group("a", 7), "ikpkipk")
    assert (plan.kept, plan.implanted, plan.pruned, plan.survivors) == (3, 2, 2, 5)


def test_a_renamed_plan_has_other_names_and_is_otherwise_the_same():
    renamed = example().renamed(lambda name: f"model.{name}")
    heads, ffn = renamed
    assert (heads.group.name, ffn.group.name) == ("model.layer.0:heads", "model.layer.0:ffn")
    assert {s.tensor for s in ffn.group.slices} == {
        f"model.layer.0.{n}" for n in ("up.weight", "up.bias", "down.weight")
    }
    assert [c.attribute for c in heads.group.counters] == ["model.layer.0.num_heads"]
    assert set(heads.ranks) == {f"model.layer.0.{p}.weight" for p in "qkv"}
    assert renamed.provenance == example().provenance
    assert renamed.renamed(lambda name: name.removeprefix("model.")) == example()


def test_parameters_and_macs_are_those_counted_by_hand():
    # Query, key and value: 4 of 6 heads survive, 2 of them implanted: 2 * 4 rows of 16, rank 1 for 8 rows; 16 biases.
    heads, ffn = example()
    expected_heads = (3 * (8 * 16 + 1 * (8 + 16) + 16) + 16 * 16, 10 * (3 * (8 * 16 + 8 + 16) + 16 * 16) + 4 * 50)
    expected_ffn = (30 * 16 + 30 + 16 * 30, 10 * (30 * 16 + 16 * 30))
    assert footprint([heads]) == expected_heads
    assert footprint([ffn]) == expected_ffn
    assert footprint(example()) == tuple(map(sum, zip(expected_heads, expected_ffn, strict=True)))


def test_a_fused_projection_has_one_implant_for_all_its_slices():
    slices = tuple(Slice("c", (16, 96), 1, third * 32, 4, Role.PRODUCER, 2.0) for third in range(3))
    plan = GroupPlan(Group("g", Kind.HEADS, 8, slices), "kkkkkiip", {"c": 3})
    # 5 kept heads of 3 * 4 rows with 16 inputs; 2 * 12 rows of rank 3.
    params, macs = footprint([plan])
    assert params == 5 * 12 * 16 + 3 * (24 + 16)
    assert macs == 2 * params


def test_a_whole_group_costs_its_units():
    for group in (heads_group("a", 6), ffn_group("a", 40)):
        assert whole([group]) == (GroupPlan(group, "k" * group.num_units),)
        params, macs = footprint(whole([group]))
        assert params == group.num_units * group.params_per_unit
        assert macs == pytest.approx(group.num_units * group.macs_per_unit)


def test_composition_appends_stages_and_their_provenances():
    later = PruningPlan(((GroupPlan(ffn_group("x", 4), "kkkp"),),), ({"seed": 4},))
    both = example().then(later)
    assert both.stages == (*example().stages, *later.stages)
    assert both.provenance == (*example().provenance, {"seed": 4})
    assert list(both) == [*example(), *later]


def test_composition_is_associative():
    a, b, c = (PruningPlan(((GroupPlan(ffn_group(n, 4), "kkkp"),),), ({n: 1},)) for n in "abc")
    assert a.then(b).then(c) == a.then(b.then(c))


def test_a_plan_of_kept_units_costs_what_the_whole_groups_do():
    kept = PruningPlan(((GroupPlan(ffn_group("a", 3), "kkk"),),))
    assert footprint(kept) == footprint(whole(g.group for g in kept))
    assert footprint(example()) < footprint(whole(g.group for g in example()))


def test_names_and_numbers_load_without_torch():
    # Loaded by path, as the package itself imports torch.
    code = (
        "import sys, types; p = types.ModuleType('hap_hf'); p.__path__ = sys.argv[1:2]; sys.modules['hap_hf'] = p; "
        "import importlib; [importlib.import_module(name) for name in sys.argv[2:]]; print('torch' in sys.modules)"
    )
    names = Path(sys.modules["hap_hf.names.plan"].__file__).parent
    modules = ["hap_hf.errors", *(f"hap_hf.names.{p.stem}" for p in sorted(names.glob("[!_]*.py")))]
    assert {"hap_hf.names.plan", "hap_hf.names.amount", "hap_hf.names.outcome"} < set(modules)
    done = subprocess.run(
        [sys.executable, "-c", code, str(names.parent), *modules], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def nested(depth):
    """Return lists in lists."""
    inner: list[object] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def as_parsed(provenance):
    """Return the example with a provenance as a caller may pass it who does not read JSON, whose keys are strings."""
    data = example().to_dict()
    data["stages"][0]["provenance"] = provenance
    return data


HOSTILE = {
    "no dict": ([], "plan must be a dict, got list"),
    "nothing": (None, "plan must be a dict"),
    "no format": ({}, "plan.format must be a int, got NoneType"),
    "newer": (changed("format", value=4), "format 4, this hap_hf reads up to 3; upgrade hap_hf"),
    "older": (changed("format", value=0), "plan.format must lie between 1 and"),
    "bool as format": (changed("format", value=True), "plan.format must be a int, got bool"),
    "huge format": (changed("format", value=10**5000), "plan.format must lie between .* over forty digits"),
    "very negative format": (changed("format", value=-(10**5000)), "plan.format must lie .* over forty digits"),
    "stages no list": (changed("stages", value={}), "plan.stages must be a list"),
    "too many stages": (changed("stages", value=[[]] * (MAX_STAGES + 1)), "65 entries, at most 64"),
    "too many stages in format 1": (old("stages", value=[[]] * (MAX_STAGES + 1)), "65 entries, at most 64"),
    "stage no dict": (changed(*STAGE, value="k"), r"plan.stages\[0\] must be a dict, got str"),
    "stage of format 1": (changed(*STAGE, value=[]), r"plan.stages\[0\] must be a dict, got list"),
    "stage no list in format 1": (old(*STAGE, value="k"), r"plan.stages\[0\] must be a list, got str"),
    "stage of format 2 in format 1": (old(*STAGE, value={"groups": []}), r"plan.stages\[0\] must be a list, got dict"),
    "groups no list": (changed(*STAGE, "groups", value={}), r"plan.stages\[0\].groups must be a list, got dict"),
    "too many groups": (changed(*STAGE, "groups", value=[0] * 100_001), "100001 entries, at most 100000"),
    "too many groups in format 1": (old(*STAGE, value=[0] * 100_001), "100001 entries, at most 100000"),
    "group no dict": (changed(*GROUP, value=7), r"plan.stages\[0\].groups\[0\] must be a dict"),
    "group no dict in format 1": (old(*STAGE, 0, value=7), r"plan.stages\[0\]\[0\] must be a dict"),
    "twice the same group": (
        changed(*STAGE, "groups", value=example().to_dict()["stages"][0]["groups"] * 2),
        r"plan.stages\[0\].groups has two groups of the name",
    ),
    "twice the same group in format 1": (
        old(*STAGE, value=in_format_1(example())["stages"][0] * 2),
        r"plan.stages\[0\] has two groups of the name",
    ),
    "no kind": (changed(*GROUP, "kind", value=None), "kind must be a str, got NoneType"),
    "unknown kind": (changed(*GROUP, "kind", value="x" * 10**6), "kind must be one of .*, got 'x{60}'$"),
    "list as kind": (changed(*GROUP, "kind", value=["heads"]), "kind must be a str, got list"),
    "name no string": (changed(*GROUP, "name", value=3), "name must be a str"),
    "long name": (changed(*GROUP, "name", value="x" * 1001), "1001 characters, at most 1000"),
    "no units": (changed(*GROUP, "units", value=0), "units must lie between 1 and"),
    "negative units": (changed(*GROUP, "units", value=-6), "units must lie between 1 and"),
    "bool as units": (changed(*GROUP, "units", value=True), "units must be a int, got bool"),
    "float as units": (changed(*GROUP, "units", value=6.0), "units must be a int, got float"),
    "too many units": (changed(*GROUP, "units", value=MAX_UNITS + 1), "units must lie between 1 and"),
    "digits without end": (changed(*GROUP, "units", value=10**5000), "units must lie between .* over forty digits"),
    "more units than fit": (changed(*GROUP, "units", value=7), "7 units of width 4 from index 0 on do not fit"),
    "unknown letter": (changed(*GROUP, "actions", value="kkxppi"), "malformed at character 2: 'xppi'"),
    "capital letter": (changed(*GROUP, "actions", value="6K"), "malformed at character 0"),
    "actions no string": (changed(*GROUP, "actions", value=["k"] * 6), "actions must be a str"),
    "too few actions": (changed(*GROUP, "actions", value="5k"), "must describe exactly 6 units"),
    "too many actions": (changed(*GROUP, "actions", value="7k"), "must describe exactly 6 units"),
    "no actions": (changed(*GROUP, "actions", value=""), "must describe exactly 6 units"),
    "huge count": (changed(*GROUP, "actions", value="9999999k"), "must describe exactly 6 units"),
    "longer count": (changed(*GROUP, "actions", value="9" * 30 + "k"), "malformed at character 0"),
    "zero count": (changed(*GROUP, "actions", value="0k6k"), "must describe exactly 6 units"),
    "zero count at the end": (changed(*GROUP, "actions", value="6k0k"), "must describe exactly 6 units"),
    "negative count": (changed(*GROUP, "actions", value="-6k"), "malformed at character 0"),
    "foreign digits": (changed(*GROUP, "actions", value="\u0666k"), "malformed at character 0"),
    "count without letter": (changed(*GROUP, "actions", value="6k3"), "malformed at character 2"),
    "ten million letters": (changed(*GROUP, "actions", value="k" * 10**7), "must describe exactly 6 units"),
    "name that colours a terminal": (changed(*GROUP, "name", value="\x1b[31mred"), r"printable characters, got '\\x1b"),
    "name that cannot be encoded": (changed(*GROUP, "name", value="\ud800"), r"printable characters, got '\\ud800'"),
    "no slices": (changed(*GROUP, "slices", value=[]), "slices must name at least one tensor"),
    "slices no list": (changed(*GROUP, "slices", value=None), "slices must be a list"),
    "short slice": (changed(*SLICE, value=["a", [4]]), "must have 7 entries, got 2"),
    "slice no list": (changed(*SLICE, value={"tensor": "a"}), "must be a list, got dict"),
    "tensor no string": (changed(*SLICE, 0, value=1), "name must be a str"),
    "tensor with a space": (changed(*SLICE, 0, value="a b"), "'a b' is no dotted"),
    "tensor with empty part": (changed(*SLICE, 0, value="a..b"), "no dotted tensor"),
    "tensor with a path": (changed(*SLICE, 0, value="../../etc"), "no dotted tensor"),
    "long tensor": (changed(*SLICE, 0, value="a" * 10**6), "'a{60}' is no dotted"),
    "newline at the end": (changed(*SLICE, 0, value="a.b\n"), "no dotted tensor"),
    "no shape": (changed(*SLICE, 1, value=[]), "do not fit dimension 0 of shape"),
    "negative shape": (changed(*SLICE, 1, value=[-24, 16]), "shape must lie between 0 and"),
    "nine dimensions": (changed(*SLICE, 1, value=[24] * 9), "shape has 9 entries, at most 8"),
    "nested shape": (changed(*SLICE, 1, value=[[24], 16]), "shape must be a int, got list"),
    "float in shape": (changed(*SLICE, 1, value=[24.0, 16]), "shape must be a int, got float"),
    "dim out of range": (changed(*SLICE, 2, value=2), "dim must lie between 0 and 1"),
    "negative dim": (changed(*SLICE, 2, value=-1), "dim must lie between 0 and 1"),
    "bool as dim": (changed(*SLICE, 2, value=False), "dim must be a int, got bool"),
    "negative offset": (changed(*SLICE, 3, value=-4), "offset must lie between 0 and"),
    "offset out of range": (changed(*SLICE, 3, value=1), "from index 1 on do not fit"),
    "zero width": (changed(*SLICE, 4, value=0), "width must lie between 1 and"),
    "unknown role": (changed(*SLICE, 5, value="owner"), "role must be one of .*, got 'owner'"),
    "role no string": (changed(*SLICE, 5, value=None), "role must be a str, got NoneType"),
    "NaN uses": (changed(*SLICE, 6, value=math.nan), "uses must be a finite number"),
    "infinite uses": (changed(*SLICE, 6, value=math.inf), "uses must be a finite number"),
    "negative uses": (changed(*SLICE, 6, value=-1), "uses must be a finite number"),
    "huge uses": (changed(*SLICE, 6, value=10**5000), "uses must be a finite number"),
    "bool as uses": (changed(*SLICE, 6, value=True), "uses must be a number, got bool"),
    "NaN core MACs": (changed(*GROUP, "core_macs", value=math.nan), "core_macs must be a finite number"),
    "text as core MACs": (changed(*GROUP, "core_macs", value="1"), "core_macs must be a number"),
    "text as may_be_empty": (changed(*GROUP, "may_be_empty", value="yes"), "may_be_empty must be a bool"),
    "number as may_be_empty": (changed(*GROUP, "may_be_empty", value=1), "may_be_empty must be a bool"),
    "short counter": (changed(*GROUP, "counters", 0, value=["a"]), "must have 2 entries, got 1"),
    "counter without width": (changed(*GROUP, "counters", 0, 1, value=0), "width must lie between 1 and"),
    "counter with a call": (changed(*GROUP, "counters", 0, 0, value="a.b()"), "is no dotted tensor or attribute"),
    "ranks no dict": (changed(*GROUP, "ranks", value=[1, 1, 1]), "ranks must be a dict"),
    "no ranks": (changed(*GROUP, "ranks", value={}), "ranks exactly when units are implanted"),
    "ranks for nothing": (changed(*STAGE, "groups", 1, "ranks", value={"layer.0.up.weight": 1}), "ranks exactly when"),
    "rank of another tensor": (changed(*GROUP, "ranks", value={"x" * 10**6: 1}), "names 'x{60}', which is no producer"),
    "zero rank": (changed(*GROUP, "ranks", "layer.0.q.weight", value=0), "must lie between 1 and 8, got 0"),
    "more than full rank": (changed(*GROUP, "ranks", "layer.0.q.weight", value=9), "must lie between 1 and 8, got 9"),
    "bool as rank": (changed(*GROUP, "ranks", "layer.0.q.weight", value=True), "must be a int, got bool"),
    "provenance no dict": (changed(*PROVENANCE, value=[]), r"provenance of plan.stages\[0\] must be a dict, got list"),
    "provenance no dict in format 1": (old("provenance", value=[]), r"provenance of plan.stages\[0\] must be a dict"),
    "deep provenance": (changed(*PROVENANCE, value={"a": {"b": [{"c": [1]}]}}), "at most 4 levels deep"),
    "deep provenance in format 1": (old("provenance", value={"a": {"b": [{"c": [1]}]}}), "at most 4 levels deep"),
    "bottomless provenance": (changed(*PROVENANCE, value={"a": nested(400)}), "at most 4 levels deep"),
    "NaN provenance": (changed(*PROVENANCE, value={"a": math.nan}), "finite JSON values under names, got a float"),
    "infinite provenance": (
        changed(*PROVENANCE, value={"a": [-math.inf]}),
        "finite JSON values under names, got a float",
    ),
    "huge provenance": (changed(*PROVENANCE, value={"a": 10**5000}), "finite JSON values under names, got a int"),
    "long provenance": (
        changed(*PROVENANCE, value=dict.fromkeys(map(str, range(MAX_PROVENANCE + 1)))),
        "at most 4096 values",
    ),
    "long list in provenance": (changed(*PROVENANCE, value={"a": [0] * MAX_PROVENANCE}), "at most 4096 values"),
    "long provenance in format 1": (
        old("provenance", value=dict.fromkeys(map(str, range(MAX_PROVENANCE + 1)))),
        "at most 4096 values",
    ),
    "number as key": (as_parsed({1: 2}), "finite JSON values under names, got a dict"),
    "number as inner key": (as_parsed({"a": {1: 2}}), "finite JSON values under names, got a dict"),
    "tuple in provenance": (as_parsed({"a": (1, 2)}), "finite JSON values under names, got a tuple"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_plan_is_refused_quickly(data, message):
    start = time.perf_counter()
    with pytest.raises(PlanFormatError, match=message) as caught:
        PruningPlan.from_dict(data)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 500


REQUIRED = [
    ("format",),
    ("stages",),
    (*STAGE, "groups"),
    *((*GROUP, key) for key in ("name", "kind", "units", "slices", "actions")),
]


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: path[-1])
def test_a_missing_entry_is_refused(path):
    data = example().to_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(PlanFormatError, match=rf"{path[-1]} must be a"):
        PruningPlan.from_dict(data)


def test_a_small_file_cannot_ask_for_gigabytes_of_letters():
    rows = ["up.weight", [10**6, 4], 0, 0, 1, "producer", 0]
    group = {"kind": "ffn", "units": 10**6, "slices": [rows], "actions": "1000000k"}
    groups = [{"name": f"g{i}", **group} for i in range(1000)]
    message = r"stages\[0\]{}\[67\].units must lie between 1 and 108864, got 1000000"
    with pytest.raises(PlanFormatError, match=message.format(".groups")):
        PruningPlan.from_dict({"format": 2, "stages": [{"groups": groups}]})
    with pytest.raises(PlanFormatError, match=message.format("")):
        PruningPlan.from_dict({"format": 1, "stages": [groups]})
    # Nor can many stages, each of which is small enough.
    stages = [{"groups": [one]} for one in groups[:MAX_STAGES]]
    for stage in stages:
        stage["groups"] = [{**stage["groups"][0], "units": 2**20, "slices": [["w", [2**20], 0, 0, 1, "aligned", 0]]}]
        stage["groups"][0]["actions"] = f"{2**20}k"
    PruningPlan.from_dict({"format": 2, "stages": stages})
    stages[0]["groups"].append({"name": "more", **group})
    with pytest.raises(PlanFormatError, match=r"stages\[63\].groups\[0\].units must lie between 1 and 48576"):
        PruningPlan.from_dict({"format": 2, "stages": stages})


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused_without_recursion(depth):
    deep = nested(depth)
    with pytest.raises(PlanFormatError, match=r"plan.stages\[0\]\[0\] must be a dict, got list"):
        PruningPlan.from_dict({"format": 1, "stages": deep})
    with pytest.raises(PlanFormatError, match=r"plan.stages\[0\] must be a dict, got list"):
        PruningPlan.from_dict({"format": 2, "stages": deep})
    with pytest.raises(PlanFormatError, match="at most 4 levels deep"):
        PruningPlan.from_dict({"format": 2, "stages": [{"groups": [], "provenance": {"a": deep}}]})


def test_a_provenance_may_be_nested_within_limits():
    deepest = {"settings": {"method": {"name": "hessian"}, "kinds": ["heads", "ffn"]}, "a": [[{"b": None}]]}
    assert PruningPlan.from_dict(changed(*PROVENANCE, value=deepest)).provenance == (deepest,)
    for most in (dict.fromkeys(map(str, range(MAX_PROVENANCE))), {"a": [0] * (MAX_PROVENANCE - 1)}):
        assert PruningPlan.from_dict(changed(*PROVENANCE, value=most)).provenance == (most,)


@pytest.mark.parametrize("written", [PruningPlan.to_dict, in_format_1])
@pytest.mark.parametrize("seed", range(200))
def test_random_damage_never_raises_anything_but_a_format_error(seed, written):
    rng = random.Random(seed)
    data = json.loads(json.dumps(written(example())))
    junk = [
        None,
        True,
        -1,
        0,
        1,
        2**63,
        1.5,
        math.nan,
        math.inf,
        "",
        "k",
        "999k",
        [],
        {},
        [[]],
        {"a": 1},
        "a.b",
        "\ud800",
    ]
    for _ in range(rng.randint(1, 3)):
        place = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            if rng.random() < 0.2:
                del place[key]
            else:
                place[key] = rng.choice(junk)
            break
    try:
        plan = PruningPlan.from_dict(data)
    except PlanFormatError:
        return
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert all(min(footprint([g])) >= 0 for g in plan)


def test_names_that_modules_can_have_are_accepted():
    for name in ("__class__.x", "blocks.0.en-fr.weight", "w"):
        data = changed(*GROUP, "slices", 6, 0, value=name)
        assert PruningPlan.from_dict(data).stages[0][0].group.slices[6].tensor == name


def test_the_plan_does_not_share_its_provenance_with_the_data():
    data = json.loads(json.dumps(example().to_dict()))
    plan = PruningPlan.from_dict(data)
    provenance = data["stages"][0]["provenance"]
    provenance["threshold"] = 99
    provenance["settings"]["seed"] = 99
    provenance["settings"]["kinds"].append("channels")
    assert plan == example()


def test_slices_list_the_indices_of_a_unit():
    fused = Slice("c", (16, 96), 1, 32, 4, Role.PRODUCER, 1.0)
    assert list(fused.indices(2)) == [40, 41, 42, 43]
    assert fused.entries_per_unit == 64


def test_only_matrices_that_make_or_read_the_unit_are_scored():
    group = heads_group("a", 2)
    assert [s.tensor for s in group.scored_slices()] == ["a.q.weight", "a.k.weight", "a.v.weight", "a.o.weight"]


def test_implant_shapes_add_up_the_slices_of_a_fused_projection():
    slices = tuple(Slice("c", (16, 96), 1, third * 32, 4, Role.PRODUCER) for third in range(3))
    assert Group("g", Kind.HEADS, 8, slices).implant_shapes(2) == {"c": ImplantShape(24, 16)}
    assert heads_group("a", 8).implant_shapes(2)["a.k.weight"] == ImplantShape(8, 16)


@pytest.mark.parametrize(("pattern", "expected"), [("a:*", True), ("*.up.bias", True), ("A:*", False), ("up", False)])
def test_patterns_tell_upper_and_lower_case_apart_and_match_whole_names(pattern, expected):
    assert ffn_group("a", 3).matches(pattern) is expected
