"""Where the output of a layer ends up."""

import pytest
import torch
from torch import nn

from hap_hf.reconstruction.stream import Following, Way


class Net(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.layer, self.norm, self.then = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), then
        nn.init.uniform_(self.norm.weight)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.then(self, self.layer(x), x)


CASES = {
    "added": (lambda m, y, x: (y + x).relu(), 1, 0),
    "in place": (lambda m, y, x: y.add_(x).relu(), 1, 0),
    "into the stream": (lambda m, y, x: x.clone().add_(y).relu(), 1, 0),
    "behind a norm": (lambda m, y, x: (m.norm(y) + x).relu(), 2, 1),
    "scaled by channel": (lambda m, y, x: y * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + x, 2, 0),
    "twice": (lambda m, y, x: (y + x) + x.exp(), 2, 0),
    "after an activation": (lambda m, y, x: y.relu() + x, 0, 0),
    "scaled by position": (lambda m, y, x: y * x + x, 0, 0),
    "to itself": (lambda m, y, x: y + y, 0, 0),
    "a scaled sum": (lambda m, y, x: torch.add(y, x, alpha=2), 0, 0),
    "a constant": (lambda m, y, x: y + 1, 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_way_ends_where_the_last_stream_is_added(case):
    then, steps, shifts = CASES[case]
    net, x, met = Net(then).eval(), torch.randn(2, 3, 4, 4), []
    following = Following(lambda way: met.append((way.steps, way.factor, len(way.shifts), way.tip.clone())))
    outputs = []

    def began(module, args, out):
        outputs.append(out.clone())
        following.way = Way.of(out, -3)

    net.layer.register_forward_hook(began)
    with torch.no_grad(), following:
        net(x)
    assert (met[-1][0] if met else 0) == steps
    if met:
        _, factor, found, stream = met[-1]
        assert found == shifts
        # Independently: whatever the output gains, the stream gains that times the factor.
        net.layer.bias.data += torch.tensor([1.0, -2.0, 0.5])
        met.clear()
        with torch.no_grad(), following:
            net(x)
        torch.testing.assert_close(met[-1][3] - stream, factor * (outputs[1] - outputs[0]), rtol=1e-4, atol=1e-5)
