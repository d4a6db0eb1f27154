"""The same models pruned by Torch-Pruning, one-shot and globally, by the recipes of its README."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from subjects import Subject
from torch import nn
from transformers import PreTrainedModel

from hap_hf import Group, Kind, Role

IMPORTANCES = {"tp_taylor": "GroupTaylorImportance", "tp_hessian": "GroupHessianImportance"}


def prune_with_torch_pruning(
    subject: Subject, groups: Sequence[Group], criterion: str, share: float
) -> PreTrainedModel:
    """Return a copy of a model that Torch-Pruning pruned.

    Of an image classifier it may prune whatever its dependency graph finds but the classifier, of a transformer the
    heads and neurons of ``groups``: left to itself, it would prune the hidden width as well.

    Args:
        subject: The model and what it works on.
        groups: The model's groups.
        criterion: One of ``IMPORTANCES``.
        share: Share of the channels, or of the heads and of the neurons, to remove.

    Returns:
        The pruned model.
    """
    import torch_pruning as tp

    model = copy.deepcopy(subject.model).eval()
    importance = getattr(tp.importance, IMPORTANCES[criterion])()
    make = partial(tp.pruner.BasePruner, importance=importance, global_pruning=True, pruning_ratio=share)
    inputs: Any = {name: value[:2] for name, value in subject.batches[0].items() if name != "labels"}
    if subject.on_images:
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        pruner = make(model.timm_model, inputs["pixel_values"], ignored_layers=head)
    else:
        heads, neurons = (
            {
                model.get_submodule(s.tensor.rpartition(".")[0]): g.num_units
                for g in groups
                if g.kind is kind
                for s in g.slices
                if s.role is Role.PRODUCER
            }
            for kind in (Kind.HEADS, Kind.FFN)
        )
        fixed = (nn.Linear, nn.Embedding, nn.LayerNorm)
        pruner = make(
            model,
            inputs,
            num_heads=heads,
            prune_num_heads=True,
            head_pruning_ratio=share,
            ignored_layers=[m for m in model.modules() if isinstance(m, fixed) and m not in heads | neurons],
        )
    model.zero_grad()
    for batch in subject.batches:
        if criterion == "tp_taylor":
            model(**batch).loss.backward()
            continue
        for index in range(len(batch["labels"])):
            model.zero_grad()
            model(**{name: value[index : index + 1] for name, value in batch.items()}).loss.backward()
            importance.accumulate_grad(model)
    pruner.step()
    return model
