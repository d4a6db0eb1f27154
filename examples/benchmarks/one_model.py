"""One model from construction to reload: what can be pruned of it, and whether the pruned model is right."""

import copy
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig

from hap_hf import Group, GroupPlan, Kind, PruningPlan, Role, apply_plan_, find_groups, record_plan

Row = dict[str, Any]
Note = Callable[..., None]
"""Takes facts by keyword and keeps them, whatever happens next."""
TOLERANCE = 1e-8
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SMALL_STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 24, 32, 40]}
TRANSFORMERS: dict[str, Row] = {
    "resnet": {**SMALL_STAGES, "embedding_size": 16},
    "regnet": {**SMALL_STAGES, "embedding_size": 16, "groups_width": 8},
    "convnext": SMALL_STAGES,
    "convnextv2": SMALL_STAGES,
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "swin": {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "image_size": 56, "window_size": 7},
    "segformer": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
}
"""Model types of transformers and what makes them small."""


def build_timm(name: str, side: int, note: Note) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a timm model, inside transformers' wrapper if that works, and a batch for it."""
    settings = timm.get_pretrained_cfg(name)
    size: Sequence[int] = settings.input_size
    if not settings.fixed_input_size:
        size = settings.min_input_size or (size[0], min(size[1], side), min(size[2], side))
    images = torch.randn(2, *size)
    note(side=size[-1])
    try:
        config = TimmWrapperConfig(architecture=name, num_labels=1000)
        model = AutoModelForImageClassification.from_config(config).eval()
        logits_of(model, {"pixel_values": images})
    except Exception as error:  # the wrapper does not take every model
        note(reloaded=f"no wrapper: {type(error).__name__}: {str(error)[:200]}")
        return timm.create_model(name, num_classes=1000).eval(), {"x": images}
    return model, {"pixel_values": images}


def build_transformers(name: str, side: int, note: Note) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a small model of transformers and a batch for it."""
    config = AutoConfig.for_model(name, **TRANSFORMERS[name])
    side = getattr(config, "image_size", None) or 64
    note(side=side)
    return AutoModelForImageClassification.from_config(config).eval(), {"pixel_values": torch.randn(2, 3, side, side)}


def randomise_(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Fill matrices with noise that keeps the size of activations, and disturb everything else."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for module in model.modules():
            for leaf, p in module.named_parameters(recurse=False):
                if leaf == "weight" and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                    p.normal_(0, prod(p.shape[1:]) ** -0.5)
                else:
                    p.add_(0.3 * torch.randn_like(p))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = None  # the plain mean over all batches
        model(**batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            if norm.running_mean is not None:
                # Variances alone are near zero over two pooled samples, and rounding errors would grow large.
                norm.running_var += norm.running_mean.square()
                norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
                norm.running_var *= 0.7 + 0.7 * torch.rand_like(norm.running_var)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the model's logits."""
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        output = model(**{k: v.to(dtype) for k, v in batch.items()})
    return output if isinstance(output, Tensor) else output.logits


def examine(model: nn.Module, batch: Mapping[str, Tensor], note: Note) -> None:
    """Find groups, remove from each, compare with masking, save and load."""
    randomise_(model, batch)
    note(stage="discovery", params=sum(p.numel() for p in model.parameters()))
    start = time.perf_counter()
    groups = find_groups(model, batch)
    note(seconds=round(time.perf_counter() - start, 2), groups=len(groups), units=sum(g.num_units for g in groups))
    note(stage="counting")
    model.requires_grad_(False)  # torch's counter fails on parameters that are handed to a module as its input
    note(**prunable(model, batch, groups))
    plan = uneven_plan(groups)
    note(stage="comparison")
    exact = copy.deepcopy(model).double()
    dense = logits_of(exact, batch)
    handles = mask(exact, plan)
    masked = logits_of(exact, batch)
    for handle in handles:
        handle.remove()
    apply_plan_(exact, plan)
    size = float(masked.abs().max())
    difference, effect = (float((x - masked).abs().max()) / size for x in (logits_of(exact, batch), dense))
    note(difference=difference, effect=effect, equal=difference < TOLERANCE < effect)
    note(stage="reload", params_after=sum(p.numel() for p in exact.parameters()))
    del exact
    if isinstance(model, PreTrainedModel):
        dense_model = copy.deepcopy(model)
        apply_plan_(model, plan)
        record_plan(model, plan)
        problem = reload_problem(model, batch)
        if problem and reload_problem(dense_model, batch):
            problem = f"nor dense: {problem}"
        note(reloaded=problem or "yes")
    note(stage="end")


