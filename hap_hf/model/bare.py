"""Whether a model is the bare float model that discovery and surgery work on."""

from torch import nn

from hap_hf.errors import UnsupportedModelError
from hap_hf.host import is_compiled
from hap_hf.layers.quantized import Quantized
from hap_hf.model.adapters import check_no_adapters


def check_bare(model: nn.Module, *, before: str = "prune") -> None:
    """Check that ``model`` is the bare float model, not something around it.

    Args:
        model: Any model that is to be analysed or cut.
        before: What is to be done with it, for messages: ``"prune"`` or ``"quantize"``.

    Raises:
        UnsupportedModelError: If it is wrapped, compiled, quantized, with adapters or without storage.
    """
    # By name, as most of these are classes of libraries that need not be there.
    wrappers = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
    name = type(model).__name__
    if name in wrappers:
        raise UnsupportedModelError(
            f"got a model wrapped in {name}; {before} the model inside it (model.module) before wrapping"
        )
    if is_compiled(model):
        raise UnsupportedModelError(
            f"got a compiled model; {before} the original, then call torch.compile on the result"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(f"got a quantized {name}; prune in floating point first, then quantize the result")
    layer = next((path for path, module in model.named_modules() if isinstance(module, Quantized)), None)
    if layer is not None:
        raise UnsupportedModelError(
            f"got a {name} that hap_hf quantized ({layer} among others), whose scales and ranges are those of its "
            f"units; prune first, then quantize: {before} the model that was quantized"
        )
    check_no_adapters(model)
    tensors = dict(model.named_parameters())
    if not tensors:
        raise UnsupportedModelError(f"{name} has no parameters")
    for path, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UnsupportedModelError(f"{path} holds {tensor.dtype}: prune in floating point first, then quantize")
        # A distributed tensor, by its attribute: importing its class would load torch.distributed.
        if hasattr(tensor, "device_mesh"):
            raise UnsupportedModelError(
                f"{path} is a {type(tensor).__name__}, of which each process holds a part; prune the whole model, "
                "then load the result in parts"
            )
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{path} is on the meta device and has no values; load the weights first, with a device_map that "
                "offloads none of them to the CPU or to disk"
            )
