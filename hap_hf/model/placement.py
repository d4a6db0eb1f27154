"""Models whose layers lie on different devices."""

from torch import nn

from hap_hf.host import device_hook


def take_over_placement_(new: nn.Module, old: nn.Module) -> None:
    """Let the inputs of ``new`` be moved to its device, if accelerate does that for the layer that it replaces.

    Models that are loaded with a ``device_map`` have a hook on each layer for it.

    Args:
        new: The layer that is there from now on.
        old: The layer that was there.
    """
    hook = device_hook(old)
    # While a model is loaded it has no storage, and gets its hooks once the weights are there.
    if hook is None or any(p.is_meta for p in new.parameters()):
        return
    from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]  # loaded long since, where it matters

    add_hook_to_module(new, hook)
