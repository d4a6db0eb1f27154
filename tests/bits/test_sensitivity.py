"""Expected rises of the loss: measured where the loss is quadratic, else from the Gauss-Newton matrix itself."""

import copy

import pytest
import torch
from channel_nets import Residual
from checkpoints import pruned, single
from torch import nn
from torch.nn import functional

from hap_hf import BitConfig, ConfigError, UnsupportedModelError, allocate_bits, bit_sensitivity, quantize_
from hap_hf.layers.grid import round_weight

BITS = (2, 4)


def squared_error(model, batch):
    return functional.mse_loss(model(batch["x"]), batch["labels"])


class Line(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def test_of_a_linear_model_with_squared_error_the_prediction_is_what_is_measured():
    torch.manual_seed(0)
    model = Line(nn.Linear(5, 3)).double()
    x = torch.randn(64, 5, dtype=torch.float64)
    batches = [{"x": x[i : i + 16], "labels": model(x[i : i + 16]).detach()} for i in range(0, 64, 16)]
    # Labels are what the model says, so that the loss is nothing but the quadratic form; signs are averaged out.
    found = bit_sensitivity(model, batches, menu=BITS, loss_fn=squared_error, num_output_probes=400, progress=False)
    for b in BITS:
        rounded = copy.deepcopy(model)
        with torch.no_grad():
            rounded.layers[0].weight.copy_(round_weight(model.layers[0].weight, b, 0))
        measured = sum(squared_error(rounded, batch).item() for batch in batches) / len(batches)
        assert found.rise["layers.0"][b] == pytest.approx(measured, rel=0.1)
        assert found.error["layers.0"][b] < 0.3 * measured
    assert found.sizes == {"layers.0": 15}


def two_layers():
    torch.manual_seed(1)
    model = Line(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    batches = [{"x": torch.randn(8, 4, dtype=torch.float64), "labels": torch.randint(2, (8,))} for _ in range(2)]
    return model, batches


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["labels"])


def test_the_quadratic_form_is_that_of_the_gauss_newton_matrix_written_out():
    model, batches = two_layers()
    # Two classes: a root of the loss's Hessian has one column, and no sign is random.
    found = bit_sensitivity(model, batches, menu=BITS, loss_fn=cross_entropy, progress=False)
    traces = bit_sensitivity(model, batches, menu=BITS, loss_fn=cross_entropy, formula="trace", progress=False)
    x = torch.cat([b["x"] for b in batches])
    for name in ("layers.0", "layers.2"):
        weight = model.get_parameter(f"{name}.weight").detach()

        def logits(w, name=name):
            return torch.func.functional_call(model, {f"{name}.weight": w}, (x,))

        jacobian = torch.func.jacrev(logits)(weight).flatten(2)  # [samples, classes, weights]
        p = logits(weight).softmax(1)
        hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        matrix = torch.einsum("nci,ncd,ndj->ij", jacobian, hessians, jacobian) / len(x)
        for b in BITS:
            delta = (round_weight(weight, b, 0) - weight).flatten()
            assert found.rise[name][b] == pytest.approx((delta @ matrix @ delta / 2).item(), rel=1e-6)
            trace = matrix.trace() / len(delta) * delta.square().sum() / 2
            assert traces.rise[name][b] == pytest.approx(trace.item(), rel=1e-6)
            assert found.rise[name][b] != pytest.approx(traces.rise[name][b], rel=1e-2)


def test_the_rise_of_a_rounded_input_is_the_quadratic_form_at_the_output():
    model, batches = two_layers()
    config = BitConfig(activations="symmetric")
    found = bit_sensitivity(
        model, batches, config, menu=BITS, loss_fn=cross_entropy, activations=True, progress=False
    ).activations
    expected = dict.fromkeys(BITS, 0.0)
    for batch in batches:
        h = model.layers[1](model.layers[0](batch["x"])).detach()
        p = model.layers[2](h).softmax(1)
        hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        for b in BITS:
            scale = h.abs().max() / (2 ** (b - 1) - 1)
            change = (model.layers[2](scale * (h / scale).round()) - model.layers[2](h)).detach()
            expected[b] += 0.5 * torch.einsum("nc,ncd,nd->", change, hessians, change).item() / 16
    assert found.rise["layers.2"] == pytest.approx(expected, rel=1e-5)
    assert found.sizes == {"layers.0": 4, "layers.2": 6}
    other = bit_sensitivity(model, batches, menu=BITS, loss_fn=cross_entropy, activations=True, progress=False)
    assert other.activations.rise["layers.2"] != pytest.approx(expected, rel=1e-2)  # with a zero point
    assert other.rise == bit_sensitivity(model, batches, menu=BITS, loss_fn=cross_entropy, progress=False).rise


def test_layers_that_read_the_same_get_the_same_bits():
    model, batch = single("bert")
    found = bit_sensitivity(model, [batch], menu=(4, 8), activations=True, progress=False)
    first = "bert.encoder.layer.0.attention.self"
    assert [f"{first}.{name}" for name in ("query", "key", "value")] in [
        list(names) for names in found.activations.tied
    ]
    assert not any("output" in name for names in found.activations.tied for name in names)
    values = batch["input_ids"].shape[1] * model.config.hidden_size
    sizes = [found.activations.sizes[f"{first}.{name}"] for name in ("query", "key", "value")]
    assert sizes == [values, 0, 0]
    assert not any("embeddings" in name for name in found.activations.rise)
    bits = allocate_bits(found.activations, average_bits=6).bits
    assert bits[f"{first}.query"] == bits[f"{first}.key"] == bits[f"{first}.value"]
    report = quantize_(model, [batch], BitConfig().with_activation_bits(bits))
    assert {name: report.plan.layers[name].activation for name in bits} == dict(bits)


def test_convolutions_that_are_added_up_are_tied_on_request():
    model, settings = Residual().eval(), {"menu": (4, 8), "loss_fn": cross_entropy, "progress": False}
    batch = {"x": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 1])}
    free, tied = (bit_sensitivity(model, [batch], tie_sums=t, **settings) for t in (False, True))
    assert list(free.tied) == []
    assert sorted(sorted(names) for names in tied.tied) == [["a2", "stem"], ["b2", "down"]]
    assert tied.sizes == free.sizes  # no weight is shared
    assert tied.rise == free.rise


