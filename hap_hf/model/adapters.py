"""Recognising models that peft has put adapters into, without importing peft."""

from torch import nn

from hap_hf.errors import UnsupportedModelError


def check_no_adapters(model: nn.Module) -> None:
    """Check that no part of ``model`` is peft's: neither a wrapper around it nor a layer inside it.

    What peft leaves behind once its layers are gone, such as flags on the model, is no adapter.

    Args:
        model: Any model.

    Raises:
        UnsupportedModelError: If some part is; the message says how to get a plain model with or without the adapters.
    """
    parts = [path for path, module in model.named_modules() if _is_of_peft(module)]
    if not parts:
        return
    name, found = type(model).__name__, f"in {len(parts)} modules, such as {parts[0]!r}"
    if _is_of_peft(model):
        if hasattr(model, "merge_and_unload"):
            raise UnsupportedModelError(
                f"got a {name} with live adapters; merge them first (model = model.merge_and_unload()), drop them "
                "(model = model.unload()), or prune first and add adapters to the result"
            )
        raise UnsupportedModelError(
            f"got a {name} with live prompts or adapters that cannot be merged; load the model inside it anew, prune "
            "that, and train new ones for the result"
        )
    # Layers of peft inside of what passes for an ordinary model, as after add_adapter.
    if any(getattr(module, "peft_config", None) for module in model.modules()):
        raise UnsupportedModelError(
            f"got a {name} with live adapters {found}; prune first and add adapters to the result, or merge them: save "
            "the adapter (model.save_pretrained(path)), load it around the model without adapters "
            "(peft.PeftModel.from_pretrained(model, path)), and prune what its merge_and_unload() returns"
        )
    raise UnsupportedModelError(
        f"got a {name} with layers of peft {found}, and no adapters for them, as delete_adapter leaves it; load the "
        "model anew, or put back what each of them wraps (model.set_submodule(path, layer.get_base_layer()))"
    )


def _is_of_peft(module: nn.Module) -> bool:
    """Return whether peft defines the module's class, or one that it is derived from."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)
