"""The CIFAR models: their sizes and graphs against the papers, timm's and transformers' ways to use them."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import randomise_
from PIL import Image
from reference_cifar import cifar_logits, preresnet_size, resnet_size, vgg_size, wide_resnet_size
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

timm = pytest.importorskip("timm", reason="the CIFAR models are models of timm")

import transformers as hf  # noqa: E402

from hap_hf.cifar import PaddingShortcut, resnet  # noqa: E402

# Parameters by hand and as published: exactly, or in millions.
SIZES = {
    # Weights in repository akamaster/pytorch_resnet_cifar10.
    "cifar_resnet20": (resnet_size(3), 269_722),
    "cifar_resnet32": (resnet_size(5), 464_154),
    "cifar_resnet56": (resnet_size(9), 853_018),
    # He et al., CVPR 2016, table 6.
    "cifar_resnet44": (resnet_size(7), "0.66"),
    "cifar_resnet110": (resnet_size(18), "1.7"),
    # Zagoruyko and Komodakis, BMVC 2016.
    "cifar_wide_resnet28_8": (wide_resnet_size(8), "23.4"),
    "cifar_wide_resnet28_10": (wide_resnet_size(10), "36.5"),
    "cifar_wide_resnet32_4": (resnet_size(5, (64, 128, 256), projection=True), None),
    "cifar_preresnet29": (preresnet_size(3, 64, 1), None),
    "cifar_preresnet56": (preresnet_size(6, 16, 4), None),
    "cifar_vgg16_bn": (vgg_size([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6), None),
    # Liu et al., ICCV 2017.
    "cifar_vgg19_bn": (vgg_size([64] * 2 + [128] * 2 + [256] * 4 + [512] * 8), "20.04"),
}
NAMES = list(SIZES)


def slim(name):
    """Return arguments that leave the model its graph and few channels."""
    if "vgg" in name:
        return {"widths": [4, 6, 8, 10, 12]}
    if "preresnet" in name:
        return {"stem": 8 if "29" in name else 4, "widths": [8, 16, 24]}
    return {"widths": [4, 8, 12]}


def randomise_norms_(model):
    generator = torch.Generator().manual_seed(1)
    for module in randomise_(model).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(4 + 4 * torch.rand(module.num_features, generator=generator))
    return model.eval()


def build(name, **kwargs):
    """Return a slim model in float64 and eval mode."""
    return randomise_norms_(timm.create_model(name, **slim(name), **kwargs)).double()


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def num_params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_by_hand_and_as_published(name):
    size = num_params(on_meta(name))
    by_hand, published = SIZES[name]
    assert size == by_hand
    if isinstance(published, str):
        assert f"{size / 1e6:.{len(published.partition('.')[2])}f}" == published
    else:
        assert published in {size, None}


def test_network_slimmings_preresnet_of_depth_164_is_a_deeper_one_of_depth_56():
    # Liu et al., ICCV 2017, give 1.70 million.
    assert f"{num_params(on_meta('cifar_preresnet56', num_blocks=18)) / 1e6:.2f}" == "1.70"


@pytest.mark.parametrize("name", NAMES)
def test_the_depth_is_the_number_in_the_name(name):
    layers = {n for n, m in on_meta(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    counted = {n for n in layers if "shortcut" not in n}
    if "wide_resnet28" in name:
        counted = layers - {"linear"}
    left_out = 2 if "vgg" in name else 0  # of VGG's three linear layers
    assert len(counted) + left_out == int(re.search(r"\d+", name)[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_that_of_the_paper(name):
    model, x = build(name), images(2, 3, 32, 32)
    expected = cifar_logits(name, model.state_dict(), x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert expected.std(0).min() > 1e-6 * expected.abs().max(), "the same answer to all images would prove nothing"


@pytest.mark.parametrize("size", [8, 9])
def test_the_padding_shortcut_takes_every_second_pixel_between_channels_of_zeros(size):
    x = images(2, 4, size, size)
    out = PaddingShortcut(3, 1)(x)
    zeros = torch.zeros(2, 3, (size + 1) // 2, (size + 1) // 2).double()
    assert torch.equal(out, torch.cat([zeros, x[:, :, ::2, ::2], zeros[:, :1]], dim=1))
    assert out.shape[2:] == nn.Conv2d(4, 8, 3, 2, padding=1).double()(x).shape[2:]


def test_the_padding_shortcut_reads_the_number_of_channels_from_its_input():
    shortcut = PaddingShortcut(2, 2)
    assert [shortcut(images(1, channels, 4, 4)).shape[1] for channels in (1, 4)] == [5, 8]
    shortcut.channels_before -= 1
    assert shortcut(images(1, 4, 4, 4)).shape[1] == 7
    assert repr(shortcut) == "PaddingShortcut(channels_before=1, channels_after=2, stride=2)"
    assert not shortcut.state_dict()


def cut_(model, name, dim):
    """Remove the first channel along ``dim`` of a layer, in place."""
    module = model.get_submodule(name)
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if dim < tensor.dim():
            tensor.data = tensor.data.narrow(dim, 1, tensor.shape[dim] - 1).clone()
    sizes = ("out_channels", "in_channels") if isinstance(module, nn.Conv2d) else ("num_features",)
    setattr(module, sizes[dim], module.weight.shape[dim])


def test_a_channel_of_a_stage_can_be_removed_in_place():
    model, x = build("cifar_resnet20"), images(2, 3, 16, 16)
    with torch.no_grad():
        full = model(x)
        for j in range(3):  # the shortcut brings zeros into channel 0 of the second stage, so this silences it
            model.layer2[j].bn2.weight[0] = model.layer2[j].bn2.bias[0] = 0
        silent = model(x)
        for j in range(3):
            cut_(model, f"layer2.{j}.conv2", 0)
            cut_(model, f"layer2.{j}.bn2", 0)
        for reader in ("layer2.1.conv1", "layer2.2.conv1", "layer3.0.conv1"):
            cut_(model, reader, 1)
        model.layer2[0].shortcut.channels_before -= 1
        model.layer3[0].shortcut.channels_before += 1  # its place in the third stage stays
        torch.testing.assert_close(model(x), silent, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(full, silent)


def test_a_classifier_reset_after_a_cut_has_the_features_that_are_left():
    model = build("cifar_vgg16_bn")
    cut_(model, "features.40", 0)
    cut_(model, "features.41", 0)
    model.reset_classifier(7)
    assert model.num_features == 11
    assert model(images(2, 3, 8, 8)).shape == (2, 7)


def test_all_names_are_registered_with_timm():
    assert sorted(timm.list_models("cifar_*")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_description_fits_the_model(name):
    model = on_meta(name, num_classes=100, in_chans=1)
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["input_size"], cfg["num_classes"], cfg["crop_pct"]) == (name, (3, 32, 32), 10, 1.0)
    assert model.default_cfg is cfg
    assert model.get_submodule(cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == model.num_classes == 100
    features = model.forward_features(torch.empty(1, 1, 32, 32, device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])


def test_there_is_nothing_to_download():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cifar_resnet20"):
        timm.create_model("cifar_resnet20", pretrained=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (28, 28), (40, 32)])
def test_images_of_any_size_pass(name, size):
    assert build(name)(images(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_pools_by_the_mean_and_can_be_replaced(name):
    model, x = build(name), images(2, 3, 8, 8)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        assert torch.equal(model(x), model.linear(pooled))
        model.reset_classifier(7)
        assert model(x).shape == (2, model.num_classes) == (2, 7)
        model.reset_classifier(0)
        assert isinstance(model.get_classifier(), nn.Identity)
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, global_pool="")
        assert torch.equal(model(x), features)


def test_dropout_acts_before_the_classifier_and_in_training_only():
    model, features = build("cifar_resnet20", drop_rate=0.5), images(2, 12, 2, 2)
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    dropped = model.train().forward_head(features, pre_logits=True)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * pooled[kept])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = build(name).train()
    functional.cross_entropy(model(images(4, 3, 32, 32)), torch.arange(4)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_convolutions_start_with_the_variance_of_he_et_al():
    weight = timm.create_model("cifar_resnet20").layer3[0].conv1.weight.detach()  # 32 to 64 channels
    assert float(weight.var()) == pytest.approx(2 / (9 * 64), rel=0.05)


def test_registering_twice_changes_nothing():
    with pytest.warns(UserWarning, match="Overwriting cifar_resnet20 in registry"):
        timm.models.register_model(resnet.cifar_resnet20)
    assert sorted(timm.list_models("cifar_*")) == sorted(NAMES)
    assert timm.create_model("cifar_resnet20").pretrained_cfg["architecture"] == "cifar_resnet20"


def test_the_import_raises_no_warning():
    code = "import warnings; warnings.simplefilter('error'); import hap_hf.cifar"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (1, 8)])
def test_a_wrapped_model_comes_back_from_disk_bitwise_equal(name, channels, size, tmp_path):
    config = hf.TimmWrapperConfig(architecture=name, num_labels=7, model_args={"in_chans": channels, **slim(name)})
    model = randomise_norms_(hf.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = images(2, channels, size, size).float()
    with torch.no_grad():
        expected = model(pixel_values=x).logits
        assert torch.equal(loaded(pixel_values=x).logits, expected)
    assert expected.shape == (2, 7)
    assert not torch.equal(expected[0], expected[1])


def test_a_wrapped_model_needs_no_arguments():
    model = hf.TimmWrapperForImageClassification(hf.TimmWrapperConfig(architecture="cifar_resnet20", num_labels=10))
    assert num_params(model) == 269_722
    labels = torch.tensor([3, 1])
    out = model(pixel_values=images(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(out.loss, functional.cross_entropy(out.logits, labels))


def test_a_wrapped_model_without_classes_pools():
    model = hf.TimmWrapperModel(hf.TimmWrapperConfig(architecture="cifar_resnet20")).eval()
    out = model(pixel_values=images(2, 3, 8, 8))
    assert out.last_hidden_state.shape == (2, 64, 2, 2)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_published_weights_have_the_names_and_shapes_of_the_model(depth, shared_data):
    state = load_file(shared_data / "cifar10_weights" / f"resnet{depth}_akamaster.safetensors")
    model = timm.create_model(f"cifar_resnet{depth}")
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_published_weights_reach_their_accuracy(shared_data, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(shared_data / "cifar10" / "test.webp") as sheet:  # tiles of 32 x 32, twenty a row
        rows = np.array(sheet.convert("RGB").crop((0, 0, 640, 1600)))
    pixels = torch.from_numpy(rows).view(50, 32, 20, 32, 3).permute(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)
    labels = torch.from_numpy(np.load(shared_data / "cifar10" / "labels_test.npy")[:1000]).long()
    path = shared_data / "cifar10_weights" / "resnet20_akamaster.safetensors"
    model = timm.create_model("cifar_resnet20", checkpoint_path=path).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((pixels / 255 - mean) / std)
    assert (logits.argmax(1) == labels).double().mean() >= 0.90
