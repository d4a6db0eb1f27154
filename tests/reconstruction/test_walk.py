"""Layers that are fitted one after the other, against doing it the slow way."""

import copy
import math
import threading
from dataclasses import replace
from unittest.mock import Mock

import pytest
import timm
import torch
from cases import batch_of, build
from reference import logits
from scored_models import bert, config, text_batch
from torch import nn
from torch.nn import functional as F

import hap_hf.reconstruction.best
from hap_hf import HapConfig, carry_out_, decide, find_groups
from hap_hf.layers.projection import on_input
from hap_hf.model.masking import channels, masked
from hap_hf.model.values import replaced_values
from hap_hf.names.group import Role
from hap_hf.reconstruction.layer import LayerFit
from hap_hf.reconstruction.ridge import Moments, fit_held_out
from hap_hf.reconstruction.walk import Walk

QUIET = {"progress": False, "max_batches": None}


def texts(number=4, rows=8):
    generator = torch.Generator().manual_seed(3)
    batches = [text_batch(rows=rows) for _ in range(number)]
    for batch in batches:
        batch["input_ids"] = torch.randint(1, 50, batch["input_ids"].shape, generator=generator)
        batch["labels"] = torch.randint(2, (rows,), generator=generator)
    return batches


class Block(nn.Module):
    """A convolutional block whose stream can be hooked."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((3, 6), (6, 8), (8, 6))
        )
        self.bn1, self.bn2, self.sum, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(6), nn.Identity(), nn.Linear(6, 3)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.uniform_(-0.5, 0.5)
            bn.running_var.uniform_(0.5, 2)
            nn.init.uniform_(bn.weight, 0.5, 2)

    def forward(self, x):
        x = self.stem(x)
        out = self.sum(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.fc(out.relu().mean((2, 3)))


def block():
    torch.manual_seed(0)
    return Block().double().eval()


def pictures(number=4, rows=8):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(number, rows, 3, 5, 5, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(3, (rows,), generator=generator)) for x in images]


BERT_STREAMS = {
    f"bert.encoder.layer.{i}.{part}output.dense": f"bert.encoder.layer.{i}.{part}output.LayerNorm"
    for i in range(2)
    for part in ("attention.", "")
}
CASES = {
    "bert": (lambda: bert().eval(), texts, BERT_STREAMS),
    "block": (block, pictures, {"conv2": "sum"}),
}


def caught(model, loss, path, stream, gone=()):
    """Return the input of a layer, and its output or what a stream is behind it, from a forward pass of its own."""
    found = {}
    layer = model.get_submodule(path)
    handles = [
        on_input(model.get_submodule(stream), lambda x: found.update(y=x.clone()))
        if stream
        else layer.register_forward_hook(lambda module, args, y: found.update(y=y.clone()))
    ]
    with torch.no_grad(), masked(model, gone):
        handles.append(on_input(layer, lambda x: found.update(x=x.clone())))  # behind the mask's own
        loss()
    for handle in handles:
        handle.remove()
    return found["x"], found["y"]


def slowly(model, batches, gone, order, streams):
    """Fit the layers in the order given, each with forward passes of its own through a dense and a pruned model."""
    pruned, start = copy.deepcopy(model), 1e-2
    settings = HapConfig(prune_ratio=0.5, **QUIET)
    for path in order:
        layer, stream = pruned.get_submodule(path), streams.get(path)
        conv, takes = isinstance(layer, nn.Conv2d), layer.bias is not None or stream is not None
        slope = pruned.bn2.weight / (pruned.bn2.running_var + pruned.bn2.eps).sqrt() if conv and stream else None
        seen = {"train": [], "test": []}
        losses = (settings.evidence(net, batches).losses() for net in (pruned, model))
        for index, ((own, _), (dense, _)) in enumerate(zip(*losses, strict=True)):
            x, y = caught(pruned, own, path, stream, gone)
            lacking = caught(model, dense, path, stream)[1] - y
            lacking = lacking if slope is None else lacking / slope.view(-1, 1, 1)
            real = batches[index]["attention_mask"].bool() if x.dim() == 3 else None
            for row in range(len(x)):
                a = F.unfold(x[row : row + 1], 3, padding=1)[0].T if conv else x[row].reshape(-1, x.shape[-1])
                r = lacking[row].movedim(0, -1).flatten(0, 1) if conv else lacking[row].reshape(-1, y.shape[-1])
                a, r = (a, r) if real is None else (a[real[row]], r[real[row]])
                part = "test" if (row + index) % 4 == 3 else "train"
                seen[part].append((torch.cat([torch.ones(len(a), int(takes)), a], 1), r))
        halves = [Moments.of(*(torch.cat(t) for t in zip(*seen[part], strict=True))) for part in ("train", "test")]
        used = halves[0].inputs.diagonal() > 0  # silenced inputs are zero
        halves = [Moments(m.inputs[used][:, used], m.across[used], m.square) for m in halves]
        scale = torch.ones(len(layer.weight)) if slope is None else slope.square().detach()
        scale[channels(gone, {Role.PRODUCER}).get(path, [])] = 0  # outputs that go do not count
        fit = fit_held_out(*halves, free=int(takes), scale=scale, start=start)
        change = torch.zeros(len(used), fit.solution.shape[1]).index_copy(0, used.nonzero().flatten(), fit.solution)
        start = fit.ridge if math.isfinite(fit.ridge) else start
        with torch.no_grad():
            layer.weight += change[int(takes) :].T.reshape(layer.weight.shape)
            if takes:
                bias = layer.bias if layer.bias is not None else pruned.bn2.bias
                bias += change[0] * (1 if layer.bias is not None else slope)
    return pruned


@pytest.mark.parametrize("case", CASES)
def test_all_layers_come_out_as_with_forward_passes_for_each(case):
    make, batches, streams = CASES[case]
    torch.set_default_dtype(torch.float64)
    try:
        model = make()
        evidence = HapConfig(prune_ratio=0.5, **QUIET).evidence(model, batches())
        gone = [(g, range(0, g.num_units, 2)) for g in find_groups(model, evidence.example) if "stem" not in g.name]
        walk = Walk(evidence, gone)
        order = list(walk.layers)
        values, before = walk.run({}), threading.active_count()
        expected = slowly(model, batches(), gone, order, streams)
        assert threading.active_count() == before
        changed = {n for n, p in expected.named_parameters() if not torch.equal(p, model.get_parameter(n))}
        assert changed == set(values) != set()
        for name, value in values.items():
            torch.testing.assert_close(value, expected.get_parameter(name).detach(), rtol=1e-6, atol=1e-8)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "t5"])
def test_models_of_all_kinds_are_walked_and_left_as_found(family):
    model, batch = build(family), batch_of(family)
    evidence = HapConfig(prune_ratio=0.5, **QUIET).evidence(model, [batch] * 2)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    gone = [(g, [0]) for g in find_groups(model, batch)]
    walk = Walk(evidence, gone)
    assert walk.layers
    values = walk.run({})
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(v.shape == model.get_parameter(n).shape for n, v in values.items())


@pytest.mark.parametrize("units", [0, 4])
def test_a_model_that_draws_random_numbers_draws_the_same_ones_in_both_passes(units):
    model = bert().eval()
    for layer in model.bert.encoder.layer:
        layer.output.dropout.forward = lambda x: x + torch.randn_like(x)  # in eval mode as well
    evidence = config(max_batches=None).evidence(model, texts())
    gone = [(g, range(units)) for g in find_groups(model, evidence.example) if g.kind == "ffn"]
    # Where nothing goes both passes are the same, and nothing is to be fitted.
    assert bool(Walk(evidence, gone).run({})) is (units > 0)


def test_copies_of_neurons_go_without_loss():
    model = bert().eval()
    for layer in model.bert.encoder.layer:
        half = layer.intermediate.dense.out_features // 2
        for tensor in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
            tensor.data[half:] = tensor.data[:half]
    evidence = HapConfig(prune_ratio=0.5, **QUIET).evidence(model, texts(6))
    gone = [(g, range(g.num_units // 2)) for g in find_groups(model, evidence.example) if g.kind == "ffn"]
    values = Walk(evidence, gone).run({})
    dense = logits(model, evidence.example)
    with masked(model, gone):
        without = (logits(model, evidence.example) - dense).abs().max()
        with replaced_values(model, values):
            assert (logits(model, evidence.example) - dense).abs().max() < 0.01 * without


@pytest.mark.parametrize("implants", [None, "svd", "zero"])
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_the_cut_model_is_the_masked_one_with_the_new_values(name, implants, monkeypatch):
    settings = HapConfig(target_params=0.5, seed=1, **QUIET)
    if implants is not None:
        settings = replace(settings, implant_ratio=0.3, implant_init=implants)
    if name == "bert":
        model, batches = bert().eval(), texts()
    else:
        model = timm.create_model("cifar_resnet20", num_classes=3).double().eval()
        batches = [{"x": x, "labels": y} for x, y in pictures()]

    def outputs(net):
        with torch.no_grad():
            out = net(**{k: v for k, v in batches[0].items() if k != "labels"})
        return out if isinstance(out, torch.Tensor) else out.logits

    # Models with random weights are no better for it; whether it is taken is not the question here.
    monkeypatch.setattr(hap_hf.reconstruction.best, "mean_loss", Mock(side_effect=[0.0, 1.0]))
    decision = decide(settings.evidence(model, batches), settings)
    assert decision.reconstructed
    # What implants will compute is in the values, or they compute nothing yet.
    gone = [(g.group, g.units("p") + (g.units("i") if implants == "zero" else [])) for g in decision.stage]
    assert any(g.implanted for g in decision.stage) is (implants is not None)

    with masked(model, gone):
        silenced = outputs(model)
        with replaced_values(model, decision.values):
            expected = outputs(model)
    cut = copy.deepcopy(model)
    carry_out_(cut, decision)
    # For the residual network that includes new statistics of its batch norms.
    torch.testing.assert_close(outputs(cut), expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(silenced, expected, rtol=1e-3)


def test_an_interrupted_walk_ends_its_threads_and_leaves_the_model_as_found(monkeypatch):
    model, before = bert().eval(), threading.active_count()
    evidence = config(max_batches=None).evidence(model, texts())
    groups = find_groups(model, evidence.example)
    monkeypatch.setattr(LayerFit, "solve", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Walk(evidence, [(g, [0]) for g in groups]).run({})
    assert threading.active_count() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