def prunable(model: nn.Module, batch: Mapping[str, Tensor], groups: Sequence[Group]) -> Row:
    """Return the prunable shares of parameters and of multiply-accumulates."""
    covered: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    layers: set[str] = set()
    for g in groups:
        for s in g.slices:
            if s.role is not Role.STATISTIC:
                covered[s.tensor][s.dim].update(range(s.offset, s.offset + s.width * g.num_units))
            if s.role in {Role.PRODUCER, Role.FACTOR, Role.CONSUMER}:
                layers.add(s.tensor.rpartition(".")[0])
    params = dict(model.named_parameters())
    gone = sum(
        params[name].numel() * (1 - prod(1 - len(of) / params[name].shape[dim] for dim, of in by_dim.items()))
        for name, by_dim in covered.items()
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # products inside fused attention are not counted
        model(**batch)
    root, total, counts = type(model).__name__, counter.get_total_flops(), counter.get_flop_counts()
    shares = {n: sum(counts.get(f"{root}.{n}", {}).values()) / total for n, _ in model.named_modules()}
    samples = len(next(iter(batch.values())))
    attention = sum(g.core_macs * g.num_units for g in groups if g.kind is Kind.HEADS) * 2 * samples / total
    layers_left = {n for n, m in model.named_modules() if next(m.children(), None) is None} - layers
    return {
        "params_prunable": gone / sum(p.numel() for p in params.values()),
        "macs_prunable": sum(shares[n] for n in layers) + attention,
        "left_whole": {n: shares[n] for n in sorted(layers_left, key=lambda n: -shares[n])[:20] if shares[n]},
    }


def uneven_plan(groups: Sequence[Group]) -> PruningPlan:
    """Return a plan that removes 15 to 45% of the units of each group, at random."""
    rng = random.Random(0)
    entries = []
    for g in groups:
        count = min(max(round(rng.uniform(0.15, 0.45) * g.num_units), 1), g.num_units - 1)
        gone = set(rng.sample(range(g.num_units), count))
        entries.append(GroupPlan(g, "".join("p" if u in gone else "k" for u in range(g.num_units))))
    return PruningPlan((tuple(entries),))


def mask(model: nn.Module, plan: PruningPlan) -> list[Any]:
    """Zero the removed units where they are read, and return the handles that undo it."""
    channels: dict[str, list[int]] = defaultdict(list)
    for g in plan:
        for s in g.group.slices:
            if s.role is Role.CONSUMER:
                channels[s.tensor.rpartition(".")[0]] += [i for u in g.units("p") for i in s.indices(u)]

    def zeroing(dim: int, indices: list[int]) -> Callable[..., tuple[Any, ...]]:
        def zero(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
            zeros = torch.tensor(sorted(set(indices)))
            return (args[0].index_fill(dim, zeros, 0), *args[1:])

        return zero

    return [
        (m := model.get_submodule(n)).register_forward_pre_hook(zeroing(1 if isinstance(m, CONVOLUTIONS) else -1, i))
        for n, i in channels.items()
    ]


def reload_problem(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> str:
    """Return what is wrong with the model after saving and loading, nothing if its logits are the same."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = AutoModelForImageClassification.from_pretrained(folder).eval()
            return "" if torch.equal(logits_of(model, batch), logits_of(again, batch)) else "other logits"
    except Exception as error:  # whatever transformers raises
        return f"{type(error).__name__}: {str(error)[:300]}"


def run_peer(name: str, side: int, note: Note) -> None:
    """Prune a model by the recipe in the README of Torch-Pruning."""
    import torch_pruning as tp

    model, batch = build_timm(name, side, note)
    model, images = getattr(model, "timm_model", model), next(iter(batch.values()))
    randomise_(model, {"x": images})
    note(stage="pruning", params=sum(p.numel() for p in model.parameters()))
    start = time.perf_counter()
    tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.3,
        global_pruning=False,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
    ).step()
    note(seconds=round(time.perf_counter() - start, 2), params_after=sum(p.numel() for p in model.parameters()))
    note(stage="forward")
    logits_of(model, {"x": images})
    note(stage="end")
