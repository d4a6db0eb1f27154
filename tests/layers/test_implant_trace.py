"""Layers with implants in torch.fx, where they cannot be, and silent behind each other."""

import copy

import pytest
import torch
from torch import fx, nn

from hap_hf import ConfigError, HapConfig, UnsupportedModelError, find_groups, prune
from hap_hf.layers.implant_conv import ImplantConv2d
from hap_hf.layers.implant_linear import ImplantLinear, side_by_side
from hap_hf.layers.kind import kind_of

pytestmark = pytest.mark.fast

SEGMENTS = {"some": [(3, 2), (1, 4)], "all": [(0, 5)], "none": [(4, 0)]}


def filled(layer):
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.eval()


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda s: ImplantLinear(6, s, 2), (2, 5, 6)),
        (lambda s: ImplantLinear(6, s, 2, transposed=True, bias=False), (2, 6)),
        (lambda s: ImplantConv2d(3, s, (3, 3), padding=(1, 1)), (2, 3, 7, 7)),
        (lambda s: ImplantConv2d(3, s, (5, 3), padding="same", padding_mode="reflect"), (2, 3, 7, 7)),
    ],
)
def test_fx_traces_layers_with_implants(build, shape, segments):
    torch.manual_seed(0)
    layer, x = filled(build(segments)), torch.randn(shape)
    traced = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert torch.equal(traced(x), layer(x).relu())


def test_parts_lie_side_by_side():
    kept, implanted = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8]])
    assert side_by_side(kept, implanted, [(2, 1), (1, 1)], -1).tolist() == [[1, 2, 7, 3, 8]]


@pytest.mark.parametrize("dims", [1, 3])
def test_implants_are_refused_by_name_where_no_layer_takes_one(dims):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    layers = [conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4**dims, 3)]
    model = nn.Sequential(*layers).eval()
    batch = {"input": torch.randn(4, 3, *[4] * dims), "labels": torch.tensor([0, 1, 2, 0])}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"none of the layers takes one: \['0', '2'\].*nn.Conv2d"):
        prune(model, [batch], HapConfig(prune_ratio=0.5, implant_ratio=0.5, method="magnitude", progress=False))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    prune(model, [batch], HapConfig(prune_ratio=0.5, method="random", progress=False))
    assert model[0].weight.shape[0] < 8


def test_where_some_layers_take_implants_the_others_lose_their_units():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 3)

        def forward(self, x):
            return self.down(torch.relu(self.up(self.b(torch.relu(self.a(x))).mean(2))))

    model = Both().eval()
    batch = {"x": torch.randn(4, 3, 5), "labels": torch.tensor([0, 1, 2, 0])}
    prune(model, [batch], HapConfig(prune_ratio=0.6, implant_ratio=0.9, method="random", progress=False))
    assert isinstance(model.up, ImplantLinear)
    assert isinstance(model.a, nn.Conv1d)


def test_implants_that_read_implants_are_silent_at_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    model = model.eval()
    batch = {"input": torch.randn(4, 3, 6, 6), "labels": torch.tensor([0, 1, 2, 0])}
    settings = {"implant_ratio": 1.0, "method": "random", "implant_init": "zero", "progress": False}
    prune(model, [batch], HapConfig(prune_ratio=0.5, **settings))
    assert isinstance(model[0], ImplantConv2d)
    assert isinstance(model[2], ImplantConv2d)
    expected = model(batch["input"])
    with torch.no_grad():
        model[0].implant_pointwise.normal_()
    torch.testing.assert_close(model(batch["input"]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_layer_whose_weight_is_made_by_a_hook_stays_whole(norm):
    torch.manual_seed(0)
    hooked = norm(nn.Conv2d(5, 6, 3))
    assert kind_of(hooked) is None
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), hooked, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).eval()
    assert [g.name for g in find_groups(model, {"input": torch.randn(2, 3, 12, 12)})] == ["4:channels"]
    with pytest.raises(UnsupportedModelError, match="found nothing to remove"):
        find_groups(nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2)), {"input": torch.randn(2, 4)})
