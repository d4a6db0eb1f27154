"""Bypasses by hand, for tests: plans of them, values for them, and the masked model that they must equal."""

import copy
from contextlib import contextmanager

import timm
import torch
import transformers as hf
from cases import batch_of, build, randomise_
from reference import uneven_removal
from torch.nn import functional as F
from trainings import samples

from hap_hf import find_groups
from hap_hf.layers.projection import input_dim, output_dim, spatial_dims
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Role
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.surgery import apply_plan_

RANK = 3
"""Directions of the linear part of each block of ``planted``."""


def planted():
    """Return a BERT of which half of the neurons of each block compute a linear map of few directions, and batches."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = hf.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16, hidden_act="relu")
    model = randomise_(hf.BertForSequenceClassification(settings)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            first, last = layer.intermediate.dense, layer.output.dense
            # A neuron and its mirror image are linear together; each direction has two such pairs.
            down, up = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((RANK, 16), (16, RANK)))
            first.weight[:12], first.bias[:12] = torch.cat([down, -down, down, -down]) / 2, 0
            last.weight[:, :12] = torch.cat([up, -up, up, -up], 1)
            last.weight[:, 12:] *= 0.5
        model.classifier.weight *= 3
    batches = [hf.default_data_collator(samples(64)[i : i + 16]) for i in range(0, 64, 16)]
    with torch.no_grad():
        for batch in batches:
            batch["labels"] = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
    return model, batches


def subject(name):
    """Return a model in float64 and a batch."""
    if name != "resnet":
        return build(name), batch_of(name)
    torch.manual_seed(0)
    net = timm.create_model("cifar_resnet20", num_classes=3).double().eval()
    return net, {"x": torch.randn(4, 3, 16, 16, dtype=torch.float64)}


def entries_and_exits(groups):
    """Yield the layer where a block begins and the one where it ends, of each group that has one of these."""
    for group in groups:
        makers = [s.tensor.rpartition(".")[0] for s in group.slices if s.role is Role.PRODUCER]
        readers = {s.tensor.rpartition(".")[0] for s in group.slices if s.role is Role.CONSUMER}
        if makers and len(readers) == 1:
            yield makers[0], readers.pop()


def bypassed_plan(model, batch, rank=2):
    """Return a plan that cuts every group and puts a bypass beside every block, values for them, and what goes."""
    groups = find_groups(model, batch)
    removed = uneven_removal([g for g in groups if g.num_units > 1])
    stage = tuple(
        GroupPlan(g, "".join("p" if u in removed.get(g, ()) else "k" for u in range(g.num_units))) for g in groups
    )
    cut = copy.deepcopy(model)
    apply_plan_(cut, PruningPlan((stage,)))
    bypasses, values, generator = [], {}, torch.Generator().manual_seed(5)
    for entry, exit_ in entries_and_exits(groups):
        found = []
        for net in (model, cut):
            first, last = net.get_submodule(entry), net.get_submodule(exit_)
            sizes = first.weight.shape[input_dim(first)], last.weight.shape[output_dim(last)]
            stride = getattr(first, "stride", (1,))[0] * getattr(last, "stride", (1,))[0]
            found.append(BypassPlan(entry, exit_, *sizes, rank, stride, spatial_dims(last)))
        bypasses.append(found[1])
        # Values are for the inputs and outputs that there are before the cut.
        values |= {
            n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in found[0].shapes.items()
        }
    return PruningPlan((stage,), (), (tuple(bypasses),)), values, removed


@contextmanager
def beside(model, plan, values):
    """Add what bypasses compute to the outputs of a dense model's layers, by hand."""
    seen, handles = {}, []

    def note(b):
        return lambda module, args, kwargs: seen.update({b.exit: args[0] if args else next(iter(kwargs.values()))})

    def add(b):
        def hook(module, args, out):
            down, up = (values[n] for n in b.shapes)
            if b.spatial_dims:
                return out + F.conv2d(F.conv2d(seen[b.exit], down, stride=b.stride), up)
            return out + seen[b.exit] @ down.T @ up.T

        return hook

    for b in plan.bypasses[0]:
        handles.append(model.get_submodule(b.entry).register_forward_pre_hook(note(b), with_kwargs=True))
        handles.append(model.get_submodule(b.exit).register_forward_hook(add(b)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
