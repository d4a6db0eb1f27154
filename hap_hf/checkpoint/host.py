"""Every private name of transformers that saving and loading touch, and the one method of it that is wrapped.

Seen in transformers 5.17 to 5.24.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_WRAPPED = "__checked_by_hap_hf__"


def forget_quantized_(model: nn.Module) -> None:
    """Take off a model every sign that a quantizer loaded it.

    Args:
        model: A model that was just loaded.
    """
    # Which of them there are depends on the version of transformers.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def was_loaded(tensor: Tensor) -> bool:
    """Return whether a tensor came from a checkpoint, rather than from an initialiser.

    Args:
        tensor: A tensor of a model that is being loaded.

    Returns:
        What transformers marked it with.
    """
    return bool(getattr(tensor, "_is_hf_initialized", False))


def forget_adapters_(model: nn.Module) -> None:
    """Take off the mark of adapters, which stays on a model when they are merged by hand.

    Args:
        model: A model without adapters.
    """
    for name in ("_hf_peft_config_loaded", "peft_config"):
        vars(model).pop(name, None)


def check_at_upload(add: Callable[[PreTrainedModel, Path, str], None]) -> None:
    """Let ``push_to_hub`` of every model add files to what it uploads.

    Args:
        add: Called with the model, the folder that will be uploaded, and the name of the repository.
    """
    upload: Any = PreTrainedModel._upload_modified_files
    if hasattr(upload, _WRAPPED):
        return

    @functools.wraps(upload)
    def adding(self: PreTrainedModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        add(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    setattr(adding, _WRAPPED, True)
    setattr(PreTrainedModel, "_upload_modified_files", adding)  # noqa: B010 (a method, which mypy lets nobody assign)


def prepare_at_saving(prepare: Callable[[PreTrainedModel, Any], Any]) -> None:
    """Let ``save_pretrained`` of every model begin with a look at what it writes. Nothing is written where it raises.

    Args:
        prepare: Called with the model and with the weights that are to be written in place of its own, if any; returns
            those that are.
    """
    save: Any = PreTrainedModel.save_pretrained
    # Wrapped once, also where the package is imported again.
    if hasattr(save, _WRAPPED):
        return

    @functools.wraps(save)
    def checked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        weights = prepare(self, kwargs.get("state_dict"))
        return save(self, *args, **(kwargs if weights is None else {**kwargs, "state_dict": weights}))

    setattr(checked, _WRAPPED, True)
    setattr(PreTrainedModel, "save_pretrained", checked)  # noqa: B010 (a method, which mypy lets nobody assign)
