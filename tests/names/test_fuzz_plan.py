"""Damaged plans: whatever config.json says, it is refused by name or it loads, in bounded time and memory."""

import json
import os
import re
import shutil
import sys
import tracemalloc
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from checkpoints import prune_, pruned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_mutations import json_values, mutated
from plans import plan_of
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hap_hf.checkpoint import record_plan
from hap_hf.discovery import find_groups
from hap_hf.errors import PlanFormatError, PlanMismatchError
from hap_hf.layers.implant_linear import ImplantLinear
from hap_hf.names.group import Counter, Group, Kind, Role, Slice
from hap_hf.names.outcome import footprint
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery import apply_plan_

MANY = int(os.environ.get("HAP_FUZZ", "1"))
"""How many times more examples than usual."""

AUTO = {
    "bert": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "resnet": AutoModelForImageClassification,
}


def fuzz(examples, seconds):
    return settings(
        max_examples=examples * MANY,
        deadline=timedelta(seconds=seconds),
        derandomize=MANY == 1,
        database=None,
        print_blob=False,
        suppress_health_check=[*HealthCheck],
    )


def pruned_resnet():
    """Return a tiny ResNet without some of its channels, and with implants where every producer can take one."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    groups = find_groups(model, batch)
    inner = [g for g in groups if g.name.endswith("layer.0.convolution:channels")]
    plan = plan_of({g: [1, 4] for g in groups}, {g: [0, 2] for g in inner})
    apply_plan_(model, plan)
    record_plan(model, plan)
    return model, batch


def pruned_twice(name):
    if name == "resnet":
        return pruned_resnet()
    model, batch = pruned(name)
    prune_(model, batch, seed=1, implants=False)
    return model, batch


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return, for each name, a folder with a pruned model, its config and a batch."""
    found = {}
    for name in AUTO:
        torch.manual_seed(0)
        model, batch = pruned_twice(name)
        folder = tmp_path_factory.mktemp("fuzz") / name
        model.save_pretrained(folder)
        AUTO[name].from_pretrained(folder)  # what is imported late is imported by now
        found[name] = folder, json.loads((folder / "config.json").read_text()), batch
    return found


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made in memory."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.entries = max(self.entries, tensor.numel())
        return result


SUSPICIOUS = ("pickle.", "subprocess.", "os.system", "os.exec", "os.fork", "socket.", "ctypes.", "os.remove", "shutil.")
_watched: list[list[str]] = []


def _audit(event, args):
    if _watched and (event.startswith(SUSPICIOUS) or (event == "import" and args[1])):
        _watched[-1].append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)  # hooks cannot be taken away, so it looks whether anybody watches


@contextmanager
def nothing_left_behind():
    """Assert that no code of strangers ran and that global state is as it was."""

    def state():
        hooks = [v for k, v in vars(nn.modules.module).items() if k.startswith("_global_") and "hooks" in k]
        patched = [nn.Module.__init__, nn.Module.__setattr__, nn.Linear.forward, nn.Module.register_parameter]
        patched += [v for k, v in vars(nn.init).items() if k.endswith("_")] + [torch.empty, torch.zeros]
        return (
            torch.get_default_dtype(),
            torch.empty(0).device,
            torch.is_grad_enabled(),
            [len(h) for h in hooks],
            patched,
            sys.getrecursionlimit(),
        )

    before = state()
    _watched.append([])
    try:
        yield
    finally:
        events = _watched.pop()
    assert not events
    assert state() == before


def whole(model, stored):
    """Assert that every weight of ``model`` is the one in the file."""
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert name not in stored or torch.equal(tensor, stored[name]), name


