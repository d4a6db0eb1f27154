"""Private names of torch, transformers and accelerate are touched in three files, and are what these take them for."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import hap_hf
from hap_hf import host

PACKAGE = Path(hap_hf.__file__).parent
HOSTS = {PACKAGE / "host.py", PACKAGE / "trainer" / "host.py", PACKAGE / "checkpoint" / "host.py"}
FILES = sorted(set(PACKAGE.rglob("*.py")) - HOSTS)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_of_others(path):
    """Yield private attributes of anything but the object itself, private imports, and strings that name either."""
    known = {n for f in HOSTS for n in private_names_in(ast.parse(f.read_text(encoding="utf-8")))}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("hap_hf"):
            yield from (n for n in [*node.module.split("."), *(a.name for a in node.names)] if is_private(n))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known:
            yield node.value


def private_names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_file_touches_a_private_name(path):
    assert list(private_names_of_others(path)) == []


def test_the_check_sees_attributes_imports_and_strings(tmp_path):
    file = tmp_path / "guest.py"
    file.write_text(
        "from torch.utils._pytree import tree_map\n"
        "def f(module):\n    getattr(module, '_hf_hook')\n    return module._buffers, self._own\n"
    )
    assert sorted(private_names_of_others(file)) == ["_buffers", "_hf_hook", "_pytree"]


def test_what_a_module_keeps_is_what_torch_says_it_keeps():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2, bias=False))
    assert set(host.own_parameters(module[0])) == {"weight", "bias"}
    assert host.own_parameters(module[1])["bias"] is None
    assert set(host.own_buffers(module[0])) == {"running_mean", "running_var", "num_batches_tracked"}
    assert [name for name, _ in host.own_tensors(module[1])] == ["weight"]
    assert list(host.own_tensors(module)) == []
    assert all(name in vars(module) for name in host.CONTAINERS)
    assert isinstance(module[0], host.BatchNorm)
    assert issubclass(host.BatchNorm, host.NormWithStatistics)
    assert issubclass(nn.InstanceNorm1d, host.NormWithStatistics)
    assert not isinstance(nn.GroupNorm(1, 2), host.NormWithStatistics)


def test_hooks_are_seen_where_they_are_registered():
    module = nn.Linear(2, 2)
    assert host.call_hooks(module) == ({}, {})
    module.register_forward_hook(lambda *args: None)
    module.register_forward_pre_hook(lambda *args: None)
    assert [len(hooks) for hooks in host.call_hooks(module)] == [1, 1]
    assert not host.gradient_hooks(module.weight)
    module.weight.register_hook(lambda grad: None)
    assert host.gradient_hooks(module.weight)
    module.bias.register_post_accumulate_grad_hook(lambda p: None)
    assert host.gradient_hooks(module.bias)


def test_compiled_modules_are_told_from_others():
    module = nn.Linear(2, 2)
    compiled = torch.compile(module)
    assert host.is_compiled(compiled)
    assert host.inside_compiled(compiled) is module
    assert not host.is_compiled(module)
    assert not host.is_compiled_in_place(module)
    module.compile()
    assert host.is_compiled_in_place(module)


def test_the_attention_kernel_of_a_config_is_read_and_set():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig()
    host.set_attention_(config, "eager")
    assert host.attention_of(config) == "eager"
    assert host.attention_of(object()) is None


def test_accelerates_hook_is_seen_on_its_module():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    module = nn.Linear(2, 2)
    assert host.device_hook(module) is None
    hook = AlignDevicesHook("cpu")
    add_hook_to_module(module, hook)
    assert host.device_hook(module) is hook
