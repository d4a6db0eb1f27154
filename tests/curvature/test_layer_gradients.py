"""Per-sample gradients from hooks, for every kind of layer, against one backward pass a sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_gradients import IMAGE, SAMPLES, SEQUENCE, STATISTICS, VECTOR, check, randomised
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hap_hf.curvature import marginals as marginals_module
from hap_hf.curvature.layers import MatrixCall
from hap_hf.curvature.replay import ReplayedCall
from hap_hf.layers.implant_linear import ImplantLinear


class RMSNorm(nn.Module):
    """A norm as in transformers, which no library knows by name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised input times the weight."""
        return self.weight * hidden_states * hidden_states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def evaluated(module: nn.Module) -> nn.Module:
    """Return a module in eval mode with statistics that are not zeros and ones."""
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module.eval()


def conv(*sizes: int, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a convolution."""
    return lambda: nn.Conv2d(*sizes, **settings)


def timm_layer(name: str, *sizes: int, **settings: Any) -> Callable[[], nn.Module]:
    """Return what builds a layer of timm, or skips."""
    return lambda: getattr(pytest.importorskip("timm.layers"), name)(*sizes, **settings)


MATRICES = {
    "linear": (lambda: nn.Linear(5, 4), VECTOR),
    "linear_without_bias": (lambda: nn.Linear(5, 4, bias=False), VECTOR),
    "linear_at_few_positions": (lambda: nn.Linear(20, 30), (SAMPLES, 2, 20)),
    "linear_at_many_positions": (lambda: nn.Linear(5, 4), SEQUENCE),
    "linear_at_a_grid_of_positions": (lambda: nn.Linear(5, 4), (SAMPLES, 2, 3, 5)),
    "linear_with_several_rows_a_sample": (lambda: nn.Linear(5, 4), (2 * SAMPLES, 3, 5)),
    "transposed_linear": (lambda: Conv1D(4, 5), SEQUENCE),
    "transposed_linear_at_few_positions": (lambda: Conv1D(30, 20), (SAMPLES, 2, 20)),
    "linear_of_timm": (timm_layer("Linear", 5, 4), SEQUENCE),
    "conv": (conv(4, 6, 3), IMAGE),
    "conv_with_stride_dilation_and_padding": (
        conv(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
        IMAGE,
    ),
    "conv_same": (conv(4, 6, (4, 3), padding="same", dilation=2, bias=False), IMAGE),
    "conv_valid": (conv(4, 6, 3, padding="valid"), IMAGE),
    "conv_reflect": (conv(4, 6, 3, padding=(1, 2), padding_mode="reflect"), IMAGE),
    "conv_circular": (conv(4, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv_replicate_same": (conv(4, 6, (2, 3), padding="same", padding_mode="replicate"), IMAGE),
    "conv_at_few_positions": (conv(4, 30, (7, 6)), IMAGE),
    "conv_with_groups": (conv(4, 6, 3, groups=2, padding=1), IMAGE),
    "conv_with_groups_at_few_positions": (conv(4, 30, (7, 6), groups=2), IMAGE),
    "conv_with_several_rows_a_sample": (conv(4, 6, 3, groups=2), (2 * SAMPLES, 4, 5, 4)),
    "depthwise_conv": (conv(4, 8, 3, groups=4, stride=2), IMAGE),
    "pointwise_conv": (conv(4, 6, 1), IMAGE),
    "conv_padded_like_tensorflow": (timm_layer("Conv2dSame", 4, 6, (3, 4), stride=(2, 3), dilation=(2, 1)), IMAGE),
    "conv_padded_like_tensorflow_not_at_all": (timm_layer("Conv2dSame", 4, 6, 1, stride=3), IMAGE),
}
OTHERS = {
    "layer_norm": (lambda: nn.LayerNorm(5), SEQUENCE),
    "rms_norm": (lambda: RMSNorm(5), SEQUENCE),
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "batch_norm": (lambda: evaluated(nn.BatchNorm2d(4)), IMAGE),
    "conv_along_time": (lambda: nn.Conv1d(7, 6, 3), SEQUENCE),
    "transposed_conv": (lambda: nn.ConvTranspose2d(4, 3, 3), IMAGE),
    "standardised_conv": (timm_layer("StdConv2d", 4, 6, 3), IMAGE),
    "implant": (lambda: ImplantLinear(5, [(2, 1), (1, 2)], rank=2), SEQUENCE),
    "transposed_implant": (lambda: ImplantLinear(5, [(2, 1), (1, 2)], rank=2, transposed=True), VECTOR),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", MATRICES)
def test_layers_with_a_matrix_give_the_gradients_of_single_samples(
    kind: str, statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplayedCall, "__init__", None)  # not one of them may take the slow way
    build, shape = MATRICES[kind]
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), statistic)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", OTHERS)
def test_modules_of_any_other_kind_give_the_gradients_of_single_samples(kind: str, statistic: str) -> None:
    build, shape = OTHERS[kind]
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), statistic)


def test_embeddings_give_the_gradients_of_single_samples() -> None:
    model = randomised(nn.Embedding(9, 4))
    check(model, torch.randint(0, 9, (SAMPLES, 6)), "squares")


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", ["conv_with_groups", "conv_with_groups_at_few_positions"])
def test_sums_along_the_taps_of_a_kernel_can_be_asked_for(kind: str, statistic: str) -> None:
    build, shape = MATRICES[kind]
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), statistic, num_dims=4)


@pytest.mark.parametrize(
    "kind", ["linear_at_few_positions", "transposed_linear_at_few_positions", "conv_with_groups_at_few_positions"]
)
def test_at_few_positions_no_gradient_is_written_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MATRICES[kind]
    original = MatrixCall.sample_gradients

    def of_biases(self: MatrixCall, attributes: list[str], *args: Any) -> list[Tensor]:
        assert attributes == ["bias"]
        return original(self, attributes, *args)

    monkeypatch.setattr(MatrixCall, "sample_gradients", of_biases)
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), "squares")


@pytest.mark.parametrize("kind", ["linear_at_many_positions", "conv"])
def test_at_many_positions_no_gram_matrix_is_built(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MATRICES[kind]
    monkeypatch.setattr(MatrixCall, "_closed", None)
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), "squares")


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", ["linear_at_few_positions", "linear_at_many_positions", "conv_with_groups", "implant"])
def test_taking_one_sample_at_a_time_changes_nothing(
    kind: str, statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = {**MATRICES, **OTHERS}[kind]
    sizes: list[int] = []
    original = MatrixCall._matrices

    def watching(self: MatrixCall, grad: Tensor, num_samples: int, samples: slice) -> tuple[Tensor, Tensor]:
        sizes.append(samples.stop - samples.start)
        return original(self, grad, num_samples, samples)

    monkeypatch.setattr(MatrixCall, "_matrices", watching)
    monkeypatch.setattr(marginals_module, "_WORKSPACE", 1)
    check(randomised(build()), torch.randn(shape, dtype=torch.float64), statistic)
    assert set(sizes) <= {1}