@contextmanager
def little_memory(most):
    """Assert that Python objects took at most ``most`` bytes; tensors are not counted."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most


def result_of(call, *errors):
    """Return what ``call`` returns, or the message of the error that it may raise."""
    try:
        return call(), ""
    except errors as error:
        return None, str(error)


def read(data):
    """Read a plan, and check that it is refused in a message that can be printed or is as good as any other."""
    with little_memory(2**23):
        plan, message = result_of(lambda: PruningPlan.from_dict(data), PlanFormatError)
    assert len(message.encode()) < 3000
    if plan is not None:
        assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
        assert all(0 <= size < float("inf") for g in plan for size in footprint([g]))


def in_format_1(plan):
    """Return a plan as hap_hf 0.1 wrote it: bare lists of groups, and one provenance for all of them."""
    stages = plan["stages"]
    return {"format": 1, "stages": [s["groups"] for s in stages], "provenance": {"seed": 3, "threshold": 0.25}}


@pytest.mark.parametrize("written", [dict, in_format_1], ids=["format 2", "format 1"])
@pytest.mark.parametrize("name", AUTO)
def test_a_mutated_plan_is_read_or_refused(name, written, checkpoints):
    @fuzz(40, seconds=10)
    @given(mutated(written(checkpoints[name][1]["quantization_config"]["plan"])))
    def run(data):
        read(data)

    run()


stages = st.lists(json_values | st.fixed_dictionaries({"groups": json_values, "provenance": json_values}), max_size=3)


@fuzz(200, seconds=10)
@given(json_values | st.fixed_dictionaries({"format": st.sampled_from([1, 2, 3]), "stages": stages}))
def test_any_json_is_read_or_refused(data):
    read(data)


@pytest.mark.parametrize(("name", "examples"), [("bert", 10), ("llama", 10), ("resnet", 15)])
def test_a_checkpoint_with_a_mutated_plan_loads_whole_or_is_refused(name, examples, checkpoints, tmp_path):
    source, config, batch = checkpoints[name]
    folder = shutil.copytree(source, tmp_path / name)
    weights = folder / "model.safetensors"
    stored = load_file(weights)

    @fuzz(examples, seconds=30)
    @given(mutated(config["quantization_config"]["plan"], most=3))
    def run(plan):
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "hap_hf", "plan": plan}})
        )
        # RuntimeError is what transformers' own check of sizes raises.
        with nothing_left_behind(), little_memory(2**25), LargestTensor() as largest:
            model, message = result_of(
                lambda: AUTO[name].from_pretrained(folder), PlanFormatError, PlanMismatchError, RuntimeError
            )
        assert largest.entries <= weights.stat().st_size
        if model is None:
            assert re.search(r"plan|ignore_mismatched_sizes", message)
            assert len(message.encode()) < 50_000
            return
        for key, tensor in model.state_dict().items():
            assert tensor.device.type == "cpu"
            assert key not in stored or torch.equal(tensor, stored[key])
        with torch.no_grad():
            model(**batch)

    run()


def cut(tensor, shape, dim):
    """Return a plan that takes the last index of a dimension away from one tensor and from nothing else."""
    group = Group("g", Kind.FFN, shape[dim], (Slice(tensor, shape, dim, 0, 1, Role.ALIGNED),))
    return PruningPlan(((GroupPlan(group, "k" * (shape[dim] - 1) + "p"),),))


@pytest.mark.parametrize(
    ("layer", "tensor", "shape", "dim"),
    [
        (ImplantLinear(6, [(4, 3)], 2), "0.implant_down", (2, 6), 0),
        (ImplantLinear(6, [(4, 3)], 2), "0.implant_up", (3, 2), 1),
        (nn.Conv2d(4, 4, 3), "0.weight", (4, 4, 3, 3), 2),
        (nn.Conv2d(4, 8, 3, groups=2), "0.weight", (8, 2, 3, 3), 1),
    ],
)
def test_what_is_neither_input_nor_output_is_not_cut(layer, tensor, shape, dim):
    with pytest.raises(PlanMismatchError, match=rf"{tensor}: dimension {dim} of a .* neither inputs nor outputs"):
        apply_plan_(nn.Sequential(layer), cut(tensor, shape, dim))


class Counting(nn.Module):
    """A layer that computes its number of heads."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 4)

    @property
    def num_heads(self):
        return 4


def test_a_property_is_no_counter():
    slices = (Slice("up.weight", (4, 3), 0, 0, 1, Role.PRODUCER), Slice("up.bias", (4,), 0, 0, 1, Role.ALIGNED))
    group = Group("g", Kind.HEADS, 4, slices, (Counter("num_heads", 1),))
    with pytest.raises(PlanMismatchError, match=r"num_heads: expected an integer attribute .*, got None"):
        apply_plan_(Counting(), PruningPlan(((GroupPlan(group, "kkkp"),),)))
