"""Everything that can be wrong between a plan and a model, found before anything is changed."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from hap_hf.errors import PlanMismatchError
from hap_hf.host import own_tensors
from hap_hf.layers.norms import group_counter, is_per_channel
from hap_hf.layers.projection import has_implant, input_dim, is_grouped, is_projection, known, output_dim
from hap_hf.model.change import TensorChange
from hap_hf.names.actions import IMPLANT, KEEP, PRUNE
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.counters import counted_by
from hap_hf.names.group import Role
from hap_hf.names.outcome import outcomes
from hap_hf.names.plan import GroupPlan
from hap_hf.surgery.bypass import bypass_problems


def stage_problems(model: nn.Module, stage: Sequence[GroupPlan], bypasses: Sequence[BypassPlan] = ()) -> list[str]:
    """Return a sentence for everything that keeps ``stage`` from being applied to ``model``.

    Args:
        model: The model as the stages before left it.
        stage: One stage of a plan, from a source that need not be trusted.
        bypasses: The bypasses that it puts beside blocks.

    Returns:
        The problems; empty where there are none.
    """
    # A module that is used in two places goes by its first name, as it does in discovery.
    modules = dict(model.named_modules())
    tensors = {
        f"{path}.{leaf}" if path else leaf: tensor
        for path, module in modules.items()
        for leaf, tensor in own_tensors(module)
    }
    problems = [p for g in stage for p in _group_problems(g, modules, tensors)]
    problems += _counter_problems(stage, modules)
    problems += bypass_problems(bypasses, modules)
    if not problems:
        problems += _overlaps(stage)
    if not problems:  # what follows may rely on names, shapes and ranges
        problems += _shared(model, stage)
        problems += _torn_layers(stage, modules)
    return problems


def check_outcome(stage: Sequence[GroupPlan], changes: Sequence[TensorChange]) -> None:
    """Check that every tensor was cut to what the plan's own algebra says, by which budgets and loading go.

    Args:
        stage: The stage that was applied.
        changes: What became of the tensors; of one that was changed twice the later change counts.

    Raises:
        PlanMismatchError: If one was not.
    """
    got = {c.name: tuple(c.new.shape) for c in changes if c.old is not None}
    wrong = [
        f"{name} {list(left.shape)}, got {list(got[name])}"
        for name, left in outcomes(stage).items()
        if name in got and got[name] != left.shape
    ]
    if wrong:
        raise PlanMismatchError(f"expected surgery to leave {'; '.join(wrong[:5])}; nothing was changed")


def _group_problems(g: GroupPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield what is wrong with one group by itself: letters, names, shapes, ranges, roles, ranks."""
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
        elif s.role not in {Role.ALIGNED, Role.STATISTIC}:
            yield from _role_problems(s.tensor, s.role, s.dim, modules)
        else:
            yield from _follower_problems(s.tensor, s.dim, modules)
    # Layers are looked up by the names of their tensors, which must exist for that.
    if all(s.tensor in tensors for s in group.slices):
        yield from _implant_problems(g, modules)


