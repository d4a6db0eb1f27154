"""Models, batches and settings for the tests of decisions."""

from dataclasses import replace

import torch
import transformers as hf
from cases import randomise_
from channel_nets import NETS
from torch import nn
from trainings import samples, tiny_bert

from hap_hf import HapConfig, Hessian, decide


def bert():
    """Return a model in float32 with dropout, in training mode, as a training leaves it."""
    return tiny_bert().train()


def texts(number=3, size=6):
    return [hf.default_data_collator(samples()[i * size : (i + 1) * size]) for i in range(number)]


def images(number=3, size=8):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 16, 16, generator=generator) for _ in range(number)]


def convnet():
    """Return a residual network whose batch norms have seen the images."""
    torch.manual_seed(0)
    model = randomise_(NETS["residual"][0]())
    with torch.no_grad():
        model.head.fc.weight /= 10  # sure of nothing
        for x in images():
            model(x)
    return model.eval()


def pictures():
    """Return images with the labels that the network gives them."""
    model = convnet()
    return [(x, model(x).argmax(1)) for x in images()]


def config(**changes):
    amount = {} if {"target_params", "target_macs", "amount"} & set(changes) else {"prune_ratio": 0.4}
    return HapConfig(**{**amount, "progress": False, **changes})


CASES = {
    "a BERT by default": (bert, texts, {}),
    "a BERT to half of its parameters": (bert, texts, {"target_params": 0.5}),
    "a BERT with implants": (bert, texts, {"implant_ratio": 0.3}),
    "a BERT with silent implants": (bert, texts, {"implant_ratio": 0.3, "implant_init": "zero"}),
    "a BERT by the Hessian": (bert, texts, {"method": Hessian(num_probes=2)}),
    "a BERT by magnitudes": (bert, texts, {"method": "magnitude"}),
    "convolutions": (convnet, pictures, {}),
    "convolutions with implants": (
        convnet,
        pictures,
        {"implant_ratio": 0.3, "target_params": 0.6, "method": "mask_ggn"},
    ),
    "convolutions with the old statistics": (convnet, pictures, {"recalibrate": False}),
}
WITH_VALUES = ["a BERT by default", "a BERT with implants", "convolutions", "convolutions with implants"]


def decided(case, **changes):
    """Return a case's model and what is decided for it."""
    build, batches, settings = CASES[case]
    wanted, model = config(**settings, **changes), build()
    return model, decide(wanted.evidence(model, iter(batches())), wanted)


def assert_same_state(a, b):
    """Check that two models are the same bit by bit, and in the layers that they have."""
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name
    assert [(n, type(m)) for n, m in a.named_modules()] == [(n, type(m)) for n, m in b.named_modules()]


def without_times(report):
    return replace(report, seconds={}, loss_after=None)  # which no decision knows


def step(model, optimizer):
    model(**texts()[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loss(model, batch):
    if isinstance(batch, tuple):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
    return model(**batch).loss


def state_of(optimizer):
    """Return what an optimizer holds, with identities."""
    return [
        (id(p), [(k, v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in optimizer.state[p].items()])
        for group in optimizer.param_groups
        for p in group["params"]
    ]
