"""Everything that can be wrong between a plan and a model, found before anything is changed."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from hap_hf.group import COUNTER_NAMES, Role
from hap_hf.plan import IMPLANT, KEEP, PRUNE, GroupPlan
from hap_hf.surgery.implant import ImplantLinear
from hap_hf.surgery.projection import input_dim, is_projection, output_dim


def stage_problems(model: nn.Module, stage: Sequence[GroupPlan]) -> list[str]:
    """Return a sentence for everything that keeps ``stage`` from being applied to ``model``.

    Args:
        model: The model.
        stage: One stage of a plan.

    Returns:
        The problems; empty where there are none.
    """
    modules = dict(model.named_modules())
    tensors = {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, module in modules.items()
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }
    problems = [p for g in stage for p in _group_problems(g, modules, tensors)]
    if not problems:
        problems += _overlaps(stage)
    if not problems:  # what follows may rely on names, shapes and ranges
        problems += _shared(model, stage)
        problems += _torn_layers(stage, modules)
    return problems


def _group_problems(g: GroupPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Iterator[str]:
    group = g.group
    if len(g.actions) != group.num_units or not set(g.actions) <= {KEEP, IMPLANT, PRUNE}:
        yield f"{group.name}: expected {group.num_units} actions out of k, i and p, got {g.actions[:20]!r}"
        return
    if set(g.actions) == {PRUNE} and not group.may_be_empty:
        yield f"{group.name}: all {group.num_units} units would go, and the layer does not run without any; keep one"
    for s in group.slices:
        tensor = tensors.get(s.tensor)
        if tensor is None:
            yield f"{group.name}: expected a tensor {s.tensor}, and the model has none of that name"
        elif tuple(tensor.shape) != s.shape:
            yield f"{s.tensor}: expected shape {list(s.shape)}, got {list(tensor.shape)}"
        elif not tensor.is_floating_point():
            yield f"{s.tensor}: expected floating point numbers, got {tensor.dtype}; prune before quantizing"
        elif not 0 <= s.dim < tensor.dim() or s.offset + group.num_units * s.width > tensor.shape[s.dim]:
            yield f"{s.tensor}: {group.num_units} units of {s.width} do not fit dimension {s.dim} of {list(s.shape)}"
        elif s.role is not Role.ALIGNED:
            yield from _role_problems(s.tensor, s.role, s.dim, modules)
    for counter in group.counters:
        owner, _, attribute = counter.attribute.rpartition(".")
        value = getattr(modules.get(owner), attribute, None) if attribute in COUNTER_NAMES else None
        if type(value) is not int or value < counter.width * group.num_units:
            yield (
                f"{counter.attribute}: expected an integer attribute of at least {counter.width * group.num_units} "
                f"that surgery may change, got {value!r}"
            )
    yield from _implant_problems(g)


def _role_problems(tensor: str, role: Role, dim: int, modules: dict[str, nn.Module]) -> Iterator[str]:
    owner, _, leaf = tensor.rpartition(".")
    module = modules[owner]
    if not is_projection(module) or leaf not in {"weight", "implant_up", "implant_down"}:
        yield f"{tensor}: a {role.value} must be the weight of a linear layer, got one of {type(module).__name__}"
        return
    implanted = isinstance(module, ImplantLinear)
    expected = {
        Role.PRODUCER: (output_dim(module), leaf == "weight" and not implanted),
        Role.FACTOR: (0 if leaf == "implant_up" else output_dim(module), implanted and leaf != "implant_down"),
        Role.CONSUMER: (1 if leaf == "implant_down" else input_dim(module), leaf != "implant_up"),
        Role.ALIGNED: (dim, True),
    }[role]
    if expected != (dim, True):
        yield f"{tensor}: dimension {dim} of a {type(module).__name__} holds no {role.value}"


def _implant_problems(g: GroupPlan) -> Iterator[str]:
    implanted = g.actions.count(IMPLANT)
    if not implanted:
        return
    producers = {s.tensor: s for s in g.group.slices if s.role is Role.PRODUCER}
    if not producers:
        yield f"{g.group.name}: {implanted} units are to be implanted, and no layer of the group can take an implant"
    for name, s in producers.items():
        rows = implanted * sum(t.width for t in g.group.slices if t.tensor == name and t.role is Role.PRODUCER)
        inputs = s.entries_per_unit // s.width
        rank = g.ranks.get(name, 0)
        if not 1 <= rank <= min(rows, inputs) or rank * (rows + inputs) >= rows * inputs:
            yield (
                f"{name}: an implant of rank {rank} has {rank * (rows + inputs)} weights where it replaces "
                f"{rows} x {inputs} = {rows * inputs}; it must be cheaper"
            )


def _overlaps(stage: Sequence[GroupPlan]) -> Iterator[str]:
    ranges: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for g in stage:
        for s in g.group.slices:
            ranges[s.tensor, s.dim].append((s.offset, s.offset + s.width * g.group.num_units))
    for (tensor, dim), spans in ranges.items():
        if any(a[1] > b[0] for a, b in pairwise(sorted(spans))):
            yield f"{tensor}: slices overlap along dimension {dim}"


def _shared(model: nn.Module, stage: Sequence[GroupPlan]) -> Iterator[str]:
    names: dict[int, list[str]] = defaultdict(list)
    ids: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        ids[name] = id(parameter)
    for tensor in {s.tensor for g in stage for s in g.group.slices} & set(ids):
        same = names[ids[tensor]]
        # One module under two paths, as in models that share layers, ties nothing.
        if len({id(model.get_submodule(n.rpartition(".")[0])) for n in same}) > 1:
            yield f"{tensor}: tied to {sorted(set(same) - {tensor})}; untie the weights before pruning"


def _torn_layers(stage: Sequence[GroupPlan], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield layers of which one tensor would lose other entries than its neighbours."""
    lost: dict[tuple[str, int], set[int]] = defaultdict(set)
    for g in stage:
        gone = g.units(PRUNE)
        for s in g.group.slices:
            lost[s.tensor, s.dim].update(i for u in gone for i in s.indices(u))

    def count(path: str, leaf: str, dim: int) -> Collection[int]:
        return lost.get((f"{path}.{leaf}", dim), set())

    for path in {tensor.rpartition(".")[0] for tensor, _ in lost}:
        module = modules[path]
        if not is_projection(module):
            continue
        outputs = count(path, "weight", output_dim(module))
        bias = count(path, "bias", 0)
        if isinstance(module, ImplantLinear):
            if count(path, "weight", input_dim(module)) != count(path, "implant_down", 1):
                yield f"{path}: weight and implant_down would lose different inputs"
            whole = len(outputs) + len(count(path, "implant_up", 0)) == len(bias)
        else:
            whole = outputs == bias
        if module.bias is not None and not whole:
            yield f"{path}: weight and bias would lose different outputs"