def _counter_problems(stage: Sequence[GroupPlan], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield counters that are no integers, or too small for what would be taken from them."""
    counted = _counted(stage)
    for g in stage:
        for c in g.group.counters:
            owner, _, name = c.attribute.rpartition(".")
            # Its own attributes only: properties and what the class holds are no numbers that one module may change.
            value = vars(modules[owner]).get(name) if owner in modules and counted_by(name) else None
            # It counts all units of the group, and the groups that lower it together must not take it below zero.
            least = max(c.width * g.group.num_units, counted[c.attribute])
            if type(value) is not int or value < least:
                yield (
                    f"{c.attribute}: expected an integer attribute of at least {least} that surgery may change, "
                    f"got {value!r:.60}"
                )


def _role_problems(tensor: str, role: Role, dim: int, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield what is wrong with a slice that a layer makes or reads: its role says along which dimension it must lie."""
    owner, _, leaf = tensor.rpartition(".")
    module = modules[owner]
    if is_grouped(module) and leaf == "weight":
        # Dimension 1 holds the inputs of one group of channels: they go with their group and are no units.
        if (role, dim) != (Role.FACTOR, 0):
            yield f"{tensor}: dimension {dim} of a grouped {type(module).__name__} holds no {role.value}"
        return
    if not is_projection(module) or leaf not in known(module).reads + known(module).makes:
        yield f"{tensor}: a {role.value} must be the weight of a layer, got one of {type(module).__name__}"
        return
    kind = known(module)
    # For each role the dimension where its units lie, and whether this tensor of the layer can play it at all.
    expected = {
        Role.PRODUCER: (output_dim(module), leaf == "weight" and not kind.has_implant),
        Role.FACTOR: (output_dim(module) if leaf == "weight" else 0, leaf in kind.makes),
        Role.CONSUMER: (input_dim(module) if leaf == "weight" else 1, leaf in kind.reads),
    }[role]
    if expected != (dim, True):
        yield f"{tensor}: dimension {dim} of a {type(module).__name__} holds no {role.value}"


def _follower_problems(tensor: str, dim: int, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield what is wrong with a slice that only follows the units, where a layer of a known kind holds it."""
    owner, _, leaf = tensor.rpartition(".")
    module = modules[owner]
    if is_projection(module) or is_grouped(module):
        # Taps of a kernel and the inside of an implant are no units, and nothing else would follow them.
        kind = known(module)
        only_read, only_made = set(kind.reads) - set(kind.makes), set(kind.makes) - set(kind.reads)
        own = {0} if is_grouped(module) or leaf in only_made else {1} if leaf in only_read else {0, 1}
        if dim not in own:
            yield f"{tensor}: dimension {dim} of a {type(module).__name__} holds neither inputs nor outputs"


def _implant_problems(g: GroupPlan, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield what is wrong with the implants of a group: where they are, their ranks, and what they cost."""
    implanted = g.actions.count(IMPLANT)
    if not implanted:
        return
    shapes = g.group.implant_shapes(implanted)
    if not g.ranks or not set(g.ranks) <= set(shapes):
        yield (
            f"{g.group.name}: {implanted} units are to be implanted in {sorted(g.ranks) or 'no layer'}; layers of the "
            f"group that can take an implant are {sorted(shapes) or 'none'}"
        )
        return
    for name, rank in g.ranks.items():
        shape, module = shapes[name], modules[name.rpartition(".")[0]]
        if not known(module).takes_implant(module):
            yield f"{name}: a {type(module).__name__} can take no implant"
        elif not 1 <= rank <= shape.max_rank or shape.weights(rank) >= shape.replaced:
            yield (
                f"{name}: an implant of rank {rank} has {shape.weights(rank)} weights where it replaces "
                f"{shape.rows} x {shape.inputs}{'' if shape.taps is None else f' x {shape.taps}'} = {shape.replaced}; "
                "it must be cheaper"
            )


def _overlaps(stage: Sequence[GroupPlan]) -> Iterator[str]:
    """Yield dimensions of tensors where some entry would belong to two units."""
    ranges: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for g in stage:
        for s in g.group.slices:
            ranges[s.tensor, s.dim].append((s.offset, s.offset + s.width * g.group.num_units))
    for (tensor, dim), spans in ranges.items():
        # In sorted order it is enough to look at neighbours: if any two spans overlap, two of these do.
        if any(a[1] > b[0] for a, b in pairwise(sorted(spans))):
            yield f"{tensor}: slices overlap along dimension {dim}"


def _shared(model: nn.Module, stage: Sequence[GroupPlan]) -> Iterator[str]:
    """Yield tensors that two modules share, of which the other one would go on with the uncut tensor."""
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
    # What is implanted is not lost: its outputs are still there, with their biases and readers.
    lost: dict[tuple[str, int], set[int]] = defaultdict(set)
    for g in stage:
        gone = g.units(PRUNE)
        for s in g.group.slices:
            lost[s.tensor, s.dim].update(i for u in gone for i in s.indices(u))

    def count(path: str, leaf: str, dim: int) -> Collection[int]:
        return lost.get((f"{path}.{leaf}", dim), set())

    counted = _counted(stage)
    holders = {tensor.rpartition(".")[0] for tensor, _ in lost}
    # A plan that lowers only the number of groups tears a layer as well, and no tensor would tell.
    holders |= {owner for owner, _, name in (c.rpartition(".") for c in counted) if name in {"groups", "num_groups"}}
    for path in sorted(holders):
        module = modules[path]
        if is_projection(module):
            outputs = count(path, "weight", output_dim(module))
            bias = count(path, "bias", 0)
            if has_implant(module):
                down, up = known(module).reads[1], known(module).makes[1]
                if count(path, "weight", input_dim(module)) != count(path, down, 1):
                    yield f"{path}: weight and {down} would lose different inputs"
                # Each of the two weights numbers its own outputs, so only how many go can be compared, not which.
                whole = len(outputs) + len(count(path, up, 0)) == len(bias)
            else:
                whole = outputs == bias
            if module.bias is not None and not whole:
                yield f"{path}: weight and bias would lose different outputs"
            continue
        own = [n for n, t in own_tensors(module) if t.dim()]
        if is_per_channel(module) or is_grouped(module):
            if len({frozenset(count(path, n, 0)) for n in own}) > 1:
                yield f"{path}: {', '.join(own)} would lose different channels"
            groups = "groups" if is_grouped(module) else group_counter(module)
            if groups and own:
                total, size = getattr(module, groups), getattr(module, own[0]).shape[0]
                # Lost channels : channels = lost groups : groups, multiplied out to stay among integers.
                if len(count(path, own[0], 0)) * total != counted.get(f"{path}.{groups}", 0) * size:
                    yield f"{path}: whole groups of channels must go, and {groups} with them"


def _counted(stage: Sequence[GroupPlan]) -> dict[str, int]:
    """Return by how much each counter would fall."""
    result: dict[str, int] = defaultdict(int)
    for g in stage:
        for c in g.group.counters:
            result[c.attribute] += c.width * g.actions.count(PRUNE)
    return result
