"""Models whose layers are spread over devices by accelerate's hooks, here all on the CPU."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from distributed_runs import batches_of, image_model, image_samples, settings, text_model, text_samples

from hap_hf import ImplantLinear, UnsupportedModelError, prune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def spread(model):
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("method", ["hessian", "ggn"])
def test_a_model_with_device_hooks_is_pruned_like_one_without(method):
    batches = batches_of(text_samples(), (4, 4))
    plain = text_model().eval()
    hooked = spread(copy.deepcopy(plain))
    for model in (plain, hooked):
        prune(model, batches, settings(method=method))
    assert list(hooked.state_dict()) == list(plain.state_dict())
    for name, x in hooked.state_dict().items():
        assert torch.equal(x, plain.state_dict()[name]), name
    assert torch.equal(hooked(**batches[0]).logits, plain(**batches[0]).logits)


def test_implants_take_over_the_device_hooks_of_what_they_replace(monkeypatch):
    batches = batches_of(text_samples(), (4, 4))
    model = spread(text_model().eval())
    prune(model, batches, settings())
    implants = [m for m in model.modules() if isinstance(m, ImplantLinear)]
    assert implants
    moved = []
    monkeypatch.setattr(
        AlignDevicesHook, "pre_forward", lambda self, module, *args, **kwargs: moved.append(module) or (args, kwargs)
    )
    model(**batches[0])
    assert all(any(m is implant for m in moved) for implant in implants)


def test_a_network_with_device_hooks_is_recalibrated_like_one_without():
    batches = batches_of(image_samples(), (4, 4))
    plain = image_model().eval()
    hooked = spread(copy.deepcopy(plain))
    for model in (plain, hooked):
        prune(model, batches, settings(implant_ratio=0.3))
    for name, x in hooked.state_dict().items():
        assert torch.equal(x, plain.state_dict()[name]), name


@pytest.mark.parametrize(
    "offload",
    [
        cpu_offload,
        lambda model, folder: dispatch_model(
            model,
            {"bert.embeddings": "cpu", "bert.encoder": "disk", "classifier": "cpu"},
            main_device="cpu",
            offload_dir=folder,
        ),
    ],
    ids=["to the CPU", "to disk"],
)
def test_offloaded_weights_are_refused_and_stay_usable(tmp_path, offload):
    batches = batches_of(text_samples(), (4, 4))
    model = text_model().eval()
    expected = model(**batches[0]).logits
    offload(model, "cpu" if offload is cpu_offload else str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"meta device and has no values; .* device_map that offloads none"):
        prune(model, batches, settings())
    assert torch.equal(model(**batches[0]).logits, expected)