def test_standard_errors_are_those_of_other_samples():
    model, _ = two_layers()
    generator = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(40):
        batch = {"x": torch.randn(16, 4, generator=generator, dtype=torch.float64), "labels": torch.zeros(16).long()}
        found = bit_sensitivity(model, [batch], menu=(3,), loss_fn=cross_entropy, progress=False)
        estimates.append(found.rise["layers.0"][3])
        errors.append(found.error["layers.0"][3])
    spread = torch.tensor(estimates).std().item()
    assert sum(errors) / 40 == pytest.approx(spread, rel=0.35)


class Mixed(nn.Module):
    """Puts all positions of a batch in another order before its layer, and back behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = x.transpose(0, 1)  # [positions, samples, 3]
        return self.head(self.layer(x).transpose(0, 1).mean(1))


def test_samples_that_are_mixed_are_told_apart(caplog):
    model = Mixed().double()
    batch = {"x": torch.randn(4, 4, 3, dtype=torch.float64), "labels": torch.tensor([0, 1, 1, 0])}
    together = bit_sensitivity(model, [batch], menu=BITS, loss_fn=cross_entropy, progress=False)
    assert "alone, which is slow" in caplog.text
    singles = [{"x": batch["x"][i : i + 1], "labels": batch["labels"][i : i + 1]} for i in range(4)]
    alone = bit_sensitivity(model, singles, menu=BITS, loss_fn=cross_entropy, progress=False)
    for b in BITS:
        assert together.rise["layer"][b] == pytest.approx(alone.rise["layer"][b], rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_pruned_model_with_implants_gets_bits_within_a_budget(name):
    model, batch = pruned(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = bit_sensitivity(model, [batch], menu=(3, 4, 8), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    total = {b: sum(rises[b] for rises in found.rise.values()) for b in (3, 4, 8)}
    assert total[3] > total[4] > 10 * total[8] > 0
    allocation = allocate_bits(found, average_bits=4)
    assert len(set(allocation.bits.values())) > 1
    config = BitConfig(activation_bits=None).with_weight_bits(allocation.bits)
    report = quantize_(model, [batch], config)
    assert {n: b.weight for n, b in report.plan.layers.items()} == dict(allocation.bits)


def test_what_cannot_be_measured_is_refused():
    model, batch = single("vit")
    for settings, words in (({"menu": ()}, "integers from 2 to 8"), ({"menu": (4, 16)}, "integers from 2 to 8")):
        with pytest.raises(ConfigError, match=words):
            bit_sensitivity(model, [batch], **settings)
    with pytest.raises(ConfigError, match="formula must be one of"):
        bit_sensitivity(model, [batch], formula="hessian")
    quantize_(model, [batch])
    with pytest.raises(UnsupportedModelError, match="quantized"):
        bit_sensitivity(model, [batch])
